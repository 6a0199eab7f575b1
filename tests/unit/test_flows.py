"""The network of flows: closed forms of messages and collectives, fair shares, and what is conserved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, log2
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.comm.virtual import flows
from hpctrain.comm.virtual.flows import FlowNetwork, MessageCosts
from hpctrain.comm.virtual.world import World
from hpctrain.hosts import Description, HostGroup, HostLink, HostSwitch, nodes

RATE = 125e6  # bytes per second of a link of 1 Gbit/s
PLAIN = MessageCosts(latency=0, eager_limit=-1)
TAG = 2


def cluster(*groups: HostGroup, oversubscription: float = 1.0, **link: float) -> Description:
    return Description(
        hosts=list(groups), link=HostLink(**link), switch=HostSwitch(oversubscription=oversubscription)
    )


def equal(count: int, **link: float) -> Description:
    return cluster(HostGroup(count=count), **link)


def timed(network: FlowNetwork, body: Callable[[Any], Any], count: int | None = None) -> float:
    """Seconds until all ranks have ended."""
    places = nodes(network.hosts, count)
    world = World(len(places), places, network)
    world.run(body)
    return world.time / 1e9


def transfers(*pairs: tuple[int, int, int]) -> Callable[[Any], list[int]]:
    """A body that sends messages (sender, receiver, bytes), all started at once; returns when each has arrived."""

    def body(comm: Any) -> list[int]:
        ends, receives = [], []
        for sender, receiver, nbytes in pairs:
            if receiver == comm.rank:
                receives.append(comm.start_recv(np.zeros(nbytes, np.uint8), sender, TAG))
        sends = [comm.start_send(np.zeros(n, np.uint8), r, TAG) for s, r, n in pairs if s == comm.rank]
        for receive in receives:
            receive.wait()
            ends.append(comm.now())
        comm.wait_all(sends)
        return ends

    return body


# -- messages --------------------------------------------------------------------------------------------------
def test_short_message_takes_overheads_latency_and_wire() -> None:
    costs = MessageCosts(latency=20_000, send_overhead=3_000, recv_overhead=5_000)
    network = FlowNetwork(equal(2, latency_ms=0.1), costs)
    world = World(2, range(2), network)
    ends = world.run(transfers((0, 1, 1_000)))
    assert ends[1] == [3_000 + 8_000 + 120_000 + 5_000]


def test_sender_of_a_short_message_goes_on_after_its_overhead() -> None:
    network = FlowNetwork(equal(2), MessageCosts(send_overhead=3_000))

    def body(comm: Any) -> int:
        if comm.rank == 0:
            comm.send(np.zeros(8_000, np.uint8), 1, TAG)
        else:
            comm.recv(np.zeros(8_000, np.uint8), 0, TAG)
        return comm.now()

    assert World(2, range(2), network).run(body) == [3_000, 3_000 + 64_000 + 20_000]


def test_long_message_asks_its_receiver_first() -> None:
    """One more round trip from when both are there, and the sender waits until its last byte has left."""
    network = FlowNetwork(equal(2), MessageCosts(latency=20_000))

    def body(comm: Any) -> int:
        if comm.rank == 0:
            comm.send(np.zeros(125_000, np.uint8), 1, TAG)
        else:
            comm.sleep(0.005)
            comm.recv(np.zeros(125_000, np.uint8), 0, TAG)
        return comm.now()

    late = 5_000_000  # the question has arrived long before
    assert World(2, range(2), network).run(body) == [late + 20_000 + 1_000_000, late + 40_000 + 1_000_000]
    together = FlowNetwork(equal(2), MessageCosts(latency=20_000))
    assert World(2, range(2), together).run(transfers((0, 1, 125_000)))[1] == [3 * 20_000 + 1_000_000]


def test_ping_pong_takes_two_latencies() -> None:
    network = FlowNetwork(equal(2, latency_ms=1.0), MessageCosts(latency=0))

    def body(comm: Any) -> None:
        token = np.zeros(1, np.uint8)
        for turn in range(10):
            if turn % 2 == comm.rank:
                comm.send(token, 1 - comm.rank, TAG)
            else:
                comm.recv(token, 1 - comm.rank, TAG)

    assert timed(network, body) == pytest.approx(10 * 1e-3, rel=0.02)


def test_messages_of_a_rank_to_another_keep_their_order() -> None:
    """The second is shorter, but does not overtake the first."""
    ends = World(2, range(2), FlowNetwork(equal(2), PLAIN)).run(transfers((0, 1, 125_000), (0, 1, 125)))[1]
    assert ends == [1_000_000, 1_001_000]


def test_overheads_limit_how_many_messages_a_rank_takes() -> None:
    network = FlowNetwork(equal(5, mbit_per_s=1e5), MessageCosts(latency=0, recv_overhead=50_000))
    assert timed(network, transfers(*((r, 0, 10) for r in range(1, 5)))) == pytest.approx(4 * 50e-6, rel=0.02)


# -- shares ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pairs", [((0, 1, 10**6), (0, 2, 10**6)), ((1, 0, 10**6), (2, 0, 10**6))])
def test_two_flows_through_a_port_take_twice_as_long(pairs: Sequence[tuple[int, int, int]]) -> None:
    assert timed(FlowNetwork(equal(3), PLAIN), transfers(*pairs)) == pytest.approx(2 * 10**6 / RATE, rel=1e-6)


def test_both_ways_and_other_hosts_do_not_share() -> None:
    pairs = ((0, 1, 10**6), (1, 0, 10**6), (2, 3, 10**6))
    assert timed(FlowNetwork(equal(4), PLAIN), transfers(*pairs)) == pytest.approx(10**6 / RATE, rel=1e-6)


def test_flow_speeds_up_when_another_ends() -> None:
    """2 MB and 1 MB: they share until the short one has ended; then the long one has the port for itself."""
    ends = World(3, range(3), FlowNetwork(equal(3), PLAIN)).run(transfers((0, 1, 2 * 10**6), (0, 2, 10**6)))
    assert ends[2][0] == pytest.approx(2e6 / RATE * 1e9, rel=1e-6)
    assert ends[1][0] == pytest.approx(3e6 / RATE * 1e9, rel=1e-6)


def test_earlier_messages_have_an_advantage_and_the_port_is_always_full() -> None:
    """The second one has half the share of the first: 1/3 of the port, until that has ended."""
    costs = replace(PLAIN, seniority=0.5)
    ends = World(3, range(3), FlowNetwork(equal(3), costs)).run(transfers((0, 1, 10**6), (0, 2, 10**6)))
    assert ends[1][0] == pytest.approx(1.5e6 / RATE * 1e9, rel=1e-6)
    assert ends[2][0] == pytest.approx(2e6 / RATE * 1e9, rel=1e-6)


def test_shares_are_max_min_fair() -> None:
    """0 sends to 1 and 2, and 3 to 2, whose link is a tenth as fast: each of its senders has half of that, and 0 to 1
    has the rest of 0's link."""
    slow = cluster(HostGroup(count=2), HostGroup(link=HostLink(mbit_per_s=100.0)), HostGroup())
    pairs = ((0, 1, 9_500_000), (0, 2, 10**6), (3, 2, 10**6))
    ends = World(4, range(4), FlowNetwork(slow, PLAIN)).run(transfers(*pairs))
    assert ends[1][0] == pytest.approx(9.5e6 / (0.95 * RATE) * 1e9, rel=1e-6)
    assert ends[2] == [pytest.approx(2e6 / (0.1 * RATE) * 1e9, rel=1e-6)] * 2


