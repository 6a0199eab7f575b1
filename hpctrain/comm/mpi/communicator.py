"""The communicator of real ranks, over mpi4py.

Importing this module initialises MPI. Lower-case mpi4py calls, which pickle, are used only between the ranks of one
run, only while a communicator is set up, and only on integers and strings.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any, Self, cast

import numpy as np

from hpctrain.cluster import share_of_cores
from hpctrain.comm import algorithms
from hpctrain.comm.base import (
    BFLOAT16,
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
)
from hpctrain.comm.mpi.ending import end_all_ranks
from hpctrain.comm.mpi.quota import processor_quota
from hpctrain.comm.mpi.requests import MpiRecv, MpiReduce, MpiRequest, MpiSend, Waiting
from hpctrain.comm.mpi.shared import PrivateArena, SharedArena, why_not_shared
from hpctrain.comm.mpi.start import MPI
from hpctrain.comm.waiting import SHORT, takes_naps
from hpctrain.errors import ClusterError
from hpctrain.trace.recorder import NullRecorder, Recorder
from hpctrain.trace.schema import Kind

OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
RECV, REDUCE = int(Kind.RECV), int(Kind.REDUCE)


def world(recorder: Recorder | None = None, ranks_per_node: int | None = None, wait: str = "auto") -> MpiCommunicator:
    """The communicator over all ranks of the MPI job (a copy of COMM_WORLD). Collective.

    `ranks_per_node` treats a node as several smaller ones, for tests and studies. `wait`: spin, nap, or auto, which
    naps if any rank has less than a core.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ClusterError(
            "the MPI library does not support MPI_THREAD_MULTIPLE, which hpctrain needs; "
            "use an MPI built with thread support"
        )
    handle = MPI.COMM_WORLD.Dup()
    shared = handle.Split_type(MPI.COMM_TYPE_SHARED)
    host = shared.bcast(handle.rank)
    place = shared.rank // ranks_per_node if ranks_per_node else 0
    mine = sorted(os.sched_getaffinity(0))
    cores = min(share_of_cores(mine, shared.allgather(mine)), processor_quota() / shared.size)
    shared.Free()
    hosts = tuple(handle.allgather((host, place)))
    naps = any(handle.allgather(takes_naps(wait, cores)))  # on one rank means on all
    members = tuple(range(handle.size))
    return MpiCommunicator(handle, members, hosts, 1, Waiting(naps), recorder or NullRecorder(), cores)


