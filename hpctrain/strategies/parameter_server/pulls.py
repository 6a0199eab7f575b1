"""Pulls of differences: what a worker gets is how the parameters differ from what it last received, through a codec.

The server keeps for each worker what that worker has received, and so does the worker. What a message leaves out is
still in the difference of the next one, so any codec will do (as in EF21; Richtarik, Sokolov and Fatkhullin 2021).

Both sides add the same messages to the same values, so they agree to the bit on one kind of processor. They agree at
first because a worker sends what it has with its first push: a copy of the model, once for each phase, also in a run
that goes on from a checkpoint. Exact parameters, as for evaluations, come besides and change nothing of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hpctrain.comm.base import Tag
from hpctrain.errors import ClusterError
from hpctrain.strategies.parameter_server.links import (
    Codecs,
    MemoryRoute,
    MessageLink,
    MessageRoute,
    Packet,
    Route,
    Shard,
    near,
)

if TYPE_CHECKING:
    from torch import Tensor

    from hpctrain.cluster import Roles
    from hpctrain.codecs.wire import WireCodec
    from hpctrain.comm.base import Buffer, Communicator, Request
    from hpctrain.strategies.phase import Phase

GIB = 2**30


class DifferencePacket(Packet):
    """A chunk on its way to one worker, which has `received` of it so far; `received` is moved towards the chunk."""

    def __init__(self, comm: Communicator, worker: int, chunk: Tensor, received: Tensor, codec: WireCodec) -> None:
        super().__init__(comm, chunk, codec.seeded(worker))
        self._received = received

    def pack(self, version: int, carry: float = 0.0) -> Buffer:
        """The message. Encoded each time: of the same version, too, the worker lacks what earlier ones have left out.
        """
        assert self._codec is not None
        with self._comm.span("encode", self._wire.nbytes):
            self._codec.encode(self._chunk - self._received, self._wire)
            self._codec.decode(self._wire, self._received, add=True)
        return self.message

    def unpack(self, into: Tensor) -> None:
        """At the worker, where `into` is what it has received so far."""
        assert self._codec is not None
        with self._comm.span("decode", self._wire.nbytes):
            self._codec.decode(self._wire, into, add=True)


class DifferenceRoute(MessageRoute):
    """A worker's way to a server that sends differences. `received`: what has arrived so far, in chunks."""

    def __init__(
        self,
        comm: Communicator,
        server: int,
        values: Sequence[Tensor],
        gradient: Sequence[Tensor],
        rests: Sequence[Tensor] | None,
        received: Sequence[Tensor],
        codecs: Codecs,
    ) -> None:
        super().__init__(comm, server, values, gradient, rests, Codecs(codecs.push, None))
        assert codecs.pull is not None
        self._received, self._begun = received, False
        self._differences = [DifferencePacket(comm, 0, chunk, chunk, codecs.pull) for chunk in received]
        self._first: list[Request] = []  # what has been received, on its way to the server

    def push(self, carry: float) -> list[Request]:
        sends = super().push(carry)
        self._begun = True
        return sends

    def before_push(self, chunk: int) -> None:
        from hpctrain.replica.tensors import as_array

        if not self._begun:
            self._first.append(self._comm.start_send(as_array(self._received[chunk]), self._server, Tag.PUSH))

    def pull(self, exact: bool) -> None:
        """Differences; and, if `exact`, the parameters besides."""
        packets = [each for chunk in range(len(self._values)) for each in self._expected(chunk, exact)]
        self._pulls = [(packet, self._comm.start_recv(packet.message, self._server, Tag.PULL)) for packet in packets]

    def _expected(self, chunk: int, exact: bool) -> list[Packet]:
        return [self._differences[chunk], *([self._exact[chunk]] if exact else [])]

    def pulled(self) -> None:
        self._comm.wait_all(self._first)
        self._first = []
        each = len(self._pulls) // len(self._values)  # messages of a chunk
        for chunk, packet in enumerate(self._differences):
            for _, request in self._pulls[chunk * each : (chunk + 1) * each]:
                request.wait()
            packet.unpack(self._received[chunk])
            if each == 1:
                self._values[chunk].copy_(self._received[chunk])

    def round(self) -> None:
        for value, received in zip(self._values, self._received, strict=True):
            value.copy_(received)