def test_single_messages_may_be_slower_than_their_link() -> None:
    costs = MessageCosts(latency=0, bandwidth=RATE / 4, eager_limit=-1)
    assert timed(FlowNetwork(equal(2), costs), transfers((0, 1, 10**6))) == pytest.approx(4e6 / RATE, rel=1e-6)
    pairs = [(0, 1, 10**6), (0, 2, 10**6), (0, 3, 10**6)]
    assert timed(FlowNetwork(equal(4), costs), transfers(*pairs)) == pytest.approx(4e6 / RATE, rel=1e-6)


def test_goodput_is_what_headers_leave() -> None:
    network = FlowNetwork(equal(2), PLAIN, goodput=0.95)
    assert timed(network, transfers((0, 1, 10**6))) == pytest.approx(1e6 / RATE / 0.95, rel=1e-6)


def test_ranks_of_a_host_share_its_memory_and_not_its_link() -> None:
    described = cluster(HostGroup(ranks=4, memory_gbyte_per_s=10.0), mbit_per_s=10.0)
    network = FlowNetwork(described, within=MessageCosts(latency=0, bandwidth=6e9, eager_limit=-1))
    pairs = [(0, 1, 10**7), (2, 3, 10**7)]
    assert timed(network, transfers(*pairs[:1])) == pytest.approx(1e7 / 6e9, rel=1e-3)
    network = FlowNetwork(described, within=MessageCosts(latency=0, bandwidth=6e9, eager_limit=-1))
    assert timed(network, transfers(*pairs)) == pytest.approx(2e7 / 1e10, rel=1e-3)
    assert [port.bytes for port in network.ports() if port.bytes] == [2 * 10**7]


