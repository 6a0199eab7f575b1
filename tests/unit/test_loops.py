"""Collectives as one loop: the times, bits and bytes of the messages that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.comm import algorithms
from hpctrain.comm.base import Operation
from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual import schedules
from hpctrain.comm.virtual.flows import FlowNetwork, MessageCosts
from hpctrain.comm.virtual.loops import GroupLoop
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork
from hpctrain.comm.virtual.schedules import Schedule
from hpctrain.comm.virtual.world import World
from hpctrain.hosts import Description, HostGroup, HostLink, HostSwitch
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import Kind

HOSTS = 20
SECOND = 10**9
SPREADS = st.sampled_from([1_000, 100_000, 10_000_000])
NAMES = ["library", *schedules.ALL_REDUCE]


def flows(**options: Any) -> FlowNetwork:
    """Hosts in two racks."""
    groups = [HostGroup(count=12), HostGroup(count=8, rack=2, link=HostLink(mbit_per_s=700.0, latency_ms=0.01))]
    return FlowNetwork(Description(hosts=groups, switch=HostSwitch(oversubscription=4.0)), **options)


OVERHEADS = MessageCosts(latency=10_000, send_overhead=700, recv_overhead=900, eager_limit=1000)
NETWORKS: dict[str, Callable[[], Any]] = {
    "free": FreeNetwork,
    "links": LinkNetwork,
    "links, rendezvous": lambda: LinkNetwork(eager_limit=-1),
    "flows": flows,
    "flows with overheads": lambda: flows(between=OVERHEADS, within=OVERHEADS),
    "flows, rendezvous": lambda: flows(between=MessageCosts(eager_limit=-1)),
}


# -- messages --------------------------------------------------------------------------------------------------
class RecordingNetwork(FreeNetwork):
    """Remembers the messages of each sender, in order."""

    def __init__(self) -> None:
        super().__init__(eager_limit=2**40)
        self.sent: dict[int, list[tuple[int, int]]] = {}

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        self.sent.setdefault(source, []).append((dest, nbytes))
        return super().transfer(source, dest, nbytes, start)


def planned(schedule: Schedule, size: int, length: int) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for step in schedule(size, length):
        assert len(set(step.source.tolist())) == len(step.source)
        assert len(set(step.dest.tolist())) == len(step.dest)
        for source, dest, low, high in zip(step.source, step.dest, step.low, step.high, strict=True):
            if high > low:
                found.setdefault(int(source), []).append((int(dest), int(high - low)))
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 40), st.integers(1, 300), st.sampled_from(sorted(schedules.ALL_REDUCE)))
def test_schedules_are_the_messages_of_the_algorithms(size: int, length: int, name: str) -> None:
    network = RecordingNetwork()
    World(size, range(size), network).run(lambda comm: comm.all_reduce(np.zeros(length, np.uint8), algorithm=name))
    assert planned(schedules.ALL_REDUCE[name], size, length) == network.sent


@pytest.mark.parametrize("size", [2, 3, 8, 13])
def test_schedules_of_barrier_and_all_gather_are_their_messages(size: int) -> None:
    network = RecordingNetwork()
    World(size, range(size), network).run(lambda comm: comm.barrier())
    assert planned(schedules.dissemination_barrier, size, 1) == network.sent
    network, bounds = RecordingNetwork(), [0, *np.cumsum(np.arange(size)).tolist()]
    World(size, range(size), network).run(lambda comm: comm.all_gather(np.zeros(bounds[-1], np.uint8), bounds))
    assert planned(schedules.ring_all_gather(bounds), size, bounds[-1]) == network.sent


# -- times and bits --------------------------------------------------------------------------------------------
def rounds(delays: Sequence[Sequence[int]], length: int, name: str, dtype: Any = np.float32) -> Callable[[Any], Any]:
    """All-reduces, barriers and gathers, a second apart; ranks enter with these delays."""

    def body(comm: Any) -> Any:
        buffer = np.random.default_rng(comm.rank).standard_normal(length).astype(dtype)
        ends, table = [], None
        for number, delay in enumerate(delays):
            comm.pass_time(number * SECOND + delay[comm.rank] - comm.now())
            if number % 3 == 0:
                comm.all_reduce(buffer, algorithm=name)
            elif number % 3 == 1:
                comm.barrier()
            else:
                table = comm.gather_rows(buffer[:5])
            ends.append(comm.now())
        return ends, buffer.tobytes(), table is not None and table.tobytes()

    return body


@pytest.mark.parametrize("network", NETWORKS)
@settings(max_examples=15, deadline=None)
@given(
    st.integers(2, HOSTS), st.sampled_from([7, 100, 5_000, 60_000]), st.sampled_from(NAMES), SPREADS, st.integers(0, 99)
)
def test_times_and_bits_are_those_of_messages(
    network: str, size: int, length: int, name: str, spread: int, seed: int
) -> None:
    delays = np.random.default_rng(seed).integers(1, spread, (6, size)).tolist()
    body, networks = rounds(delays, length, name), [NETWORKS[network]() for _ in range(2)]
    by_messages = World(size, range(size), networks[0]).run(body)
    looped = World(size, range(size), networks[1], collectives="loop").run(body)
    assert looped == by_messages
    if isinstance(networks[0], FlowNetwork):
        passed = [[(port.name, port.bytes) for port in each.ports()] for each in networks]
        assert passed[0] == passed[1]
        busy = [{rank: time for rank, time in each.receives.items() if time} for each in networks]
        assert busy[0] == busy[1]
        assert networks[0].sends == networks[1].sends


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=12), st.sampled_from(NAMES), st.integers(0, 99))
def test_ranks_that_share_hosts_take_the_times_of_messages(places: list[int], name: str, seed: int) -> None:
    """Their messages compete with each other."""
    delays = np.random.default_rng(seed).integers(1, 1_000_000, (6, len(places))).tolist()
    body = rounds(delays, 5_000, name)
    by_messages = World(len(places), places, flows()).run(body)
    assert World(len(places), places, flows(), collectives="loop").run(body) == by_messages


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 17),
    st.sampled_from([40, 1_000, 200_000]),
    st.sampled_from(NAMES),
    st.sampled_from([np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int64]),
    st.sampled_from(["sum", "max", "min"]),
)
def test_sums_have_the_bits_of_messages(size: int, length: int, name: str, dtype: Any, operation: Operation) -> None:
    values = (10 * np.random.default_rng(length).standard_normal((size, length))).astype(dtype)

    def body(comm: Any) -> bytes:
        buffer = values[comm.rank].copy()
        comm.all_reduce(buffer, operation, name)
        return buffer.tobytes()

    assert World(size, range(size), collectives="loop").run(body) == World(size, range(size)).run(body)


@pytest.mark.parametrize("places", [range(6), (0, 0, 0, 1, 1, 2)])
def test_buffers_without_numbers_take_the_same_times(places: Sequence[int]) -> None:
    def body(comm: Any, make: Callable[[], Any]) -> int:
        comm.pass_time(1000 * comm.rank)
        comm.all_reduce(make())
        return comm.now()

    size = len(places)
    numbers, none = (lambda: np.zeros(10**6, np.float32)), (lambda: Phantom(10**6, np.dtype(np.float32)))
    wanted = World(size, places, flows()).run(lambda comm: body(comm, numbers))
    assert World(size, places, flows(), collectives="loop").run(lambda comm: body(comm, none)) == wanted


def test_short_messages_of_many_ranks_take_nearly_the_time_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they meet, in groups of which the size is no power of two, each counts as if it were alone."""
    delay = np.random.default_rng(0).integers(1, 20_000, 300).tolist()
    costs = MessageCosts(latency=10_000, send_overhead=700, recv_overhead=900, eager_limit=16_384)
    network = partial(FlowNetwork, Description(hosts=[HostGroup(count=300)]), costs)

    def body(comm: Any) -> int:
        comm.pass_time(delay[comm.rank])
        comm.all_reduce(np.zeros(72_848, np.float32))
        return comm.now()

    by_messages = World(300, range(300), network()).run(body)
    monkeypatch.setattr(GroupLoop, "_one_by_one", None)
    looped = World(300, range(300), network(), collectives="loop").run(body)
    assert max(looped) == pytest.approx(max(by_messages), rel=0.02)


