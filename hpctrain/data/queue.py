"""Assigns samples to workers that do not step together: the queues of asynchronous phases. Pure.

The strategy's coordinator holds one and deals out stretches of positions; a stretch has at most `batch` samples and
never crosses the end of an epoch. Dealing stops at a limit and continues once all dealt samples have been consumed: at
that point the samples consumed are a prefix of the run.
"""

from __future__ import annotations

from typing import Protocol

from hpctrain.data.order import round_bounds

Stretch = tuple[int, int]


class Queue(Protocol):
    """Deals out the positions of a run of epochs of `length` samples."""

    furthest: int  # all positions before it are dealt, or must be before dealing may stop

    def take(self, worker: int, limit: int) -> Stretch | None:
        """The next stretch for this worker; None if it would begin at or after `limit`."""

    def stop_at(self, cursor: int) -> int:
        """The first position at or after `cursor` where dealing may stop."""


class SharedQueue:
    """One queue for all: each request takes the next stretch, so a slow worker takes fewer."""

    def __init__(self, start: int, length: int, batch: int, workers: int) -> None:
        self.furthest = start
        self._length, self._batch = length, batch

    def take(self, worker: int, limit: int) -> Stretch | None:
        start = self.furthest
        if start >= limit:
            return None
        _, self.furthest = round_bounds(start, self._length, self._batch, 1)
        return start, self.furthest

    def stop_at(self, cursor: int) -> int:
        return cursor


class StaticQueue:
    """Gives each worker its own share of every round, as in synchronous phases; dealing can stop after a round."""

    def __init__(self, start: int, length: int, batch: int, workers: int) -> None:
        self.furthest = start
        self._start, self._length, self._batch, self._workers = start, length, batch, workers
        self._rounds = [start] * workers

    def take(self, worker: int, limit: int) -> Stretch | None:
        while (start := self._rounds[worker]) < limit:
            bounds = round_bounds(start, self._length, self._batch * self._workers, self._workers)
            self._rounds[worker] = bounds[-1]
            if bounds[worker] < bounds[worker + 1]:
                self.furthest = max(self.furthest, bounds[-1])
                return bounds[worker], bounds[worker + 1]
        return None

    def stop_at(self, cursor: int) -> int:
        epoch = cursor // self._length * self._length
        first, size = max(epoch, self._start), self._batch * self._workers
        return min(first - (first - cursor) // size * size, epoch + self._length)
