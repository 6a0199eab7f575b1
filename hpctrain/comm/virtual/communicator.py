"""The communicator of a virtual rank. Its collectives are built from messages."""

from __future__ import annotations

import json
import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from typing import Any, TypeVar

import numpy as np

from hpctrain.comm import algorithms
from hpctrain.comm.base import (
    HALVES,
    SHARED,
    Arena,
    Buffer,
    Communicator,
    Operation,
    Request,
    Share,
    Thread,
    barrier_id,
    decoded,
)
from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual import schedules
from hpctrain.comm.virtual.loops import loop_of
from hpctrain.comm.virtual.platform import Manner, Platform
from hpctrain.comm.virtual.requests import (
    UNTRACED,
    Boxes,
    VirtualRecv,
    VirtualReduce,
    VirtualSend,
    join,
    match,
    verb_span,
)
from hpctrain.comm.virtual.scheduler import Scheduler, Task
from hpctrain.comm.virtual.schedules import Schedule
from hpctrain.comm.virtual.shared import Absentees, Meeting, VirtualArena, VirtualGroup
from hpctrain.trace.recorder import NullRecorder, Recorder

Made = TypeVar("Made")
Course = Callable[["VirtualCommunicator", Buffer], None]
"""A collective by messages."""


class VirtualCommunicator(Communicator):
    """See `Communicator`. Collectives are built from messages and cost what the messages cost; arithmetic is free."""

    def __init__(self, world: Platform, group: VirtualGroup, rank: int, recorder: Recorder) -> None:
        self.world = world
        self.group = group
        self.boxes: Boxes = group.boxes
        self.rank = rank
        self.size = len(group.members)
        self.members = group.members
        self.nodes = group.nodes
        self.local_ranks = group.local_ranks[group.nodes[rank]]
        self.local_rank = self.local_ranks.index(rank)
        self.concurrent = False
        self.simulates = world.simulates
        self.recorder = recorder
        self.host = world.nodes[group.members[rank]]
        self.traced = not isinstance(recorder, NullRecorder)
        self.manner: Manner = "naps"
        self.loop = loop_of(world, group)
        self._count = 0
        self._numbers: dict[tuple[int, int], int] = {}

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> VirtualSend:
        world, send = self.world, VirtualSend(self, buffer, dest, tag)
        if self.traced:
            send.id = self._number(dest, tag, 0)
            self.recorder.open("send", world.time, buffer.nbytes, self.members[dest], send.id)
            self.recorder.close(world.time)
        world.handled(self.members[self.rank], buffer.nbytes)
        send.since = world.time
        box = self.boxes[dest, self.rank, tag]
        if box and isinstance(recv := box[0], VirtualRecv):
            box.popleft()
            match(world, send, recv)
            return send
        there = world.nodes[self.members[dest]]
        if buffer.nbytes <= world.eager_limits[there == self.host]:  # it does not wait for its receiver
            send.buffer = buffer.copy()
            if world.flows is None:
                send.ends, send.arrives = world.network.transfer(self.host, there, buffer.nbytes, world.time)
            else:
                send.into = None
                world.flows.carry(send)
        box.append(send)
        return send

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> VirtualRecv:
        recv = VirtualRecv(self, buffer, source, tag)
        if self.traced:
            recv.id = self._number(source, tag, 1)
        box = self.boxes[self.rank, source, tag]
        if box and isinstance(send := box[0], VirtualSend):
            box.popleft()
            match(self.world, send, recv)
        else:
            box.append(recv)
        return recv

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> int:
        incoming = self.start_recv(into, source, tag)
        outgoing = self.start_send(out, dest, tag)
        world = self.world
        if incoming.ends > world.time:
            incoming.block()
        elif self.traced:
            incoming.leave_span()
        if outgoing.ends > world.time:
            outgoing.block()
        return incoming.elements

    def _number(self, peer: int, tag: int, way: int) -> int:
        """The number of this message among those to (or from) that peer: the same at both ends."""
        key = (2 * peer + way, tag)
        self._numbers[key] = count = self._numbers.get(key, 0) + 1
        return self.group.number << 44 | tag << 36 | count

    def wait_any(self, requests: Sequence[Request]) -> int:
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            for request in requests:
                request.watch(True)
            with verb_span(self, "wait"):
                since = self.world.time
                self.world.block(requests)
                self._notice(since)
                for request in requests:
                    if request.over():
                        request.explain()
                        break
            for request in requests:
                request.watch(False)

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        with self._collective("wait"):
            self._gather_up()

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        all_ranks = self.group.all_ranks
        with self._collective("send" if self.rank == root else "recv"):
            algorithms.tree_broadcast(self, buffer, all_ranks[root:] + all_ranks[:root])

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        with self._collective("reduce"), self._in_library(algorithm == "library"):
            if self._all_reduce(buffer, operation, algorithm):
                self._learn(buffer.nbytes)

    def _all_reduce(self, buffer: Buffer, operation: Operation, algorithm: str) -> bool:
        if algorithm == "library":
            algorithm = "tree" if buffer.nbytes <= 2048 else "halving_doubling"
        reduce = algorithms.all_reduce_by(algorithm)
        wide = buffer.astype(np.float32) if buffer.dtype in HALVES else buffer

        def course(comm: VirtualCommunicator, part: Buffer) -> None:
            reduce(comm, part, operation, comm.group.all_ranks)

        looped = self._perform(course, schedules.ALL_REDUCE.get(algorithm), wide, operation)
        if wide is not buffer:
            buffer[:] = wide
        return looped

    def _perform(
        self, course: Course, schedule: Schedule | None, buffer: Buffer, operation: Operation = "sum"
    ) -> bool:
        """As one loop, if it can be: then True; else by messages, which record the bytes."""
        if self.loop is None or schedule is None:
            looped = False
        else:
            since = self.world.time
            looped = self.loop.enter(self, self._count, schedule, buffer, operation)
            if looped:
                self._notice(since)
        if not looped:
            course(self, buffer)
        return looped

    def _learn(self, nbytes: int) -> None:
        if self.traced:
            self.recorder.learn(nbytes, -1, self.group.number << 44 | self._count)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        """Runs in a separate coroutine of this rank, with its own messages."""
        self._count += 1
        id = self.group.number << 44 | self._count
        beside = copy(self)
        beside.boxes = self._shared("started", self.size, lambda: defaultdict(deque))
        beside.recorder, beside.traced, beside.manner = NullRecorder(), False, "beside"
        name = f"a started all-reduce of rank {self.members[self.rank]}"
        task = self.world.start(name, lambda: beside._all_reduce(buffer, operation, "library"), inside=1)
        return VirtualReduce(self, task, buffer.nbytes, id)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        self._all_gather(buffer, bounds, short=False)

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int], short: bool) -> None:
        with self._collective("recv"), self._in_library(short=short):

            def course(comm: VirtualCommunicator, part: Buffer) -> None:
                algorithms.ring_all_gather(comm, part, bounds, comm.group.all_ranks)

            if self._perform(course, schedules.ring_all_gather(bounds), buffer):
                self._learn(buffer.nbytes)

    def gather_rows(self, row: Buffer) -> Buffer:
        """One table for all ranks, which they cannot change: with thousands of ranks, one for each would not fit. Its
        messages carry no values."""
        table = self._table(row)
        bounds = range(0, table.size + 1, row.size) if row.size else [0] * (self.size + 1)
        self._all_gather(Phantom(table.size, table.dtype), bounds, short=True)
        return table

    def start_gather_rows(self, row: Buffer) -> tuple[Request, Buffer]:
        """The same."""
        table = self._table(row + row.dtype.type(0))  # as a sum has it: -0.0 is 0.0
        return self.start_all_reduce(Phantom(table.size, table.dtype)), table

    def _table(self, row: Buffer) -> Buffer:
        table = self._shared("table", self.size, lambda: np.zeros((self.size, row.size), row.dtype))
        table[self.rank] = row
        seen = table.view()
        seen.flags.writeable = False
        return seen

    def gather_json(self, value: Any) -> list[Any]:
        """As of `Communicator`, with the same messages; the texts exist once for all ranks."""
        text = json.dumps(value).encode()
        texts = self._shared("texts", self.size, lambda: [b""] * self.size)
        texts[self.rank] = text
        lengths = self.gather_rows(np.array([len(text)], np.int64))[:, 0]
        bounds = self._shared("bounds", self.size, lambda: [0, *np.cumsum(lengths).tolist()])
        self.all_gather(Phantom(bounds[-1], np.dtype(np.uint8)), bounds)
        return decoded(texts)

    def split(self, color: int | None, key: int = 0) -> VirtualCommunicator | None:
        answers = self._meet("split", self.group.all_ranks, (color, key))
        chosen = self._shared("colors", self.size, lambda: by_color(answers)).get(color)
        if color is None or chosen is None:
            return None
        number = zlib.crc32(f"{self.group.number}/{self._count}/{color}".encode()) & 0x3FFFF

        def make() -> VirtualGroup:
            return VirtualGroup(self.world.nodes, tuple(self.members[rank] for rank in chosen), number)

        group = self._shared(("group", color), len(chosen), make)
        return VirtualCommunicator(self.world, group, chosen.index(self.rank), self.recorder)

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        mine = Phantom(length, dtype) if self.world.phantom and share != "board" else np.zeros(length, dtype)
        if share not in SHARED:
            return VirtualArena([mine], 0, [0], [], -1)
        arrived = self._meet("arena", self.local_ranks, mine)
        parts = [arrived[rank] for rank in self.local_ranks]
        id = barrier_id(self.group.number, self._count)
        name, takers = ("epochs", self.local_ranks[0]), len(parts)
        board: tuple[list[int], list[Task]] = self._shared(name, takers, lambda: ([0] * len(parts), []))
        return VirtualArena(parts, self.local_rank, *board, id)

    def can_share(self, nbytes: int) -> str | None:
        return None

    def notify(self, arena: Arena) -> None:
        assert isinstance(arena, VirtualArena)
        arena.epochs[arena.index] += 1
        tasks, arena.waiting[:] = list(arena.waiting), []
        for task in tasks:
            self.world.wake(task)

    def wait(self, arena: Arena) -> None:
        assert isinstance(arena, VirtualArena)
        epoch, world = arena.epochs[arena.index], self.world
        if len(arena.epochs) == 1:
            return
        since = world.time
        with verb_span(self, "wait", id=arena.id | epoch):  # also for the last rank, which others waited for
            while min(arena.epochs) < epoch:
                late = [self.members[self.local_ranks[i]] for i, e in enumerate(arena.epochs) if e < epoch]
                assert world.current is not None
                arena.waiting.append(world.current)
                world.block(f"notify of epoch {epoch} by ranks {late}")
            self._notice(since, "idles")

    def behind(self, arena: Arena) -> int:
        assert isinstance(arena, VirtualArena)
        return arena.epochs[arena.index] - min(arena.epochs)

    def sync(self, arena: Arena) -> None:
        """Nothing to do: only one rank runs at a time."""

    def _meet(self, what: str, ranks: Sequence[int], value: Any) -> dict[int, Any]:
        """The values of these ranks, by rank; waits until all have arrived."""
        self._count += 1
        meetings, key = self.group.meetings, (what, self._count, ranks[0])
        meeting = meetings.setdefault(key, Meeting())
        meeting.values[self.rank] = value
        if len(meeting.values) == len(ranks):
            for task in meeting.tasks:
                self.world.wake(task)
        while len(meeting.values) < len(ranks):
            assert self.world.current is not None
            meeting.tasks.append(self.world.current)
            self.world.block(Absentees(what, self.members, ranks, meeting))
        self._take(key, meeting, len(ranks))
        return meeting.values

    def _shared(self, name: Any, takers: int, make: Callable[[], Made]) -> Made:
        """One object for all `takers` ranks that request it by the same name, after the same number of collectives."""
        meetings, key = self.group.meetings, (name, self._count)
        meeting = meetings.setdefault(key, Meeting())
        if not meeting.values:
            meeting.values[0] = make()
        self._take(key, meeting, takers)
        made: Made = meeting.values[0]
        return made

    def _take(self, key: Any, meeting: Meeting, takers: int) -> None:
        meeting.taken += 1
        if meeting.taken == takers:
            del self.group.meetings[key]

    @contextmanager
    def _collective(self, kind: str) -> Iterator[None]:
        """A collective built from messages, which record the bytes."""
        self._count += 1
        task = self.world.current
        assert task is not None
        task.inside += 1
        try:
            with verb_span(self, kind, 0, self.group.number << 44 | self._count):
                yield
        finally:
            task.inside -= 1
            if task.modes is not None and not task.inside:
                self.world.restore(task)

    @contextmanager
    def _in_library(self, library: bool = True, short: bool = False) -> Iterator[None]:
        """A collective of the MPI library, which polls, other than messages. Where cores are scarce, ranks do as real
        ones: they start it and nap, or if they share nodes, or it is short, they gather first."""
        attention = self.world.attention
        apart = self.group.apart and not short
        if attention is None or (attention.naps and apart):
            yield
            return
        if attention.naps:
            self._gather_up()
        before, self.manner = self.manner, "polls" if library else self.manner
        try:
            yield
        finally:
            self.manner = before

    def _gather_up(self) -> None:
        before, self.manner = self.manner, "idles"
        self._perform(_barrier, schedules.dissemination_barrier, np.zeros(1, np.uint8))
        self.manner = before

    def _notice(self, since: int, manner: Manner | None = None) -> None:
        self.world.notice(self.members[self.rank], since, manner or self.manner)

    # -- time, threads -------------------------------------------------------------------------------------
    def now(self) -> int:
        return self.world.time

    def sleep(self, seconds: float) -> None:
        self.pass_time(int(seconds * 1e9))

    def pass_time(self, nanoseconds: int) -> None:
        """Let this rank sleep for that time."""
        self.world.sleep_until(self.world.time + nanoseconds)

    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0, items: int = 0
    ) -> AbstractContextManager[Any]:
        if self.traced or self.world.compute is not None:
            return ComputeSpan(self, kind, bytes, peer, id, items, flops)
        return UNTRACED

    def spawn(self, function: Callable[[], Any]) -> Thread:
        world = self.world
        return VirtualThread(world, world.start(f"a thread of rank {self.members[self.rank]}", function))

    def free(self) -> None:
        return None


