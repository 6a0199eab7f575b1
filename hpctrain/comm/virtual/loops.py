"""Collectives of virtual ranks as one loop over their steps, instead of one message after the other.

No rank can leave an all-reduce, an all-gather or a barrier before the last has entered. So the last one computes, for
all ranks at once, when each of them would leave by messages, from when each of them entered (`lockstep`), and does the
arithmetic in the same order. The times are those of messages to the nanosecond, as long as only this group uses its
links meanwhile:
- If the group's own messages compete with each other, they are exchanged one by one, on a clock of their own.
- Among more than 256 ranks, messages up to the eager limit that meet at a port count as if each were alone there:
  all-reduces of less than about 100 kB end up to a fifth earlier than by messages, larger ones a few per cent.
- If another message was under way on the network since the first rank entered, all ranks begin when the last has
  entered, so up to that much later: by messages, if one is still under way then.
- What ranks send that have left, while messages of the collective are still under way, does not compete with them. If
  the group begins another collective meanwhile, as with started all-reduces, the one waits at each link for the other
  (but short messages do not), instead of sharing it: several that overlap end up to a fifth earlier than by messages.
- A group that shares its hosts (or an oversubscribed uplink) with ranks outside always exchanges messages, and so do
  the hierarchical algorithm and broadcasts.
In a trace such a collective is one span per rank, as one of an MPI library: with the bytes of its buffer, and peer -1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from hpctrain.comm.algorithms import COMBINE
from hpctrain.comm.base import Buffer, Operation, Tag
from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual import schedules
from hpctrain.comm.virtual.lockstep import Crowded, StepTimes, step_times
from hpctrain.comm.virtual.platform import Attention, Platform
from hpctrain.comm.virtual.requests import VirtualRecv, VirtualSend
from hpctrain.comm.virtual.scheduler import Task
from hpctrain.comm.virtual.schedules import Levels, Numbers, Schedule, ScheduleStep
from hpctrain.comm.virtual.shared import VirtualGroup
from hpctrain.trace.recorder import NullRecorder, Recorder

SHORT = 4096  # elements per message up to which the arithmetic of all messages of a step is one operation
BLOCK = 2**18  # elements of all ranks together that are summed at once
BYTES = np.dtype(np.uint8)


class Member(Protocol):
    """The part of a communicator that a loop uses."""

    world: Platform
    group: VirtualGroup
    rank: int

    def __init__(self, world: Platform, group: VirtualGroup, rank: int, recorder: Recorder) -> None: ...
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> VirtualSend: ...
    def start_recv(self, buffer: Buffer, source: int, tag: int) -> VirtualRecv: ...


class Gathering:
    """The ranks that have entered one collective. `ends`: when each may leave, once all have; empty: by messages."""

    def __init__(self, loop: GroupLoop) -> None:
        self.members = loop.group.members
        self.traffic = loop.traffic()
        self.entered: dict[int, tuple[int, Buffer, Task]] = {}
        self.ends: list[int] | None = None

    def __str__(self) -> str:
        late = [member for rank, member in enumerate(self.members) if rank not in self.entered]
        return f"a collective with ranks {late}"


class GroupLoop:
    """The collectives of one group."""

    def __init__(self, world: Platform, group: VirtualGroup, times: StepTimes) -> None:
        self.world, self.group, self._times = world, group, times
        self._nodes = {world.nodes[member] for member in group.members}
        self._gatherings: dict[int, Gathering] = {}

    def traffic(self) -> tuple[Any, ...]:
        """What changes when a message passes that is not of a loop."""
        if self.world.flows is not None:
            return self.world.flows.carried, self.world.flows.delivered
        network: Any = self.world.network
        ways = (getattr(network, "out", {}), getattr(network, "into", {}))
        return tuple(way.get(node, 0) for node in self._nodes for way in ways)

    def enter(
        self, comm: Member, number: int, schedule: Schedule, buffer: Buffer, operation: Operation
    ) -> bool:
        """Take part in the group's collective of that number; returns when this rank may leave it. False: it has to be
        done by messages, which is not done here."""
        world, rank = self.world, comm.rank
        gathering = self._gatherings.get(number) or self._gatherings.setdefault(number, Gathering(self))
        assert world.current is not None
        gathering.entered[rank] = world.time, buffer, world.current
        if len(gathering.entered) == len(gathering.members):
            del self._gatherings[number]
            ends = gathering.ends = self._ends(gathering, type(comm), schedule, operation)
            for other, (_, _, task) in gathering.entered.items():
                if ends:
                    world.wake_at(ends[other], task)
                elif other != rank:
                    world.wake(task)
        while gathering.ends is None or (gathering.ends and world.time < gathering.ends[rank]):
            world.block(gathering)
        return bool(gathering.ends)

    def _ends(
        self, gathering: Gathering, kind: type[Member], schedule: Schedule, operation: Operation
    ) -> list[int]:
        now, ranks = self.traffic(), range(len(gathering.members))
        if self.world.flows is not None and now[0] != now[1]:
            return []
        entered = np.array([gathering.entered[rank][0] for rank in ranks])
        if now != gathering.traffic:  # the network was in use, but no longer is
            entered[:] = self.world.time
        buffers = [gathering.entered[rank][1] for rank in ranks]
        length = buffers[0].size
        try:
            ends = self._times_of(schedule(len(ranks), length), entered, buffers[0].itemsize)
        except Crowded:
            ends = self._one_by_one(gathering, kind, schedule, entered.tolist())
        if self.world.attention is not None:
            self._count_messages(schedule(len(ranks), length), buffers[0].itemsize, self.world.attention)
        if not any(isinstance(buffer, Phantom) for buffer in buffers):
            compute(schedule, buffers, operation)
        return ends

    def _count_messages(self, steps: Iterable[ScheduleStep], itemsize: int, attention: Attention) -> None:
        """What every rank has sent and received, at once."""
        messages, nbytes = np.zeros((2, len(self.group.members)), np.int64)
        for source, dest, low, high, _ in steps:
            for end in (source, dest):
                np.add.at(messages, end, 1)
                np.add.at(nbytes, end, (high - low) * itemsize)
        for member, count, total in zip(self.group.members, messages.tolist(), nbytes.tolist(), strict=True):
            attention.handled(member, total, count)

    def _times_of(self, steps: Iterable[ScheduleStep], entered: Numbers, itemsize: int) -> list[int]:
        times, at = self._times, entered
        times.begin()
        for source, dest, low, high, _ in steps:
            nbytes = (high - low) * itemsize
            if not nbytes.all():  # a rank that has nothing to send goes on without the others
                raise Crowded
            sent, got = times.step(source, dest, nbytes, at[source], at[dest])
            at = at.copy()
            at[source] = np.maximum(at[source], sent)
            at[dest] = np.maximum(at[dest], got)
        times.keep()
        ends: list[int] = at.tolist()
        return ends

    def _one_by_one(
        self, gathering: Gathering, kind: type[Member], schedule: Schedule, entered: Sequence[int]
    ) -> list[int]:
        """By messages without values, from when the ranks entered and in that order, on a clock of their own."""
        outer, group, buffer = self.world, self.group, gathering.entered[0][1]
        carried = outer.flows.carried if outer.flows is not None else 0
        network = outer.flows or outer.network
        inner = Platform(outer.nodes, network, None, False, "messages", outer.phantom, outer.simulates)
        inner.time = min(entered)
        apart, ends = VirtualGroup(outer.nodes, group.members, group.number), list(entered)
        plans = by_rank(schedule(len(ends), buffer.size), buffer.itemsize)

        def course(rank: int) -> Iterator[None]:
            comm = kind(inner, apart, rank, NullRecorder())
            if inner.time < entered[rank]:
                inner.wake_later(entered[rank])
            while inner.time < entered[rank]:
                yield
            for sends, receives in plans.get(rank, ()):
                incoming = comm.start_recv(receives.buffer, receives.peer, Tag.COLLECTIVE) if receives else None
                outgoing = comm.start_send(sends.buffer, sends.peer, Tag.COLLECTIVE) if sends else None
                for request in (incoming, outgoing):
                    if request is not None and request.ends > inner.time:
                        request.watch(True)
                        while request.ends > inner.time:
                            yield
            ends[rank] = inner.time

        try:
            inner.run_courses([course(rank) for rank in gathering.entered])
        finally:
            if outer.flows is not None:
                outer.flows.begin(outer, outer.nodes)
                outer.flows.carried = outer.flows.delivered = carried  # as if they had been of a loop
        return ends


class MessageEnd(NamedTuple):
    """One end of a message: the other end's rank, and as many bytes."""

    peer: int
    buffer: Phantom


