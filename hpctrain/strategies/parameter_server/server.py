"""The server half of a parameter server: each server owns a shard of the parameters and of the optimizer state.

The first server also drives the coordinator: it forwards the headers to it, and sends and executes its decisions.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.codecs import wire_codec_by
from hpctrain.comm.base import Tag
from hpctrain.replica.state import STRATEGY, State, merge, recv_state, send_state
from hpctrain.strategies.balance import BatchBalance
from hpctrain.strategies.base import Server
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.contribution import nan_error, sum_error
from hpctrain.strategies.parameter_server.bandwidth import shard_weights
from hpctrain.strategies.parameter_server.coordinator import MODES, Coordinator, Message, Terms
from hpctrain.strategies.parameter_server.corrections import DelayCompensation
from hpctrain.strategies.parameter_server.links import Codecs, MessageLink, Packet, Shard, memory_link, near
from hpctrain.strategies.parameter_server.options import ParameterServerOptions
from hpctrain.strategies.parameter_server.pulls import DifferenceLink, check_memory
from hpctrain.strategies.parameter_server.wire import (
    Decision,
    DecisionRecord,
    Header,
    HeaderKind,
    HeaderRecord,
    NotFinite,
    Reply,
    ReplyRecord,
    What,
)
from hpctrain.strategies.phase import Phase

if TYPE_CHECKING:
    import torch

    from hpctrain.codecs.wire import WireCodec
    from hpctrain.comm.base import Communicator, Request, Share
    from hpctrain.errors import NanError
    from hpctrain.replica.update import Update
    from hpctrain.strategies.parameter_server.links import WorkerLink

ROUNDED = ("bfloat16", "float16")  # codecs with which pulls have the parameters, which must keep their size


def _codecs(options: ParameterServerOptions, seed: int) -> Codecs:
    push = wire_codec_by(options.codec, seed)
    if options.pull is not None:
        return Codecs(push, wire_codec_by(options.pull, seed), differences=options.pull not in ("none", *ROUNDED))
    rounding = options.codec if options.codec in ROUNDED else "bfloat16"
    return Codecs(push, wire_codec_by(rounding) if push is not None else None)


class Wiring:
    """Which rank owns which shard, and the communicators between workers and servers. The constructor is collective."""

    def __init__(self, phase: Phase, options: ParameterServerOptions) -> None:
        from hpctrain.replica.layout import slice_bounds

        comm = phase.comm
        self.workers, self.servers = phase.roles.workers, phase.roles.servers
        service = comm.split(0, comm.rank)
        assert service is not None
        self.service: Communicator = service
        self.between_servers = comm.split(0 if comm.rank in self.servers else None, comm.rank)
        self.slots = len(phase.replica.layout.slots)
        self._shares = len(self.workers) if options.balance != "none" else 0  # that replies carry
        weights = shard_weights(phase, service) if options.shard_sizes == "bandwidth" else None
        self.bounds = slice_bounds(phase.replica.layout, len(self.servers), phase.updating.elementwise, weights)
        whole = options.lockstep and phase.updating.clip_norm is not None  # the norm must be known before any update
        sent = not phase.members.shared or len(set(comm.nodes)) > 1  # else chunks would only cost their calls
        chunked = sent and phase.updating.elementwise and not whole
        self._chunk = int(options.chunk_mb * 2**20 / phase.replica.layout.dtype.itemsize) if chunked else None
        self.codecs = _codecs(options, phase.seed)
        if self.codecs.differences:
            itemsize = phase.replica.layout.dtype.itemsize
            check_memory(comm, phase.roles, phase.members.shared, self.bounds, itemsize)
        ahead = np.array([phase.dealing.ahead], np.int64)  # ranks may have different values: use the coordinator's
        comm.broadcast(ahead, self.coordinator)
        self.ahead = int(ahead[0])
        apart = {comm.nodes[rank] for rank in self.workers}.isdisjoint(comm.nodes[rank] for rank in self.servers)
        self.streams = not options.backup_workers and (options.lockstep or apart)  # see `Driver`
        if not phase.members.equal and phase.members.placement != "node":
            comm.broadcast(phase.replica.value_buffer)

    @property
    def coordinator(self) -> int:
        return self.servers[0]

    def shard(self, server: int) -> Shard:
        """What that rank serves."""
        from hpctrain.replica.layout import stretches_of

        index = self.servers.index(server)
        low, high = self.bounds[index : index + 2]
        size = high - low if self._chunk is None else self._chunk
        return Shard(server, (low, *(low + end for _, end in stretches_of(high - low, size))))

    def shards(self) -> list[Shard]:
        """Every shard that is not empty."""
        return [shard for shard in map(self.shard, self.servers) if shard.low < shard.high]

    def keepers(self) -> list[tuple[int, int, int]]:
        """The ranks that hold part of the strategy's state: the owners of shards, and the coordinator."""
        shards = [(shard.server, shard.low, shard.high) for shard in self.shards()]
        if shards and shards[0][0] != self.coordinator:
            shards.insert(0, (self.coordinator, 0, 0))
        return shards

    def reply_record(self) -> ReplyRecord:
        """A buffer for a reply; the same size on all ranks."""
        return ReplyRecord(self.ahead + 1, self._shares)

    def free(self) -> None:
        """Collective over the phase's ranks."""
        if self.between_servers is not None:
            self.between_servers.free()
        self.service.free()


