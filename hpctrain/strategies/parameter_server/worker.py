"""The worker half of a parameter server: push a gradient, pull parameters (Li et al. 2014)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpctrain.clock.decisions import Ask
from hpctrain.comm.base import Tag
from hpctrain.errors import ClusterError
from hpctrain.replica.state import REST, Own, State, collect_state
from hpctrain.strategies.base import Needs, Outcome, Strategy
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.contribution import Contribution, nan_error
from hpctrain.strategies.parameter_server.corrections import RunningClip
from hpctrain.strategies.parameter_server.links import near
from hpctrain.strategies.parameter_server.options import ParameterServerOptions
from hpctrain.strategies.parameter_server.pulls import routes
from hpctrain.strategies.parameter_server.server import ParameterServerServer, Wiring, deal_state
from hpctrain.strategies.parameter_server.wire import Header, HeaderKind, HeaderRecord, Reply
from hpctrain.strategies.phase import Phase

if TYPE_CHECKING:
    from torch import Tensor

    from hpctrain.cluster import Roles
    from hpctrain.comm.base import Request, Thread
    from hpctrain.data.queue import Stretch

CLIP = "clip"  # key in a worker's own numbers
RECEIVED = "received"  # key in its own arrays: what pulls of differences have brought so far


class ParameterServer(Strategy):
    """A worker computes on the parameters that it pulled, and pushes its gradient to the servers."""

    Options = ParameterServerOptions
    Server = ParameterServerServer
    options: ParameterServerOptions
    tested_with = (
        {"mode": "sync"},
        {},
        {"mode": "sync", "servers": 2},
        {"mode": "sync", "servers": 2, "colocated": True},
        {"mode": "sync", "backup_workers": 1, "colocated": True},
        {"servers": 2, "colocated": True, "delay_compensation": "adaptive"},
        {"mode": "bounded", "bound": 1},
        {"mode": "sync", "shards": "host"},
        {"mode": "sync", "servers": 2, "shard_sizes": "bandwidth"},
        {"mode": "sync", "servers": 2, "colocated": True, "chunk_mb": 0.0005, "codec": "bfloat16"},
        {"chunk_mb": 0.0005, "codec": "float16", "delay_compensation": "constant"},
        {"servers": 2, "chunk_mb": 0.0005},
        {"mode": "sync", "servers": 2, "chunk_mb": 0.0005, "codec": {"name": "topk", "keep": 0.1}},
        {"codec": "int8"},
        {"mode": "sync", "servers": 2, "colocated": True, "balance": "throughput"},
        {"mode": "sync", "servers": 2, "chunk_mb": 0.0005, "codec": "int8", "pull": {"name": "topk", "keep": 0.1}},
    )

    def __init__(self, options: ParameterServerOptions) -> None:
        super().__init__(options)
        # Where workers step together, nobody reads parameters during an update: once per node is enough.
        once = options.lockstep and not options.backup_workers
        self.needs = Needs("node" if once else "copies", "copies", options.lockstep, not options.lockstep)
        self.deterministic = once and not self.balances and options.shard_sizes == "equal"
        self.exact = once and options.codec == "none" and options.pull in (None, "none")

    @staticmethod
    def roles(options: ParameterServerOptions) -> tuple[int, bool]:
        return options.servers, options.colocated

    @staticmethod
    def check(options: ParameterServerOptions, roles: Roles) -> None:
        if options.backup_workers >= (workers := len(roles.workers)):
            raise ClusterError(
                f"strategy.backup_workers = {options.backup_workers}: at least one of {workers} workers must "
                "be waited for; lower strategy.backup_workers or start more ranks"
            )

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.phase = phase
        self.wiring = Wiring(phase, self.options)
        self.comm = self.wiring.service
        beside = phase.comm.rank in phase.roles.servers
        self._server = ParameterServerServer(self.options) if beside else None
        if self._server is not None:
            self._server.attach(phase, self.wiring, apart=True, lane=1)
        deal_state(phase, self.wiring, state, self._server)
        self._thread: Thread | None = phase.comm.spawn(self._server.serve) if self._server else None
        self._slices: list[Stretch] = []
        self._running = self._running_clip()
        self._rest, self._weight = self._room_for_rests(), 1.0
        self._received = self._room_for_pulls()
        wiring = self.wiring
        self._routes = routes(phase, self.comm, wiring.shards(), wiring.codecs, self._rest, self._received)
        self._exact = True  # whether the parameters are exact, although the next step computes on rounded ones
        self._header = HeaderRecord(len(phase.replica.layout.slots))
        self._reply = self.wiring.reply_record()
        self.comm.recv(self._reply.bytes, self.wiring.coordinator, Tag.REPLY)
        self._take()

    def slices(self) -> list[Stretch] | None:
        return None if self.options.lockstep else self._slices

    def before(self) -> None:
        if self._exact:
            for route in self._routes:
                route.round()
            self._exact = False

    def step(self, samples: int, loss: float) -> Outcome:
        phase, wiring = self.phase, self.wiring
        self._slices = self._slices[1:]
        if samples and not self.options.lockstep:
            self._clip(samples)
        self._look_for_nan()
        part = Contribution.of(phase, samples, loss)
        self._header.write(Header(HeaderKind.STEP, self.version, phase.step.round_end, phase.step.number, part))
        reply = self.comm.start_recv(self._reply.bytes, wiring.coordinator, Tag.REPLY)
        for route in self._routes:
            route.offer()
        sends = [self.comm.start_send(self._header.bytes, wiring.coordinator, Tag.CONTROL)]
        carry = self._carry(part)
        for route in self._routes:
            sends += route.push(carry)
        found = self._pull(reply)
        self.comm.wait_all(sends)
        if carry and found.result != "applied":
            for route in self._routes:
                route.take_back()
        return self._outcome(found)

    def _room_for_rests(self) -> Tensor | None:
        """Memory for what pushes leave out, if there are messages and the codec remembers."""
        codec = self.wiring.codecs.push
        return self._room() if codec is not None and codec.remembers and self._has_far() else None

    def _room_for_pulls(self) -> Tensor | None:
        """What has been received, if pulls are messages with differences: at first the parameters of all."""
        differences = self.wiring.codecs.differences and self._has_far()
        return self._room().copy_(self.phase.replica.values) if differences else None

    def _has_far(self) -> bool:
        """Whether there are servers that this worker reaches by messages."""
        return any(not near(self.phase, shard.server) for shard in self.wiring.shards())

    def _room(self) -> Tensor:
        """Memory like the arena's."""
        from hpctrain.replica.tensors import as_tensor

        layout = self.phase.replica.layout
        return as_tensor(self.phase.comm.arena(layout.length, layout.dtype).mine)

    def _look_for_nan(self) -> None:
        """Codecs that remember spread what is not finite over its neighbours: find it here."""
        from hpctrain.replica.blocks import is_finite

        step, replica = self.phase.step, self.phase.replica
        if self._rest is not None and not step.bad and not is_finite(replica.gradient):
            step.bad = replica.first_not_finite()

    def _carry(self, part: Contribution) -> float:
        """What is to be multiplied with what earlier pushes have left out, which is in units of a mean, as gradients of
        short batches are not; 0 if this push cannot count."""
        codec, weight = self.wiring.codecs.push, part.weight / self.phase.dealing.batch
        if codec is not None:
            codec.position = self.phase.step.number
        if self._rest is None or not weight or not part.finite:
            return 0.0
        carry, self._weight = weight / self._weight, weight
        return carry

    def _pull(self, request: Request) -> Reply:
        """Receive the coordinator's reply, `request`, and the parameters. Raises NanError if the phase ends with it."""
        request.wait()
        self._exact = self._reply.read().exact
        for route in self._routes:
            route.pull(self._exact)
        for route in self._routes:
            route.pulled()
        return self._take()

    def _running_clip(self) -> RunningClip | None:
        """The running clip, if gradients may be late; those of a single worker never are."""
        longest = self.options.clip_pushes or (None if self.phase.updating.adaptive else 2.0)
        alone = len(self.phase.roles.workers) == 1
        return RunningClip(longest) if longest is not None and not alone else None

    def _clip(self, samples: int) -> None:
        """Clip this worker's own gradient, as the mean over its samples; the other workers' are not available."""
        limit, running = self.phase.updating.clip_norm, self._running
        if limit is None and running is None:
            return
        from hpctrain.replica.blocks import is_finite, sum_of_squares

        gradient, weight = self.phase.replica.gradient, self.phase.step.weight or samples
        squares = sum_of_squares(gradient) * (self.phase.dealing.batch / weight) ** 2
        if squares - squares != 0.0 and not is_finite(gradient):  # left to the server, which names the parameter
            return
        factor = clip_factor(squares, limit) if limit is not None else 1.0
        if running is not None:
            factor *= running.factor(factor * squares**0.5)
        if factor < 1.0:
            gradient.mul_(factor)

    def _take(self) -> Reply:
        """Read the coordinator's reply, which has arrived. Raises NanError if the phase ends with it."""
        reply = self._reply.read()
        if (nan := reply.nan) is not None:
            raise nan_error(self.phase, self.wiring.workers[nan.worker], nan.loss, nan.step, nan.bad)
        self.version, self.phase.cursor = reply.version, reply.cursor
        self._slices += reply.slices
        if reply.shares:
            self.phase.step.shares, self.phase.step.later = reply.shares
        return reply

    def _outcome(self, reply: Reply) -> Outcome:
        assert reply.result is not None
        return Outcome(
            reply.result,
            reply.cursor,
            reply.loss,
            reply.samples,
            reply.ask,
            reply.version,
            (reply.staleness, reply.staleness),
            reply.why,
            reply.held,
            reply.overflow,
        )

    def state(self) -> State | None:
        if self.comm.rank != 0:
            return None
        self._send(HeaderKind.STATE)
        servers = [server for server, _, _ in self.wiring.keepers()]
        return collect_state(self.comm, State(0, 0), servers, self.phase.replica.layout.length)

    def own(self) -> Own:
        own = Own(numbers={CLIP: self._running.counters()} if self._running is not None else {})
        if self._rest is not None:
            from hpctrain.replica.tensors import as_array

            own.arrays[REST], own.numbers[REST] = as_array(self._rest), {"weight": self._weight}
        if self._received is not None:
            from hpctrain.replica.tensors import as_array

            own.arrays[RECEIVED] = as_array(self._received)
        return own

    def load_own(self, own: Own) -> str | None:
        if self._rest is not None and REST in own.arrays:
            from hpctrain.replica.tensors import as_tensor

            self._rest.copy_(as_tensor(own.arrays[REST]))
            self._weight = own.numbers[REST]["weight"]
        if self._received is not None and RECEIVED in own.arrays:
            from hpctrain.replica.tensors import as_tensor

            self._received.copy_(as_tensor(own.arrays[RECEIVED]))
        if self._running is not None and CLIP in own.numbers:
            self._running.load(own.numbers[CLIP])
        return None

    def leave(self) -> State | None:
        state = self.state()
        self._send(HeaderKind.LEAVE)
        if self._thread is not None:
            self._thread.join()
        self.wiring.free()
        return state

    def withdraw(self) -> Ask:
        reply = self.comm.start_recv(self._reply.bytes, self.wiring.coordinator, Tag.REPLY)
        self._send(HeaderKind.WITHDRAW)
        return self._pull(reply).ask

    def _send(self, kind: HeaderKind) -> None:
        """Send a header without a push."""
        self._header.write(Header(kind))
        self.comm.send(self._header.bytes, self.wiring.coordinator, Tag.CONTROL)
