"""pytest under mpiexec: one rank reports; the other ranks report only failures.

Tests marked `launch` start ranks themselves and are run by plain pytest; all others by
`mpiexec -n N python -m pytest --with-mpi tests/mpi`.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain.comm.base import Communicator
from hpctrain.launcher.started import launched_rank
from hpctrain.trace.recorder import Recorder
from tests.helpers_mpi import Join


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Reports of ranks other than 0 go to a buffer, their temporary files to separate folders."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--with-mpi") and launched_rank(os.environ) > 0:
        if reporter is not None:
            reporter._tw._file = io.StringIO()
        # Ranks that clean up the same parent folder would remove each other's temporary folders.
        own = Path(tempfile.gettempdir()) / f"hpctrain-tests-rank-{launched_rank(os.environ)}"
        own.mkdir(exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ranks must not launch ranks, and tests that need ranks are skipped without them.

    pytest-mpi takes the name of this folder for a mark: without --with-mpi it skips everything in it.
    """
    # Processes of pytest-xdist do not finalize MPI, and would leave shared memory behind.
    if "mpi4py.MPI" in sys.modules and not config.getoption("--with-mpi"):
        raise pytest.UsageError("importing the tests has initialised MPI; import that module where it is used")
    launching = [item for item in items if item.get_closest_marker("launch") is not None]
    if config.getoption("--with-mpi"):
        config.hook.pytest_deselected(items=launching)
        items[:] = [item for item in items if item not in launching]
    for item in launching:
        item.own_markers[:] = [m for m in item.own_markers if "--with-mpi" not in m.kwargs.get("reason", "")]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A rank's buffer is shown if one of its tests failed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not isinstance(reporter._tw._file, io.StringIO):
        return
    if reporter.stats.get("failed") or reporter.stats.get("error"):
        sys.stderr.write(f"---- rank {launched_rank(os.environ)} ----\n{reporter._tw._file.getvalue()}\n")
        sys.stderr.flush()


@pytest.fixture(scope="session")
def join() -> Join:
    """join(ranks_per_node=None, traced=False): the communicator over all ranks. Collective."""
    import torch

    from hpctrain.comm.mpi import communicator

    torch.set_num_threads(1)
    made: dict[tuple[int | None, bool], Communicator] = {}

    def world(ranks_per_node: int | None = None, traced: bool = False) -> Communicator:
        key = ranks_per_node, traced
        if key not in made:
            made[key] = communicator.world(Recorder() if traced else None, ranks_per_node)
        return made[key]

    return world


@pytest.fixture
def folder(join: Join) -> Iterator[Path]:
    """One folder for all ranks."""
    comm = join()
    path = Path(comm.broadcast_json(tempfile.mkdtemp(prefix="hpctrain-test-") if comm.rank == 0 else None))
    yield path
    comm.barrier()
    if comm.rank == 0:
        shutil.rmtree(path)
