"""`hpctrain run`: find the mpiexec that belongs to mpi4py's MPI, start ranks with it, leave nothing behind.

Linux. The ranks are known by a mark in their environment, so that they are found also when their launcher is gone.
What is known about launchers is in `facts`.
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
