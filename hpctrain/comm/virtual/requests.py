"""Started operations of virtual ranks, and how sends and receives are matched."""

from __future__ import annotations

from collections import defaultdict, deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from hpctrain.comm.base import Buffer, Request
from hpctrain.comm.phantom import deliver
from hpctrain.comm.virtual.network import LATER
from hpctrain.comm.virtual.platform import Manner, Platform
from hpctrain.comm.virtual.scheduler import Scheduler, Task
from hpctrain.comm.waiting import SHORT
from hpctrain.trace.recorder import Recorder

UNTRACED = nullcontext()

Box = deque["VirtualSend | VirtualRecv"]
"""Started operations without a counterpart yet: only sends, or only receives."""

Boxes = defaultdict[tuple[int, int, int], Box]
"""By destination, source and tag."""


class Endpoint(Protocol):
    """The part of a communicator that its requests use."""

    world: Platform
    rank: int
    host: int
    members: tuple[int, ...]
    boxes: Boxes
    recorder: Recorder
    traced: bool
    manner: Manner


class VerbSpan:
    """Traces a communicator operation; takes exactly as long as its messages."""

    __slots__ = ("_arguments", "_comm")

    def __init__(self, comm: Endpoint, kind: str, nbytes: int, id: int) -> None:
        self._comm, self._arguments = comm, (kind, nbytes, id)

    def __enter__(self) -> None:
        kind, nbytes, id = self._arguments
        self._comm.recorder.open(kind, self._comm.world.time, nbytes, -1, id)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._comm.recorder.close(self._comm.world.time)


def verb_span(comm: Endpoint, kind: str, nbytes: int = 0, id: int = -1) -> AbstractContextManager[None]:
    """A `VerbSpan`, or a null context if nothing is traced."""
    return VerbSpan(comm, kind, nbytes, id) if comm.traced else UNTRACED


class VirtualRequest(Request):
    """A send or a receive in progress: over when the clock reaches `ends`, which is LATER until it is known.

    For a receive: `elements`, the number received. For a send: `arrives`, its arrival time if it was sent before its
    receiver was ready (else -1; LATER until it is known), `since`, when it was started, and `into`, the receive that
    waits for it to arrive.
    """

    __slots__ = ("arrives", "buffer", "comm", "elements", "ends", "id", "peer", "tag", "task", "woken")
    verb = ""

    def __init__(self, comm: Endpoint, buffer: Buffer, peer: int, tag: int) -> None:
        self.comm = comm
        self.buffer = buffer
        self.peer = peer
        self.tag = tag
        self.ends = LATER
        self.task: Task | None = None  # that waits
        self.woken: Task | None = None  # that will be woken
        self.arrives = self.id = -1
        self.elements = 0

    def test(self) -> bool:
        return self.ends <= self.comm.world.time

    def watch(self, waits: bool) -> None:
        world = self.comm.world
        self.task = world.current if waits else None
        if self.ends < LATER:
            self.wake()

    def wake(self) -> None:
        """Once the clock reaches `ends`, wake the task that waits, if one does. Only once for each task: one that waits
        for many messages looks again whenever one of them comes."""
        task = self.task
        if task is not None and task is not self.woken:
            self.woken = task
            self.comm.world.wake_at(self.ends, task)

    def block(self) -> None:
        """Wait until it is over. Only for operations that are not over yet."""
        comm = self.comm
        world = comm.world
        if comm.traced:
            comm.recorder.open(self.verb, world.time, 0, comm.members[self.peer], self.id)
        self.watch(True)
        since = world.time
        while self.ends > world.time:
            world.block(self)
        short = comm.manner == "naps" and self.buffer.nbytes <= SHORT
        world.notice(comm.members[comm.rank], since, "idles" if short else comm.manner)
        if comm.traced:
            self.learn()
            comm.recorder.close(world.time)

    def learn(self) -> None:
        """Called before the span of waiting for it is closed."""

    def __str__(self) -> str:
        peer = self.comm.members[self.peer]
        return f"{self.verb} rank {peer} (tag {int(self.tag)}, {self.buffer.nbytes} bytes)"