class ParameterServerServer(Server):
    """Owns one shard. Receives gradients, updates the shard and sends parameters, as the coordinator decides."""

    options: ParameterServerOptions

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.wiring = Wiring(phase, self.options)
        self.attach(phase, self.wiring, apart=self.options.shards == "host", lane=0)  # no replica is trained here
        deal_state(phase, self.wiring, state, self)

    def attach(self, phase: Phase, wiring: Wiring, apart: bool, lane: int) -> None:
        """Take over this rank's shard, which already holds rank 0's parameters, and allocate receive buffers. `apart`:
        in memory of its own, which the options name, unless parameters exist once per node. Not collective."""
        from hpctrain.replica.tensors import as_tensor

        self.phase, self.wiring, self._lane = phase, wiring, lane
        self.comm = wiring.service.lane(lane)
        self.between = wiring.between_servers.lane(lane) if wiring.between_servers is not None else None
        self.shard = wiring.shard(phase.comm.rank)
        self.low, self.high = self.shard.low, self.shard.high
        self.values = as_tensor(phase.replica.value_buffer[self.low : self.high])
        if apart and phase.members.placement != "node":
            self.values = self._room().copy_(self.values)
        self.chunks = self.shard.chunks(self.values)
        stretches = zip(self.chunks, pairwise(self.shard.bounds), strict=True)
        self.updates: list[Update] = [phase.updating.make(chunk, *stretch) for chunk, stretch in stretches]
        self._version = 0  # of the shard: how many decisions have updated it
        self.links = [self._link(rank) for rank in wiring.workers]
        self._sum = self.shard.chunks(self._room())
        self._compensation = DelayCompensation.of(self.options, self.values)
        self._corrects = not self.options.lockstep and self.options.momentum_correction and len(wiring.workers) > 1
        leads = phase.comm.rank == wiring.coordinator
        self.coordinator = MODES[self.options.mode](_terms(phase, self.options)) if leads else None

    def _room(self) -> torch.Tensor:
        """Memory for a tensor like the shard."""
        from hpctrain.replica.tensors import as_tensor

        share: Share = "host" if self.options.shards == "host" else "rank"
        return as_tensor(self.phase.comm.arena(self.high - self.low, self.phase.replica.layout.dtype, share).mine)

    def _packets(self, codec: WireCodec | None, lent: bool) -> list[Packet]:
        return [Packet(self.comm, chunk, codec, lent) for chunk in self.chunks]

    @cached_property
    def _common(self) -> list[Packet]:
        """For workers that all get the same version."""
        return self._packets(self.wiring.codecs.pull, lent=True)

    def _link(self, rank: int) -> WorkerLink:
        if near(self.phase, rank):
            return memory_link(self.phase, self.comm, rank, self.shard, self.chunks)
        from hpctrain.codecs.wire import Plain

        wiring, gradient = self.wiring, self.shard.chunks(self._room())
        pushes, codec = [Packet(self.comm, chunk, wiring.codecs.push) for chunk in gradient], wiring.codecs.pull
        if wiring.codecs.differences and codec is not None:
            received, exact = self.shard.chunks(self._room().copy_(self.values)), self._packets(None, lent=True)
            return DifferenceLink(self.comm, rank, gradient, pushes, exact, self.chunks, received, codec)
        own = self._packets(wiring.codecs.pull or Plain(), lent=False) if self._sends_copies(rank) else None
        read: list[torch.Tensor] = []
        if self.options.delay_compensation != "none":
            read = self.shard.chunks(self._room())
        pulls = own or self._common
        exact = pulls if wiring.codecs.pull is None else self._packets(None, lent=True)
        link = MessageLink(self.comm, rank, gradient, pushes, pulls, exact, read)
        for chunk in range(len(read)):
            link.keep(chunk, self._version)
        return link

    def _sends_copies(self, rank: int) -> bool:
        """Whether that worker gets its parameters from copies, so that the next update need not wait for the transfer:
        if it is on another node and does not step with the others."""
        return not self.options.lockstep and self.comm.nodes[rank] != self.comm.nodes[self.comm.rank]

    def load(self, state: State) -> None:
        """Load this server's part of the state from a checkpoint or from the previous phase."""
        if self._compensation is not None:
            self._compensation.load(state.section(STRATEGY).flat)
        layout = self.phase.replica.layout
        for update in self.updates:
            names = [slot.name for slot in layout.slots_in(update.low, update.high)]
            update.load_in_place(state.cut(update.low, update.high, names))
        if self.coordinator is not None:
            self.coordinator.load(state.counters)

    def serve(self) -> None:
        """Serve until every worker has left. Raises NanError, as the workers do, if a loss is not finite."""
        for link in self.links:
            for chunk in range(len(self.chunks)):
                link.expect(chunk)
        try:
            if self.coordinator is not None:
                Driver(self, self.coordinator).run()
            else:
                self._follow()
        finally:
            for link in self.links:
                link.cancel()
        for link in self.links:
            link.finish()
        if self._lane == 0:
            self.wiring.free()

    def _follow(self) -> None:
        record = DecisionRecord(len(self.wiring.workers), self.wiring.slots)
        while True:
            self.comm.recv(record.bytes, self.wiring.coordinator, Tag.DECISION)
            decision = record.read()
            if decision.what is What.END:
                return
            if decision.nan is not None:
                raise self.error(decision.nan)
            self.execute(decision)

    def error(self, nan: NotFinite) -> NanError:
        """The error that all ranks raise."""
        return nan_error(self.phase, self.wiring.workers[nan.worker], nan.loss, nan.step, nan.bad)

    def execute(self, decision: Decision) -> None:
        """Execute a decision of the coordinator."""
        if self._lane == 0:
            self.phase.watching.tick()
        if decision.what is What.STATE:
            self._send_state()
            if self._lane == 0:
                self.phase.watching.saving()
            return
        if self.low == self.high:
            if decision.what is What.UPDATE and self._clips:
                self._clip(self.values)
            return
        self._version += decision.what is What.UPDATE
        if (pull := self.wiring.codecs.pull) is not None:
            pull.position = max(0, decision.step)
        for chunk in range(len(self.chunks)):
            for worker in decision.take:
                self.links[worker].arrive(chunk)
            if decision.what is What.UPDATE:
                self._apply(decision, chunk)
            for worker in decision.take:
                self.links[worker].expect(chunk)
            for worker in decision.give:
                self.links[worker].give(chunk, self._version, decision.exact)

    def _apply(self, decision: Decision, chunk: int) -> None:
        alone = len(decision.take) == 1
        peer = self.comm.members[self.wiring.workers[decision.take[0]]] if alone else -1
        self.comm.recorder.step = decision.step
        gradient = self._gradient(decision, chunk)
        if self._clips:
            gradient.mul_(self._clip(gradient))
        for link in self.links:  # nobody may read a half-finished update
            link.release(chunk)
        with self.comm.span("update", gradient.nbytes, peer, decision.version, flops=float(gradient.numel())):
            whose = decision.take[0] if self._corrects else None
            self.updates[chunk].apply(gradient, decision.rate, decision.momentum, whose, decision.used)

    def _gradient(self, decision: Decision, chunk: int) -> torch.Tensor:
        """The mean of the accepted gradients, summed in rank order; a single one that stays as it is is not copied.
        Raises NanError."""
        from hpctrain.replica.blocks import add_up, is_finite

        links = [self.links[worker] for worker in decision.take]
        parts, whole = [link.gradient[chunk] for link in links], self._sum[chunk]
        if len(parts) == 1 and decision.weight == 1.0 and not self._clips and self._compensation is None:
            whole, finite = parts[0], is_finite(parts[0])
        else:
            with self.comm.span("reduce", whole.nbytes * len(parts), flops=float(whole.numel() * len(parts))):
                finite = add_up(parts, whole, decision.weight)
        if not finite:
            raise self._gradient_error(decision, chunk, whole)
        if len(parts) == 1 and self._compensation is not None:
            first = self.shard.bounds[chunk] - self.low
            self._compensation.correct(whole, self.chunks[chunk], links[0].read[chunk], first)
        return whole

    def _gradient_error(self, decision: Decision, chunk: int, whole: torch.Tensor) -> NanError:
        """Find the worker and the parameter. Only this server raises it: the workers already have their replies."""
        layout, phase, first = self.phase.replica.layout, self.phase, self.shard.bounds[chunk]
        error = sum_error(phase, layout.first_not_finite(whole, first), decision.step)
        for worker in decision.take:
            if bad := layout.first_not_finite(self.links[worker].gradient[chunk], first):
                error = nan_error(phase, self.wiring.workers[worker], 0.0, decision.step, bad)
                break
        error.everywhere = False
        return error

    @property
    def _clips(self) -> bool:
        """Whether the sum is clipped here; in asynchronous modes each worker clips its own gradient."""
        return self.phase.updating.clip_norm is not None and self.options.lockstep

    def _clip(self, gradient: torch.Tensor) -> float:
        """The clipping factor, the same for all shards. Collective over the servers."""
        from hpctrain.replica.blocks import sum_of_squares

        assert self.between is not None and self.phase.updating.clip_norm is not None
        squares = np.array([sum_of_squares(gradient)])
        return clip_factor(float(self.between.gather_rows(squares).sum()), self.phase.updating.clip_norm)

    def _send_state(self) -> None:
        if self.coordinator is None and self.low == self.high:
            return
        with ExitStack() as stack:
            for update in self.updates:
                stack.enter_context(update.common_velocity(len(self.wiring.workers)))
            state = merge([update.view() for update in self.updates], self.high, self.low)
            if self._compensation is not None:
                state.section(STRATEGY).flat |= self._compensation.view()
            if self.coordinator is not None:
                state.counters = self.coordinator.state()
                if self.phase.conductor.rule is not None:
                    state.rule = self.phase.conductor.rule.state()
            send_state(self.comm, state, 0)


