"""Real ranks: the communicator over mpi4py.

Importing this module initialises MPI. Lower-case mpi4py calls, which pickle, are used between the ranks of one run
only while a communicator is set up, and only on integers and strings.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, cast

import numpy as np

from hpctrain.cluster import share_of_cores
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
from hpctrain.comm.ending import end_all_ranks
from hpctrain.comm.node import PrivateArena, SharedArena, why_not_shared
from hpctrain.comm.start import MPI
from hpctrain.errors import ClusterError
from hpctrain.trace.recorder import NullRecorder, Recorder

OPERATIONS = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}
SENT = Status(-1, -1, -1)
NAP = 50e-6  # seconds between looks where ranks outnumber cores
LOOKS = 16  # between naps: in each, MPICH moves only one piece (64 KiB or so) of a long message


class Waiting:
    """How to pass the time until something is true: look often at first, then nap or go on looking.

    `naps` lets the cores of waiting ranks to those that compute; without, latency is lowest.
    """

    def __init__(self, naps: bool) -> None:
        self.naps = naps
        self._eager = 20 if naps else 1000

    def until(self, ready: Callable[[], bool]) -> None:
        looks = self._eager
        while True:
            for _ in range(looks):
                if ready():
                    return
            if self.naps:
                time.sleep(NAP)
                looks = LOOKS
            else:
                os.sched_yield()
                looks = 1


def world(
    recorder: Recorder | None = None, ranks_per_node: int | None = None, wait: str = "auto"
) -> MpiCommunicator:
    """The communicator over all ranks of the MPI job (a copy of COMM_WORLD). Collective.

    `ranks_per_node` pretends that a node's ranks sit on several smaller ones, for tests and studies. `wait`: spin,
    nap, or auto, which naps if any node has more ranks than cores.
    """
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise ClusterError(
            "the MPI library does not offer MPI_THREAD_MULTIPLE, which hpctrain needs; "
            "use an MPI built with thread support"
        )
    handle = MPI.COMM_WORLD.Dup()
    shared = handle.Split_type(MPI.COMM_TYPE_SHARED)
    host = shared.bcast(handle.rank)
    place = shared.rank // ranks_per_node if ranks_per_node else 0
    mine = sorted(os.sched_getaffinity(0))
    cores = share_of_cores(mine, shared.allgather(mine))
    shared.Free()
    hosts = tuple(handle.allgather((host, place)))
    naps = any(handle.allgather(wait == "nap" or (wait == "auto" and cores < 1)))  # on one rank means on all
    members = tuple(range(handle.size))
    return MpiCommunicator(handle, members, hosts, 1, Waiting(naps), recorder or NullRecorder(), cores)


def launched_together() -> int:
    """How many processes the MPI library knows to have been started together."""
    return MPI.COMM_WORLD.size


def library() -> str:
    """The MPI library's own name and version, one line."""
    return MPI.Get_library_version().splitlines()[0].strip("\x00 ")


def standard() -> str:
    """The version of the MPI standard that the library implements: "4.1"."""
    return ".".join(map(str, MPI.Get_version()))


