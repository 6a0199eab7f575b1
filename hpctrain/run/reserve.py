"""Memory that later phases will fill, touched when a run begins: a switch is no time for it."""

from __future__ import annotations

import os

import numpy as np

PAGE = 4096


def reserve(nbytes: int) -> None:
    """Have the C library's allocator take so much from the system and keep it for what is allocated later.

    To touch fresh memory takes longer than to copy what goes there. Does nothing where the allocator would hand it
    back at once, as it does unless it is told otherwise (`launcher.MEMORY`, in GLIBC_TUNABLES).
    """
    if 0 < nbytes < kept_up_to(os.environ.get("GLIBC_TUNABLES", "")):
        np.empty(nbytes, np.uint8)[::PAGE] = 0


def kept_up_to(tunables: str) -> int:
    """How many bytes of freed memory glibc's allocator keeps, as far as GLIBC_TUNABLES says."""
    settings = dict(setting.split("=", 1) for setting in tunables.split(":") if "=" in setting)
    if settings.get("glibc.malloc.mmap_max") != "0":
        return 0
    try:
        return int(settings.get("glibc.malloc.trim_threshold", "0"), 0)
    except ValueError:
        return 0