class DifferenceLink(MessageLink):
    """A server's way to a worker that gets differences. `received`: what it has got so far, in chunks."""

    def __init__(
        self,
        comm: Communicator,
        worker: int,
        gradient: Sequence[Tensor],
        pushes: Sequence[Packet],
        exact: Sequence[Packet],
        chunks: Sequence[Tensor],
        received: Sequence[Tensor],
        codec: WireCodec,
    ) -> None:
        differences = [
            DifferencePacket(comm, worker, chunk, part, codec) for chunk, part in zip(chunks, received, strict=True)
        ]
        super().__init__(comm, worker, gradient, pushes, differences, exact, received)
        self._first: list[Request | None] = [None] * len(received)
        self._begun = [False] * len(received)

    def expect(self, chunk: int) -> None:
        from hpctrain.replica.tensors import as_array

        if not self._begun[chunk]:
            self._begun[chunk] = True
            self._first[chunk] = self._comm.start_recv(as_array(self.read[chunk]), self._worker, Tag.PUSH)
        super().expect(chunk)

    def arrive(self, chunk: int) -> None:
        first = self._first[chunk]
        if first is not None:
            first.wait()
            self._first[chunk] = None
        super().arrive(chunk)

    def packets(self, chunk: int, exact: bool) -> list[Packet]:
        return [self._pulls[chunk], *([self._exact[chunk]] if exact else [])]

    def keep(self, chunk: int, version: int) -> None:
        """`read` is what has been received."""

    def cancel(self) -> None:
        for request in self._first:
            if request is not None:
                request.cancel()
        super().cancel()


def check_memory(comm: Communicator, roles: Roles, shares: bool, bounds: Sequence[int], itemsize: int) -> None:
    """Refuse pulls of differences if what has been received does not fit into the memory of a node. `shares`: whether
    the ranks of a node share memory, so that their pulls are not sent. Collective; raises ClusterError on all ranks."""
    import psutil

    free = comm.gather_json(psutil.virtual_memory().available)
    for node in sorted(set(comm.nodes)):
        needed = kept_bytes(comm.nodes, node, roles, shares, bounds, itemsize)
        available = min(free[rank] for rank in range(comm.size) if comm.nodes[rank] == node)
        if needed > available:
            error = ClusterError(
                "strategy.pull: to send differences, servers keep a model for each worker of another node, and each "
                f"worker one; on node {node} these take {needed / GIB:.3g} GiB, but {available / GIB:.3g} GiB of "
                "memory is available there; start servers on more nodes, or set strategy.pull to bfloat16"
            )
            error.everywhere = True
            raise error


def kept_bytes(
    nodes: Sequence[int], node: int, roles: Roles, shares: bool, bounds: Sequence[int], itemsize: int
) -> int:
    """The bytes of what has been received that are kept on that node, if server i owns the elements bounds[i] to
    bounds[i + 1]."""
    elements = 0
    for index, server in enumerate(roles.servers):
        far = [rank for rank in roles.workers if not (shares and nodes[rank] == nodes[server])]
        elements += (bounds[index + 1] - bounds[index]) * (len(far) if nodes[server] == node else 0)
        elements += (bounds[index + 1] - bounds[index]) * sum(nodes[rank] == node for rank in far)
    return elements * itemsize


def routes(
    phase: Phase,
    comm: Communicator,
    shards: Sequence[Shard],
    codecs: Codecs,
    rest: Tensor | None,
    received: Tensor | None,
) -> list[Route]:
    """This worker's routes to the owners of these shards. `rest`: what its pushes leave out, and `received`: what
    pulls of differences have brought so far, of the whole arena."""
    found: list[Route] = []
    for shard in shards:
        if near(phase, shard.server):
            found.append(MemoryRoute(phase, comm, shard.server))
            continue
        here = slice(shard.low, shard.high)
        values, gradient = (shard.chunks(part[here]) for part in (phase.replica.values, phase.replica.gradient))
        rests = shard.chunks(rest[here]) if rest is not None else None
        if received is not None:
            parts = shard.chunks(received[here])
            found.append(DifferenceRoute(comm, shard.server, values, gradient, rests, parts, codecs))
        else:
            found.append(MessageRoute(comm, shard.server, values, gradient, rests, codecs))
    return found
