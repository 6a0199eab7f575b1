"""Collectives of virtual ranks as one loop over their steps, instead of one message after the other.

No rank can leave an all-reduce, an all-gather or a barrier before the last has entered. So the last one computes, for
all ranks at once, when each of them would leave by messages, from when each of them entered (`lockstep`), and does the
arithmetic in the same order. The times are those of messages to the nanosecond, as long as only this group uses its
links meanwhile:
- If the group's own messages compete with each other, they are exchanged one by one, on a clock of their own.
- Among more than 256 ranks, messages up to the eager limit that meet at a port count as if each were alone there:
  all-reduces of less than about 100 kB end up to a fifth earlier than by messages, larger ones a few per cent.
- If another message was under way on the network since the first rank entered, the ranks exchange messages from when
  the last has entered, so up to that much later.
- What ranks send that have left, while messages of the collective are still under way, does not compete with them. If
  the group begins another collective meanwhile, as with started all-reduces, the one waits at each link for the other
  (but short messages do not), instead of sharing it: several that overlap end up to a fifth earlier than by messages.
- A group that shares its hosts (or an oversubscribed uplink) with ranks outside always exchanges messages, and so do
  the hierarchical algorithm and broadcasts.
In a trace such a collective is one span per rank, as one of an MPI library: with the bytes of its buffer, and peer -1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from hpctrain.comm.algorithms import COMBINE
from hpctrain.comm.base import Buffer, Operation
from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual.lockstep import Crowded, StepTimes, step_times
from hpctrain.comm.virtual.platform import Platform
from hpctrain.comm.virtual.scheduler import Task
from hpctrain.comm.virtual.schedules import Numbers, Schedule, ScheduleStep
from hpctrain.comm.virtual.shared import VirtualGroup
from hpctrain.trace.recorder import NullRecorder, Recorder

SHORT = 4096  # elements per message up to which the arithmetic of all messages of a step is one operation


class Member(Protocol):
    """The part of a communicator that a loop uses."""

    world: Platform
    group: VirtualGroup
    rank: int

    def __init__(self, world: Platform, group: VirtualGroup, rank: int, recorder: Recorder) -> None: ...


Course = Callable[[Any, Buffer], None]
"""(communicator, buffer): the collective by messages"""


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
        self, comm: Member, number: int, course: Course, schedule: Schedule, buffer: Buffer, operation: Operation
    ) -> bool:
        """Take part in the group's collective of that number; returns when this rank may leave it. False: it has to be
        done by messages, which is not done here."""
        world, rank = self.world, comm.rank
        gathering = self._gatherings.get(number) or self._gatherings.setdefault(number, Gathering(self))
        assert world.current is not None
        gathering.entered[rank] = world.time, buffer, world.current
        if len(gathering.entered) == len(gathering.members):
            del self._gatherings[number]
            ends = gathering.ends = self._ends(gathering, type(comm), course, schedule, operation)
            for other, (_, _, task) in gathering.entered.items():
                if ends:
                    world.wake_at(ends[other], task)
                elif other != rank:
                    world.wake(task)
        while gathering.ends is None or (gathering.ends and world.time < gathering.ends[rank]):
            world.block(gathering)
        return bool(gathering.ends)

    def _ends(
        self, gathering: Gathering, kind: type[Member], course: Course, schedule: Schedule, operation: Operation
    ) -> list[int]:
        now = self.traffic()
        if now != gathering.traffic or (self.world.flows is not None and now[0] != now[1]):
            return []
        ranks = range(len(gathering.members))
        entered = np.array([gathering.entered[rank][0] for rank in ranks])
        buffers = [gathering.entered[rank][1] for rank in ranks]
        steps = list(schedule(len(ranks), buffers[0].size))
        try:
            ends = self._times_of(steps, entered, buffers[0].itemsize)
        except Crowded:
            return self._one_by_one(gathering, kind, course)
        if not any(isinstance(buffer, Phantom) for buffer in buffers):
            compute(steps, buffers, operation)
        return ends

    def _times_of(self, steps: Sequence[ScheduleStep], entered: Numbers, itemsize: int) -> list[int]:
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

    def _one_by_one(self, gathering: Gathering, kind: type[Member], course: Course) -> list[int]:
        """By messages, from when the ranks entered and in that order, on a clock of their own."""
        outer, group, ends = self.world, self.group, [0] * len(gathering.members)
        carried = outer.flows.carried if outer.flows is not None else 0
        network = outer.flows or outer.network
        inner = Platform(outer.nodes, network, None, False, "messages", outer.phantom, outer.simulates)
        inner.time = min(time for time, _, _ in gathering.entered.values())
        apart = VirtualGroup(outer.nodes, group.members, group.number)

        def run(rank: int, start: int, buffer: Buffer) -> None:
            task = inner.current
            assert task is not None
            if inner.time < start:
                inner.wake_at(start, task)
            while inner.time < start:
                inner.block("its turn")
            course(kind(inner, apart, rank, NullRecorder()), buffer)
            ends[rank] = inner.time

        tasks = [
            (f"rank {gathering.members[rank]}", partial(run, rank, start, buffer))
            for rank, (start, buffer, _) in gathering.entered.items()
        ]
        try:
            inner.run_all(tasks)
        finally:
            if outer.flows is not None:
                outer.flows.begin(outer, outer.nodes)
                outer.flows.carried = outer.flows.delivered = carried  # as if they had been of a loop
        return ends


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


def compute(steps: Sequence[ScheduleStep], buffers: list[Buffer], operation: Operation) -> None:
    """What the messages of these steps do to the ranks' buffers, in the same order."""
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