class Driver:
    """Passes headers to the coordinator as they arrive, and sends and executes what it returns, in that order."""

    def __init__(self, server: ParameterServerServer, coordinator: Coordinator) -> None:
        wiring = server.wiring
        self._server, self._coordinator = server, coordinator
        self._comm, self._workers = server.comm, wiring.workers
        self._others = wiring.servers[1:]
        self._headers = [HeaderRecord(wiring.slots) for _ in wiring.workers]
        self._reply = wiring.reply_record()
        self._decision = DecisionRecord(len(wiring.workers), wiring.slots)

    def run(self) -> None:
        """Run until every worker has left. Raises NanError, as the workers do, if the phase ends with it."""
        comm, coordinator = self._comm, self._coordinator
        self._carry_out(coordinator.begin(comm.now()))
        arrived: dict[int, Header] = {}  # headers whose gradient is still in transit
        requests: dict[int, Request] = {worker: self._listen(worker) for worker in range(len(self._workers))}
        while requests:
            senders = list(requests)
            worker = senders[comm.wait_any([requests[sender] for sender in senders])]
            header = arrived.pop(worker, None)
            if header is None:
                header = self._headers[worker].read()
                push = self._pushed(worker)
                if header.kind is HeaderKind.STEP and push is not None and not push.test():
                    arrived[worker], requests[worker] = header, push
                    continue
            del requests[worker]  # move it to the end: `wait_any` prefers requests at the front
            requests[worker] = self._listen(worker)
            self._carry_out(coordinator.receive(worker, header, comm.now()))
            for gone in coordinator.left & set(requests):
                requests.pop(gone).cancel()
        if coordinator.nan is not None:
            raise self._server.error(coordinator.nan)

    def _pushed(self, worker: int) -> Request | None:
        """What must be over before a decision about that worker's push; None: nothing.

        A push is executed chunk by chunk while it arrives. Workers whose pushes come later wait meanwhile. That costs
        no more than the link's time if all of them are on other nodes; but a worker beside the server, whose pushes
        take no time, would be slowed down to the link's speed. In that case a push is decided on once it is complete.
        """
        return None if self._server.wiring.streams else self._server.links[worker].push

    def _listen(self, worker: int) -> Request:
        return self._comm.start_recv(self._headers[worker].bytes, self._workers[worker], Tag.CONTROL)

    def _carry_out(self, messages: Iterable[Message]) -> None:
        for message in messages:
            if isinstance(message, Reply):
                self._reply.write(message)
                self._comm.send(self._reply.bytes, self._workers[message.worker], Tag.REPLY)
            else:
                self._decide(message)

    def _decide(self, decision: Decision) -> None:
        """Send the decision to the other servers, then execute it here."""
        if self._others:
            self._decision.write(decision)
        sends = [self._comm.start_send(self._decision.bytes, server, Tag.DECISION) for server in self._others]
        if decision.what not in (What.END, What.NAN):
            self._server.execute(decision)
        self._comm.wait_all(sends)