def by_color(answers: dict[int, tuple[int | None, int]]) -> dict[int | None, list[int]]:
    """The ranks of each color, ordered by (key, rank). `answers`: (color, key) by rank."""
    found: dict[int | None, list[int]] = {}
    for _, rank in sorted((key, rank) for rank, (_, key) in answers.items()):
        found.setdefault(answers[rank][0], []).append(rank)
    return found


def _barrier(comm: VirtualCommunicator, token: Buffer) -> None:
    algorithms.dissemination_barrier(comm, comm.group.all_ranks)


class VirtualThread(Thread):
    def __init__(self, world: Scheduler, task: Task) -> None:
        self._world = world
        self._task = task

    def join(self) -> Any:
        join(self._world, self._task)
        if self._task.error is not None:
            raise self._task.error
        return self._task.result


class ComputeSpan:
    """Traces its block and advances the clock by the cost of the block."""

    __slots__ = ("_arguments", "_comm")

    def __init__(self, comm: VirtualCommunicator, *arguments: Any) -> None:
        self._comm = comm
        self._arguments = arguments

    def __enter__(self) -> None:
        comm = self._comm
        if comm.traced:
            kind, nbytes, peer, id, items, flops = self._arguments
            comm.recorder.open(kind, comm.world.time, nbytes, peer, id, items, flops)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        comm = self._comm
        compute = comm.world.compute
        name, nbytes, _, _, _, flops = self._arguments
        if compute is not None and kind is None:
            comm.pass_time(compute(comm.members[comm.rank], name, nbytes, flops))
        if comm.traced:
            comm.recorder.close(comm.world.time)
