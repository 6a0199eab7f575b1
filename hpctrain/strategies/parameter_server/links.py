"""How gradients and parameters get from workers to servers and back: by messages, or through memory that they share.

On a node that shares memory a server reads a gradient where the worker has computed it. The worker's header says that
it is there: no push is copied or sent. A server that learns of it from the coordinator's decision is later still. The
server writes parameters where the worker reads them, or updates them there if all workers read them in one place (see
`Placement`). It does so only between that worker's push and its pull, while the worker waits, so every pull is of one
version. A message of one byte, the pull, ends the wait.

Between nodes a shard travels in chunks. All servers execute the coordinator's decisions in one order, and each of them
chunk by chunk: wait for the chunk of the push, update, send the chunk of the pull. Every chunk sees the same updates in
the same order, so a pull is of one version although it begins before its push has ended.

The messages also order the accesses to the memory: who writes calls `Communicator.sync` before it sends, who reads
calls it after it has received, and a message is received after it was sent. So a server reads a gradient only after it
is complete, and the worker reads parameters, and changes its gradient again, only after the server has finished with
both.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpctrain.comm.base import Tag

if TYPE_CHECKING:
    from torch import Tensor

    from hpctrain.codecs.wire import WireCodec
    from hpctrain.comm.base import Arena, Buffer, Communicator, Request
    from hpctrain.strategies.phase import Phase


class Codecs(NamedTuple):
    """How gradients and parameters travel between nodes; None: as they are. `differences`: whether pulls have the
    differences to what a worker last received."""

    push: WireCodec | None
    pull: WireCodec | None
    differences: bool = False


class Packet:
    """A chunk on its way between nodes. `message`: what is sent or received; without a codec the chunk itself. `lent`:
    the message changes when the chunk is updated, or serves several workers. `rest`: what messages have left out."""

    def __init__(
        self,
        comm: Communicator,
        chunk: Tensor,
        codec: WireCodec | None,
        lent: bool = False,
        rest: Tensor | None = None,
    ) -> None:
        from hpctrain.replica.layout import NUMPY_DTYPES
        from hpctrain.replica.tensors import as_array, as_tensor

        self._comm, self._chunk, self.lent, self._rest = comm, chunk, lent, rest
        self._codec = codec.seeded(comm.members[comm.rank], int(chunk.storage_offset())) if codec is not None else None
        self._version = -1  # of the values that were packed
        if codec is None:
            self.message, self._wire = as_array(chunk), chunk
        else:
            length, dtype = codec.shape(chunk)
            self.message = comm.arena(length, NUMPY_DTYPES[dtype]).mine
            self._wire = as_tensor(self.message)

    def pack(self, version: int, carry: float = 0.0) -> Buffer:
        """The message with the chunk's values and `carry` times the rest, which then gets what this one leaves out. The
        same version is encoded only once."""
        if self._codec is not None and version != self._version:
            rest = self._rest if carry else None
            with self._comm.span("encode", self._wire.nbytes):
                if rest is None:
                    self._codec.encode(self._chunk, self._wire)
                else:
                    rest.mul_(carry * self._codec.feedback.decay).add_(self._chunk)
                    self._codec.encode(rest, self._wire, rest)
            self._version = version
        return self.message

    def take_back(self) -> None:
        """The message counts for nothing, and nor does the gradient, which is still in the chunk: the rest is what it
        was before."""
        if self._codec is not None and self._rest is not None:
            self._codec.decode(self._wire, self._rest, add=True)
            self._rest.sub_(self._chunk).div_(self._codec.feedback.decay)

    def unpack(self, into: Tensor) -> None:
        """Store the values of the message in `into`."""
        if self._codec is not None:
            with self._comm.span("decode", self._wire.nbytes):
                self._codec.decode(self._wire, into)
        elif into is not self._chunk:
            into.copy_(self._chunk)


class Route(ABC):
    """A worker's way to one server, for the arena's stretch that the server owns. In a step, `offer` comes before the
    header is sent, `push` after it, `pull` once the reply is there, and `pulled` last."""

    def offer(self) -> None:  # noqa: B027 (a message comes after the header)
        """The gradient is complete: a server on this node takes the header as the sign of it."""

    def push(self, carry: float) -> list[Request]:
        """Start to send the gradient, with `carry` times what earlier ones have left out."""
        return []

    def take_back(self) -> None:  # noqa: B027 (memory leaves nothing out)
        """The push counts for nothing: what earlier ones have left out stays left out."""

    @abstractmethod
    def pull(self, exact: bool) -> None:
        """Start to receive parameters; `exact`: without a codec."""

    @abstractmethod
    def pulled(self) -> None:
        """Wait until the parameters may be read."""

    def round(self) -> None:  # noqa: B027 (memory is not encoded)
        """Round exact parameters as a pull with a codec would have, so that training does not depend on what was asked
        in between."""


class MessageRoute(Route):
    """By messages, one for each chunk of the stretch's `values` and `gradient`."""

    def __init__(
        self,
        comm: Communicator,
        server: int,
        values: Sequence[Tensor],
        gradient: Sequence[Tensor],
        rests: Sequence[Tensor] | None,
        codecs: Codecs,
    ) -> None:
        self._comm, self._server, self._values = comm, server, values
        kept: Sequence[Tensor | None] = rests or [None] * len(gradient)
        self._pushes = [
            Packet(comm, chunk, codecs.push, rest=rest) for chunk, rest in zip(gradient, kept, strict=True)
        ]
        self._exact = [Packet(comm, chunk, None) for chunk in values]
        rounded = [Packet(comm, chunk, codecs.pull) for chunk in values] if codecs.pull is not None else self._exact
        self._rounded = rounded
        self._pulls: list[tuple[Packet, Request]] = []
        self._steps = 0

    def push(self, carry: float) -> list[Request]:
        self._steps += 1
        sends = []
        for chunk, packet in enumerate(self._pushes):
            self.before_push(chunk)
            sends.append(self._comm.start_send(packet.pack(self._steps, carry), self._server, Tag.PUSH))
        return sends

    def before_push(self, chunk: int) -> None:
        """Send what the server needs before that chunk."""

    def take_back(self) -> None:
        for packet in self._pushes:
            packet.take_back()

    def pull(self, exact: bool) -> None:
        packets = self._exact if exact else self._rounded
        self._pulls = [(packet, self._comm.start_recv(packet.message, self._server, Tag.PULL)) for packet in packets]

    def pulled(self) -> None:
        for chunk, (packet, request) in zip(self._values, self._pulls, strict=True):
            request.wait()
            packet.unpack(chunk)

    def round(self) -> None:
        self._steps += 1
        for chunk, packet in zip(self._values, self._rounded, strict=True):
            packet.pack(self._steps)
            packet.unpack(chunk)


