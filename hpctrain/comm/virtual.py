"""Virtual ranks: many ranks as coroutines of one process, on a virtual clock. Deterministic.

`World(size).run(function)` calls `function(communicator)` once per rank. A rank runs until it must wait; then
the next one that can, in the order in which they became able to. Time passes only in messages (what the
`network` says), in spans of the caller (what `compute` says) and in `sleep`. Where nobody can go on and no event
is to come, `DeadlockError` lists who waits for what.
"""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any, TypeVar

import numpy as np

from hpctrain.comm import algorithms
from hpctrain.comm.base import (
    ANY_SOURCE,
    BFLOAT16,
    Arena,
    Buffer,
    Communicator,
    Counter,
    Operation,
    Request,
    Share,
    Status,
    Thread,
    barrier_id,
)
from hpctrain.comm.coroutines import DeadlockError, Scheduler, Task
from hpctrain.comm.network import FreeNetwork, Network
from hpctrain.trace.recorder import NullRecorder, Recorder

__all__ = ["DeadlockError", "VirtualCommunicator", "World"]

Compute = Callable[[int, str, int, float], int]
"""(rank, span kind, bytes, flops) -> nanoseconds that the span costs in virtual time."""

Made = TypeVar("Made")
SENT = Status(-1, -1, -1)
LATER = 2**63
UNTRACED = nullcontext()


class World(Scheduler):
    """`size` virtual ranks on `nodes` (rank -> node index; default: all on one).

    `isolate_torch`: save and restore torch's grad mode, autocast and CPU random state at every change of rank.
    Attributes after a run: `time` (virtual nanoseconds), `resumptions` (how often one rank gave way to another).
    """

    def __init__(
        self,
        size: int,
        nodes: Sequence[int] | None = None,
        network: Network | None = None,
        compute: Compute | None = None,
        recorders: Sequence[Recorder] | None = None,
        isolate_torch: bool = True,
    ) -> None:
        super().__init__(isolate_torch)
        self.size = size
        self.nodes = tuple(nodes) if nodes is not None else (0,) * size
        self.network: Network = network or FreeNetwork()
        self.compute = compute
        self.recorders = recorders

    def run(self, function: Callable[[VirtualCommunicator], Any]) -> list[Any]:
        """Run all ranks to their end; returns their results in rank order.

        Raises the first exception of a rank, or DeadlockError.
        """
        group = _Group(self, tuple(range(self.size)), 1)
        recorders = self.recorders or [NullRecorder()] * self.size
        comms = [VirtualCommunicator(self, group, rank, recorders[rank]) for rank in range(self.size)]
        return self.run_all([(f"rank {comm.rank}", partial(function, comm)) for comm in comms])


Box = deque["_Operation"]
"""What was started and has no counterpart yet: only sends, or only receives."""


class _Group:
    """What the ranks of one communicator share."""

    def __init__(self, world: World, members: tuple[int, ...], number: int) -> None:
        self.members = members
        self.number = number
        hosts = [world.nodes[rank] for rank in members]
        order = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
        self.nodes = tuple(order[host] for host in hosts)
        on_node: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            on_node.setdefault(node, []).append(rank)
        self.local_ranks = {node: tuple(ranks) for node, ranks in on_node.items()}
        self.everybody = tuple(range(len(members)))
        self.boxes: defaultdict[tuple[int, int, int], Box] = defaultdict(deque)  # by dest, source, tag
        self.unnamed: defaultdict[tuple[int, int], Box] = defaultdict(deque)  # by dest, tag: from ANY_SOURCE
        self.meetings: dict[Any, _Meeting] = {}


