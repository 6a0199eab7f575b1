"""How long a waiting rank naps between polls, where cores are scarce. Real ranks do it; the simulator computes it."""

from __future__ import annotations

NAP = 50e-6  # seconds between polls at first
LONGEST = 1e-3  # seconds; a nap grows to this while nothing moves
GROWTH = 1 / 8  # of the time waited so far: the end is noticed late by a sixteenth of the wait on average
BETWEEN = 5e-4  # seconds; the longest nap while a long message moves: 16 pieces are then 2 GB/s
LATER = 1 / 32  # its growth
SHORT = 1 << 12  # bytes; messages up to this are there all at once


def takes_naps(wait: str, cores: float) -> bool:
    """Whether a rank with that many cores naps while it waits. `wait`: of the job: spin, nap, or auto."""
    return wait == "nap" or (wait == "auto" and cores < 1)


def nap(waited: float, idle: bool = False, shortest: float = NAP) -> float:
    """Seconds to sleep before the next poll, after having waited for that many; `idle`: no long message moves
    meanwhile."""
    longest, growth = (LONGEST, GROWTH) if idle else (BETWEEN, LATER)
    return min(longest, max(shortest, growth * waited))