BothEnds = tuple[MessageEnd | None, MessageEnd | None]
"""What a rank sends at a time, and what it receives."""


def by_rank(steps: Iterable[ScheduleStep], itemsize: int) -> dict[int, list[BothEnds]]:
    """What each rank sends and receives at the same time, step by step. Messages of no bytes do not exist."""
    plans: dict[int, list[BothEnds]] = defaultdict(list)
    for source, dest, low, high, _ in steps:
        rows = zip(source.tolist(), dest.tolist(), (itemsize * (high - low)).tolist(), strict=True)
        found = [(here, there, Phantom(nbytes, BYTES)) for here, there, nbytes in rows if nbytes]
        sends = {here: MessageEnd(there, buffer) for here, there, buffer in found}
        receives = {there: MessageEnd(here, buffer) for here, there, buffer in found}
        for rank in sends.keys() | receives.keys():
            plans[rank].append((sends.get(rank), receives.get(rank)))
    return plans


def loop_of(world: Platform, group: VirtualGroup) -> GroupLoop | None:
    """The loop of a group, the same for all its ranks; None if its collectives are by messages."""
    if world.collectives == "messages" or len(group.members) == 1:
        return None
    if group.loop is None:
        hosts = [world.nodes[member] for member in group.members]
        times = step_times(world.flows or world.network, np.array(hosts), group.members)
        group.loop = GroupLoop(world, group, times) if times is not None and _alone(world, hosts) else False
    return group.loop or None