def _terms(phase: Phase, options: ParameterServerOptions) -> Terms:
    """What the coordinator needs to know about the phase."""
    workers = len(phase.roles.workers)
    scaled = partial(options.per_update, workers, phase.updating.adaptive)
    return Terms(
        workers=workers,
        options=options,
        conductor=phase.conductor,
        cursor=phase.cursor,
        batch=phase.dealing.batch,
        nan=phase.updating.nan,
        rate=phase.updating.rate,
        momentum=phase.updating.momentum,
        per_update=scaled if phase.updating.per_update else lambda staleness: 1.0,
        queue=phase.dealing.queue,
        epoch=phase.dealing.epoch,
        ahead=phase.dealing.ahead,
        balance=BatchBalance(phase.roles.workers, phase.dealing.batch) if options.balance != "none" else None,
    )


def deal_state(
    phase: Phase, wiring: Wiring, state: State | None, server: ParameterServerServer | None
) -> None:
    """Send every server its part of rank 0's state. Collective over the phase's ranks."""
    comm = phase.comm
    if not comm.broadcast_json(state is not None):
        return
    if comm.rank == 0:
        assert state is not None
        for rank, low, high in wiring.keepers():
            part = state.cut(low, high, [slot.name for slot in phase.replica.layout.slots_in(low, high)])
            if rank != 0:
                send_state(comm, part, rank)
            elif server is not None:
                server.load(part)
    elif server is not None and comm.rank in [rank for rank, _, _ in wiring.keepers()]:
        server.load(recv_state(comm, 0))
