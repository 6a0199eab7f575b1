"""pytest under mpiexec: one rank reports, the others only when they have something to say.

Tests marked `launch` start ranks themselves and are run by plain pytest; all others by
`mpiexec -n N python -m pytest --with-mpi tests/mpi`.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import pytest

RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def _rank() -> int:
    return next((int(os.environ[name]) for name in RANKS if name in os.environ), 0)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """The reports of the ranks behind the first go into a buffer, their temporary files into folders of their own."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if config.getoption("--with-mpi") and _rank() > 0:
        if reporter is not None:
            reporter._tw._file = io.StringIO()
        # Ranks that tidy up the same folder of old temporary ones remove it under each other's feet.
        own = Path(tempfile.gettempdir()) / f"hpctrain-tests-rank-{_rank()}"
        own.mkdir(exist_ok=True)
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(own)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Ranks must not launch ranks, and what needs ranks is not run without.

    For pytest-mpi the name of this folder is a mark: without --with-mpi it skips whatever is in it.
    """
    launching = [item for item in items if item.get_closest_marker("launch") is not None]
    if config.getoption("--with-mpi"):
        config.hook.pytest_deselected(items=launching)
        items[:] = [item for item in items if item not in launching]
    for item in launching:
        item.own_markers[:] = [m for m in item.own_markers if "--with-mpi" not in m.kwargs.get("reason", "")]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """What a rank's buffer holds is shown if one of its tests failed."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not isinstance(reporter._tw._file, io.StringIO):
        return
    if reporter.stats.get("failed") or reporter.stats.get("error"):
        sys.stderr.write(f"---- rank {_rank()} ----\n{reporter._tw._file.getvalue()}\n")
        sys.stderr.flush()
