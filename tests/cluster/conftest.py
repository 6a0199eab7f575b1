"""A real Slurm for the tests of this folder, started once and stopped completely."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import PACKAGES, Slurm, SlurmError, install, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Two nodes. If CI is set, Slurm is installed, and a missing Slurm is a failure; otherwise tests are skipped."""
    continuous = os.environ.get("CI", "") not in ("", "0", "false")
    if missing() and continuous:
        try:
            install()
        except SlurmError as error:
            pytest.fail(f"Slurm cannot be installed: {error}", pytrace=False)
    if absent := missing():
        pytest.skip(f"no {', '.join(absent)} here; as root: apt-get install {' '.join(PACKAGES)} (or set CI=true)")
    # A socket's path is limited to 107 characters, so it cannot be in pytest's temporary folders.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    cluster = Slurm(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)
    assert not cluster.processes()