class _Meeting:
    """Something that ranks of a group have in common for a while: forgotten when all of them have taken it."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.tasks: list[Task] = []
        self.taken = 0


class _Operation(Request):
    """A send or a receive in progress: over when the clock comes to `ends`, which is LATER until that is known.

    Of a receive: `elements`, how many came. Of a send: `since` when it could have been received, and `arrives`,
    when it is there if it set out before its receiver was (else -1).
    """

    __slots__ = ("arrives", "buffer", "comm", "elements", "ends", "id", "peer", "since", "tag", "task")
    verb = ""

    def __init__(self, comm: VirtualCommunicator, buffer: Buffer, peer: int, tag: int) -> None:
        self.comm = comm
        self.buffer = buffer
        self.peer = peer
        self.tag = tag
        self.ends = LATER
        self.task: Task | None = None
        self.arrives = self.since = self.elements = self.id = -1

    def test(self) -> bool:
        return self.ends <= self.comm.world.time

    def pause(self, task: Task | None) -> None:
        """The task waits for it (None: no longer)."""
        self.task = task
        if task is not None and self.ends < LATER:
            self.comm.world.wake_at(self.ends, task)

    def block(self) -> None:
        """Wait until it is over. For operations that are not."""
        comm = self.comm
        world = comm.world
        if comm.traced:
            peer = comm.members[self.peer] if self.peer >= 0 else -1
            comm.recorder.open(self.verb, world.time, 0, peer, self.id)
        self.task = world.current
        if self.ends < LATER and self.task is not None:
            world.wake_at(self.ends, self.task)
        while self.ends > world.time:
            world.block(self)
        if comm.traced:
            self.learn()
            comm.recorder.close(world.time)

    def learn(self) -> None:
        """Before the span of having waited for it is closed."""

    def __str__(self) -> str:
        peer = "any rank" if self.peer == ANY_SOURCE else f"rank {self.comm.members[self.peer]}"
        return f"{self.verb} {peer} (tag {int(self.tag)}, {self.buffer.nbytes} bytes)"


class _Send(_Operation):
    __slots__ = ()
    verb = "send"

    def wait(self) -> Status:
        if not self.test():
            self.block()
        return SENT


class _Recv(_Operation):
    __slots__ = ("told",)
    verb = "recv"

    def __init__(self, comm: VirtualCommunicator, buffer: Buffer, peer: int, tag: int) -> None:
        super().__init__(comm, buffer, peer, tag)
        self.told = not comm.traced

    def test(self) -> bool:
        if self.ends > self.comm.world.time:
            return False
        if not self.told:
            self.tell()
        return True

    def over(self) -> bool:
        """Like `test`, but leaves no trace."""
        return self.ends <= self.comm.world.time

    def tell(self) -> None:
        """Leave a span of no length: it was there before anybody waited for it."""
        comm = self.comm
        comm.recorder.open("recv", comm.world.time, 0, -1, self.id)
        self.learn()
        comm.recorder.close(comm.world.time)

    def learn(self) -> None:
        self.told = True
        comm = self.comm
        comm.recorder.learn(self.elements * self.buffer.itemsize, comm.members[self.peer], self.id)

    def wait(self) -> Status:
        if not self.test():
            self.block()
        return Status(self.peer, self.tag, self.elements)

    def cancel(self) -> None:
        comm = self.comm
        named = self.peer != ANY_SOURCE
        box = comm.boxes[comm.rank, self.peer, self.tag] if named else comm.unnamed[comm.rank, self.tag]
        if self in box:
            box.remove(self)
            self.ends = comm.world.time


def _match(world: World, send: _Send, recv: _Recv) -> None:
    """Move the bytes, and let time pass for both ends."""
    out, into, now = send.buffer, recv.buffer, world.time
    if out.size == into.size:
        into[...] = out
    elif out.size < into.size:
        into[: out.size] = out
    else:
        raise ValueError(f"a message of {out.nbytes} bytes came for a buffer of {into.nbytes}: {recv}")
    recv.peer, recv.elements = send.comm.rank, out.size
    arrives = send.arrives
    if arrives < 0:
        send.ends, arrives = world.network.transfer(send.comm.host, recv.comm.host, out.nbytes, now)
        if send.task is not None:
            world.wake_at(send.ends, send.task)
    recv.ends = arrives if arrives > now else now
    if recv.task is not None:
        world.wake_at(recv.ends, recv.task)


class VirtualCommunicator(Communicator):
    """See `Communicator`. Collectives are built from messages and cost what these cost; their sums are free."""

    def __init__(self, world: World, group: _Group, rank: int, recorder: Recorder) -> None:
        self.world = world
        self.group = group
        self.boxes, self.unnamed = group.boxes, group.unnamed
        self.rank = rank
        self.size = len(group.members)
        self.members = group.members
        self.nodes = group.nodes
        self.local_ranks = group.local_ranks[group.nodes[rank]]
        self.local_rank = self.local_ranks.index(rank)
        self.concurrent = False
        self.recorder = recorder
        self.host = world.nodes[group.members[rank]]
        self.traced = not isinstance(recorder, NullRecorder)
        self._count = 0
        self._numbers: dict[tuple[int, int], int] = {}

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> _Send:
        world, send = self.world, _Send(self, buffer, dest, tag)
        if self.traced:
            send.id = self._number(dest, tag, 0)
            self.recorder.open("send", world.time, buffer.nbytes, self.members[dest], send.id)
            self.recorder.close(world.time)
        box = self.boxes[dest, self.rank, tag]
        if not (box and box[0].verb == "recv") and self.unnamed:
            box = self.unnamed[dest, tag] or box
        if box and box[0].verb == "recv":
            _match(world, send, box.popleft())  # type: ignore[arg-type]
            return send
        send.since = world.time
        if buffer.nbytes <= world.network.eager_limit:  # it does not wait for its receiver
            send.buffer = buffer.copy()
            there = world.nodes[self.members[dest]]
            send.ends, send.arrives = world.network.transfer(self.host, there, buffer.nbytes, world.time)
            send.since = send.arrives
        box.append(send)
        return send

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> _Recv:
        """Of several messages for ANY_SOURCE the earliest comes first; a receive that names its source, before."""
        recv = _Recv(self, buffer, source, tag)
        if self.traced:
            recv.id = self._number(source, tag, 1)
        if source == ANY_SOURCE:
            box = self._earliest(tag) or self.unnamed[self.rank, tag]
        else:
            box = self.boxes[self.rank, source, tag]
        if box and box[0].verb == "send":
            _match(self.world, box.popleft(), recv)  # type: ignore[arg-type]
        else:
            box.append(recv)
        return recv

    def _earliest(self, tag: int) -> Box | None:
        boxes = [self.boxes.get((self.rank, source, tag)) for source in range(self.size)]
        sent = [box for box in boxes if box and box[0].verb == "send"]
        return min(sent, key=lambda box: box[0].since, default=None)

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> Status:
        incoming = self.start_recv(into, source, tag)
        outgoing = self.start_send(out, dest, tag)
        world = self.world
        if incoming.ends > world.time:
            incoming.block()
        elif self.traced:
            incoming.tell()
        if outgoing.ends > world.time:
            outgoing.block()
        return Status(incoming.peer, tag, incoming.elements)

    def _number(self, peer: int, tag: int, way: int) -> int:
        """The number of this message among those to (or from) that peer: equal at both ends."""
        key = (2 * peer + way, tag)
        self._numbers[key] = count = self._numbers.get(key, 0) + 1
        return self.group.number << 44 | tag << 36 | count

    def wait_any(self, requests: Sequence[Request]) -> int:
        world = self.world
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            for request in requests:
                request.pause(world.current)  # type: ignore[attr-defined]
            with self._own_span("wait"):
                world.block(requests)
                first = next((request for request in requests if isinstance(request, _Recv) and request.over()), None)
                if first is not None and self.traced:
                    self.recorder.learn(0, self.members[first.peer], first.id)
            for request in requests:
                request.pause(None)  # type: ignore[attr-defined]

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        with self._collective("wait"):
            algorithms.dissemination_barrier(self, self.group.everybody)

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        everybody = self.group.everybody
        with self._collective("send" if self.rank == root else "recv"):
            algorithms.tree_broadcast(self, buffer, everybody[root:] + everybody[:root])

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        with self._collective("reduce"):
            self._all_reduce(buffer, operation, algorithm)

    def _all_reduce(self, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        if algorithm == "library":
            algorithm = "tree" if buffer.nbytes <= 2048 else "halving_doubling"
        reduce = algorithms.all_reduce_by(algorithm)
        if buffer.dtype == BFLOAT16:
            wide = buffer.astype(np.float32)
            reduce(self, wide, operation, self.group.everybody)
            buffer[:] = wide
        else:
            reduce(self, buffer, operation, self.group.everybody)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        """Runs in a coroutine beside this rank's own, with messages of its own."""
        self._count += 1
        id = self.group.number << 44 | self._count
        beside = copy(self)
        beside.boxes = self._shared("started", self.size, lambda: defaultdict(deque))
        beside.recorder, beside.traced = NullRecorder(), False
        name = f"a started all-reduce of rank {self.members[self.rank]}"
        task = self.world.start(name, lambda: beside._all_reduce(buffer, operation, "library"), inside=1)
        return _Started(self, task, buffer.nbytes, id)

    def reduce_scatter(self, buffer: Buffer, bounds: Sequence[int], operation: Operation = "sum") -> None:
        with self._collective("reduce"):
            algorithms.ring_reduce_scatter(self, buffer, bounds, operation, self.group.everybody)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        with self._collective("recv"):
            algorithms.ring_all_gather(self, buffer, bounds, self.group.everybody)

    def split(self, color: int | None, key: int = 0) -> VirtualCommunicator | None:
        answers = self._meet("split", self.group.everybody, (color, key))
        if color is None:
            return None
        chosen = [r for _, r in sorted((k, r) for r, (c, k) in enumerate(answers) if c == color)]
        number = zlib.crc32(f"{self.group.number}/{self._count}/{color}".encode()) & 0x3FFFF
        members = tuple(self.members[r] for r in chosen)
        group = self._shared(("group", color), len(chosen), lambda: _Group(self.world, members, number))
        return VirtualCommunicator(self.world, group, chosen.index(self.rank), self.recorder)

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        mine = np.zeros(length, dtype)
        if share == "rank":
            return _VirtualArena([mine], 0, [0], [], -1)
        parts = self._meet("arena", self.local_ranks, mine)
        id = barrier_id(self.group.number, self._count)
        name, takers = ("epochs", self.local_ranks[0]), len(parts)
        board: tuple[list[int], list[Task]] = self._shared(name, takers, lambda: ([0] * len(parts), []))
        return _VirtualArena(parts, self.local_rank, *board, id)

    def can_share(self, nbytes: int) -> str | None:
        return None

    def notify(self, arena: Arena) -> None:
        assert isinstance(arena, _VirtualArena)
        arena.epochs[arena.index] += 1
        tasks, arena.waiting[:] = list(arena.waiting), []
        for task in tasks:
            self.world.wake(task)

    def wait(self, arena: Arena) -> None:
        assert isinstance(arena, _VirtualArena)
        epoch, world = arena.epochs[arena.index], self.world
        if len(arena.epochs) == 1:
            return
        with self._own_span("wait", id=arena.id | epoch):  # also of who came last: for whom the others waited
            while min(arena.epochs) < epoch:
                late = [self.members[self.local_ranks[i]] for i, e in enumerate(arena.epochs) if e < epoch]
                assert world.current is not None
                arena.waiting.append(world.current)
                world.block(f"notify of epoch {epoch} by ranks {late}")

    def counter(self) -> Counter:
        self._count += 1
        return _VirtualCounter(self._shared("counter", self.size, lambda: [0]))

    def _meet(self, what: str, who: Sequence[int], value: Any) -> list[Any]:
        """Values of all of `who`, in their order; waits until all have come."""
        self._count += 1
        meetings, key = self.group.meetings, (what, self._count, who[0])
        meeting = meetings.setdefault(key, _Meeting())
        meeting.values[self.rank] = value
        if len(meeting.values) == len(who):
            for task in meeting.tasks:
                self.world.wake(task)
        while len(meeting.values) < len(who):
            assert self.world.current is not None
            meeting.tasks.append(self.world.current)
            late = [self.members[r] for r in who if r not in meeting.values]
            self.world.block(f"{what} with ranks {late}")
        self._take(key, meeting, len(who))
        return [meeting.values[r] for r in who]

    def _shared(self, name: Any, takers: int, make: Callable[[], Made]) -> Made:
        """One object for all `takers` ranks that ask for it by the same name at the same place of their course."""
        meetings, key = self.group.meetings, (name, self._count)
        meeting = meetings.setdefault(key, _Meeting())
        if not meeting.values:
            meeting.values[0] = make()
        self._take(key, meeting, takers)
        made: Made = meeting.values[0]
        return made

    def _take(self, key: Any, meeting: _Meeting, takers: int) -> None:
        meeting.taken += 1
        if meeting.taken == takers:
            del self.group.meetings[key]

    @contextmanager
    def _collective(self, kind: str) -> Iterator[None]:
        """Made of messages, which carry the bytes."""
        self._count += 1
        task = self.world.current
        assert task is not None
        task.inside += 1
        try:
            with self._own_span(kind, 0, self.group.number << 44 | self._count):
                yield
        finally:
            task.inside -= 1
            if task.torch is not None and not task.inside:
                self.world.restore_torch(task)

    # -- time, threads -------------------------------------------------------------------------------------
    def now(self) -> int:
        return self.world.time

    def sleep(self, seconds: float) -> None:
        self.pass_time(int(seconds * 1e9))

    def pass_time(self, nanoseconds: int) -> None:
        """Let this rank do nothing for so long."""
        world = self.world
        task, end = world.current, world.time + nanoseconds
        assert task is not None
        if nanoseconds > 0:
            world.wake_at(end, task)
        while world.time < end:
            world.block("the end of a sleep")

    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0, items: int = 0
    ) -> AbstractContextManager[Any]:
        if self.traced or self.world.compute is not None:
            return _VirtualSpan(self, kind, bytes, peer, id, items, flops)
        return UNTRACED

    def _own_span(self, kind: str, nbytes: int = 0, id: int = -1) -> AbstractContextManager[Any]:
        """Of a verb, which takes the time that its messages take and no more."""
        return _VirtualSpan(self, kind, nbytes, -1, id, 0, None) if self.traced else UNTRACED

    def spawn(self, function: Callable[[], Any]) -> Thread:
        world = self.world
        return _VirtualThread(world, world.start(f"a thread of rank {self.members[self.rank]}", function))

    def free(self) -> None:
        return None


