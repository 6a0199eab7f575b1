"""Virtual ranks: many ranks as coroutines of one process, on a virtual clock. Deterministic.

`World(size).run(function)` calls `function(communicator)` once per rank. A rank runs until it must wait; then
the next one that can, in the order in which they became able to. Time passes only in messages (what the
`network` says), in spans (what `compute` says) and in `sleep`. Where nobody can go on and no event is to come,
`DeadlockError` lists who waits for what.
"""

from __future__ import annotations

import heapq
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import greenlet
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
)
from hpctrain.comm.network import FreeNetwork, Network
from hpctrain.trace.recorder import NullRecorder, Recorder

Compute = Callable[[int, str, int, float], int]
"""(rank, span kind, bytes, flops) -> nanoseconds that the span costs in virtual time."""

SENT = Status(-1, -1, -1)


class DeadlockError(RuntimeError):
    """No virtual rank can go on; the message lists who waits for what."""


class _Task:
    """One coroutine: a rank's own course, or a function it spawned. Carries what torch keeps per thread."""

    __slots__ = ("name", "glet", "waits", "queued", "finished", "result", "error", "joiner", "inside", "torch")

    def __init__(self, name: str) -> None:
        self.name = name
        self.glet: Any = None
        self.waits: Any = None
        self.queued = False
        self.finished = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.joiner: _Task | None = None
        self.inside = 0  # depth of collectives: until they return no code runs that could look at torch's state
        self.torch: tuple[Any, ...] | None = None  # saved; None while it is the one in force