class MpiCommunicator(Communicator):
    """See `Communicator`."""

    def __init__(
        self,
        handle: MPI.Intracomm,
        members: tuple[int, ...],
        hosts: tuple[tuple[int, int], ...],
        number: int,
        waiting: Waiting,
        recorder: Recorder,
        cores: float,
    ) -> None:
        self.handle = handle
        self.rank, self.size = handle.rank, handle.size
        self.members, self.hosts = members, hosts
        order = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
        self.nodes = tuple(order[host] for host in hosts)
        self.local_ranks = tuple(r for r in range(self.size) if hosts[r] == hosts[self.rank])
        self.local_rank = self.local_ranks.index(self.rank)
        self.concurrent = True
        self.recorder = recorder
        self.waiting = waiting
        self.cores = cores
        self.number = number
        self.node = _split(handle, self.nodes[self.rank], self.rank)
        self._count = 0
        self._messages: dict[tuple[int, int], int] = {}
        self._all_ranks = tuple(range(self.size))
        self._apart = len(order) == self.size

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        id = self._message_id("send", dest, tag)
        with self.span("send", buffer.nbytes, self.members[dest], id):
            request = self.handle.Isend(_wire(buffer), dest, tag)
        return MpiSend(self.recorder, self.waiting, request, self.members[dest], id)

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        request, id = self.handle.Irecv(_wire(buffer), source, tag), self._message_id("recv", source, tag)
        return MpiRecv(self.recorder, self.waiting, request, buffer, self.members[source], id)

    def wait_any(self, requests: Sequence[Request]) -> int:
        while True:
            for index, request in enumerate(requests):
                if request.test():
                    return index
            with self.span("wait"):
                short = all(isinstance(request, MpiRequest) and request.short for request in requests)
                self.waiting.until(lambda: any(request.over() for request in requests), idle=short)
                next(request for request in requests if request.over()).explain()

    def _message_id(self, verb: str, peer: int, tag: int) -> int:
        """The number of this message among those to (or from) that peer: the same at both ends."""
        key = (2 * peer + (verb == "recv"), tag)
        self._messages[key] = count = self._messages.get(key, 0) + 1
        return self.number << 44 | tag << 36 | count

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        with self.span("wait", id=self._collective()):
            self.waiting.settle(self.handle.Ibarrier(), idle=True)

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        sends = self.rank == root
        with self.span("send" if sends else "recv", buffer.nbytes if sends else 0, id=self._collective()):
            self.waiting.settle(self.handle.Ibcast(_wire(buffer), root))

    # Of a short all-reduce, Python's own calls take a good part, most of all while none of this is in the CPU caches.
    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        id, recorder = self._collective(), self.recorder
        naps = self.waiting.naps
        if naps and not self._apart:
            self._gather_up(id)
        wide = buffer.astype(np.float32) if buffer.itemsize == 2 and buffer.dtype in HALVES else buffer
        if algorithm == "library":
            began = recorder.now()
            if naps and self._apart:
                self._settle(self.handle.Iallreduce(MPI.IN_PLACE, wide, OPERATIONS[operation]), wide.nbytes)
            else:
                self.handle.Allreduce(MPI.IN_PLACE, wide, OPERATIONS[operation])
            recorder.passed(REDUCE, began, buffer.nbytes, id)
        else:
            with self.span("reduce", id=id):  # its messages have the bytes
                algorithms.all_reduce_by(algorithm)(self, wide, operation, self._all_ranks)
        if wide is not buffer:
            buffer[...] = wide

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        id = self._collective()
        wide = buffer.astype(np.float32) if buffer.dtype in HALVES else buffer
        with self.span("reduce", buffer.nbytes, id=id):
            request = self.handle.Iallreduce(MPI.IN_PLACE, wide, OPERATIONS[operation])
        return MpiReduce(self.recorder, self.waiting, request, buffer, wide, id)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        id, naps = self._collective(), self.waiting.naps
        if naps and not self._apart:
            self._gather_up(id)
        with self.span("recv", buffer.nbytes, id=id):
            counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
            into = [_wire(buffer), (counts, list(bounds[:-1]))]
            if naps and self._apart:
                self._settle(self.handle.Iallgatherv(MPI.IN_PLACE, into), buffer.nbytes)
            else:
                self.handle.Allgatherv(MPI.IN_PLACE, into)

    def gather_rows(self, row: Buffer) -> Buffer:
        id, recorder = self._collective(), self.recorder
        if self.waiting.naps:
            self._gather_up(id)
        began = recorder.now()
        table = np.empty((self.size, row.size), row.dtype)
        self.handle.Allgather(_wire(row), _wire(table))
        recorder.passed(RECV, began, table.nbytes, id)
        return table

    def split(self, color: int | None, key: int = 0) -> MpiCommunicator | None:
        self._count += 1
        handle = _split(self.handle, MPI.UNDEFINED if color is None else color, key)
        if handle == MPI.COMM_NULL:
            return None
        ranks = np.empty(handle.size, np.int64)
        handle.Allgather(np.array([self.rank], np.int64), ranks)
        members = tuple(self.members[r] for r in ranks)
        number = zlib.crc32(f"{self.number}/{self._count}/{color}".encode()) & 0x3FFFF
        hosts = tuple(self.hosts[r] for r in ranks)
        return MpiCommunicator(handle, members, hosts, number, self.waiting, self.recorder, self.cores)

    def _settle(self, request: MPI.Request, nbytes: int) -> None:
        """Where cores are scarce and messages go between nodes, which takes long: nap until the collective is over."""
        self.waiting.settle(request, idle=nbytes <= SHORT)

    def _gather_up(self, id: int) -> None:
        """Where cores are scarce, on one node: wait for the last rank without using a core, then exchange at full
        speed."""
        with self.span("wait", id=id):
            self.waiting.settle(self.handle.Ibarrier(), idle=True)

    def _collective(self) -> int:
        self._count += 1
        return self.number << 44 | self._count

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        if share not in SHARED:
            return PrivateArena(length, dtype)
        self._count += 1
        return SharedArena(self.node, length, dtype, barrier_id(self.number, self._count))

    def can_share(self, nbytes: int) -> str | None:
        return why_not_shared(self.node, nbytes)

    def notify(self, arena: Arena) -> None:
        if isinstance(arena, SharedArena):
            arena.publish()

    def wait(self, arena: Arena) -> None:
        if isinstance(arena, SharedArena):
            with self.span("wait", id=arena.id | arena.epoch):  # also for the last rank, which others waited for
                if not arena.arrived():
                    self.waiting.until(arena.arrived, idle=True)

    def behind(self, arena: Arena) -> int:
        return arena.behind() if isinstance(arena, SharedArena) else 0

    def sync(self, arena: Arena) -> None:
        if isinstance(arena, SharedArena):
            arena.sync()

    # -- time, threads -------------------------------------------------------------------------------------
    def now(self) -> int:
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0, items: int = 0
    ) -> AbstractContextManager[Any]:
        return self.recorder.span(kind, bytes, peer, id, items, flops)

    def lane(self, number: int) -> Self:
        other = super().lane(number)
        other.waiting = Waiting(naps=True)  # a polling thread would keep the interpreter from the main one
        return other

    def patient(self) -> Self:
        other = copy(self)
        other.waiting = Waiting(self.waiting.naps, patient=True)
        return other

    def spawn(self, function: Callable[[], Any]) -> Thread:
        return MpiThread(function, self.members[self.rank])

    def free(self) -> None:
        self.node.Free()
        self.handle.Free()


def _split(handle: MPI.Intracomm, color: int, key: int) -> MPI.Intracomm:
    return cast(MPI.Intracomm, handle.Split(color, key))


def _wire(buffer: Buffer) -> Buffer:
    """The buffer in a form that MPI can send: there is no MPI type for bfloat16, but there is one for its bits."""
    return buffer.view(np.uint16) if buffer.dtype == BFLOAT16 else buffer


class MpiThread(Thread):
    """A thread of rank `rank`. An exception ends all ranks, as nothing may ever join it, unless all ranks raise it."""

    def __init__(self, function: Callable[[], Any], rank: int) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def body() -> None:
            try:
                self._result = _without_exit(function)
            except BaseException as error:
                self._error = error
                if getattr(error, "everywhere", False):
                    return
                if MPI.COMM_WORLD.size > 1:
                    end_all_ranks(rank, error)
                raise

        self._thread = threading.Thread(target=body, daemon=True)
        self._thread.start()

    def join(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


def _without_exit(function: Callable[[], Any]) -> Any:
    """`function()`. sys.exit() would end the thread silently, so it becomes an error."""
    try:
        return function()
    except SystemExit as error:
        raise RuntimeError("sys.exit() was called in a server's thread") from error
