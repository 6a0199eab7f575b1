"""Memory for later phases, touched when a run begins, so that a switch does not have to."""

from __future__ import annotations

import os

import numpy as np

from hpctrain.cluster import Roles

PAGE = 4096


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


def reserve(nbytes: int) -> None:
    """Make the C library's allocator take this much memory from the system and keep it for later allocations.

    Touching fresh memory takes longer than copying into it. Does nothing if the allocator would return the memory at
    once, which is its default (`launcher.MEMORY` sets it otherwise, in GLIBC_TUNABLES).
    """
    if 0 < nbytes < kept_up_to(os.environ.get("GLIBC_TUNABLES", "")):
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
