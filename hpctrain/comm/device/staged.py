"""Device buffers copied through pinned host memory, for an MPI that supports only host memory. Not yet run on a GPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpctrain.comm import algorithms
from hpctrain.comm.base import Buffer, Operation, Request
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.gpu import PinnedArray, PinnedSlot

SLOTS = 3  # per blocking operation: one being copied in, one in MPI, one being copied out


class StagedCommunicator(DeviceCommunicator):
    """For an MPI that supports only host memory.

    Blocking operations use a few slots in turn, so that copies and MPI overlap. A started send or receive takes as many
    slots as its message needs, because MPI must be able to complete it while this rank does something else.
    """

    transport = "staged"

    def _whole(self, buffer: Buffer) -> bool:
        return super()._whole(buffer) and not isinstance(buffer, PinnedArray)

    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        if isinstance(buffer, PinnedArray):
            return Pieces([self.inner.start_send(part, dest, tag) for part in self._parts_of(buffer)])
        with self.span("send", peer=self.members[dest]):
            return StagedSend(self, buffer, dest, tag)

    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        if isinstance(buffer, PinnedArray):
            return Pieces([self.inner.start_recv(part, source, tag) for part in self._parts_of(buffer)])
        self.gpu.mark().synchronize()  # earlier work may still read the buffer
        return StagedRecv(self, buffer, source, tag)

    def _parts_of(self, buffer: PinnedArray) -> list[Buffer]:
        """The pieces in which the same message from or to a device buffer would be sent."""
        return self.pool.cut(buffer.view(np.ndarray))

    def _send(self, buffer: Buffer, dest: int, tag: int) -> None:
        if isinstance(buffer, PinnedArray):
            self._start_send(buffer, dest, tag).wait()
            return
        parts, slots = self._begin(buffer, self.gpu.mark())
        sent: list[Request] = []
        try:
            with self.span("send", peer=self.members[dest]):
                for slot, part in zip(slots, parts, strict=False):
                    slot.load(part)
                for index, part in enumerate(parts):
                    slot = slots[index % len(slots)]
                    slot.event.synchronize()
                    sent.append(self.inner.start_send(slot.host(part.size, part.dtype), dest, tag))
                    if 0 < index < len(parts) - len(slots) + 1:
                        sent[index - 1].wait()
                        slots[(index - 1) % len(slots)].load(parts[index - 1 + len(slots)])
                self.inner.wait_all(sent)
        finally:
            self.pool.give(slots)

    def _recv(self, buffer: Buffer, source: int, tag: int) -> int:
        if isinstance(buffer, PinnedArray):
            return self._start_recv(buffer, source, tag).wait()
        parts, slots = self._begin(buffer, self.gpu.mark())
        incoming = [
            self.inner.start_recv(slot.host(part.size, part.dtype), source, tag)
            for slot, part in zip(slots, parts, strict=False)
        ]
        elements = 0
        try:
            for index, part in enumerate(parts):
                came = _checked(incoming[index].wait(), part, len(parts), source)
                elements += came
                slots[index % len(slots)].store(part[:came])
                following = index - 1 + len(slots)
                if index > 0 and following < len(parts):
                    slot, after = slots[(index - 1) % len(slots)], parts[following]
                    slot.event.synchronize()
                    incoming.append(self.inner.start_recv(slot.host(after.size, after.dtype), source, tag))
        finally:
            self.pool.give(slots)
        return elements

    def _broadcast(self, buffer: Buffer, root: int) -> None:
        mine = self.rank == root
        with self.span("send" if mine else "recv"):
            self._pass(buffer, self.gpu.mark(), lambda host: self.inner.broadcast(host, root), mine, not mine)

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        ready.synchronize()  # what it waits for is computation, not part of the all-reduce
        with self.span("reduce"):
            self._pass(buffer, ready, lambda host: self.inner.all_reduce(host, operation, algorithm), True, True)

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        with self.span("recv"):
            algorithms.ring_all_gather(self, buffer, bounds, self._all_ranks)

    def _pass(self, buffer: Buffer, ready: Any, verb: Callable[[Buffer], None], loads: bool, stores: bool) -> None:
        """Run a blocking operation on the buffer piece by piece; the neighbouring pieces are copied meanwhile."""
        parts, slots = self._begin(buffer, ready)
        try:
            if loads:
                for slot, part in zip(slots, parts, strict=False):
                    slot.load(part)
            for index, part in enumerate(parts):
                slot, following = slots[index % len(slots)], index + len(slots)
                slot.event.synchronize()
                verb(slot.host(part.size, part.dtype))
                if stores:
                    slot.store(part)
                if loads and following < len(parts):
                    self.gpu.down.wait_event(slot.event)  # wait for that store
                    slot.load(parts[following])
        finally:
            self.pool.give(slots)

    def _begin(self, buffer: Buffer, ready: Any) -> tuple[list[Buffer], list[PinnedSlot]]:
        ready.synchronize()
        parts = self.pool.cut(buffer)
        return parts, self.pool.take(min(SLOTS, len(parts)))


class Pieces(Request):
    """A started message of a pinned arena, in pieces; none is copied."""

    def __init__(self, requests: list[Request]) -> None:
        self._left, self._elements = deque(requests), 0

    def pending(self) -> Request | None:
        return self._left[0] if self._left else None

    def test(self) -> bool:
        while self._left and self._left[0].test():
            self._elements += self._left.popleft().wait()
        return not self._left

    def wait(self) -> int:
        while self._left:
            self._elements += self._left.popleft().wait()
        return self._elements

    def cancel(self) -> None:
        for request in self._left:
            request.cancel()
        self._left.clear()


class StagedSend(Request):
    """A started send; all pieces are passed to MPI in the constructor."""

    def __init__(self, comm: StagedCommunicator, buffer: Buffer, dest: int, tag: int) -> None:
        comm.gpu.mark().synchronize()
        self._pool = comm.pool
        parts = self._pool.cut(buffer)
        self._slots = self._pool.take(len(parts))
        self._requests: deque[Request] = deque()
        for slot, part in zip(self._slots, parts, strict=True):
            slot.load(part)
        for slot, part in zip(self._slots, parts, strict=True):
            slot.event.synchronize()
            self._requests.append(comm.inner.start_send(slot.host(part.size, part.dtype), dest, tag))

    def pending(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def test(self) -> bool:
        while self._requests and self._requests[0].test():
            self._requests.popleft()
        self._finish()
        return not self._requests

    def wait(self) -> int:
        while self._requests:
            self._requests.popleft().wait()
        self._finish()
        return 0

    def _finish(self) -> None:
        if self._slots and not self._requests:
            self._pool.give(self._slots)
            self._slots = []


class StagedRecv(Request):
    """A started receive. All pieces are requested at once; each is copied to the device once it has arrived."""

    def __init__(self, comm: StagedCommunicator, buffer: Buffer, source: int, tag: int) -> None:
        self._comm, self._pool = comm, comm.pool
        self._parts = self._pool.cut(buffer)
        self._slots = self._pool.take(len(self._parts))
        self._requests = [
            comm.inner.start_recv(slot.host(part.size, part.dtype), source, tag)
            for slot, part in zip(self._slots, self._parts, strict=True)
        ]
        self._source, self._next, self._elements = source, 0, 0

    def pending(self) -> Request | None:
        return self._requests[self._next] if self._next < len(self._requests) else None

    def test(self) -> bool:
        while self._next < len(self._requests) and self._requests[self._next].test():
            self._store()
        if self._slots and self._next == len(self._requests) and self._slots[-1].event.done:
            self._finish()
        return not self._slots

    def wait(self) -> int:
        while self._next < len(self._requests):
            self._store()
        if self._slots:
            with self._comm.span("recv"):
                self._finish()
        return self._elements

    def cancel(self) -> None:
        for request in self._requests[self._next :]:
            request.cancel()
        self._next = len(self._requests)
        self._finish()

    def _store(self) -> None:
        part = self._parts[self._next]
        came = _checked(self._requests[self._next].wait(), part, len(self._parts), self._source)
        self._elements += came
        self._slots[self._next].store(part[:came])
        self._next += 1

    def _finish(self) -> None:
        self._pool.give(self._slots)
        self._slots = []


def _checked(elements: int, part: Buffer, pieces: int, source: int) -> int:
    """The number of elements received. A message of several pieces must fill its buffer: else pieces stay unmatched."""
    if pieces > 1 and elements != part.size:
        raise ValueError(
            f"received a piece of {elements} elements from rank {source}, but expected {part.size}: a message longer "
            "than a slot needs a device buffer of its own length"
        )
    return elements
