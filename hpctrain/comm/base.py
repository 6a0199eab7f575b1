"""The communicator: MPI's operations on arenas and their slices, plus clock, spans and threads.

Two implementations: `MpiCommunicator` in `mpi` (real ranks) and `VirtualCommunicator` in `virtual` (coroutines on a
virtual clock); `DeviceCommunicator` in `device` wraps one of them. Strategies use only this file. Buffers are
one-dimensional, C-contiguous NumPy arrays (or CuPy arrays, if a device path is in use) of float16, float32, float64,
bfloat16 (`ml_dtypes.bfloat16`) or integers.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, Self

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from hpctrain.trace.recorder import Recorder

Buffer = Any  # np.ndarray; a CuPy array on the device path; a Phantom where a simulation needs no values
Share = Literal["node", "rank", "host", "board"]
Operation = Literal["sum", "max", "min"]
SHARED: tuple[Share, ...] = ("node", "board")  # by the ranks of a node
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
HALVES = (BFLOAT16, np.dtype(np.float16))  # are added in float32, never in their own precision


class Tag(IntEnum):
    """All message tags. Collectives built from messages use COLLECTIVE."""

    COLLECTIVE = 1
    PUSH = 2
    PULL = 3
    CONTROL = 4
    REPLY = 5
    DECISION = 6
    STATE = 7
    CLOCK = 8
    PART = 9  # of a sum
    SUM = 10


def barrier_id(communicator: int, arena: int) -> int:
    """The base id of the spans that wait for an arena; the epoch is added to it. Bit 43 distinguishes them from
    messages (which have their tag there) and collectives (which are counted from 0)."""
    return communicator << 44 | 1 << 43 | (arena & 0x7FF) << 32


class Request(ABC):
    """A started operation. Its buffers belong to the communicator until it is done.

    Strategies use `test`, `wait` and `cancel`; the other methods are for `Communicator.wait_any`.
    """

    __slots__ = ()

    @abstractmethod
    def test(self) -> bool:
        """Whether it is done; never waits."""

    @abstractmethod
    def wait(self) -> int:
        """Wait until it is done. Returns the number of elements received; 0 for a send or a collective."""

    def cancel(self) -> None:
        """Withdraw a receive that no send will match (when a server ends). Only receives can be cancelled."""
        raise NotImplementedError("only a receive can be cancelled")

    def over(self) -> bool:
        """Like `test`, but records nothing in the trace."""
        return self.test()

    def pending(self) -> Request | None:
        """The operation of the underlying communicator that must end next: this one, unless it consists of others. None
        while it waits for something else, such as a copy or a thread."""
        return self

    def watch(self, waits: bool) -> None:  # noqa: B027 (a rank that polls has nothing to do)
        """The caller starts to wait for this among other requests, or stops waiting (`waits` False). If ranks are
        coroutines, the caller is resumed when this may be done."""

    def explain(self) -> None:  # noqa: B027 (most leave the span as it is)
        """If this is a receive, add its message to the caller's open span. Call only once it is over."""


class Arena(ABC):
    """One contiguous buffer per rank, placed by the communicator.

    `parts[i]` is the buffer of the i-th rank of this node (`share="node"`; "board": for numbers that ranks decide by,
    which exist even where arenas hold no memory), or `parts` contains only this rank's own buffer (`share="rank"`;
    "host": in host memory, pinned if the others are on a GPU). A rank may request length 0, so "once per node" means:
    local rank 0 requests n, the others 0, and all use `parts[0]`. `mine` is this rank's own buffer.
    """

    parts: list[Buffer]
    mine: Buffer

    @abstractmethod
    def free(self) -> None:
        """Free the memory. Collective over the node's ranks if shared. Views must not be used afterwards."""


class Thread(ABC):
    """The handle of a thread started by `spawn`."""

    @abstractmethod
    def join(self) -> Any:
        """Wait for the thread to end; returns the function's result or raises its exception."""


