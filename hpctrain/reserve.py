"""Memory that later phases will fill, touched when a run begins: a switch is no time for it."""

from __future__ import annotations

import os

import numpy as np

PAGE = 4096


def reserve(nbytes: int) -> None:
    """Have the C library's allocator take so much from the system and keep it for what is allocated later.

    To touch fresh memory takes longer than to copy what goes there. Does nothing where the allocator would hand it
    back at once, as it does unless it is told otherwise (`launcher.MEMORY`, from GLIBC_TUNABLES).
    """
    if nbytes > 0 and "malloc.mmap_max=0" in os.environ.get("GLIBC_TUNABLES", ""):
        np.empty(nbytes, np.uint8)[::PAGE] = 0
