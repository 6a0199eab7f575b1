"""The sample clock: which sample is at which position of a run. Pure; NumPy only.

A run's samples are numbered by a global cursor 0, 1, 2, ...; epoch e of a data set of N samples is [e*N, (e+1)*N), in
the order of a permutation drawn from (seed, epoch). Every rank computes the same permutation.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
UNKNOWN_END = 2**62
SHARDS = 0x5348_4152_4453  # added to the seed when fixed shards are drawn
_MASK = 2**64 - 1


class Order:
    """The order of `length` samples, epoch after epoch; thread-safe.

    `length` is None for a stream whose length is not known and that has not been read to its end yet (see `learn`):
    until then there is a single endless epoch. Streams keep their own order, so `shuffle` does not affect them. `of`:
    the number of samples to choose from, if an epoch omits some: it uses the first `length` of their permutation.
    `common`: whether all ranks are known to have this length.
    """

    def __init__(self, length: int | None, seed: int = 0, shuffle: bool = True, of: int | None = None) -> None:
        if length is not None and length < 1:
            raise ValueError(f"an order of {length} samples")
        self.length = length
        self._of = of
        self.common = length is not None
        self.seed = seed
        self.shuffle = shuffle
        self._permutations: dict[int, Indices] = {}
        self._lock = threading.Lock()

    @property
    def samples(self) -> int | None:
        """The number of samples to choose from; None if it is not known."""
        return self._of or self.length

    def learn(self, length: int) -> None:
        """Set the length of a stream, once its end has been reached (or is known from a checkpoint)."""
        if length < 1 or self.length not in (None, length):
            raise ValueError(f"the length is {self.length}, and cannot change to {length}")
        self.length = length

    def epoch(self, cursor: int) -> int:
        """The epoch that contains the position `cursor`, from 0."""
        return 0 if self.length is None else cursor // self.length

    def epoch_end(self, cursor: int) -> int:
        """The position just after the epoch of `cursor`; `UNKNOWN_END` while the length is unknown."""
        return _epoch_end(cursor, self.length)

    def place(self, start: int, stop: int) -> tuple[int, int]:
        """(epoch, offset in it) of `start`; raises ValueError if [start, stop) crosses the end of an epoch."""
        if not 0 <= start <= stop or stop > self.epoch_end(start):
            raise ValueError(f"positions {start} to {stop} are not in one epoch of {self.length} samples")
        epoch = self.epoch(start)
        return epoch, start - epoch * (self.length or 0)

    def indices(self, start: int, stop: int) -> Indices:
        """The indices of the samples at positions [start, stop), as int64; the range must lie within one epoch."""
        epoch, offset = self.place(start, stop)
        if not self.shuffle or self.length is None:
            return np.arange(offset, offset + stop - start, dtype=np.int64)
        return self._permutation(epoch)[offset : offset + stop - start]

    def _permutation(self, epoch: int) -> Indices:
        with self._lock:
            if epoch not in self._permutations:
                while len(self._permutations) > 1:  # at an epoch's start, the previous epoch is still being fetched
                    del self._permutations[min(self._permutations)]
                self._permutations[epoch] = self._draw(epoch)
            return self._permutations[epoch]

    def _draw(self, epoch: int) -> Indices:
        """The order of that epoch."""
        return permutation(self._of or self.length or 0, self.seed, epoch)[: self.length]


class FixedOrder(Order):
    """The order in which each of `workers` workers takes its samples from a shard of its own, in every epoch, in rounds
    of `batch` samples per worker (see `round_bounds`).

    Shards differ in length by one sample at most. They are drawn from the seed, or, without `shuffle`, consecutive.
    """

    def __init__(
        self, length: int, seed: int, shuffle: bool, workers: int, batch: int, of: int | None = None
    ) -> None:
        super().__init__(length, seed, shuffle, of)
        samples = of or length
        shards = round_bounds(0, samples, samples, workers)
        drawn = permutation(samples, seed, *words(SHARDS)) if shuffle else np.arange(samples)
        self._shards = [drawn[a:b] for a, b in zip(shards, shards[1:], strict=False)]
        self._batch = batch

    def indices(self, start: int, stop: int) -> Indices:
        epoch, offset = self.place(start, stop)
        return self._permutation(epoch)[offset : offset + stop - start]

    def _draw(self, epoch: int) -> Indices:
        length, workers = self.length or 0, len(self._shards)
        size, drawn = self._batch * workers, np.empty(length, np.int64)
        rounds = np.arange(length // size * size).reshape(-1, workers, self._batch)
        last = round_bounds(rounds.size, length, size, workers) if rounds.size < length else [length] * (workers + 1)
        for worker, shard in enumerate(self._shards):
            places = np.concatenate([rounds[:, worker].reshape(-1), np.arange(last[worker], last[worker + 1])])
            own = shard[permutation(len(shard), self.seed, epoch, worker)] if self.shuffle else shard
            drawn[places] = own[: len(places)]
        return drawn


def permutation(length: int, *seed: int) -> Indices:
    """A permutation of range(length), drawn from the seeds alone.

    Sorted from raw bits: NumPy guarantees a bit generator's stream permanently, but may change `Generator.permutation`
    in any release, and all nodes must agree.
    """
    bits = np.random.PCG64([part & _MASK for part in seed])
    return np.argsort(bits.random_raw(length), kind="stable").astype(np.int64, copy=False)


def words(seed: int) -> list[int]:
    """The low and the high 32 bits of a seed."""
    return [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]


def mix(seed: int, epoch: int, indices: NDArray[Any]) -> NDArray[np.uint64]:
    """One seed per sample from (seed, epoch, index), as uint64: splitmix64's finaliser, chained."""
    state = np.zeros(len(indices), np.uint64)
    for part in (np.uint64(seed & _MASK), np.uint64(epoch & _MASK), np.asarray(indices).astype(np.uint64)):
        state = (state ^ part) + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


def round_bounds(
    cursor: int, length: int | None, round_size: int, workers: int, shares: Sequence[int] | None = None
) -> Sequence[int]:
    """The positions that a round starting at `cursor` assigns to its workers: worker i takes [b[i], b[i+1]).

    A round has `round_size` samples but never crosses the end of an epoch, so the last round of an epoch is smaller.
    Worker i gets `shares[i]` of them, or its proportion of a smaller round. Without `shares` the workers' shares differ
    by at most one sample. Some may be empty. `length` None: the end is not known yet.
    """
    size = min(round_size, _epoch_end(cursor, length) - cursor)
    if shares is not None:
        return [cursor + size * before // round_size for before in accumulate(shares, initial=0)]
    return EvenBounds(cursor, size, workers)


class EvenBounds(Sequence[int]):
    """Bounds of `workers` shares of `size` positions from `cursor` on, which differ by at most one. Each is computed
    when it is asked for: every one of thousands of workers needs only its own."""

    def __init__(self, cursor: int, size: int, workers: int) -> None:
        self._cursor, self._workers = cursor, workers
        self._share, self._extra = divmod(size, workers)

    def __len__(self) -> int:
        return self._workers + 1

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        found = range(self._workers + 1)[index]
        if isinstance(found, range):
            return [self[worker] for worker in found]
        return self._cursor + found * self._share + min(found, self._extra)


def _epoch_end(cursor: int, length: int | None) -> int:
    return UNKNOWN_END if length is None else (cursor // length + 1) * length
