"""`hpctrain run`: find the mpiexec that belongs to mpi4py's MPI, start ranks with it, clean up afterwards.

Linux only. A mark in their environment identifies the ranks, so they can be found even when their launcher is gone.
All facts about launchers are in `facts`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.launcher.cleanup import clear, leftovers, watch
    from hpctrain.launcher.environment import MEMORY, rank_environment
    from hpctrain.launcher.mpiexec import Library, Mpi, find_library, find_mpiexec, launcher_kind
    from hpctrain.launcher.start import GRACE, run

# Ranks use other modules of this package, and start faster without these.
_HOME = {
    "GRACE": "start",
    "MEMORY": "environment",
    "Library": "mpiexec",
    "Mpi": "mpiexec",
    "clear": "cleanup",
    "find_library": "mpiexec",
    "find_mpiexec": "mpiexec",
    "launcher_kind": "mpiexec",
    "leftovers": "cleanup",
    "rank_environment": "environment",
    "run": "start",
    "watch": "cleanup",
}

__all__ = [
    "GRACE",
    "MEMORY",
    "Library",
    "Mpi",
    "clear",
    "find_library",
    "find_mpiexec",
    "launcher_kind",
    "leftovers",
    "rank_environment",
    "run",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