@pytest.mark.parametrize("oversubscription", [1.0, 4.0])
def test_racks_share_oversubscribed_uplinks(oversubscription: float) -> None:
    """Eight hosts in two racks: each of the first four sends to one of the others."""
    racks = cluster(HostGroup(count=4), HostGroup(count=4, rack=2), oversubscription=oversubscription)
    network = FlowNetwork(racks, PLAIN)
    seconds = timed(network, transfers(*((r, r + 4, 10**6) for r in range(4))))
    assert seconds == pytest.approx(oversubscription * 1e6 / RATE, rel=0.001)
    passed = {port.name: port.bytes for port in network.ports()}
    assert (passed["rack1 up"], passed["rack2 down"], passed["rack2 up"]) == (4 * 10**6, 4 * 10**6, 0)
    inside = timed(FlowNetwork(racks, PLAIN), transfers(*((r, (r + 1) % 4, 10**6) for r in range(4))))
    assert inside == pytest.approx(1e6 / RATE, rel=0.001)


def test_ports_know_how_long_they_were_in_use() -> None:
    network = FlowNetwork(equal(3), PLAIN)
    timed(network, transfers((0, 1, 10**6), (0, 2, 10**6)))
    used = {port.name: (port.bytes, port.busy) for port in network.ports() if port.bytes}
    both = round(2e6 / RATE * 1e9)
    assert used == {"node1 out": (2 * 10**6, both), "node2 in": (10**6, both), "node3 in": (10**6, both)}


# -- closed forms ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [1, 4, 16])
def test_server_takes_as_long_as_all_that_it_receives(workers: int) -> None:
    pairs = [(rank, 0, 10**6) for rank in range(1, workers + 1)]
    assert timed(FlowNetwork(equal(workers + 1)), transfers(*pairs)) == pytest.approx(workers * 1e6 / RATE, rel=0.02)


