"""The two ways to move device buffers: staged through the host, or handed to MPI as they are.

NOT YET RUN ON A GPU: tested with stand-ins for CuPy (tests/unit/test_device.py); tests/gpu waits for a GPU.

A `DeviceCommunicator` wraps another communicator. Verbs on NumPy arrays go straight to that one; of CuPy arrays
`StagedCommunicator` moves copies in pinned memory, `DirectCommunicator` hands over the device pointers, which an MPI
that is not CUDA-aware answers with a segmentation fault (`cuda_aware` finds out beforehand). Before MPI or a copy
touches a device buffer, what torch has queued by then is waited for: here, and nowhere else.

A device message longer than a slot travels as several, in order: its receiver must be given a device buffer of exactly
that length and name the source. Of a collective all ranks give a device buffer, or none.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, Self

import numpy as np

from hpctrain.comm import algorithms
from hpctrain.comm.base import (
    ANY_SOURCE,
    BFLOAT16,
    Arena,
    Buffer,
    Communicator,
    Counter,
    NotSupportedError,
    Operation,
    Request,
    Share,
    Status,
    Thread,
)
from hpctrain.comm.cuda_aware import cuda_aware
from hpctrain.comm.gpu import DeviceArena, Gpu, Slot, SlotPool

SLOTS = 3  # per blocking verb: one is copied in, one is with MPI, one is copied out
REDUCE_LANE = 2  # of the thread that runs started all-reduces (0: the rank's own course, 1: a colocated server)
DONE = Status(-1, -1, -1)


def open_device(comm: Communicator, index: int, wanted: str = "auto") -> tuple[DeviceCommunicator, str]:
    """The communicator for arenas on cuda:`index`, and which way it takes, as a sentence. Collective over `comm`.

    `wanted`: whether the MPI is CUDA-aware: "yes", "no", or "auto" to find out.
    """
    aware, why = cuda_aware(comm, wanted, index)
    gpu = Gpu.open(index)
    if aware:
        return DirectCommunicator.around(comm, gpu), f"device buffers are handed to MPI: {why}"
    return StagedCommunicator.around(comm, gpu), f"device buffers are staged through pinned memory: {why}"


class DeviceCommunicator(Communicator):
    """What both ways have in common: host arrays go to `inner`, private arenas lie on the device.

    `beside`: a second communicator over the same ranks, for what a thread does beside the rank's own course. It cannot
    be made when it is first needed: that is in a gradient hook, which must not wait for other ranks.
    """

    def __init__(self, inner: Communicator, beside: Communicator | None, gpu: Gpu, pool: SlotPool) -> None:
        self.inner, self._beside, self.gpu, self.pool = inner, beside, gpu, pool
        self.rank, self.size = inner.rank, inner.size
        self.nodes, self.members = inner.nodes, inner.members
        self.local_ranks, self.local_rank = inner.local_ranks, inner.local_rank
        self.concurrent, self.cores = inner.concurrent, inner.cores
        self.recorder = inner.recorder
        self._everybody = tuple(range(inner.size))
        self._reducer: _Reducer | None = None

    @classmethod
    def around(cls, inner: Communicator, gpu: Gpu, pool: SlotPool | None = None) -> Self:
        """Collective over `inner`."""
        return cls(inner, inner.split(0, inner.rank), gpu, pool or SlotPool(gpu))

    # -- how device buffers move ---------------------------------------------------------------------------
    @abstractmethod
    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request: ...

    @abstractmethod
    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request: ...

    @abstractmethod
    def _send(self, buffer: Buffer, dest: int, tag: int) -> None: ...

    @abstractmethod
    def _recv(self, buffer: Buffer, source: int, tag: int) -> Status: ...

    @abstractmethod
    def _broadcast(self, buffer: Buffer, root: int) -> None: ...

    @abstractmethod
    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        """All-reduce a device buffer once the event `ready` has passed; blocks."""

    @abstractmethod
    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None: ...

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        start = self.inner.start_send if on_host(buffer) else self._start_send
        return start(buffer, dest, tag)

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        start = self.inner.start_recv if on_host(buffer) else self._start_recv
        return start(buffer, source, tag)

    def send(self, buffer: Buffer, dest: int, tag: int) -> None:
        (self.inner.send if on_host(buffer) else self._send)(buffer, dest, tag)

    def recv(self, buffer: Buffer, source: int, tag: int) -> Status:
        return (self.inner.recv if on_host(buffer) else self._recv)(buffer, source, tag)

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> Status:
        if on_host(out) and on_host(into):
            return self.inner.sendrecv(out, dest, into, source, tag)
        incoming = self.start_recv(into, source, tag)
        self.send(out, dest, tag)
        return incoming.wait()

    def wait_any(self, requests: Sequence[Request]) -> int:
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            waits = [r.waits_for() if isinstance(r, DeviceRequest) else r for r in requests]
            if any(wait is None for wait in waits):  # for a copy or a thread, which MPI cannot be asked about
                self.inner.sleep(20e-6)
            else:
                self.inner.wait_any([wait for wait in waits if wait is not None])

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        self.inner.barrier()

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        (self.inner.broadcast if on_host(buffer) else self._broadcast)(buffer, root)

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        if on_host(buffer):
            self.inner.all_reduce(buffer, operation, algorithm)
        else:
            self.reduce_when(self.gpu.mark(), buffer, operation, algorithm)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        """Of a device buffer: a blocking one, in a thread (Open MPI's Iallreduce cannot read device memory, issue
        9845), in the order of the starts."""
        if on_host(buffer):
            return self.inner.start_all_reduce(buffer, operation)
        if self._reducer is None:
            assert self._beside is not None
            self._reducer = _Reducer(type(self)(self._beside, None, self.gpu, self.pool))
        return self._reducer.start(self.gpu.mark(), buffer, operation)

    def reduce_scatter(self, buffer: Buffer, bounds: Sequence[int], operation: Operation = "sum") -> None:
        if on_host(buffer):
            self.inner.reduce_scatter(buffer, bounds, operation)
        elif buffer.dtype == BFLOAT16:
            wide = self.gpu.widened(buffer)
            self.reduce_scatter(wide, bounds, operation)
            self.gpu.narrow(wide, buffer)
        else:
            with self.span("reduce"), self.gpu.stream():  # its messages have the bytes
                algorithms.ring_reduce_scatter(self, buffer, bounds, operation, self._everybody)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        (self.inner.all_gather if on_host(buffer) else self._all_gather)(buffer, bounds)

    def split(self, color: int | None, key: int = 0) -> Self | None:
        part = self.inner.split(color, key)
        return self.around(part, self.gpu, self.pool) if part is not None else None

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        """On the device; only memory that the ranks of a node share lies on the host."""
        return DeviceArena(self.gpu, length, dtype) if share == "rank" else self.inner.arena(length, dtype, share)

    def can_share(self, nbytes: int) -> str | None:
        return self.inner.can_share(nbytes)

    def notify(self, arena: Arena) -> None:
        if not isinstance(arena, DeviceArena):
            self.inner.notify(arena)

    def wait(self, arena: Arena) -> None:
        if not isinstance(arena, DeviceArena):
            self.inner.wait(arena)

    def counter(self) -> Counter:
        return self.inner.counter()

    # -- time, threads -------------------------------------------------------------------------------------
    def now(self) -> int:
        return self.inner.now()

    def sleep(self, seconds: float) -> None:
        self.inner.sleep(seconds)

    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0, items: int = 0
    ) -> AbstractContextManager[Any]:
        return self.inner.span(kind, bytes, peer, id, flops, items)

    def spawn(self, function: Callable[[], Any]) -> Thread:
        def body() -> Any:
            self.gpu.use()
            return function()

        return self.inner.spawn(body)

    def lane(self, number: int) -> Self:
        other = copy(self)
        other.inner = self.inner.lane(number)
        other.recorder = other.inner.recorder
        return other

    # -- failures ------------------------------------------------------------------------------------------
    def revoke(self) -> None:
        self.inner.revoke()

    def agree(self, value: bool) -> bool:
        return self.inner.agree(value)

    def shrink(self) -> Communicator:
        return self.around(self.inner.shrink(), self.gpu, self.pool)

    def free(self) -> None:
        if self._beside is not None:
            self._beside.free()
        self.inner.free()


class StagedCommunicator(DeviceCommunicator):
    """For an MPI that knows host memory only.

    Blocking verbs pass a few slots through, so that copies and MPI overlap. A started send or receive takes as many
    slots as its message needs, because MPI must be able to complete it while this rank does something else.
    """

    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        with self.span("send", peer=self.members[dest]):
            return _StagedSend(self, buffer, dest, tag)

    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        self._check_source(buffer, source)
        self.gpu.mark().synchronize()  # what still reads the buffer
        return _StagedRecv(self, buffer, source, tag)

    def _send(self, buffer: Buffer, dest: int, tag: int) -> None:
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

    def _recv(self, buffer: Buffer, source: int, tag: int) -> Status:
        self._check_source(buffer, source)
        parts, slots = self._begin(buffer, self.gpu.mark())
        incoming = [
            self.inner.start_recv(slot.host(part.size, part.dtype), source, tag)
            for slot, part in zip(slots, parts, strict=False)
        ]
        status, elements = DONE, 0
        try:
            for index, part in enumerate(parts):
                status = incoming[index].wait()
                elements += _checked(status, part, len(parts))
                slots[index % len(slots)].store(part[: status.elements])
                following = index - 1 + len(slots)
                if index > 0 and following < len(parts):
                    slot, after = slots[(index - 1) % len(slots)], parts[following]
                    slot.event.synchronize()
                    incoming.append(self.inner.start_recv(slot.host(after.size, after.dtype), source, tag))
        finally:
            self.pool.give(slots)
        return Status(status.source, status.tag, elements)

    def _broadcast(self, buffer: Buffer, root: int) -> None:
        mine = self.rank == root
        with self.span("send" if mine else "recv"):
            self._pass(buffer, self.gpu.mark(), lambda host: self.inner.broadcast(host, root), mine, not mine)

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        with self.span("reduce"):
            self._pass(buffer, ready, lambda host: self.inner.all_reduce(host, operation, algorithm), True, True)

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        with self.span("recv"):
            algorithms.ring_all_gather(self, buffer, bounds, self._everybody)

    def _pass(
        self, buffer: Buffer, ready: Any, verb: Callable[[Buffer], None], loads: bool, stores: bool
    ) -> None:
        """A blocking verb on the buffer piece by piece; the copies of its neighbours run meanwhile."""
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
                    self.gpu.down.wait_event(slot.event)  # that store
                    slot.load(parts[following])
        finally:
            self.pool.give(slots)

    def _begin(self, buffer: Buffer, ready: Any) -> tuple[list[Buffer], list[Slot]]:
        ready.synchronize()
        parts = self.pool.cut(buffer)
        return parts, self.pool.take(min(SLOTS, len(parts)))

    def _check_source(self, buffer: Buffer, source: int) -> None:
        if source == ANY_SOURCE and buffer.nbytes > self.pool.nbytes:
            raise NotSupportedError(
                f"a device buffer of {buffer.nbytes} bytes cannot be received from any source, because its pieces "
                f"(of {self.pool.nbytes} bytes) could be of several; name the source"
            )


class DirectCommunicator(DeviceCommunicator):
    """For a CUDA-aware MPI, which takes device pointers. It does not know of streams, so they are waited for here."""

    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        self.gpu.mark().synchronize()
        return self.inner.start_send(buffer, dest, tag)

    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        self.gpu.mark().synchronize()
        return self.inner.start_recv(buffer, source, tag)

    def _send(self, buffer: Buffer, dest: int, tag: int) -> None:
        self.gpu.mark().synchronize()
        self.inner.send(buffer, dest, tag)

    def _recv(self, buffer: Buffer, source: int, tag: int) -> Status:
        self.gpu.mark().synchronize()
        return self.inner.recv(buffer, source, tag)

    def _broadcast(self, buffer: Buffer, root: int) -> None:
        self.gpu.mark().synchronize()
        self.inner.broadcast(buffer, root)

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        ready.synchronize()
        if buffer.dtype == BFLOAT16:
            wide = self.gpu.widened(buffer)
            self.reduce_when(self.gpu.mark(), wide, operation, algorithm)
            self.gpu.narrow(wide, buffer)
            self.gpu.mark().synchronize()  # this thread's stream need not be that of the others
        elif algorithm == "library":
            self.inner.all_reduce(buffer, operation)
        else:
            with self.span("reduce"), self.gpu.stream():  # its messages have the bytes
                algorithms.all_reduce_by(algorithm)(self, buffer, operation, self._everybody)

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        self.gpu.mark().synchronize()
        self.inner.all_gather(buffer, bounds)


# -- requests ------------------------------------------------------------------------------------------------
class DeviceRequest(Request):
    """A started operation on a device buffer."""

    @abstractmethod
    def waits_for(self) -> Request | None:
        """The operation of the inner communicator that comes next; None while it waits for something else."""


class _StagedSend(DeviceRequest):
    """All pieces are with MPI when the constructor returns."""

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

    def waits_for(self) -> Request | None:
        return self._requests[0] if self._requests else None

    def test(self) -> bool:
        while self._requests and self._requests[0].test():
            self._requests.popleft()
        self._finish()
        return not self._requests

    def wait(self) -> Status:
        while self._requests:
            self._requests.popleft().wait()
        self._finish()
        return DONE

    def _finish(self) -> None:
        if self._slots and not self._requests:
            self._pool.give(self._slots)
            self._slots = []


class _StagedRecv(DeviceRequest):
    """All pieces are asked for at once; each is copied to the device when it is seen to have come."""

    def __init__(self, comm: StagedCommunicator, buffer: Buffer, source: int, tag: int) -> None:
        self._comm, self._pool = comm, comm.pool
        self._parts = self._pool.cut(buffer)
        self._slots = self._pool.take(len(self._parts))
        self._requests = [
            comm.inner.start_recv(slot.host(part.size, part.dtype), source, tag)
            for slot, part in zip(self._slots, self._parts, strict=True)
        ]
        self._next, self._elements, self._status = 0, 0, DONE

    def waits_for(self) -> Request | None:
        return self._requests[self._next] if self._next < len(self._requests) else None

    def test(self) -> bool:
        while self._next < len(self._requests) and self._requests[self._next].test():
            self._store()
        if self._slots and self._next == len(self._requests) and self._slots[-1].event.done:
            self._finish()
        return not self._slots

    def wait(self) -> Status:
        while self._next < len(self._requests):
            self._store()
        if self._slots:
            with self._comm.span("recv"):
                self._finish()
        return self._status

    def cancel(self) -> None:
        for request in self._requests[self._next :]:
            request.cancel()
        self._next = len(self._requests)
        self._finish()

    def _store(self) -> None:
        status, part = self._requests[self._next].wait(), self._parts[self._next]
        self._elements += _checked(status, part, len(self._parts))
        self._slots[self._next].store(part[: status.elements])
        self._next += 1
        self._status = Status(status.source, status.tag, self._elements)

    def _finish(self) -> None:
        self._pool.give(self._slots)
        self._slots = []


class _Reducer:
    """Runs started all-reduces one after the other beside the rank's own course, over a communicator of its own."""

    def __init__(self, comm: DeviceCommunicator) -> None:
        self.comm = comm
        self._lane = comm.lane(REDUCE_LANE)
        self._jobs: deque[_StartedReduce] = deque()
        self._lock = threading.Lock()
        self._running = False
        self.thread: Thread | None = None

    def start(self, ready: Any, buffer: Buffer, operation: Operation) -> Request:
        job = _StartedReduce(self, ready, buffer, operation)
        with self._lock:
            self._jobs.append(job)
            if not self._running:
                self._running = True
                self.thread = self.comm.spawn(self._work)
        return job

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._running = False
                    return
                job = self._jobs.popleft()
            job.run(self._lane)


class _StartedReduce(DeviceRequest):
    def __init__(self, reducer: _Reducer, ready: Any, buffer: Buffer, operation: Operation) -> None:
        self._reducer, self._arguments = reducer, (ready, buffer, operation)
        self._done = False

    def run(self, comm: DeviceCommunicator) -> None:
        ready, buffer, operation = self._arguments
        comm.reduce_when(ready, buffer, operation, "library")
        self._done = True

    def waits_for(self) -> None:
        return None

    def test(self) -> bool:
        return self._done

    def wait(self) -> Status:
        with self._reducer.comm.span("wait"):
            while not self._done:
                assert self._reducer.thread is not None
                self._reducer.thread.join()
        return DONE


def on_host(buffer: Buffer) -> bool:
    """Whether it is NumPy's, so that MPI can have it as it is."""
    return isinstance(buffer, np.ndarray)


def _checked(status: Status, part: Buffer, pieces: int) -> int:
    """How many elements came. A message of several pieces must fill its buffer: the others would stay unmatched."""
    if pieces > 1 and status.elements != part.size:
        raise ValueError(
            f"a piece of {status.elements} elements came from rank {status.source} where one of {part.size} was "
            "due: a message longer than a slot needs a device buffer of its own length"
        )
    return status.elements
