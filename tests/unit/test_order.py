"""The sample clock: every sample exactly once per epoch, dealt evenly, the same on all ranks."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.order import UNKNOWN_END, FixedOrder, Order, mix, round_bounds


def walk(order: Order, epochs: int, round_size: int, workers: int) -> list[list[int]]:
    """The samples of each round of a run, in order of workers."""
    rounds, cursor = [], 0
    assert order.length is not None
    while cursor < epochs * order.length:
        bounds = round_bounds(cursor, order.length, round_size, workers)
        assert bounds[0] == cursor < bounds[-1]
        rounds.append([int(i) for a, b in zip(bounds, bounds[1:], strict=False) for i in order.indices(a, b)])
        cursor = bounds[-1]
    return rounds


@given(st.integers(1, 300), st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**40), st.booleans())
def test_every_sample_once_per_epoch(length: int, workers: int, batch: int, seed: int, shuffle: bool) -> None:
    rounds = walk(Order(length, seed, shuffle), 3, workers * batch, workers)
    seen = [sample for samples in rounds for sample in samples]
    for epoch in range(3):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))
    assert all(len(samples) <= workers * batch for samples in rounds)
    full = length // (workers * batch)
    assert [len(samples) for samples in rounds[:full]] == [workers * batch] * full


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 4096), st.integers(1, 64))
def test_round_is_dealt_evenly_and_ends_with_the_epoch(
    cursor: int, length: int, round_size: int, workers: int
) -> None:
    bounds = round_bounds(cursor, length, round_size, workers)
    sizes = np.diff(bounds)
    assert len(sizes) == workers
    assert max(sizes) - min(sizes) <= 1
    assert bounds[0] == cursor
    assert bounds[-1] == min(cursor + round_size, (cursor // length + 1) * length)


def test_order_depends_only_on_seed_and_epoch() -> None:
    first, again = Order(50, seed=3), Order(50, seed=3)
    later = again.indices(50, 100)  # requested in another order
    np.testing.assert_array_equal(again.indices(0, 50), first.indices(0, 50))
    np.testing.assert_array_equal(first.indices(50, 100), later)
    assert not np.array_equal(first.indices(0, 50), later)
    assert not np.array_equal(first.indices(0, 50), Order(50, seed=4).indices(0, 50))
    np.testing.assert_array_equal(Order(50, shuffle=False).indices(60, 63), [10, 11, 12])


def test_order_never_changes_between_versions() -> None:
    """Resumed runs depend on it, with any release of NumPy."""
    assert Order(8, seed=1).indices(8, 16).tolist() == [5, 6, 3, 0, 7, 2, 1, 4]
    assert mix(1, 2, np.array([0, 5])).tolist() == [16613338946343043936, 7702586659592502839]


def test_range_across_an_epoch_end_is_refused() -> None:
    order = Order(10)
    assert order.indices(10, 10).tolist() == []
    for start, stop in ((8, 12), (-1, 2), (5, 4)):
        with pytest.raises(ValueError, match="not in one epoch of 10"):
            order.indices(start, stop)


def test_length_learned_during_the_run() -> None:
    order = Order(None, shuffle=False)
    assert (order.epoch(10**9), order.epoch_end(5)) == (0, UNKNOWN_END)
    assert list(round_bounds(96, None, 32, 4)) == [96, 104, 112, 120, 128]
    order.learn(100)
    order.learn(100)
    assert (order.epoch(100), order.epoch_end(100)) == (1, 200)
    with pytest.raises(ValueError, match="the length is 100, and cannot change to 99"):
        order.learn(99)


def test_seeds_of_samples_differ() -> None:
    seeds = np.concatenate([mix(seed, epoch, np.arange(1000)) for seed in (-1, 0, 1) for epoch in (0, 1)])
    assert len(np.unique(seeds)) == len(seeds)
    assert len(np.unique(seeds & 0xFFFFFFFF)) > len(seeds) - 3  # a generator of torch uses 32 bits


# -- fixed shards ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("length", "workers", "batch", "of"), [(103, 3, 6, None), (10, 4, 2, None), (96, 4, 6, 103)])
def test_workers_take_their_samples_from_shards_of_their_own(
    length: int, workers: int, batch: int, of: int | None, shuffle: bool
) -> None:
    order = FixedOrder(length, 7, shuffle, workers, batch, of)
    seen: list[set[int]] = [set() for _ in range(workers)]
    for epoch in range(3):
        cursor, taken = epoch * length, list[int]()
        while cursor < (epoch + 1) * length:
            bounds = round_bounds(cursor, length, workers * batch, workers)
            for worker in range(workers):
                own = order.indices(bounds[worker], bounds[worker + 1]).tolist()
                seen[worker] |= set(own)
                taken += own
            cursor = bounds[-1]
        assert len(set(taken)) == len(taken) == length
    assert sum(map(len, seen)) == len(set().union(*seen)), "shards overlap"
    sizes = [b - a for a, b in pairwise(round_bounds(0, of or length, of or length, workers))]
    assert all(len(own) <= size for own, size in zip(seen, sizes, strict=True))


def test_samples_of_a_shard_are_reshuffled_in_every_epoch() -> None:
    order = FixedOrder(40, 7, True, 2, 5)
    first, second = order.indices(0, 5), order.indices(40, 45)
    assert first.tolist() != second.tolist()
    assert FixedOrder(40, 7, True, 2, 5).indices(40, 45).tolist() == second.tolist()
    assert FixedOrder(40, 7, False, 2, 5).indices(0, 10).tolist() == [0, 1, 2, 3, 4, 20, 21, 22, 23, 24]
