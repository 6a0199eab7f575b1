"""How gradients and parameters get from workers to servers and back: by messages, or through memory that they share.

On a node that shares memory a server reads a gradient where the worker has computed it. The worker's header says that
it is there: no push is copied or sent. A server that learns of it from the coordinator's decision is later still. The
server writes parameters where the worker reads them, or updates them there if all workers read them in one place (see
`Placement`). It does so only between that worker's push and its pull, while the worker waits, so every pull is of one
version. A message of one byte, the pull, ends the wait.

The messages also order the accesses to the memory: who writes calls `Communicator.sync` before it sends, who reads
calls it after it has received, and a message is received after it was sent. So a server reads a gradient only after it
is complete, and the worker reads parameters, and changes its gradient again, only after the server has finished with
both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.base import Tag

if TYPE_CHECKING:
    from torch import Tensor

    from hpctrain.comm.base import Arena, Buffer, Communicator, Request
    from hpctrain.strategies.phase import Phase


class Route(ABC):
    """A worker's way to one server, for the arena's stretch [low, high) that the server owns."""

    @abstractmethod
    def pull(self) -> Request:
        """Start to receive parameters."""

    def push(self) -> list[Request]:
        """Start to send the gradient; the header goes out after this."""
        return []

    def pulled(self) -> None:  # noqa: B027 (a message needs nothing more)
        """All pulls are over: the parameters may be read."""


class MessageRoute(Route):
    """By messages."""

    def __init__(self, comm: Communicator, server: int, values: Buffer, gradient: Buffer) -> None:
        self._comm, self._server, self._values, self._gradient = comm, server, values, gradient

    def pull(self) -> Request:
        return self._comm.start_recv(self._values, self._server, Tag.PULL)

    def push(self) -> list[Request]:
        return [self._comm.start_send(self._gradient, self._server, Tag.PUSH)]


class MemoryRoute(Route):
    """Through the node's memory."""

    def __init__(self, phase: Phase, comm: Communicator, server: int) -> None:
        self._comm, self._server = comm, server
        self._arenas = phase.replica.gradient_arena, phase.replica.value_arena
        self._notice = np.zeros(1, np.uint8)

    def pull(self) -> Request:
        return self._comm.start_recv(self._notice, self._server, Tag.PULL)

    def push(self) -> list[Request]:
        self._sync()
        return []

    def pulled(self) -> None:
        self._sync()

    def _sync(self) -> None:
        for arena in self._arenas:
            self._comm.sync(arena)


class WorkerLink(ABC):
    """A server's way to one worker. `gradient`: what the worker has pushed, between `arrive` and `expect`; read-only.
    `read`: the parameters that it was computed on, if they are kept."""

    gradient: Tensor
    read: Tensor | None = None
    _pull: Request | None = None  # under way

    def expect(self) -> None:  # noqa: B027 (through memory nothing is received)
        """Be ready for the worker's next push."""

    @property
    def push(self) -> Request | None:
        """The push under way; None if it is there as soon as the worker's header is."""
        return None

    @abstractmethod
    def arrive(self) -> None:
        """Wait until the push is there."""

    @abstractmethod
    def give(self, values: Tensor) -> None:
        """Give the worker the shard's parameters."""

    def release(self) -> None:  # noqa: B027 (a copy is given)
        """Wait until the worker no longer needs the shard: it may change."""

    def finish(self) -> None:
        """Wait until what was given has arrived."""
        if self._pull is not None:
            self._pull.wait()
            self._pull = None

    def cancel(self) -> None:  # noqa: B027 (through memory nothing is received)
        """Expect no more pushes."""


class MessageLink(WorkerLink):
    """By messages. Parameters are sent from the shard, or from `copy`, if given, so that the next update need not wait
    for the transfer."""

    def __init__(
        self, comm: Communicator, worker: int, shard: Buffer, received: Buffer, copy: Buffer | None
    ) -> None:
        from hpctrain.replica.tensors import as_tensor

        self._comm, self._worker = comm, worker
        self._received, self.gradient = received, as_tensor(received)
        self._sent = shard if copy is None else copy
        self._copies = copy is not None
        self._push: Request | None = None
        if copy is not None:
            self.read = as_tensor(copy)
            self.read.copy_(as_tensor(shard))

    def expect(self) -> None:
        self._push = self._comm.start_recv(self._received, self._worker, Tag.PUSH)

    @property
    def push(self) -> Request | None:
        return self._push

    def arrive(self) -> None:
        assert self._push is not None
        self._push.wait()

    def give(self, values: Tensor) -> None:
        self.finish()  # its last pull is over: it has pushed since
        if self.read is not None:
            self.read.copy_(values)
        self._pull = self._comm.start_send(self._sent, self._worker, Tag.PULL)

    def release(self) -> None:
        if not self._copies:
            self.finish()

    def cancel(self) -> None:
        if self._push is not None:
            self._push.cancel()


class MemoryLink(WorkerLink):
    """Through the node's memory: the worker's gradient, and `read`, its own parameters, or None if it reads the shard
    itself."""

    def __init__(
        self, comm: Communicator, worker: int, arenas: tuple[Arena, Arena], gradient: Tensor, read: Tensor | None
    ) -> None:
        self._comm, self._worker, self._arenas = comm, worker, arenas
        self.gradient, self.read = gradient, read
        self._notice = np.zeros(1, np.uint8)

    def arrive(self) -> None:
        self._sync()

    def give(self, values: Tensor) -> None:
        self.finish()
        if self.read is not None:
            with self._comm.span("send", values.nbytes, self._comm.members[self._worker]):
                self.read.copy_(values)
        self._sync()
        self._pull = self._comm.start_send(self._notice, self._worker, Tag.PULL)

    def _sync(self) -> None:
        for arena in self._arenas:
            self._comm.sync(arena)


def routes(phase: Phase, comm: Communicator, shards: list[tuple[int, int, int]]) -> list[Route]:
    """This worker's routes to the owners of these shards: (server rank, low, high)."""
    found: list[Route] = []
    values, gradient = phase.replica.value_buffer, phase.replica.gradient_arena.mine
    for server, low, high in shards:
        if near(phase, server):
            found.append(MemoryRoute(phase, comm, server))
        else:
            found.append(MessageRoute(comm, server, values[low:high], gradient[low:high]))
    return found


def memory_link(phase: Phase, comm: Communicator, worker: int, low: int, high: int) -> MemoryLink:
    """A server's link to a rank that is `near`."""
    from hpctrain.replica.tensors import as_tensor

    values, gradient = phase.replica.value_arena, phase.replica.gradient_arena
    place = phase.comm.local_ranks.index(worker)
    read = as_tensor(values.parts[place][low:high]) if phase.members.placement == "copies" else None
    return MemoryLink(comm, worker, (gradient, values), as_tensor(gradient.parts[place][low:high]), read)


def near(phase: Phase, rank: int) -> bool:
    """Whether this rank of the phase shares its memory with that one."""
    return phase.members.shared and phase.comm.nodes[rank] == phase.comm.nodes[phase.comm.rank]
