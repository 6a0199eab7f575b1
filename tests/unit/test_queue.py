"""The queues of asynchronous phases: which worker gets which samples, and where dealing stops."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.order import round_bounds
from hpctrain.data.queue import Queue, SharedQueue, StaticQueue, Stretch

Kind = type[SharedQueue] | type[StaticQueue]
QUEUES: list[Kind] = [SharedQueue, StaticQueue]
FAR = 500
sizes = st.tuples(
    st.integers(1, 60),  # samples per epoch
    st.integers(1, 9),  # batch
    st.integers(1, 5),  # workers
    st.integers(0, 150),  # start of the phase, perhaps in mid-epoch
)


def deal(queue: Queue, askers: list[int], limit: int) -> dict[int, list[Stretch]]:
    """What each worker gets, asking in the given order and then in turn until no worker gets anything."""
    found: dict[int, list[Stretch]] = {worker: [] for worker in askers}

    def ask(worker: int) -> bool:
        stretch = queue.take(worker, limit)
        found[worker] += [stretch] if stretch is not None else []
        return stretch is not None

    for worker in askers:
        ask(worker)
    while [worker for worker in sorted(found) if ask(worker)]:
        pass
    return found


@pytest.mark.parametrize("kind", QUEUES)
@given(sizes=sizes, reach=st.integers(1, 200), data=st.data())
def test_samples_dealt_up_to_a_limit_are_a_prefix_without_repeats(kind: Kind, sizes, reach: int, data):
    """In any order of workers; once the limit is reached and raised, dealing continues from there."""
    length, batch, workers, start = sizes
    queue = kind(start, length, batch, workers)
    everybody = list(range(workers))
    for end in (start + reach, start + 2 * reach):
        limit = queue.stop_at(end)
        askers = data.draw(st.lists(st.sampled_from(everybody), max_size=40)) + everybody
        dealt = sorted(stretch for own in deal(queue, askers, limit).values() for stretch in own)
        if not dealt:
            assert start >= limit
            continue
        assert dealt[0][0] == start
        assert all(before[1] == after[0] for before, after in zip(dealt, dealt[1:], strict=False))
        assert dealt[-1][1] == queue.furthest >= limit
        start = queue.furthest


@pytest.mark.parametrize("kind", QUEUES)
@given(sizes=sizes, reach=st.integers(1, 300))
def test_stretches_are_batches_within_an_epoch(kind: Kind, sizes, reach: int):
    length, batch, workers, start = sizes
    queue = kind(start, length, batch, workers)
    for own in deal(queue, list(range(workers)), queue.stop_at(start + reach)).values():
        assert own == sorted(own)
        for low, high in own:
            assert 0 < high - low <= batch
            assert low // length == (high - 1) // length


@given(sizes=sizes, reach=st.integers(1, 300), data=st.data())
def test_static_shares_equal_those_of_synchronous_rounds(sizes, reach: int, data):
    """In any order of workers."""
    length, batch, workers, start = sizes
    queue = StaticQueue(start, length, batch, workers)
    limit = queue.stop_at(start + reach)
    askers = data.draw(st.lists(st.integers(0, workers - 1), max_size=40)) + list(range(workers))
    found = deal(queue, askers, limit)
    wanted: dict[int, list[Stretch]] = {worker: [] for worker in range(workers)}
    while start < limit:
        bounds = round_bounds(start, length, batch * workers, workers)
        for worker in range(workers):
            wanted[worker] += [(bounds[worker], bounds[worker + 1])] if bounds[worker] < bounds[worker + 1] else []
        start = bounds[-1]
    assert found == wanted


@pytest.mark.parametrize("kind", QUEUES)
@given(sizes=sizes, taken=st.integers(0, 50), ahead=st.integers(0, 200))
def test_dealing_can_stop_shortly_after_any_position(kind: Kind, sizes, taken: int, ahead: int):
    length, batch, workers, start = sizes
    queue = kind(start, length, batch, workers)
    for turn in range(taken):
        queue.take(turn % workers, FAR)
    assert queue.stop_at(queue.furthest) == queue.furthest  # a round that has begun is dealt out completely
    cursor = queue.furthest + ahead
    assert cursor <= queue.stop_at(cursor) < cursor + min(length, batch * workers)


def test_slow_worker_takes_fewer_samples_from_a_shared_queue():
    queue = SharedQueue(0, 40, 4, 2)
    quick = [queue.take(0, 40) for _ in range(3)]
    assert quick == [(0, 4), (4, 8), (8, 12)]
    assert queue.take(1, 40) == (12, 16)


def test_every_worker_takes_its_own_share_from_a_static_queue():
    queue = StaticQueue(0, 40, 4, 2)
    assert [queue.take(0, 40) for _ in range(3)] == [(0, 4), (8, 12), (16, 20)]
    assert queue.take(1, 40) == (4, 8)


def test_worker_with_an_empty_share_gets_the_next_round():
    queue = StaticQueue(0, 5, 1, 4)  # rounds of 4 samples and of 1
    assert [queue.take(3, 10) for _ in range(3)] == [(3, 4), (8, 9), None]
    assert [queue.take(0, 10) for _ in range(5)] == [(0, 1), (4, 5), (5, 6), (9, 10), None]