class World:
    """`size` virtual ranks on `nodes` (rank -> node index; default: all on one).

    `isolate_torch`: save and restore torch's grad mode, autocast and CPU random state at every change of rank.
    Attributes after a run: `time` (virtual nanoseconds), `resumptions` (how often a rank was resumed).
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
        self.size = size
        self.nodes = tuple(nodes) if nodes is not None else (0,) * size
        self.network: Network = network or FreeNetwork()
        self.compute = compute
        self.recorders = recorders
        self.time = 0
        self.resumptions = 0
        self._torch = sys.modules.get("torch") if isolate_torch else None
        self._ready: deque[_Task] = deque()
        self._events: list[tuple[int, int, Any]] = []
        self._sequence = 0
        self._tasks: list[_Task] = []
        self._hub: Any = None
        self._dying = False
        self._starting: _Task | None = None
        self.current: _Task | None = None

    def run(self, function: Callable[[VirtualCommunicator], Any]) -> list[Any]:
        """Run all ranks to their end; returns their results in rank order.

        Raises the first exception of a rank, or DeadlockError.
        """
        self._hub = greenlet.getcurrent()
        group = _Group(self, tuple(range(self.size)), 1)
        tasks = []
        for rank in range(self.size):
            recorder = self.recorders[rank] if self.recorders else NullRecorder()
            comm = VirtualCommunicator(self, group, rank, recorder)
            tasks.append(self.start(f"rank {rank}", lambda comm=comm: function(comm)))
        before = _torch_state(self._torch)
        try:
            self._loop(tasks)
        finally:
            self._end()
            _restore_torch(self._torch, before)
        return [task.result for task in tasks]

    # -- scheduling ----------------------------------------------------------------------------------------
    def start(self, name: str, function: Callable[[], Any]) -> _Task:
        task = _Task(name)

        def body() -> None:
            self._enter(task)
            try:
                task.result = function()
            except greenlet.GreenletExit:
                raise
            except BaseException as error:
                task.error = error
            task.finished = True
            if task.joiner is not None:
                self.wake(task.joiner)

        task.glet = greenlet.greenlet(body, parent=self._hub)
        task.torch = _torch_state(self._torch)
        self._tasks.append(task)
        self.wake(task)
        return task

    def wake(self, task: _Task) -> None:
        if not task.queued:
            task.queued = True
            self._ready.append(task)

    def at(self, time: int, action: Any) -> None:
        """Wake a task or call a function when the clock has come to `time`."""
        self._sequence += 1
        heapq.heappush(self._events, (time, self._sequence, action))

    def block(self, waits: Any) -> None:
        """Give way until somebody wakes the current task. `waits` is shown if it never happens."""
        if self._dying:
            raise greenlet.GreenletExit
        task = self.current
        assert task is not None
        task.waits = waits
        following = self._next()
        if following is not task:
            self._leave(task)
            if following is not None and following.glet:
                following.glet.switch()
            else:  # only the hub starts coroutines: each inherits the stack depth of whoever starts it
                self._starting = following
                self._hub.switch()
            self._enter(task)
        task.waits = None

    def _next(self) -> _Task | None:
        while not self._ready:
            if not self._events:
                return None
            self.time, _, action = heapq.heappop(self._events)
            if isinstance(action, _Task):
                self.wake(action)
            else:
                action()
        task = self._ready.popleft()
        task.queued = False
        return task

    def _leave(self, task: _Task) -> None:
        if self._torch is not None and task.torch is None:
            task.torch = _torch_state(self._torch)

    def _enter(self, task: _Task) -> None:
        self.current = task
        self.resumptions += 1
        if task.torch is not None and not task.inside:
            self.restore_torch(task)

    def restore_torch(self, task: _Task) -> None:
        _restore_torch(self._torch, task.torch)
        task.torch = None

    def _loop(self, ranks: Sequence[_Task]) -> None:
        following: _Task | None = None
        while True:
            failed = next((task for task in self._tasks if task.error is not None), None)
            if failed is not None:
                assert failed.error is not None
                raise failed.error
            if all(task.finished for task in ranks):
                return
            following, self._starting = self._starting or self._next(), None
            if following is None:
                waiting = [f"{t.name} waits for {_describe(t.waits)}" for t in self._tasks if not t.finished]
                raise DeadlockError("deadlock of virtual ranks: " + "; ".join(waiting))
            self._tasks = [task for task in self._tasks if not task.finished or task in ranks]
            following.glet.switch()

    def _end(self) -> None:
        self._dying = True
        for task in self._tasks:
            if task.glet:
                task.glet.throw()


def _torch_state(torch: Any) -> tuple[Any, ...] | None:
    if torch is None:
        return None
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else None
    return torch.is_grad_enabled(), autocast, dtype, torch.default_generator.get_state()


def _restore_torch(torch: Any, state: tuple[Any, ...] | None) -> None:
    if torch is None or state is None:
        return
    grad, autocast, dtype, random = state
    if torch.is_grad_enabled() != grad:
        torch._C._set_grad_enabled(grad)
    if autocast or torch.is_autocast_enabled("cpu"):
        torch.set_autocast_enabled("cpu", autocast)
        if dtype is not None:
            torch.set_autocast_dtype("cpu", dtype)
    torch.default_generator.set_state(random)


def _describe(waits: Any) -> str:
    if isinstance(waits, (list, tuple)):
        return " or ".join(_describe(wait) for wait in waits)
    return str(waits)


class _Group:
    """What the ranks of one communicator share."""

    def __init__(self, world: World, members: tuple[int, ...], number: int) -> None:
        self.members = members
        self.number = number
        hosts = [world.nodes[rank] for rank in members]
        order = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
        self.nodes = tuple(order[host] for host in hosts)
        self.sends: dict[tuple[int, int, int], deque[_Send]] = {}  # (dest, source, tag) -> not yet received
        self.recvs: dict[tuple[int, int, int], deque[_Recv]] = {}  # the same, of receives
        self.meetings: dict[Any, _Meeting] = {}

    def any_sends(self, dest: int, tag: int) -> deque[_Send] | None:
        """What the lowest rank that has sent to `dest` has sent."""
        queues = (self.sends.get((dest, source, tag)) for source in range(len(self.members)))
        return next((queue for queue in queues if queue), None)


class _Meeting:
    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.tasks: list[_Task] = []


class _Operation(Request):
    __slots__ = ("comm", "done", "task", "buffer", "peer", "tag", "count", "id", "arrived")
    verb = ""

    def __init__(self, comm: VirtualCommunicator, buffer: Buffer, peer: int, tag: int, id: int) -> None:
        self.comm = comm
        self.buffer = buffer
        self.peer = peer
        self.tag = tag
        self.count = -1
        self.done = False
        self.task: _Task | None = None
        self.arrived = -1
        self.id = id

    def finish(self) -> None:
        self.done = True
        if self.task is not None:
            self.comm.world.wake(self.task)

    def test(self) -> bool:
        return self.done

    def wait(self) -> Status:
        if not self.done:
            self._wait()
        return Status(self.peer, self.tag, self.count)

    def _wait(self) -> None:
        comm = self.comm
        if comm.traced:
            peer = comm.members[self.peer] if self.peer >= 0 else -1
            with comm.span(self.verb, self.buffer.nbytes, peer, self.id):
                self._block()
        else:
            self._block()

    def _block(self) -> None:
        world = self.comm.world
        self.task = world.current
        while not self.done:
            world.block(self)

    def __str__(self) -> str:
        peer = "any rank" if self.peer == ANY_SOURCE else f"rank {self.comm.members[self.peer]}"
        return f"{self.verb} {peer} (tag {int(self.tag)}, {self.buffer.nbytes} bytes)"


class _Send(_Operation):
    __slots__ = ()
    verb = "send"


class _Recv(_Operation):
    __slots__ = ()
    verb = "recv"

    def cancel(self) -> None:
        comm = self.comm
        posted = comm.group.recvs.get((comm.rank, self.peer, self.tag))
        if posted and self in posted:
            posted.remove(self)


class _Done(Request):
    """A send whose receiver was there already."""

    def test(self) -> bool:
        return True

    def wait(self) -> Status:
        return SENT


DONE = _Done()


class VirtualCommunicator(Communicator):
    """See `Communicator`. Collectives are built from messages, so they cost what their messages cost."""

    def __init__(self, world: World, group: _Group, rank: int, recorder: Recorder) -> None:
        self.world = world
        self.group = group
        self.rank = rank
        self.size = len(group.members)
        self.members = group.members
        self.nodes = group.nodes
        self.local_ranks = tuple(r for r in range(self.size) if group.nodes[r] == group.nodes[rank])
        self.local_rank = self.local_ranks.index(rank)
        self.concurrent = False
        self.recorder = recorder
        self.host = world.nodes[group.members[rank]]
        self.traced = not isinstance(recorder, NullRecorder)
        self._count = 0
        self._sent: dict[tuple[int, int], int] = {}
        self._everybody = tuple(range(self.size))

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        group, world, rank = self.group, self.world, self.rank
        id = self._number(dest, tag, 0) if self.traced else -1
        queue = group.recvs.get((dest, rank, tag)) or group.recvs.get((dest, ANY_SOURCE, tag))
        if queue:
            recv = queue.popleft()
            sent, arrived = world.network.transfer(self.host, recv.comm.host, buffer.nbytes, world.time)
            _copy(buffer, recv.buffer)
            recv.peer, recv.count = rank, buffer.size
            _finish_at(world, arrived, recv)
            if sent <= world.time:
                return DONE
            send = _Send(self, buffer, dest, tag, id)
            world.at(sent, send.finish)
            return send
        send = _Send(self, buffer, dest, tag, id)
        if buffer.nbytes <= world.network.eager_limit:
            send.buffer = buffer.copy()
            there = world.nodes[group.members[dest]]
            sent, send.arrived = world.network.transfer(self.host, there, buffer.nbytes, world.time)
            _finish_at(world, sent, send)
        _append(group.sends, (dest, rank, tag), send)
        return send

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        group, world = self.group, self.world
        recv = _Recv(self, buffer, source, tag, self._number(source, tag, 1) if self.traced else -1)
        queue = group.sends.get((self.rank, source, tag))
        if source == ANY_SOURCE:
            queue = group.any_sends(self.rank, tag)
        if not queue:
            _append(group.recvs, (self.rank, source, tag), recv)
            return recv
        send = queue.popleft()
        arrived, there = send.arrived, send.comm
        if arrived < 0:
            sent, arrived = world.network.transfer(there.host, self.host, send.buffer.nbytes, world.time)
            _finish_at(world, sent, send)
        _copy(send.buffer, buffer)
        recv.peer, recv.count = there.rank, send.buffer.size
        _finish_at(world, arrived, recv)
        return recv

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> Status:
        incoming = self.start_recv(into, source, tag)
        outgoing = self.start_send(out, dest, tag)
        if not incoming.test():
            incoming.wait()
        if not outgoing.test():
            outgoing.wait()
        return incoming.wait()

    def _number(self, peer: int, tag: int, way: int) -> int:
        """The number of this message among those to (or from) that peer: equal at both ends."""
        key = (2 * peer + way, tag)
        self._sent[key] = count = self._sent.get(key, 0) + 1
        return self.group.number << 44 | tag << 36 | count

    def wait_any(self, requests: Sequence[Request]) -> int:
        world = self.world
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            for request in requests:  # none of them done, so each is an operation that can wake a task
                request.task = world.current  # type: ignore[attr-defined]
            with self.span("wait"):
                world.block(requests)
            for request in requests:
                request.task = None  # type: ignore[attr-defined]

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        with self._collective("wait"):
            algorithms.dissemination_barrier(self, self._everybody)

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        group = self._everybody[root:] + self._everybody[:root]
        with self._collective("send" if self.rank == root else "recv", buffer.nbytes):
            algorithms.tree_broadcast(self, buffer, group)

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        if algorithm == "library":
            algorithm = "tree" if buffer.nbytes <= 2048 else "halving_doubling"
        reduce = algorithms.all_reduce_by(algorithm)
        with self._collective("reduce", buffer.nbytes):
            if buffer.dtype == BFLOAT16:
                wide = buffer.astype(np.float32)
                reduce(self, wide, operation, self._everybody)
                buffer[:] = wide
            else:
                reduce(self, buffer, operation, self._everybody)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        return _Deferred(self, buffer, operation)

    def reduce_scatter(self, buffer: Buffer, bounds: Sequence[int], operation: Operation = "sum") -> None:
        with self._collective("reduce", buffer.nbytes):
            algorithms.ring_reduce_scatter(self, buffer, bounds, operation, self._everybody)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        with self._collective("recv", buffer.nbytes):
            algorithms.ring_all_gather(self, buffer, bounds, self._everybody)

    def split(self, color: int | None, key: int = 0) -> VirtualCommunicator | None:
        answers = self._meet("split", self._everybody, (color, key))
        if color is None:
            return None
        chosen = sorted((k, r) for r, (c, k) in enumerate(answers) if c == color)
        number = zlib.crc32(f"{self.group.number}/{self._count}/{color}".encode()) & 0x3FFFF
        members = tuple(self.members[r] for _, r in chosen)
        shared = self._shared(("group", self._count, color), lambda: _Group(self.world, members, number))
        return VirtualCommunicator(self.world, shared, [r for _, r in chosen].index(self.rank), self.recorder)

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        mine = np.zeros(length, dtype)
        if share == "rank":
            return _VirtualArena([mine], 0, [0], [])
        parts = self._meet("arena", self.local_ranks, mine)
        name = ("epochs", self._count, self.local_ranks[0])
        epochs, waiting = self._shared(name, lambda: ([0] * len(parts), []))
        return _VirtualArena(parts, self.local_rank, epochs, waiting)

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
        with self.span("wait", id=epoch):
            while min(arena.epochs) < epoch:
                late = [self.members[self.local_ranks[i]] for i, e in enumerate(arena.epochs) if e < epoch]
                assert world.current is not None
                arena.waiting.append(world.current)
                world.block(f"notify of epoch {epoch} by ranks {late}")

    def counter(self) -> Counter:
        self._count += 1
        return _VirtualCounter(self._shared(("counter", self._count), lambda: [0]))

    def _meet(self, what: str, who: Sequence[int], value: Any) -> list[Any]:
        """Values of all of `who`, in their order; waits until all have come."""
        self._count += 1
        key = (what, self._count, tuple(who))
        meeting = self.group.meetings.setdefault(key, _Meeting())
        meeting.values[self.rank] = value
        if len(meeting.values) < len(who):
            while len(meeting.values) < len(who):
                assert self.world.current is not None
                meeting.tasks.append(self.world.current)
                late = [self.members[r] for r in who if r not in meeting.values]
                self.world.block(f"{what} with ranks {late}")
        else:
            for task in meeting.tasks:
                self.world.wake(task)
        return [meeting.values[r] for r in who]

    def _shared(self, name: Any, make: Callable[[], Any]) -> Any:
        """One object for all ranks that ask for it by the same name."""
        store: dict[Any, Any] = self.group.meetings  # type: ignore[assignment]
        if name not in store:
            store[name] = make()
        return store[name]

    @contextmanager
    def _collective(self, kind: str, nbytes: int = 0) -> Iterator[None]:
        self._count += 1
        task = self.world.current
        assert task is not None
        task.inside += 1
        try:
            with self.span(kind, nbytes, id=self.group.number << 44 | self._count):
                yield
        finally:
            task.inside -= 1
            if task.torch is not None and not task.inside:
                self.world.restore_torch(task)

    # -- time, threads -------------------------------------------------------------------------------------
    def now(self) -> int:
        return self.world.time

    def sleep(self, seconds: float) -> None:
        self._pass(int(seconds * 1e9))

    def _pass(self, nanoseconds: int) -> None:
        if nanoseconds > 0:
            self.world.at(self.world.time + nanoseconds, self.world.current)
            self.world.block("the end of a sleep")

    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0
    ) -> AbstractContextManager[Any]:
        return _VirtualSpan(self, kind, bytes, peer, id, flops)

    def spawn(self, function: Callable[[], Any]) -> Thread:
        world = self.world
        return _VirtualThread(world, world.start(f"a thread of rank {self.members[self.rank]}", function))

    def free(self) -> None:
        return None


def _append(table: dict[Any, deque[Any]], key: tuple[int, int, int], operation: _Operation) -> None:
    queue = table.get(key)
    if queue is None:
        queue = table[key] = deque()
    queue.append(operation)


def _copy(source: Buffer, into: Buffer) -> None:
    if source.size == into.size:
        into[...] = source
    elif source.size < into.size:
        into[: source.size] = source
    else:
        raise ValueError(f"a message of {source.nbytes} bytes came for a buffer of {into.nbytes}")


def _finish_at(world: World, time: int, operation: _Operation) -> None:
    if time <= world.time:
        operation.done = True
        if operation.task is not None:
            world.wake(operation.task)
    else:
        world.at(time, operation.finish)


class _Deferred(Request):
    """A started all-reduce: done as a whole when waited for (a coroutine cannot progress by itself)."""

    def __init__(self, comm: VirtualCommunicator, buffer: Buffer, operation: Operation) -> None:
        self._arguments = comm, buffer, operation
        self._done = False

    def test(self) -> bool:
        return self._done

    def wait(self) -> Status:
        if not self._done:
            comm, buffer, operation = self._arguments
            comm.all_reduce(buffer, operation)
            self._done = True
        return SENT


class _VirtualArena(Arena):
    def __init__(self, parts: list[Buffer], index: int, epochs: list[int], waiting: list[_Task]) -> None:
        self.parts = parts
        self.index = index
        self.mine = parts[index]
        self.epochs = epochs
        self.waiting = waiting

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
    def __init__(self, world: World, task: _Task) -> None:
        self._world = world
        self._task = task

    def join(self) -> Any:
        while not self._task.finished:
            self._task.joiner = self._world.current
            self._world.block(self._task.name)
        if self._task.error is not None:
            raise self._task.error
        return self._task.result


class _VirtualSpan:
    __slots__ = ("_comm", "_arguments")

    def __init__(self, comm: VirtualCommunicator, *arguments: Any) -> None:
        self._comm = comm
        self._arguments = arguments

    def __enter__(self) -> None:
        comm = self._comm
        if comm.traced:
            kind, nbytes, peer, id, _ = self._arguments
            comm.recorder.open(kind, comm.world.time, nbytes, peer, id)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        comm = self._comm
        compute = comm.world.compute
        if compute is not None and kind is None:
            name, nbytes, _, _, flops = self._arguments
            comm._pass(compute(comm.members[comm.rank], name, nbytes, flops))
        if comm.traced:
            comm.recorder.close(comm.world.time)


