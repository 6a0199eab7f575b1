"""Memory for later phases, touched when a run begins, so that a switch does not have to."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import numpy as np

from hpctrain.cluster import Roles
from hpctrain.launcher.started import is_launched

PAGE = 4096
# malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD (-1: never) and M_TOP_PAD, as `launcher.MEMORY` has them.
SETTINGS = {-4: 0, -1: -1, -2: 64 << 20}
EVERYTHING = 2**62


def models_needed(roles: Roles, rank: int) -> float:
    """Roughly how much memory this rank allocates when a phase with these roles follows another, in models.

    Where there are servers, every rank takes its own parameters and keeps what the previous phase holds; rank 0 takes
    the optimizer state, as it arrives and leaves; a server takes its workers' gradients and velocities, their sum, the
    optimizer state and the memory for an update. Without servers the arenas of the previous phase are used again.
    """
    if not roles.servers:
        return 0.0
    shards = (2 * len(roles.workers) + 5) / len(roles.servers) if rank in roles.servers else 0.0
    return 2.0 + 3.0 * (rank == 0) + shards


def keep_freed_memory(environment: Mapping[str, str]) -> int:
    """Make the C library's allocator keep freed memory instead of returning it to the system. Returns how many bytes it
    keeps; 0 if it returns them at once.

    `hpctrain run` and the job templates set GLIBC_TUNABLES to this effect; if that is set, nothing changes. Otherwise
    the setting is made here, in a process that a launcher has started: such a process is there for this run. Huge pages
    cannot be chosen here. Only glibc has these settings.
    """
    tunables = environment.get("GLIBC_TUNABLES")
    if tunables is not None:
        return kept_up_to(tunables)
    if not is_launched(environment) or not all(_mallopt(key, value) for key, value in SETTINGS.items()):
        return 0
    return EVERYTHING


def _mallopt(key: int, value: int) -> bool:
    """Whether the C library has accepted the setting."""
    try:
        return bool(ctypes.CDLL(None).mallopt(key, value))
    except (OSError, AttributeError):  # no glibc
        return False


def reserve(nbytes: int, kept: int) -> None:
    """Take this much memory from the system, so that the allocator keeps it for later allocations.

    Touching fresh memory takes longer than copying into it. `kept`: from `keep_freed_memory`; does nothing if the
    allocator would return that much memory at once.
    """
    if 0 < nbytes < kept:
        np.empty(nbytes, np.uint8)[::PAGE] = 0


def kept_up_to(tunables: str) -> int:
    """How many bytes of freed memory glibc's allocator keeps, according to GLIBC_TUNABLES."""
    settings = dict(setting.split("=", 1) for setting in tunables.split(":") if "=" in setting)
    if settings.get("glibc.malloc.mmap_max") != "0":
        return 0
    try:
        return int(settings.get("glibc.malloc.trim_threshold", "0"), 0)
    except ValueError:
        return 0
