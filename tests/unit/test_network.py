"""The network of virtual time: times of messages and collectives in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork
from hpctrain.comm.virtual.world import World

LATENCY, WIRE = 20_000, 0.8  # ns; ns per byte at 1.25 GB/s


def test_free_network_costs_nothing() -> None:
    assert FreeNetwork().transfer(0, 1, 10**9, 7) == (7, 7)
    world = World(5)
    world.run(lambda comm: comm.all_reduce(np.ones(1000)))
    assert world.time == 0


def test_one_message_takes_latency_and_wire() -> None:
    network = LinkNetwork()
    assert network.transfer(0, 1, 1_000_000, 500) == (500 + 800_000, 500 + LATENCY + 800_000)


def test_messages_within_a_node_use_no_link() -> None:
    network = LinkNetwork()
    assert network.transfer(3, 3, 8000, 100) == (100 + 500 + 1000, 100 + 500 + 1000)
    assert network.transfer(3, 3, 8000, 100) == (1600, 1600)


def test_messages_queue_at_the_senders_link() -> None:
    network = LinkNetwork()
    network.transfer(0, 1, 10_000, 0)
    assert network.transfer(0, 2, 10_000, 0) == (16_000, 16_000 + LATENCY)


def test_messages_queue_at_the_receivers_link() -> None:
    network = LinkNetwork()
    assert network.transfer(0, 2, 10_000, 0) == (8_000, LATENCY + 8_000)
    assert network.transfer(1, 2, 10_000, 0) == (8_000, LATENCY + 16_000)


def test_links_work_both_ways_at_once() -> None:
    network = LinkNetwork()
    assert network.transfer(0, 1, 10_000, 0) == network.transfer(1, 0, 10_000, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 17), st.sampled_from([4, 1000, 25_000]), st.sampled_from([-1, 8192]))
def test_ring_of_nodes_matches_its_closed_form(size: int, elements: int, eager: int) -> None:
    """2 (p - 1) steps of one latency and one p-th of the buffer."""
    network = LinkNetwork(eager_limit=eager)
    world = World(size, range(size), network)
    world.run(lambda comm: comm.all_reduce(np.ones(size * elements, np.float32), algorithm="ring"))
    assert world.time == 2 * (size - 1) * (LATENCY + int(4 * elements * WIRE))


@pytest.mark.parametrize(("size", "steps"), [(2, 1), (4, 2), (8, 3), (16, 4)])
def test_halving_doubling_matches_its_closed_form(size: int, steps: int) -> None:
    """2 log2 p latencies, and the same bytes as the ring."""
    nbytes = 4 * size * 10_000
    world = World(size, range(size), LinkNetwork())
    buffers = np.ones((size, nbytes // 4), np.float32)
    world.run(lambda comm: comm.all_reduce(buffers[comm.rank], algorithm="halving_doubling"))
    sent = nbytes - nbytes // size
    assert world.time == pytest.approx(2 * (steps * LATENCY + sent * WIRE), abs=4 * steps)


def test_tree_matches_its_closed_form() -> None:
    world = World(8, range(8), LinkNetwork())
    world.run(lambda comm: comm.all_reduce(np.ones(2500, np.float32), algorithm="tree"))
    assert world.time == 2 * 3 * (LATENCY + 8000)


def test_server_is_limited_by_its_link() -> None:
    """Pushing S bytes from each of W workers to one server takes at least W S / R (FIELD's analytic delay)."""

    def body(comm):
        if comm.rank:
            comm.send(np.zeros(12_500, np.float64), 0, 2)
        else:
            for rank in range(1, comm.size):
                comm.recv(np.zeros(12_500, np.float64), rank, 2)

    world = World(9, range(9), LinkNetwork())
    world.run(body)
    assert world.time >= 8 * 100_000 * WIRE