class _Started(Request):
    """A started all-reduce."""

    def __init__(self, comm: VirtualCommunicator, task: Task, nbytes: int, id: int) -> None:
        self._comm, self._work, self._nbytes, self._id = comm, task, nbytes, id

    def pause(self, task: Task | None) -> None:
        """The task waits for it (None: no longer)."""
        self._work.joiner = task

    def test(self) -> bool:
        return self._work.finished

    def wait(self) -> Status:
        if not self._work.finished:
            with self._comm._own_span("reduce", self._nbytes, self._id):
                _join(self._comm.world, self._work)
        return SENT

    def __str__(self) -> str:
        return self._work.name


def _join(world: World, work: Task) -> None:
    while not work.finished:
        work.joiner = world.current
        world.block(work.name)


class _VirtualArena(Arena):
    def __init__(self, parts: list[Buffer], index: int, epochs: list[int], waiting: list[Task], id: int) -> None:
        self.parts = parts
        self.index = index
        self.mine = parts[index]
        self.epochs = epochs
        self.waiting = waiting
        self.id = id

    def free(self) -> None:
        self.parts = []
        self.mine = None


class _VirtualCounter(Counter):
    def __init__(self, cell: list[int]) -> None:
        self._cell = cell

    def fetch_add(self, amount: int) -> int:
        before = self._cell[0]
        self._cell[0] += amount
        return before

    def free(self) -> None:
        return None


class _VirtualThread(Thread):
    def __init__(self, world: World, task: Task) -> None:
        self._world = world
        self._task = task

    def join(self) -> Any:
        _join(self._world, self._task)
        if self._task.error is not None:
            raise self._task.error
        return self._task.result


class _VirtualSpan:
    """Traces its block and lets the time pass that the block costs (`flops` None: none)."""

    __slots__ = ("_arguments", "_comm")

    def __init__(self, comm: VirtualCommunicator, *arguments: Any) -> None:
        self._comm = comm
        self._arguments = arguments

    def __enter__(self) -> None:
        comm = self._comm
        if comm.traced:
            kind, nbytes, peer, id, items, flops = self._arguments
            comm.recorder.open(kind, comm.world.time, nbytes, peer, id, items, flops or 0.0)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        comm = self._comm
        compute = comm.world.compute
        name, nbytes, _, _, _, flops = self._arguments
        if compute is not None and kind is None and flops is not None:
            comm.pass_time(compute(comm.members[comm.rank], name, nbytes, flops))
        if comm.traced:
            comm.recorder.close(comm.world.time)