class MemoryRoute(Route):
    """Through the node's memory."""

    def __init__(self, phase: Phase, comm: Communicator, server: int) -> None:
        self._comm, self._server = comm, server
        self._arenas = phase.replica.gradient_arena, phase.replica.value_arena
        self._notice = np.zeros(1, np.uint8)
        self._pull: Request | None = None

    def offer(self) -> None:
        self._sync()

    def pull(self, exact: bool) -> None:
        self._pull = self._comm.start_recv(self._notice, self._server, Tag.PULL)

    def pulled(self) -> None:
        assert self._pull is not None
        self._pull.wait()
        self._sync()

    def _sync(self) -> None:
        for arena in self._arenas:
            self._comm.sync(arena)


class WorkerLink(ABC):
    """A server's way to one worker. `gradient`: what the worker has pushed, in chunks: read-only, and there between
    `arrive` and `expect`. `read`: the parameters that it was computed on, in chunks; empty if they are not kept."""

    gradient: Sequence[Tensor]
    read: Sequence[Tensor]

    def expect(self, chunk: int) -> None:  # noqa: B027 (through memory nothing is received)
        """Be ready for that chunk of the worker's next push."""

    @property
    def push(self) -> Request | None:
        """The last chunk of the push under way; None if the push is there as soon as the worker's header is."""
        return None

    @abstractmethod
    def arrive(self, chunk: int) -> None:
        """Wait until that chunk of the push is there."""

    @abstractmethod
    def give(self, chunk: int, version: int, exact: bool) -> None:
        """Give the worker that chunk of the shard's parameters; all chunks come in order. `version`: counts the shard's
        updates; `exact`: without a codec."""

    def release(self, chunk: int) -> None:  # noqa: B027 (a copy is given)
        """Wait until the worker no longer needs that chunk of the shard: it may change."""

    @abstractmethod
    def finish(self) -> None:
        """Wait until all that was given has arrived."""

    def cancel(self) -> None:  # noqa: B027 (through memory nothing is received)
        """Expect no more pushes."""


