"""`hpctrain run`: find the mpiexec that belongs to mpi4py's MPI, start ranks with it, clean up afterwards.

Linux only. A mark in their environment identifies the ranks, so they can be found even when their launcher is gone.
All facts about launchers are in `facts`.
"""

from hpctrain.launcher.cleanup import clear, leftovers, watch
from hpctrain.launcher.environment import MEMORY, rank_environment
from hpctrain.launcher.mpiexec import Library, Mpi, find_library, find_mpiexec, launcher_kind
from hpctrain.launcher.start import GRACE, run

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
