"""Collectives built from messages, compared with NumPy's sums: any rank count, length, dtype, nodes and network."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.comm import algorithms
from hpctrain.comm.base import Operation
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork, Network
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError

NAMES = ["library", *algorithms.ALL_REDUCE]
DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
OPERATIONS: dict[Operation, Any] = {"sum": np.sum, "max": np.max, "min": np.min}

ranks = st.integers(1, 17)
lengths = st.one_of(st.integers(0, 20), st.integers(0, 1200))
networks = st.builds(FreeNetwork, st.sampled_from([-1, 64])) | st.builds(
    LinkNetwork, eager_limit=st.sampled_from([-1, 64, 8192])
)


@st.composite
def clusters(draw: st.DrawFn) -> list[int]:
    """The node of each rank, in any order."""
    size = draw(ranks)
    return draw(st.lists(st.integers(0, 4), min_size=size, max_size=size))


def given_values(size: int, length: int, dtype: Any) -> list[np.ndarray]:
    """Whole numbers whose sums are exact in every dtype, so that the order of additions does not matter."""
    rng = np.random.default_rng(size * 5000 + length)
    return [rng.integers(-8, 9, length).astype(dtype) for _ in range(size)]


@settings(max_examples=150, deadline=None)
@given(clusters(), lengths, st.sampled_from(NAMES), st.sampled_from(DTYPES), networks)
def test_all_reduce_sums(nodes: list[int], length: int, name: str, dtype: Any, network: Network) -> None:
    values = given_values(len(nodes), length, dtype)

    def body(comm):
        buffer = values[comm.rank].copy()
        comm.all_reduce(buffer, algorithm=name)
        return buffer

    expected = np.sum([v.astype(np.float64) for v in values], axis=0)
    for got in World(len(nodes), nodes, network).run(body):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got.astype(np.float64), expected)


@settings(max_examples=40, deadline=None)
@given(clusters(), lengths, st.sampled_from(NAMES), st.sampled_from(list(OPERATIONS)))
def test_all_reduce_by_every_operation(nodes: list[int], length: int, name: str, operation: Operation) -> None:
    values = given_values(len(nodes), length, np.int64)

    def body(comm):
        buffer = values[comm.rank].copy()
        comm.all_reduce(buffer, operation, name)
        return buffer

    for got in World(len(nodes), nodes).run(body):
        np.testing.assert_array_equal(got, OPERATIONS[operation](values, axis=0))


@settings(max_examples=30, deadline=None)
@given(clusters(), st.integers(1, 400), st.sampled_from(NAMES), networks)
def test_sums_have_the_same_bits_on_all_ranks_and_every_time(
    nodes: list[int], length: int, name: str, network: Network
) -> None:
    values = np.random.default_rng(length).standard_normal((len(nodes), length)).astype(np.float32)

    def body(comm):
        buffer = values[comm.rank].copy()
        comm.all_reduce(buffer, algorithm=name)
        return buffer.tobytes()

    first = World(len(nodes), nodes, network).run(body)
    again = World(len(nodes), nodes, FreeNetwork()).run(body)
    assert len(set(first + again)) == 1


@st.composite
def cuts(draw: st.DrawFn) -> list[int]:
    """Bounds of one slice per rank of a buffer, some of them empty."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=17))
    return [0, *np.cumsum(sizes).tolist()]


@settings(max_examples=60, deadline=None)
@given(cuts(), networks)
def test_ring_reduce_scatter_then_all_gather(bounds: list[int], network: Network) -> None:
    size, length = len(bounds) - 1, bounds[-1]
    values = given_values(size, length, np.float32)

    def body(comm):
        buffer = values[comm.rank].copy()
        algorithms.ring_reduce_scatter(comm, buffer, bounds, "sum", range(size))
        low, high = bounds[comm.rank : comm.rank + 2]
        own = buffer[low:high].copy()
        buffer[:low], buffer[high:] = np.nan, np.nan
        comm.all_gather(buffer, bounds)
        return own, buffer

    expected = np.sum(values, axis=0)
    for rank, (own, whole) in enumerate(World(size, network=network).run(body)):
        np.testing.assert_array_equal(own, expected[bounds[rank] : bounds[rank + 1]])
        np.testing.assert_array_equal(whole, expected)


@settings(max_examples=60, deadline=None)
@given(ranks, st.data(), st.integers(0, 40), st.sampled_from(DTYPES), networks)
def test_broadcast_from_any_root(size: int, data: st.DataObject, length: int, dtype: Any, network: Network) -> None:
    root = data.draw(st.integers(0, size - 1))

    def body(comm):
        buffer = np.arange(length).astype(dtype) * (comm.rank == root)
        comm.broadcast(buffer, root)
        return buffer

    for got in World(size, network=network).run(body):
        np.testing.assert_array_equal(got, np.arange(length).astype(dtype))


@pytest.mark.parametrize("size", range(1, 18))
def test_no_rank_leaves_a_barrier_before_all_have_arrived(size: int) -> None:
    came: list[int] = []

    def body(comm):
        comm.sleep(comm.rank * 1e-3)
        came.append(comm.rank)
        comm.barrier()
        return len(came)

    assert World(size).run(body) == [size] * size


@given(st.integers(0, 10**6), st.integers(1, 300))
def test_even_bounds(length: int, parts: int) -> None:
    bounds = algorithms.even_bounds(length, parts)
    sizes = np.diff(bounds)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, length, parts + 1)
    assert sizes.min() >= 0
    assert sizes.max() - sizes.min() <= 1


def test_collectives_on_a_subset_of_the_ranks() -> None:
    def body(comm):
        buffer = np.ones(5)
        if comm.rank in (1, 3, 4):
            algorithms.ring(comm, buffer, "sum", (1, 3, 4))
        return buffer[0]

    assert World(6).run(body) == [1, 3, 1, 3, 3, 1]


def test_hierarchical_sends_bytes_over_each_link_once() -> None:
    """Two nodes of four: the leaders' ring carries one buffer each way, where a flat tree carries more."""
    crossing: list[int] = []

    class Counting(FreeNetwork):
        def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
            if source != dest:
                crossing.append(nbytes)
            return start, start

    World(8, [0, 1] * 4, Counting()).run(
        lambda comm: comm.all_reduce(np.ones(1000, np.float32), algorithm="hierarchical")
    )
    assert sum(crossing) == 2 * 4000


def test_unknown_algorithm_error_lists_the_known_ones() -> None:
    with pytest.raises(HpctrainError, match=r"'star': expected library, ring, halving_doubling, tree"):
        World(2).run(lambda comm: comm.all_reduce(np.ones(3), algorithm="star"))