class Communicator(ABC):
    """A group of ranks. Unless stated otherwise, operations are collective over all of them and in place.

    Attributes: `rank`, `size`; `nodes[r]` the index of rank r's node (nodes are numbered by their first rank);
    `local_ranks` the ranks of this node in order, `local_rank` this rank's index among them; `members[r]` the rank that
    r has in the whole run (used in traces and user messages); `concurrent` whether ranks really run in parallel (False:
    coroutines; do not create threads); `cores` how many of its node's cores are available to this rank (less than 1 if
    there are more ranks than cores); `simulates` the description of the cluster that virtual ranks stand for ("":
    none), which makes them write traces.
    """

    rank: int
    size: int
    nodes: tuple[int, ...]
    local_ranks: tuple[int, ...]
    local_rank: int
    members: tuple[int, ...]
    concurrent: bool
    simulates: str = ""
    cores: float = 1.0
    recorder: Recorder

    # -- point to point (not collective) -----------------------------------------------------------------
    @abstractmethod
    def start_send(self, buffer: Buffer, dest: int, tag: int) -> Request: ...

    @abstractmethod
    def start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        """The message may be shorter than the buffer."""

    def send(self, buffer: Buffer, dest: int, tag: int) -> None:
        self.start_send(buffer, dest, tag).wait()

    def recv(self, buffer: Buffer, source: int, tag: int) -> int:
        """Returns the number of elements received."""
        return self.start_recv(buffer, source, tag).wait()

    def sendrecv(self, out: Buffer, dest: int, into: Buffer, source: int, tag: int) -> int:
        """Send and receive at the same time; cannot deadlock in a ring. Returns the number of elements received."""
        incoming = self.start_recv(into, source, tag)
        outgoing = self.start_send(out, dest, tag)
        elements = incoming.wait()
        outgoing.wait()
        return elements

    @abstractmethod
    def wait_any(self, requests: Sequence[Request]) -> int:
        """The index of a request that is done (the lowest, if several); waits until one is."""

    def wait_all(self, requests: Sequence[Request]) -> None:
        for request in requests:
            request.wait()

    # -- collectives -------------------------------------------------------------------------------------
    @abstractmethod
    def barrier(self) -> None: ...

    @abstractmethod
    def broadcast(self, buffer: Buffer, root: int = 0) -> None: ...

    @abstractmethod
    def all_reduce(self, buffer: Buffer, operation: Operation = "sum", algorithm: str = "library") -> None:
        """Reduce over all ranks, in place. `algorithm`: library, ring, halving_doubling, tree or hierarchical."""

    @abstractmethod
    def start_all_reduce(self, buffer: Buffer, operation: Operation = "sum") -> Request:
        """Start the library's all-reduce; every rank must start the same ones in the same order."""

    @abstractmethod
    def all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        """Rank r provides buffer[bounds[r]:bounds[r + 1]]; afterwards all have the whole buffer."""

    @abstractmethod
    def split(self, color: int | None, key: int = 0) -> Communicator | None:
        """Ranks of equal color form a communicator, ordered by (key, rank). None: this rank joins no communicator."""

    def gather_rows(self, row: Buffer) -> Buffer:
        """The rows of all ranks, of equal length n, as one (size, n) array; row r comes from rank r."""
        table = np.zeros((self.size, row.size), row.dtype)
        table[self.rank] = row
        self.all_gather(table.reshape(-1), [r * row.size for r in range(self.size + 1)])
        return table

    def start_gather_rows(self, row: Buffer) -> tuple[Request, Buffer]:
        """Start `gather_rows`; the array is complete once the request is done. -0.0 arrives as 0.0."""
        table = np.zeros((self.size, row.size), row.dtype)
        table[self.rank] = row
        return self.start_all_reduce(table.reshape(-1)), table

    def broadcast_json(self, value: Any, root: int = 0) -> Any:
        """A small plain value from `root` (the argument of other ranks is ignored). Never pickled."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8).copy() if self.rank == root else None
        length = np.array([0 if data is None else data.size], np.int64)
        self.broadcast(length, root)
        if data is None:
            data = np.empty(int(length[0]), np.uint8)
        self.broadcast(data, root)
        return json.loads(data.tobytes())

    def gather_json(self, value: Any) -> list[Any]:
        """Small plain values of all ranks, in rank order, on all ranks; equal ones are one object. Never pickled."""
        data = np.frombuffer(json.dumps(value).encode(), np.uint8)
        lengths = self.gather_rows(np.array([data.size], np.int64))[:, 0]
        bounds = [0, *np.cumsum(lengths).tolist()]
        everything = np.zeros(bounds[-1], np.uint8)
        everything[bounds[self.rank] : bounds[self.rank + 1]] = data
        self.all_gather(everything, bounds)
        return decoded([everything[a:b].tobytes() for a, b in zip(bounds, bounds[1:], strict=False)])

    # -- memory ------------------------------------------------------------------------------------------
    @abstractmethod
    def arena(self, length: int, dtype: np.dtype[Any], share: Share = "rank") -> Arena:
        """A zeroed buffer of `length` elements. Collective over the node's ranks if `share` is "node" or "board"."""

    @abstractmethod
    def can_share(self, nbytes: int) -> str | None:
        """Why this node cannot share arenas of `nbytes` in total, as a sentence; None if it can. Collective."""

    @abstractmethod
    def notify(self, arena: Arena) -> None:
        """Publish this rank's writes to its node-shared arenas: increments its epoch. Not collective."""

    @abstractmethod
    def wait(self, arena: Arena) -> None:
        """Wait until every rank of the node has notified `arena` as often as this rank: a node barrier."""

    @abstractmethod
    def behind(self, arena: Arena) -> int:
        """How many of this rank's latest notifications some rank of the node has yet to match; 0: `wait(arena)` would
        return at once. What every rank wrote before the others is visible here. Never waits."""

    @abstractmethod
    def sync(self, arena: Arena) -> None:
        """Order this rank's accesses to its node-shared arena and its messages: what it wrote before this call is there
        for a rank of the node that receives a message sent after it, and then calls this, too. Never waits."""

    # -- time, threads -----------------------------------------------------------------------------------
    @abstractmethod
    def now(self) -> int:
        """Nanoseconds of a monotonic clock; virtual time for virtual ranks."""

    @abstractmethod
    def sleep(self, seconds: float) -> None: ...

    @abstractmethod
    def span(
        self, kind: str, bytes: int = 0, peer: int = -1, id: int = -1, flops: float = 0.0, items: int = 0
    ) -> AbstractContextManager[Any]:
        """Trace the block as a span; in virtual time it also advances the clock by the cost of the block.

        The returned object may be entered repeatedly, but not within itself. `peer` is a rank of the whole run;
        `items`: samples that are loaded or computed on; `flops`: floating-point operations, 0 if unknown. The
        operations above trace themselves: a span around one of them is cut where it waits.
        """

    @abstractmethod
    def spawn(self, function: Callable[[], Any]) -> Thread:
        """Run concurrently with this rank's main thread: a thread under MPI, a coroutine in virtual time."""

    def lane(self, number: int) -> Self:
        """This communicator for another thread of this rank, which traces into its own lane."""
        other = copy(self)
        other.recorder = self.recorder.lane(number)
        return other

    def patient(self) -> Self:
        """This communicator for a caller with several operations under way: its waits take less processor time, and
        notice an end later."""
        return self

    @abstractmethod
    def free(self) -> None:
        """Free the communicator, after its arenas."""


def decoded(texts: Sequence[bytes]) -> list[Any]:
    """What these JSON texts say. Each is read once: of thousands of ranks most say the same."""
    known = {text: json.loads(text) for text in set(texts)}
    return [known[text] for text in texts]
