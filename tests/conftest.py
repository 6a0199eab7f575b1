"""Fixtures for all tests. Nothing here imports torch or mpi4py."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpctrain import launcher
from hpctrain.launcher.facts import MARK

ROOT = Path(__file__).resolve().parent.parent
Mpirun = Callable[..., "Ended"]


@dataclass(frozen=True)
class Ended:
    """A launched program that has ended: its status and what it printed."""

    status: int
    out: str
    err: str
    seconds: float


def pytest_configure() -> None:
    """Under nohup SIGHUP is ignored, also by processes that tests start. Imported objects are excluded from garbage
    collection. Processes that share the cores, and what they start, use one torch thread each."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    gc.disable()


def pytest_collection_finish() -> None:
    """Exclude objects of the collected tests from garbage collection."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Exclude all objects from the garbage collection at exit."""
    gc.freeze()


@pytest.fixture(scope="session")
def mpi() -> launcher.Mpi:
    """The mpiexec of the MPI that mpi4py loads here."""
    return launcher.find_mpiexec()


@pytest.fixture
def mpirun(mpi: launcher.Mpi, tmp_path: Path) -> Mpirun:
    """mpirun(n, program, *arguments, timeout=60, environment={}, status=0) -> Ended.

    Starts `n` ranks of a Python program (a file, or its source). An exception on one rank ends them all. If it takes
    longer, or ends with another status than the expected one (None: any), the test fails and shows its output.
    """

    def start(
        count: int,
        program: Path | str,
        *arguments: str,
        timeout: float = 60.0,
        environment: dict[str, str] | None = None,
        status: int | None = 0,
    ) -> Ended:
        if isinstance(program, str):
            file = tmp_path / f"program-{uuid.uuid4().hex[:8]}.py"
            file.write_text(program)
            program = file
        command = [sys.executable, "-m", "mpi4py", str(program), *arguments]
        ended = launch([*mpi.command(count), *command], mpi, timeout, environment)
        if status is not None and ended.status != status:
            pytest.fail(f"status {ended.status} instead of {status}\n{ended.out}\n{ended.err}", pytrace=False)
        return ended

    return start


def launch(argv: list[str], mpi: launcher.Mpi, timeout: float, environment: dict[str, str] | None = None) -> Ended:
    """Run a launcher in its own session; none of its processes are left, whatever happens."""
    mark = uuid.uuid4().hex
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **(environment or {})}
    variables = {**launcher.rank_environment(mpi.library, base), MARK: mark}
    started, wall = time.monotonic(), time.time()
    with subprocess.Popen(
        argv,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            launcher.clear(mark, process.pid, wall)
            out, err = process.communicate()
            pytest.fail(f"not done after {timeout:g} s; killed\n{out}\n{err}", pytrace=False)
        finally:
            launcher.clear(mark, process.pid, wall)
    return Ended(process.returncode, out, err, time.monotonic() - started)