def _alone(world: Platform, hosts: Sequence[int]) -> bool:
    """Whether no rank outside the group can use its ports."""
    places = list(range(max(world.nodes) + 1))
    if world.flows is not None and world.flows.narrowed_racks:
        racks = [host.rack for host in world.flows.hosts]
        if len({racks[host] for host in hosts}) > 1:
            places = racks
    used = {places[host] for host in hosts}
    return sum(places[node] in used for node in world.nodes) == len(hosts)


def compute(schedule: Schedule, buffers: list[Buffer], operation: Operation) -> None:
    """What the messages do to the ranks' buffers, in the same order."""
    size, length = len(buffers), buffers[0].size
    if operation == "sum" and schedule in schedules.SUMS:
        _sum(schedules.SUMS[schedule](size), buffers)
        return
    steps = list(schedule(size, length))
    if not any(step.combine for step in steps):
        _gather(steps[0], buffers)
        return
    reduce = COMBINE[operation]
    longest = max(int((step.high - step.low).max(initial=0)) for step in steps)
    if longest > SHORT:
        for source, dest, low, high, combine in steps:
            for here, there, a, b in zip(source.tolist(), dest.tolist(), low.tolist(), high.tolist(), strict=True):
                into = buffers[there][a:b]
                if combine:
                    reduce(into, buffers[here][a:b], out=into)
                else:
                    into[...] = buffers[here][a:b]
        return
    rows = np.stack(buffers)
    for source, dest, columns, combine in (piece for step in steps for piece in _equal(step)):
        given = rows[source, columns]
        rows[dest, columns] = reduce(rows[dest, columns], given) if combine else given
    for buffer, row in zip(buffers, rows, strict=True):
        buffer[...] = row


def _sum(levels: Levels, buffers: list[Buffer]) -> None:
    """In stretches that stay in the processor's cache."""
    places, pairs = levels
    length, given = buffers[0].size, [buffers[rank] for rank in places]
    width = max(BLOCK // len(buffers), 256)
    for low in range(0, length, width):
        here = slice(low, low + width)
        rows = np.stack([buffer[here] for buffer in given])
        for into, other in pairs:
            np.add(rows[into], rows[other], out=rows[into])
        for buffer in buffers:
            buffer[here] = rows[0]


def _gather(first: ScheduleStep, buffers: list[Buffer]) -> None:
    """Every rank begins with its own part, and all end with all of them."""
    whole = buffers[0].copy()
    for rank, low, high in zip(first.source.tolist(), first.low.tolist(), first.high.tolist(), strict=True):
        whole[low:high] = buffers[rank][low:high]
    for buffer in buffers:
        buffer[...] = whole


def _equal(step: ScheduleStep) -> Iterator[tuple[Numbers, Numbers, Numbers, bool]]:
    """The messages of a step by length: source and dest as columns, and a row of elements each."""
    lengths = step.high - step.low
    for length in np.unique(lengths).tolist():
        some = np.flatnonzero(lengths == length)
        columns = step.low[some, None] + np.arange(length)
        yield step.source[some, None], step.dest[some, None], columns, step.combine
