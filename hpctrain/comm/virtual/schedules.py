"""The messages of collectives, step by step, for all ranks of a group at once.

These are the messages of `hpctrain.comm.algorithms`; tests compare both. In a step a rank sends at most one message and
receives at most one, at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from hpctrain.comm.algorithms import even_bounds

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class ScheduleStep(NamedTuple):
    """One message per row: elements `low` to `high` of the buffer go from rank `source` of the group to rank `dest`.
    There they are reduced with those of `dest` (`combine`), or replace them."""

    source: Numbers
    dest: Numbers
    low: Numbers
    high: Numbers
    combine: bool


Schedule = Callable[[int, int], Iterator[ScheduleStep]]
"""(ranks, elements of the buffer) -> steps"""


def ring(size: int, length: int) -> Iterator[ScheduleStep]:
    """See `algorithms.ring`."""
    bounds = even_bounds(length, size)
    ranks = np.arange(size)
    right = (ranks + 1) % size
    low, high = np.array(bounds[:-1]), np.array(bounds[1:])
    for step in range(size - 1):
        part = (ranks - 1 - step) % size
        yield ScheduleStep(ranks, right, low[part], high[part], True)
    yield from ring_all_gather(bounds)(size, length)


def ring_all_gather(bounds: Sequence[int]) -> Schedule:
    """See `algorithms.ring_all_gather`."""

    def schedule(size: int, length: int) -> Iterator[ScheduleStep]:
        ranks = np.arange(size)
        right = (ranks + 1) % size
        low, high = np.array(bounds[:-1]), np.array(bounds[1:])
        for step in range(size - 1):
            part = (ranks - step) % size
            yield ScheduleStep(ranks, right, low[part], high[part], False)

    return schedule


def halving_doubling(size: int, length: int) -> Iterator[ScheduleStep]:
    """See `algorithms.halving_doubling`."""
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    even = np.arange(0, 2 * extra, 2)
    if extra:
        yield _whole(even, even + 1, length, True)
    places = np.arange(power)
    ranks = np.where(places < extra, 2 * places + 1, places + extra)
    low, high = np.zeros(power, np.int64), np.full(power, length)
    trail, distance = [], power // 2
    while distance:
        middle = low + (high - low) // 2
        lower = places & distance == 0
        keep = np.where(lower, low, middle), np.where(lower, middle, high)
        give = np.where(lower, middle, low), np.where(lower, high, middle)
        partner = ranks[places ^ distance]
        yield ScheduleStep(ranks, partner, give[0], give[1], True)
        trail.append((partner, keep))
        (low, high), distance = keep, distance // 2
    for partner, keep in reversed(trail):
        yield ScheduleStep(ranks, partner, keep[0], keep[1], False)
    if extra:
        yield _whole(even + 1, even, length, False)


def tree(size: int, length: int) -> Iterator[ScheduleStep]:
    """See `algorithms.tree`."""
    distances = [1 << i for i in range((size - 1).bit_length())]
    for distance, up in chain(((d, True) for d in distances), ((d, False) for d in reversed(distances))):
        far = np.arange(distance, size, 2 * distance)
        pair = (far, far - distance) if up else (far - distance, far)
        yield _whole(pair[0], pair[1], length, up)


def dissemination_barrier(size: int, length: int) -> Iterator[ScheduleStep]:
    """See `algorithms.dissemination_barrier`; its buffer is a token of one element."""
    ranks = np.arange(size)
    for distance in (1 << i for i in range((size - 1).bit_length())):
        yield _whole(ranks, (ranks + distance) % size, 1, False)


def _whole(source: Numbers, dest: Numbers, length: int, combine: bool) -> ScheduleStep:
    zero = np.zeros(len(source), np.int64)
    return ScheduleStep(source, dest, zero, zero + length, combine)


Levels = tuple[Sequence[int], list[tuple[slice, slice]]]
"""The ranks in some order, and which of their rows, in that order, are added to which, one level after the other. The
first row is then the sum over all."""


def halving_sums(size: int) -> Levels:
    """How `halving_doubling` adds up every element: both ranks of a pair come to the same sum."""
    half = 1 << (size.bit_length() - 1)
    extra = size - half
    places = [2 * place + 1 if place < extra else place + extra for place in range(half)]
    pairs = [(slice(0, extra), slice(half, size))] if extra else []
    while half := half // 2:
        pairs.append((slice(0, half), slice(half, 2 * half)))
    return [*places, *range(0, 2 * extra, 2)], pairs


def tree_sums(size: int) -> Levels:
    """How `tree` adds up every element."""
    distances = [1 << i for i in range((size - 1).bit_length())]
    return range(size), [(slice(0, size - d, 2 * d), slice(d, size, 2 * d)) for d in distances]


SUMS: dict[Schedule, Callable[[int], Levels]] = {halving_doubling: halving_sums, tree: tree_sums}
ALL_REDUCE: dict[str, Schedule] = {"ring": ring, "halving_doubling": halving_doubling, "tree": tree}