def thread_level() -> str:
    """What the library grants to threads: "MPI_THREAD_MULTIPLE", which `world` needs, or less."""
    levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(f"MPI_THREAD_{name}" for name in levels if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def cuda_support() -> bool | None:
    """What the MPI library says: whether it takes device pointers. None where it does not say."""
    library = ctypes.CDLL(MPI.__file__)
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")  # of MPI 4.1: "mpi,system,cuda:device", say
    info.Free()
    return None if kinds is None else any(kind.strip().startswith("cuda") for kind in kinds.split(","))


def try_on_self(out: Buffer, into: Buffer) -> None:
    """Send `out` to this process itself, and add it to what arrived, leaving twice `out` in `into`."""
    MPI.COMM_SELF.Sendrecv(out, 0, recvbuf=into, source=0)
    MPI.SUM.Reduce_local(out, into)
    MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, into)


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
        self._everybody = tuple(range(self.size))

    # -- point to point ------------------------------------------------------------------------------------
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        id = self.number_of("send", dest, tag)
        with self.span("send", buffer.nbytes, self.members[dest], id):
            request = self.handle.Isend(_wire(buffer), dest, tag)
        return _Send(self, request, self.members[dest], id)

    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        peer = MPI.ANY_SOURCE if source == ANY_SOURCE else source
        request = self.handle.Irecv(_wire(buffer), peer, tag)
        return _Recv(self, request, buffer, tag, self.number_of("recv", source, tag))

    def wait_any(self, requests: Sequence[Request]) -> int:
        done = _first_done(requests)
        if done is None:
            with self.span("wait"):
                self.waiting.until(lambda: any(_is_over(request) for request in requests))
                first = next(request for request in requests if _is_over(request))
                if isinstance(first, _Recv):
                    self.recorder.learn(0, first.peer, first.id)
            done = _first_done(requests)
        assert done is not None
        return done

    def number_of(self, verb: str, peer: int, tag: int) -> int:
        """The number of this message among those to (or from) that peer: equal at both ends."""
        key = (2 * peer + (verb == "recv"), tag)
        self._messages[key] = count = self._messages.get(key, 0) + 1
        return self.number << 44 | tag << 36 | count

    # -- collectives ---------------------------------------------------------------------------------------
    def barrier(self) -> None:
        with self.span("wait", id=self._collective()):
            self._settle(self.handle.Ibarrier())

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        sends = self.rank == root
        with self.span("send" if sends else "recv", buffer.nbytes if sends else 0, id=self._collective()):
            self._settle(self.handle.Ibcast(_wire(buffer), root))

    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        id = self._collective()
        self._gather_up(id)
        with self.span("reduce", buffer.nbytes if algorithm == "library" else 0, id=id):  # else its messages have them
            if buffer.dtype == BFLOAT16:
                wide = buffer.astype(np.float32)
                self._all_reduce(wide, operation, algorithm)
                buffer[...] = wide
            else:
                self._all_reduce(buffer, operation, algorithm)

    def _all_reduce(self, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        if algorithm == "library":
            self.handle.Allreduce(MPI.IN_PLACE, buffer, OPERATIONS[operation])
        else:
            algorithms.all_reduce_by(algorithm)(self, buffer, operation, self._everybody)

    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        id = self._collective()
        wide = buffer.astype(np.float32) if buffer.dtype == BFLOAT16 else buffer
        with self.span("reduce", buffer.nbytes, id=id):
            request = self.handle.Iallreduce(MPI.IN_PLACE, wide, OPERATIONS[operation])
        return _StartedReduce(self, request, buffer, wide, id)

    def reduce_scatter(self, buffer: Buffer, bounds: Sequence[int], operation: Operation = "sum") -> None:
        id = self._collective()
        self._gather_up(id)
        with self.span("reduce", id=id):
            algorithms.ring_reduce_scatter(self, buffer, bounds, operation, self._everybody)

    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        id = self._collective()
        self._gather_up(id)
        with self.span("recv", buffer.nbytes, id=id):
            wire = _wire(buffer)
            counts = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
            places = list(bounds[:-1])
            self.handle.Allgatherv(MPI.IN_PLACE, [wire, (counts, places)])

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

    def _gather_up(self, id: int) -> None:
        """Where cores are scarce, wait for the last rank without burning a core, then exchange at full speed."""
        if self.waiting.naps:
            with self.span("wait", id=id):
                self._settle(self.handle.Ibarrier())

    def _settle(self, request: MPI.Request) -> None:
        if self.waiting.naps:
            self.waiting.until(request.Test)
        else:
            request.Wait()

    def _collective(self) -> int:
        self._count += 1
        return self.number << 44 | self._count

    # -- memory --------------------------------------------------------------------------------------------
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        if share == "rank":
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
            with self.span("wait", id=arena.id | arena.epoch):  # also of who came last: for whom the others waited
                if not arena.arrived():
                    self.waiting.until(arena.arrived)

    def counter(self) -> Counter:
        return _MpiCounter(self.handle)

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
        other.waiting = Waiting(naps=True)  # a thread that looks all the time keeps the rank's own from the interpreter
        return other

    def spawn(self, function: Callable[[], Any]) -> Thread:
        return _MpiThread(function, self.members[self.rank])

    def free(self) -> None:
        self.node.Free()
        self.handle.Free()


def _split(handle: MPI.Intracomm, color: int, key: int) -> MPI.Intracomm:
    return cast(MPI.Intracomm, handle.Split(color, key))


def _wire(buffer: Buffer) -> Buffer:
    """The buffer as MPI can move it: bfloat16 has no MPI type, its bits have."""
    return buffer.view(np.uint16) if buffer.dtype == BFLOAT16 else buffer


def _first_done(requests: Sequence[Request]) -> int | None:
    for index, request in enumerate(requests):
        if request.test():
            return index
    return None


def _is_over(request: Request) -> bool:
    assert isinstance(request, _Operation)
    return request.over()


class _Operation(Request):
    """A started MPI operation. `_end` is called once, by whoever first sees that it is over."""

    __slots__ = ("_comm", "_request", "_status", "id")

    def __init__(self, comm: MpiCommunicator, request: MPI.Request, id: int) -> None:
        self._comm, self._request, self.id = comm, request, id
        self._status: Status | None = None

    def over(self) -> bool:
        """Like `test`, but leaves no trace."""
        return self._status is not None or bool(self._request.Test())

    def test(self) -> bool:
        if self._status is None and self.over():
            self._status = self._end()
        return self._status is not None

    def _end(self) -> Status:
        return SENT

    def _settle(self) -> None:
        self._comm._settle(self._request)


class _Send(_Operation):
    """Its bytes were traced when it began; how long its sender waits for its end is a second span, of none."""

    __slots__ = ("_peer",)

    def __init__(self, comm: MpiCommunicator, request: MPI.Request, peer: int, id: int) -> None:
        super().__init__(comm, request, id)
        self._peer = peer

    def wait(self) -> Status:
        if not self.test():
            with self._comm.span("send", 0, self._peer, self.id):
                self._settle()
            self._status = SENT
        return SENT


class _Recv(_Operation):
    """Traced where it ends: as a span of no length if nobody waited for it."""

    __slots__ = ("_buffer", "_found", "_tag", "peer")

    def __init__(self, comm: MpiCommunicator, request: MPI.Request, buffer: Buffer, tag: int, id: int) -> None:
        super().__init__(comm, request, id)
        self._buffer, self._tag = buffer, tag
        self._found: MPI.Status | None = None
        self.peer = -1

    def over(self) -> bool:
        if self._found is None:
            found = MPI.Status()
            if not self._request.Test(found):
                return False
            self._found = found
            self.peer = self._comm.members[found.Get_source()]
        return True

    def wait(self) -> Status:
        if not self.test():
            with self._comm.span("recv", id=self.id):
                if self._comm.waiting.naps:
                    self._comm.waiting.until(self.over)
                else:
                    self._found = MPI.Status()
                    self._request.Wait(self._found)
                self._status = self._received()
        assert self._status is not None
        return self._status

    def _end(self) -> Status:
        with self._comm.span("recv", id=self.id):
            return self._received()

    def _received(self) -> Status:
        found = self._found
        assert found is not None
        nbytes, source = found.Get_count(MPI.BYTE), found.Get_source()
        self.peer = self._comm.members[source]
        self._comm.recorder.learn(nbytes, self.peer, self.id)
        return Status(source, self._tag, nbytes // self._buffer.itemsize)

    def cancel(self) -> None:
        if self._status is None:
            self._request.Cancel()
            self._request.Wait()
            self._status = SENT


class _StartedReduce(_Operation):
    """Traced like a send: its bytes where it begins, how long it is waited for in a second span."""

    def __init__(
        self, comm: MpiCommunicator, request: MPI.Request, buffer: Buffer, wide: Buffer, id: int
    ) -> None:
        super().__init__(comm, request, id)
        self._buffer, self._wide = buffer, wide

    def wait(self) -> Status:
        if not self.test():
            with self._comm.span("reduce", id=self.id):
                self._settle()
            self._status = self._end()
        return SENT

    def _end(self) -> Status:
        if self._wide is not self._buffer:
            self._buffer[...] = self._wide
        return SENT


class _MpiCounter(Counter):
    def __init__(self, handle: MPI.Intracomm) -> None:
        self._window = MPI.Win.Allocate(8 if handle.rank == 0 else 0, 8, comm=handle)
        if handle.rank == 0:
            np.asarray(self._window.tomemory()).view(np.int64)[0] = 0
        handle.Barrier()
        self._window.Lock_all(MPI.MODE_NOCHECK)

    def fetch_add(self, amount: int) -> int:
        before = np.empty(1, np.int64)
        self._window.Fetch_and_op(np.array([amount], np.int64), before, 0, 0, MPI.SUM)
        self._window.Flush(0)
        return int(before[0])

    def free(self) -> None:
        self._window.Unlock_all()
        self._window.Free()


class _MpiThread(Thread):
    """Of rank `rank`. What `function` raises ends all ranks, unless they raise it too: nobody may ever come to join."""

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
    """`function()`. Python ends a thread without a word where it calls sys.exit(): so that is an error."""
    try:
        return function()
    except SystemExit as error:
        raise RuntimeError("sys.exit() was called in a server's thread") from error
