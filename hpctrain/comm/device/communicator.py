"""Base of the transports of device buffers: staged through the host, CUDA IPC, NCCL, or MPI with device pointers.

NOT YET RUN ON A GPU: tested with stand-ins for CuPy (tests/unit/test_device.py); tests/gpu waits for a GPU.

A `DeviceCommunicator` wraps another communicator. Operations on NumPy arrays are forwarded to it. CuPy arrays take the
transport's way; `choice` finds out which ones work here, and which is the fastest. Before anything but torch accesses a
device buffer, the work that torch has queued so far is waited for: here, and nowhere else.

A device message longer than a slot is sent as several, in order: its receiver must provide a buffer of exactly that
length, on a device or in a pinned arena. In a collective, either all ranks provide a device buffer, or none.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from functools import partial
from typing import Any, ClassVar, Self

import numpy as np

from hpctrain.comm.base import (
    SHARED,
    Arena,
    Buffer,
    Communicator,
    Operation,
    Request,
    Share,
    Thread,
)
from hpctrain.comm.device.gpu import DeviceArena, Gpu, PinnedArena, SlotPool
from hpctrain.comm.device.reducer import NOTHING, Reducer

REDUCE_LANE = 2  # of the thread that runs started all-reduces (0: the rank's main thread, 1: a colocated server)


class DeviceCommunicator(Communicator):
    """The common part of all transports: host arrays are passed to `inner`, private arenas lie on the device.

    The constructor is collective over `inner`. `transport`: its name in jobs and traces. `_beside`: a second
    communicator over the same ranks, for operations in another thread. It cannot be created on first use: that happens
    in a gradient hook, which must not wait for other ranks.
    """

    transport: ClassVar[str]

    def __init__(self, inner: Communicator, gpu: Gpu, pool: SlotPool) -> None:
        self.inner, self.gpu, self.pool = inner, gpu, pool
        self.rank, self.size = inner.rank, inner.size
        self.nodes, self.members = inner.nodes, inner.members
        self.local_ranks, self.local_rank = inner.local_ranks, inner.local_rank
        self.concurrent, self.cores = inner.concurrent, inner.cores
        self.recorder = inner.recorder
        self._all_ranks = tuple(range(inner.size))
        self._beside: DeviceCommunicator | None = None
        self._reducer: tuple[Reducer, DeviceCommunicator] | None = None

    @classmethod
    def around(cls, inner: Communicator, gpu: Gpu, pool: SlotPool | None = None) -> Self:
        """Collective over `inner`."""
        made = cls(inner, gpu, pool or SlotPool(gpu))
        beside = inner.split(0, inner.rank)
        assert beside is not None
        made._beside = cls(beside, gpu, made.pool)
        return made

    # -- how device buffers move ---------------------------------------------------------------------------
    @abstractmethod
    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request: ...

    @abstractmethod
    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request: ...

    @abstractmethod
    def _send(self, buffer: Buffer, dest: int, tag: int) -> None: ...

    @abstractmethod
    def _recv(self, buffer: Buffer, source: int, tag: int) -> int: ...

    @abstractmethod
    def _broadcast(self, buffer: Buffer, root: int) -> None: ...

    @abstractmethod
    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        """All-reduce a device buffer once the event `ready` has passed; blocks."""

    @abstractmethod
    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None: ...

    def _whole(self, buffer: Buffer) -> bool:
        """Whether a message from or to this buffer is a single one, as it is between any other communicators."""
        return on_host(buffer)

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        start = self.inner.start_send if self._whole(buffer) else self._start_send
        return start(buffer, dest, tag)

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        start = self.inner.start_recv if self._whole(buffer) else self._start_recv
        return start(buffer, source, tag)

    def send(self, buffer: Buffer, dest: int, tag: int) -> None:
        (self.inner.send if self._whole(buffer) else self._send)(buffer, dest, tag)

    def recv(self, buffer: Buffer, source: int, tag: int) -> int:
        return (self.inner.recv if self._whole(buffer) else self._recv)(buffer, source, tag)

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> int:
        if self._whole(out) and self._whole(into):
            return self.inner.sendrecv(out, dest, into, source, tag)
        incoming = self.start_recv(into, source, tag)
        self.send(out, dest, tag)
        return incoming.wait()

    def wait_any(self, requests: Sequence[Request]) -> int:
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            pending = [request.pending() for request in requests]
            if None in pending:  # a copy or a thread, which MPI cannot report on
                self.inner.sleep(20e-6)
            else:
                self.inner.wait_any([request for request in pending if request is not None])

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        self.inner.barrier()

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        if on_host(buffer):
            self.inner.broadcast(buffer, root)
        elif self.size > 1:
            self._broadcast(buffer, root)

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        if on_host(buffer):
            self.inner.all_reduce(buffer, operation, algorithm)
        elif self.size > 1:
            self.reduce_when(self.gpu.mark(), buffer, operation, algorithm)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        """For a device buffer: a blocking all-reduce in a thread, in the order of the starts, because Open MPI's
        Iallreduce cannot read device memory (issue 9845)."""
        if on_host(buffer):
            return self.inner.start_all_reduce(buffer, operation)
        if self.size == 1:
            return NOTHING
        if self._reducer is None:
            assert self._beside is not None
            self._reducer = Reducer(self._beside), self._beside.lane(REDUCE_LANE)
        reducer, lane = self._reducer
        return reducer.start(partial(lane.reduce_when, self.gpu.mark(), buffer, operation, "library"))

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        if on_host(buffer):
            self.inner.all_gather(buffer, bounds)
        elif self.size > 1:
            self._all_gather(buffer, bounds)

    def split(self, color: int | None, key: int = 0) -> Self | None:
        part = self.inner.split(color, key)
        return self.around(part, self.gpu, self.pool) if part is not None else None

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        """On the device, except for memory shared by the ranks of a node, which lies on the host, and pinned memory."""
        if share in SHARED:
            return self.inner.arena(length, dtype, share)
        return (DeviceArena if share == "rank" else PinnedArena)(self.gpu, length, dtype)

    def can_share(self, nbytes: int) -> str | None:
        return "the models are on GPUs"

    def notify(self, arena: Arena) -> None:
        if not isinstance(arena, (DeviceArena, PinnedArena)):
            self.inner.notify(arena)

    def wait(self, arena: Arena) -> None:
        if not isinstance(arena, (DeviceArena, PinnedArena)):
            self.inner.wait(arena)

    def behind(self, arena: Arena) -> int:
        return 0 if isinstance(arena, (DeviceArena, PinnedArena)) else self.inner.behind(arena)

    def sync(self, arena: Arena) -> None:
        if not isinstance(arena, (DeviceArena, PinnedArena)):
            self.inner.sync(arena)

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

    def patient(self) -> Self:
        other = copy(self)
        other.inner = self.inner.patient()
        return other

    def free(self) -> None:
        self.release()
        self.inner.free()

    def release(self) -> None:
        """Free what this transport needs, but not `inner`. Collective."""
        if self._reducer is not None:
            reducer, lane = self._reducer
            reducer.join()
            lane.release()  # it has connections of its own
        if self._beside is not None:
            self._beside.free()


def on_host(buffer: Buffer) -> bool:
    """Whether it is a NumPy array, which MPI can use directly."""
    return isinstance(buffer, np.ndarray)