def test_ring_of_equal_ranks_is_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few turns per rank, and no message by itself."""
    monkeypatch.setattr(GroupLoop, "_one_by_one", None)
    world = World(64, range(64), LinkNetwork(), collectives="loop")
    world.run(lambda comm: comm.all_reduce(np.ones(640, np.float32), algorithm="ring"))
    assert world.resumptions <= 4 * 64


def test_gathers_of_ranks_that_share_hosts_are_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short messages within a host do not compete for its memory."""
    places = [rank // 8 for rank in range(48)]
    wanted = World(48, places, flows()).run(lambda comm: [comm.gather_rows(np.ones(2)).sum(), comm.now()])
    monkeypatch.setattr(GroupLoop, "_one_by_one", None)
    world = World(48, places, flows(), collectives="loop")
    assert world.run(lambda comm: [comm.gather_rows(np.ones(2)).sum(), comm.now()]) == wanted


# -- when messages are needed ----------------------------------------------------------------------------------
def test_groups_that_share_hosts_with_others_use_messages() -> None:
    """Two groups with a rank each on every host, as strategies have between nodes, compete for the links."""
    places = [0, 0, 1, 1, 2, 2]

    def body(comm: Any) -> int:
        group = comm.split(comm.rank % 2)
        group.all_reduce(np.zeros(10**6, np.float32), algorithm="ring")
        return comm.now()

    costs = {"between": MessageCosts(latency=0)}
    by_messages = World(6, places, flows(**costs)).run(body)
    assert World(6, places, flows(**costs), collectives="loop").run(body) == by_messages
    assert min(by_messages) > 1.9 * 4 / 3 * 4e6 / 125e6 * 1e9  # each has half of a link


def test_other_messages_under_way_make_a_collective_use_messages() -> None:
    """Rank 2 sends to rank 1 while ranks enter: the sum is right, and its messages share the link with it."""

    def body(comm: Any, busy: bool) -> tuple[int, float]:
        buffer, large = np.ones(250_000, np.float32), np.zeros(5_000_000, np.uint8)
        requests = []
        if busy and comm.rank == 2:
            requests.append(comm.start_send(large, 1, 2))
        if busy and comm.rank == 1:
            requests.append(comm.start_recv(large, 2, 2))
        comm.pass_time(1_000_000 * (1 + comm.rank))
        comm.all_reduce(buffer, algorithm="ring")
        end = comm.now()
        comm.wait_all(requests)
        return end, float(buffer.sum())

    quiet = World(4, range(4), flows(), collectives="loop").run(lambda comm: body(comm, False))
    busy = World(4, range(4), flows(), collectives="loop").run(lambda comm: body(comm, True))
    assert [total for _, total in busy] == [total for _, total in quiet] == [1e6] * 4
    assert max(end for end, _ in busy) > max(end for end, _ in quiet) + 1_000_000


def started(comm: Any, delay: Sequence[int], count: int) -> tuple[list[int], bytes]:
    """All-reduces that are started one after the other, 10 ms apart, and take longer than that."""
    comm.pass_time(delay[comm.rank])
    buffers = [np.random.default_rng(comm.rank + i).standard_normal(500_000).astype(np.float32) for i in range(count)]
    requests = []
    for buffer in buffers:
        requests.append(comm.start_all_reduce(buffer))
        comm.pass_time(10_000_000)
    ends = []
    for request in requests:
        request.wait()
        ends.append(comm.now())
    return ends, b"".join(buffer.tobytes() for buffer in buffers)


@pytest.mark.parametrize("size", [5, 8])
def test_started_all_reduces_are_loops_that_wait_for_each_other(size: int) -> None:
    """One has the time of its messages; the last of several ends as by messages, or up to a fifth earlier."""
    delay = np.random.default_rng(size).integers(1, 1_000_000, size).tolist()
    for count, tolerance in ((1, 0.0), (4, 0.2)):
        body = partial(started, delay=delay, count=count)
        by_messages = World(size, range(size), flows()).run(body)
        looped = World(size, range(size), flows(), collectives="loop").run(body)
        assert [data for _, data in looped] == [data for _, data in by_messages]
        assert [ends[-1] for ends, _ in looped] == pytest.approx([ends[-1] for ends, _ in by_messages], rel=tolerance)


@pytest.mark.parametrize("collective", ["hierarchical", "started", "broadcast"])
def test_collectives_without_a_loop_still_work(collective: str) -> None:
    def body(comm: Any) -> float:
        buffer = np.full(100, comm.rank, np.float32)
        if collective == "started":
            comm.start_all_reduce(buffer).wait()
        elif collective == "broadcast":
            comm.broadcast(buffer, 1)
        else:
            comm.all_reduce(buffer, algorithm=collective)
        return float(buffer[0])

    wanted = [1.0] * 4 if collective == "broadcast" else [6.0] * 4
    assert World(4, (0, 0, 1, 1), flows(), collectives="loop").run(body) == wanted


def test_ranks_that_wait_for_others_are_named() -> None:
    def body(comm: Any) -> None:
        if comm.rank < 2:
            comm.barrier()

    with pytest.raises(RuntimeError, match=r"rank 0 waits for a collective with ranks \[2\]"):
        World(3, range(3), collectives="loop").run(body)


def test_unknown_algorithm_is_an_error_as_by_messages() -> None:
    with pytest.raises(Exception, match="all-reduce algorithm 'rings'"):
        World(2, range(2), collectives="loop").run(lambda c: c.all_reduce(np.ones(1), algorithm="rings"))


# -- traces ----------------------------------------------------------------------------------------------------
def test_trace_has_one_span_per_rank_with_the_bytes_of_the_buffer() -> None:
    recorders = [Recorder() for _ in range(3)]
    world = World(3, range(3), flows(), recorders=recorders, collectives="loop")

    def body(comm: Any) -> None:
        comm.pass_time(1000 * comm.rank)
        comm.all_reduce(np.ones(1000, np.float32))
        comm.all_gather(np.ones(30, np.float64), [0, 10, 20, 30])
        comm.barrier()

    world.run(body)
    rows = [recorder.drain()["spans"] for recorder in recorders]
    for rank, spans in enumerate(rows):
        assert [(int(s["kind"]), int(s["bytes"]), int(s["peer"])) for s in spans] == [
            (Kind.REDUCE, 4000, -1), (Kind.RECV, 240, -1), (Kind.WAIT, 0, -1),
        ]  # fmt: skip
        assert int(spans[0]["start_ns"]) == 1000 * rank
        assert spans["id"].tolist() == rows[0]["id"].tolist()
        assert int(spans[-1]["end_ns"]) <= world.time
    assert algorithms.ALL_REDUCE.keys() - schedules.ALL_REDUCE.keys() == {"hierarchical"}