def all_reduce(nbytes: int, algorithm: str) -> Callable[[Any], None]:
    return lambda comm: comm.all_reduce(np.zeros(nbytes // 4, np.float32), algorithm=algorithm)


@pytest.mark.parametrize("size", [2, 5, 16])
def test_ring_matches_its_closed_form(size: int) -> None:
    nbytes = 6_400_000 * size
    seconds = timed(FlowNetwork(equal(size)), all_reduce(nbytes, "ring"))
    assert seconds == pytest.approx(2 * (1 - 1 / size) * nbytes / RATE, rel=0.02)


@pytest.mark.parametrize("size", [2, 8, 16])
@pytest.mark.parametrize("nbytes", [640, 64_000_000])
def test_halving_doubling_matches_its_closed_form(size: int, nbytes: int) -> None:
    network = FlowNetwork(equal(size, latency_ms=1.0), MessageCosts(latency=0))
    rounds = 1 if nbytes < 8192 else 3  # latencies of a step: with the question to the receiver
    expected = 2 * (1 - 1 / size) * nbytes / RATE + 2 * log2(size) * rounds * 1e-3
    assert timed(network, all_reduce(nbytes, "halving_doubling")) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", [2, 8, 13])
def test_tree_broadcast_takes_as_many_steps_as_the_tree_is_deep(size: int) -> None:
    seconds = timed(FlowNetwork(equal(size)), lambda comm: comm.broadcast(np.zeros(10**7, np.uint8)))
    assert seconds == pytest.approx(np.ceil(log2(size)) * 1e7 / RATE, rel=0.02)


# -- what is conserved -----------------------------------------------------------------------------------------
hosts = st.builds(
    HostGroup,
    count=st.integers(1, 3),
    ranks=st.integers(1, 3),
    rack=st.integers(1, 2),
    memory_gbyte_per_s=st.sampled_from([None, 0.05]),
    link=st.sampled_from([None, HostLink(mbit_per_s=100.0, latency_ms=0.3)]),
)
clusters = st.builds(
    lambda groups, over: cluster(*groups, oversubscription=over),
    st.lists(hosts, min_size=1, max_size=3),
    st.sampled_from([1.0, 2.0]),
)
costs = st.builds(
    MessageCosts,
    latency=st.sampled_from([0, 20_000]),
    bandwidth=st.sampled_from([inf, 5e7]),
    send_overhead=st.sampled_from([0, 1_000]),
    recv_overhead=st.sampled_from([0, 2_000]),
    eager_limit=st.sampled_from([-1, 8192]),
)
messages = st.lists(
    st.tuples(st.integers(0, 26), st.integers(0, 26), st.integers(0, 200_000), st.floats(0, 0.01)), max_size=25
)


@settings(max_examples=150, deadline=None)
@given(clusters, costs, costs, messages)
def test_no_port_carries_more_than_it_can_and_every_byte_arrives(
    described: Description, between: MessageCosts, within: MessageCosts, sent: list[tuple[int, int, int, float]]
) -> None:
    places = nodes(described.each())
    size = len(places)
    sent = [(a % size, b % size, nbytes, start) for a, b, nbytes, start in sent]
    overfull: list[str] = []

    class Watched(FlowNetwork):
        def _share(self, ignored: object) -> None:
            super()._share(ignored)
            for port in self.ports():
                rate = sum(flow.rate for flow in port.flows)
                if rate > port.capacity * (1 + 1e-6):
                    overfull.append(f"{port.name}: {rate} of {port.capacity}")
                assert all(flow.rate > 0 for flow in port.flows)

    def body(comm: Any) -> list[tuple[int, int]]:
        requests = [
            comm.start_recv(np.zeros(n, np.uint8), a, tag)
            for tag, (a, b, n, _) in enumerate(sent)
            if b == comm.rank
        ]
        sends = []
        for tag, (a, b, n, start) in sorted(enumerate(sent), key=lambda each: each[1][3]):
            if a == comm.rank:
                comm.pass_time(int(start * 1e9) - comm.now())
                sends.append(comm.start_send(np.full(n, tag, np.uint8), b, tag))
        ends = [(request.wait(), comm.now()) for request in requests]
        comm.wait_all(sends)
        return ends

    found = []
    for _ in range(2):
        network = Watched(described, between, within)
        found.append(World(size, places, network).run(body))
    assert found[0] == found[1]
    assert not overfull
    assert [[n for n, _ in ends] for ends in found[0]] == [[n for _, b, n, _ in sent if b == r] for r in range(size)]
    ports = network.ports()
    between_hosts = sum(n for a, b, n, _ in sent if places[a] != places[b])
    assert sum(port.bytes for port in ports if port.name.endswith(" out")) == between_hosts
    assert sum(port.bytes for port in ports if port.name.endswith(" in")) == between_hosts
    assert sum(p.bytes for p in ports if p.name.endswith("memory")) == sum(n for _, _, n, _ in sent) - between_hosts
    for port in ports:
        assert port.active == 0 and not port.flows
        if not port.name.endswith("memory"):  # for which short messages do not compete
            assert port.bytes <= port.capacity * port.busy * (1 + 1e-6) + 1


def test_only_what_a_change_touches_is_computed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that share nothing with others have no shares to compute."""
    seen: list[int] = []
    real = flows.max_min

    def counted(some: dict[flows.Flow, None], ports: Sequence[flows.Port]) -> dict[flows.Flow, float]:
        seen.append(len(some))
        return real(some, ports)

    monkeypatch.setattr(flows, "max_min", counted)
    timed(FlowNetwork(equal(40), PLAIN), transfers(*((r, r + 20, 10**6 + r) for r in range(20))))
    assert seen == []
    timed(FlowNetwork(equal(40), PLAIN), transfers(*((r, r + 20, 10**6) for r in range(19)), (0, 39, 10**6)))
    assert seen[0] == 2
    assert max(seen) <= 2
