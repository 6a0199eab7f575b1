"""A job is checked before anything heavy is loaded: what these modules bring with them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import hpctrain

HEAVY = {"torch", "mpi4py", "h5py", "cupy", "pandas"}
PACKAGE = Path(hpctrain.__file__).parent
LIGHT = ["hpctrain", "hpctrain.cli", "hpctrain.job", "hpctrain.launcher", "hpctrain.interrupt", "hpctrain.trace"]
STRATEGIES = sorted(f"hpctrain.strategies.{path.stem}" for path in (PACKAGE / "strategies").glob("[a-z]*.py"))


@pytest.mark.parametrize("module", LIGHT + STRATEGIES)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({HEAVY!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