class MessageLink(WorkerLink):
    """By messages, one for each chunk. `pushes`: of `gradient`. `pulls`: of the shard; `exact`: the same without a
    codec."""

    def __init__(
        self,
        comm: Communicator,
        worker: int,
        gradient: Sequence[Tensor],
        pushes: Sequence[Packet],
        pulls: Sequence[Packet],
        exact: Sequence[Packet],
        read: Sequence[Tensor],
    ) -> None:
        self._comm, self._worker = comm, worker
        self.gradient, self.read = gradient, read
        self._pushes, self._pulls, self._exact = pushes, pulls, exact
        self._arriving: list[Request | None] = [None] * len(pushes)
        self._leaving: list[list[tuple[Request, Packet]]] = [[] for _ in pushes]

    def expect(self, chunk: int) -> None:
        self._arriving[chunk] = self._comm.start_recv(self._pushes[chunk].message, self._worker, Tag.PUSH)

    @property
    def push(self) -> Request | None:
        return self._arriving[-1] if self._arriving else None

    def arrive(self, chunk: int) -> None:
        request = self._arriving[chunk]
        assert request is not None
        request.wait()
        self._pushes[chunk].unpack(self.gradient[chunk])

    def give(self, chunk: int, version: int, exact: bool) -> None:
        self._finish(chunk)  # its last pull is over: it has pushed since
        for packet in self.packets(chunk, exact):
            request = self._comm.start_send(packet.pack(version), self._worker, Tag.PULL)
            self._leaving[chunk].append((request, packet))
        if self.read:
            self.keep(chunk, version)

    def packets(self, chunk: int, exact: bool) -> list[Packet]:
        """What is sent of that chunk."""
        return [(self._exact if exact else self._pulls)[chunk]]

    def keep(self, chunk: int, version: int) -> None:
        """Keep what the worker computes on: rounded, even if it got exact parameters; see `Route.round`."""
        self._pulls[chunk].pack(version)
        self._pulls[chunk].unpack(self.read[chunk])

    def release(self, chunk: int) -> None:
        if any(packet.lent for _, packet in self._leaving[chunk]):
            self._finish(chunk)

    def _finish(self, chunk: int) -> None:
        leaving, self._leaving[chunk] = self._leaving[chunk], []
        for request, _ in leaving:
            request.wait()

    def finish(self) -> None:
        for chunk in range(len(self._leaving)):
            self._finish(chunk)

    def cancel(self) -> None:
        for request in self._arriving:
            if request is not None:
                request.cancel()


class MemoryLink(WorkerLink):
    """Through the node's memory: the worker's `gradient`, and `read`, its own parameters; empty if it reads those of
    the shard, `values`."""

    def __init__(
        self,
        comm: Communicator,
        worker: int,
        arenas: tuple[Arena, Arena],
        values: Sequence[Tensor],
        gradient: Sequence[Tensor],
        read: Sequence[Tensor],
    ) -> None:
        self._comm, self._worker, self._arenas = comm, worker, arenas
        self._values, self.gradient, self.read = values, gradient, read
        self._notice = np.zeros(1, np.uint8)
        self._pull: Request | None = None

    def arrive(self, chunk: int) -> None:
        if chunk == 0:
            self._sync()

    def give(self, chunk: int, version: int, exact: bool) -> None:
        if chunk == 0:
            self.finish()
        if self.read:
            with self._comm.span("send", self.read[chunk].nbytes, self._comm.members[self._worker]):
                self.read[chunk].copy_(self._values[chunk])
        if chunk == len(self._values) - 1:
            self._sync()
            self._pull = self._comm.start_send(self._notice, self._worker, Tag.PULL)

    def finish(self) -> None:
        if self._pull is not None:
            self._pull.wait()
            self._pull = None

    def _sync(self) -> None:
        for arena in self._arenas:
            self._comm.sync(arena)


class Shard(NamedTuple):
    """The arena's stretch [low, high), which `server` owns. `bounds`: of its chunks; a single one if it is empty."""

    server: int
    bounds: tuple[int, ...]

    @property
    def low(self) -> int:
        return self.bounds[0]

    @property
    def high(self) -> int:
        return self.bounds[-1]

    def chunks(self, values: Tensor) -> list[Tensor]:
        """The chunks of the stretch's `values`."""
        return [values[low - self.low : high - self.low] for low, high in pairwise(self.bounds)]


def memory_link(phase: Phase, comm: Communicator, worker: int, shard: Shard, values: Sequence[Tensor]) -> MemoryLink:
    """A server's link to a rank that is `near`. `values`: the chunks of its shard."""
    from hpctrain.replica.tensors import as_tensor

    arenas, place = (phase.replica.gradient_arena, phase.replica.value_arena), phase.comm.local_ranks.index(worker)
    gradient, read = (shard.chunks(as_tensor(arena.parts[place])[shard.low : shard.high]) for arena in arenas)
    return MemoryLink(comm, worker, arenas, values, gradient, read if phase.members.placement == "copies" else [])


def near(phase: Phase, rank: int) -> bool:
    """Whether this rank of the phase shares its memory with that one."""
    return phase.members.shared and phase.comm.nodes[rank] == phase.comm.nodes[phase.comm.rank]