class VirtualSend(VirtualRequest):
    __slots__ = ("into", "since")
    verb = "send"
    into: VirtualRecv | None
    since: int

    @property
    def envelope(self) -> tuple[int, int, int]:
        """(sender, receiver, bytes), with ranks of the whole run."""
        comm = self.comm
        return comm.members[comm.rank], comm.members[self.peer], self.buffer.nbytes

    def left(self, time: int) -> None:
        """Its last byte leaves the sender at `time`."""
        self.ends = time
        self.wake()

    def arrived(self, time: int) -> None:
        """It is known now that it arrives at `time`."""
        self.arrives = time
        recv = self.into
        if recv is not None:
            recv.ends = time
            recv.wake()

    def wait(self) -> int:
        if not self.test():
            self.block()
        return 0


class VirtualRecv(VirtualRequest):
    __slots__ = ("traced",)
    verb = "recv"

    def __init__(self, comm: Endpoint, buffer: Buffer, peer: int, tag: int) -> None:
        super().__init__(comm, buffer, peer, tag)
        self.traced = not comm.traced

    def test(self) -> bool:
        if self.ends > self.comm.world.time:
            return False
        if not self.traced:
            self.leave_span()
        return True

    def over(self) -> bool:
        return self.ends <= self.comm.world.time

    def explain(self) -> None:
        if self.comm.traced:
            self.comm.recorder.learn(0, self.comm.members[self.peer], self.id)

    def leave_span(self) -> None:
        """Record a span of length zero: the message arrived before its receiver waited for it."""
        comm = self.comm
        comm.recorder.open("recv", comm.world.time, 0, -1, self.id)
        self.learn()
        comm.recorder.close(comm.world.time)

    def learn(self) -> None:
        self.traced = True
        comm = self.comm
        comm.recorder.learn(self.elements * self.buffer.itemsize, comm.members[self.peer], self.id)

    def wait(self) -> int:
        if not self.test():
            self.block()
        return self.elements

    def cancel(self) -> None:
        comm = self.comm
        box = comm.boxes[comm.rank, self.peer, self.tag]
        if self in box:
            box.remove(self)
            self.ends = comm.world.time


def match(world: Platform, send: VirtualSend, recv: VirtualRecv) -> None:
    """Copy the data, and schedule the end on both sides."""
    out, into, now = send.buffer, recv.buffer, world.time
    if out.size <= into.size:
        deliver(out, into)
    else:
        raise ValueError(f"a message of {out.nbytes} bytes does not fit a buffer of {into.nbytes}: {recv}")
    recv.elements = out.size
    world.handled(recv.comm.members[recv.comm.rank], out.nbytes)
    arrives = send.arrives
    if world.flows is not None and (arrives < 0 or arrives == LATER):
        send.into = recv
        if arrives < 0:
            world.flows.carry(send)
        return
    if arrives < 0:
        send.ends, arrives = world.network.transfer(send.comm.host, recv.comm.host, out.nbytes, now)
        send.wake()
    recv.ends = arrives if arrives > now else now
    recv.wake()


class VirtualReduce(Request):
    """A started all-reduce."""

    def __init__(self, comm: Endpoint, task: Task, nbytes: int, id: int) -> None:
        self._comm, self._work, self._nbytes, self._id = comm, task, nbytes, id

    def watch(self, waits: bool) -> None:
        self._work.joiner = self._comm.world.current if waits else None

    def test(self) -> bool:
        return self._work.finished

    def wait(self) -> int:
        if not self._work.finished:
            comm = self._comm
            with verb_span(comm, "reduce", self._nbytes, self._id):
                since = comm.world.time
                join(comm.world, self._work)
                comm.world.notice(comm.members[comm.rank], since, comm.manner)
        return 0

    def __str__(self) -> str:
        return self._work.name


def join(world: Scheduler, work: Task) -> None:
    """Wait until the task has ended."""
    while not work.finished:
        work.joiner = world.current
        world.block(work.name)
