"""Parameter server: servers own shards of the parameters and the optimizer; workers push gradients and pull parameters
(Li et al. 2014). Synchronous, asynchronous or bounded: see `coordinator`, which decides; here it is carried out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from hpctrain.comm.base import Tag
from hpctrain.errors import ClusterError
from hpctrain.jobspec import Options
from hpctrain.schedule import Ask
from hpctrain.state import STRATEGY, Own
from hpctrain.strategies.base import Needs, Outcome, Phase, Server, Strategy, clip_factor
from hpctrain.strategies.contribution import Contribution, nan_error, sum_error
from hpctrain.strategies.coordinator import (
    REPLY,
    Asynchronous,
    Bounded,
    Coordinator,
    Decision,
    Header,
    Kind,
    Rounds,
    What,
)
from hpctrain.strategies.corrections import DelayCompensation, RunningClip

if TYPE_CHECKING:
    import torch

    from hpctrain.cluster import Roles
    from hpctrain.comm.base import Arena, Buffer, Communicator, Request, Thread
    from hpctrain.data.queue import Stretch
    from hpctrain.errors import NanError
    from hpctrain.optimizer import Update
    from hpctrain.state import State

MODES: dict[str, type[Coordinator]] = {"sync": Rounds, "async": Asynchronous, "bounded": Bounded}


class ParameterServerOptions(Options):
    """The keys of strategy.name = "parameter_server"."""

    mode: Literal["async", "bounded", "sync"] = Field(
        "async",
        description="async: one update per gradient, as it comes; bounded: the same, but no worker runs more than "
        "`bound` steps ahead of the slowest; sync: one update per round, of all workers' gradients summed in rank "
        "order",
    )
    servers: int = Field(1, ge=1, description="how many ranks own a shard of the parameters")
    colocated: bool = Field(
        False, description="put the servers beside workers (a thread of their ranks) instead of on ranks of their own"
    )
    bound: int = Field(
        3,
        ge=0,
        le=10**6,
        description="steps that the fastest worker may be ahead of the slowest, counted from where all were last "
        "together, as at an evaluation (mode bounded)",
    )
    lr_per_update: Literal["auto", "workers", "staleness", "none"] = Field(
        "auto",
        description="what the learning rate is divided by for one worker's gradient (modes async and bounded): the "
        "number of workers, the gradient's staleness (at least 1), or nothing; auto: the number of workers, for Adam "
        "and its like to the power of 0.75",
    )
    momentum_correction: bool = Field(
        True,
        description="keep SGD's velocity per worker, with Nesterov's momentum (DANA-Slim: Hakimi et al. 2019): one "
        "velocity of all workers' late gradients becomes unstable (modes async and bounded)",
    )
    clip_pushes: float | None = Field(
        None,
        gt=1,
        le=1e9,
        description="a gradient longer than so many times the running mean of its worker's is scaled down to that "
        "(modes async and bounded); left out: 2 where updates grow with gradients (SGD), never for Adam and its like",
    )
    delay_compensation: Literal["none", "constant", "adaptive"] = Field(
        "none",
        description="correct stale gradients for what changed meanwhile, to first order (DC-ASGD, Zheng et al. 2017)",
    )
    delay_lambda: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="strength of delay_compensation; left out: 0.04 for constant, 2.0 for adaptive, as published",
    )
    backup_workers: int = Field(
        0,
        ge=0,
        description="close a round without waiting for so many of the slowest workers, and drop their late gradients "
        "(mode sync)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        defaults = type(self).model_fields
        for key, modes in MODE_KEYS.items():
            if self.mode not in modes and getattr(self, key) != defaults[key].default:
                needed = " or ".join(f'"{mode}"' for mode in modes)
                raise ValueError(f'has {key} with mode = "{self.mode}", where it has no effect; set mode = {needed}')
        if self.delay_lambda is not None and self.delay_compensation == "none":
            raise ValueError('has delay_lambda with delay_compensation = "none", where it has no effect')
        return self

    @property
    def lockstep(self) -> bool:
        """Whether all workers take every step together."""
        return self.mode == "sync"

    def per_update(self, phase: Phase, staleness: int) -> float:
        """The learning rate's factor for one worker's gradient of that staleness."""
        if not phase.per_update or self.lr_per_update == "none":
            return 1.0
        if self.lr_per_update == "staleness":
            return 1.0 / max(1, staleness)
        adapts = self.lr_per_update == "auto" and phase.adaptive
        return len(phase.roles.workers) ** -(ADAPTIVE_POWER if adapts else 1.0)


# One worker's gradient is noisier than a round's, so Adam takes shorter steps along it by itself: a smaller batch wants
# the rate's root (Malladi et al. 2022), late gradients less. Between the two; docs/asynchrony.md has what came of it.
ADAPTIVE_POWER = 0.75
MODE_KEYS = {
    "bound": ("bounded",),
    "backup_workers": ("sync",),
    "lr_per_update": ("async", "bounded"),
    "momentum_correction": ("async", "bounded"),
    "clip_pushes": ("async", "bounded"),
    "delay_compensation": ("async", "bounded"),
}


CLIP = "clip"  # among a worker's own numbers


class Wiring:
    """Who owns which shard, and the communicators between workers and servers. Construction is collective."""

    def __init__(self, phase: Phase, options: ParameterServerOptions) -> None:
        from hpctrain.optimizer import slice_bounds

        comm = phase.comm
        self.workers, self.servers = phase.roles.workers, phase.roles.servers
        service = comm.split(0, comm.rank)
        assert service is not None
        self.service: Communicator = service
        self.between_servers = comm.split(0 if comm.rank in self.servers else None, comm.rank)
        self.bounds = slice_bounds(phase.replica.layout, len(self.servers), phase.elementwise)
        assert phase.replica.value_arena is not None
        if not phase.equal:
            comm.broadcast(phase.replica.value_arena.mine)

    @property
    def coordinator(self) -> int:
        return self.servers[0]

    def shards(self) -> list[tuple[int, int, int]]:
        """(server's rank, low, high) of every shard that is not empty."""
        cuts = zip(self.servers, self.bounds, self.bounds[1:], strict=False)
        return [(server, low, high) for server, low, high in cuts if low < high]

    def shard(self, phase: Phase) -> Buffer:
        """The part of this rank's parameters that it serves; for servers."""
        index = self.servers.index(phase.comm.rank)
        assert phase.replica.value_arena is not None
        return phase.replica.value_arena.mine[self.bounds[index] : self.bounds[index + 1]]

    def keepers(self) -> list[tuple[int, int, int]]:
        """Who has a part of the strategy's state: the owners of shards, and the coordinator."""
        shards = self.shards()
        if shards and shards[0][0] != self.coordinator:
            shards.insert(0, (self.coordinator, 0, 0))
        return shards

    def free(self) -> None:
        if self.between_servers is not None:
            self.between_servers.free()
        self.service.free()


class ParameterServerServer(Server):
    """Owns one shard: takes gradients, updates, gives parameters, as the coordinator decides."""

    options: ParameterServerOptions

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.wiring = Wiring(phase, self.options)
        self.attach(phase, self.wiring, self.wiring.shard(phase), lane=0)  # no replica is trained here
        _deal(phase, self.wiring, state, self)

    def attach(self, phase: Phase, wiring: Wiring, shard: Buffer, lane: int) -> None:
        """Own `shard`, by now rank 0's parameters, and allocate what is received into. Not collective."""
        from hpctrain.replica import as_tensor

        self.phase, self.wiring, self._lane = phase, wiring, lane
        self.comm = wiring.service.lane(lane)
        self.between = wiring.between_servers.lane(lane) if wiring.between_servers is not None else None
        index = wiring.servers.index(phase.comm.rank)
        self.low, self.high = wiring.bounds[index], wiring.bounds[index + 1]
        self._shard, self.values = shard, as_tensor(shard)
        self.update: Update = phase.make_update(self.values, self.low, self.high)
        self._gradients = [self._buffer() for _ in wiring.workers]
        self.pushes: list[Request | None] = [None] * len(wiring.workers)
        self._sum = as_tensor(self._buffer().mine)
        self._copies = {worker: self._buffer() for worker in self._copied()}
        self._direct: list[Request] = []
        self._sending: list[Request] = []
        self._compensation = DelayCompensation.of(self.options, self.values)
        self._corrects = not self.options.lockstep and self.options.momentum_correction and len(wiring.workers) > 1
        self.coordinator = MODES[self.options.mode](self) if phase.comm.rank == wiring.coordinator else None

    def _buffer(self) -> Arena:
        return self.phase.comm.arena(self.high - self.low, self.phase.replica.layout.dtype, "rank")

    def _copied(self) -> list[int]:
        """Workers that get a copy of the parameters as they are now: those that the next update must not wait for,
        being far away, and those whose gradients are compensated for what changed since."""
        if self.options.lockstep or self.low == self.high:
            return []
        here, nodes = self.comm.nodes[self.comm.rank], self.comm.nodes
        everybody = self.options.delay_compensation != "none"
        return [worker for worker, rank in enumerate(self.wiring.workers) if everybody or nodes[rank] != here]

    def load(self, state: State) -> None:
        """Take over this server's part of a checkpoint, or of the phase before."""
        if self._compensation is not None:
            self._compensation.load(state.section(STRATEGY).flat)
        self.update.load_in_place(state)
        if self.coordinator is not None:
            self.coordinator.load(state.counters)

    def serve(self) -> None:
        """Until every worker has left. Raises NanError (as the workers do) if a loss is not finite."""
        self._remember_all()
        for worker in range(len(self.wiring.workers)):
            self._expect(worker)
        try:
            if self.coordinator is not None:
                self.coordinator.run()
            else:
                self._follow()
        finally:
            for request in self.pushes:
                if request is not None:
                    request.cancel()
            self.coordinator = None  # which knows this server: else its memory would wait for the garbage collector
        self.comm.wait_all(self._direct + self._sending)
        if self._lane == 0:
            self.wiring.free()

    def _follow(self) -> None:
        workers, slots = len(self.wiring.workers), len(self.phase.replica.layout.slots)
        row = np.zeros(Decision.length(workers, slots), np.float64)
        while True:
            self.comm.recv(row, self.wiring.coordinator, Tag.DECISION)
            decision = Decision.decode(row, workers, slots)
            if decision.what is What.END:
                return
            if decision.what is What.NAN:
                rank = self.wiring.workers[decision.take[0]]
                raise nan_error(self.phase, rank, decision.weight, decision.step, decision.bad)
            self.execute(decision)

    def execute(self, decision: Decision) -> None:
        """Do what the coordinator decided."""
        if self._lane == 0:
            self.phase.tick()
        if decision.what is What.STATE:
            self._send_state()
            if self._lane == 0:
                self.phase.saving()
            return
        if self.low == self.high:
            if decision.what is What.UPDATE and self._clips:
                self._clip(self._sum)
            return
        for worker in decision.take:
            push = self.pushes[worker]
            assert push is not None
            push.wait()
        if decision.what is What.UPDATE:
            self._apply(decision)
        for worker in decision.take:
            self._expect(worker)
        for worker in decision.give:
            self._give(worker)

    def _apply(self, decision: Decision) -> None:
        alone = len(decision.take) == 1
        peer = self.comm.members[self.wiring.workers[decision.take[0]]] if alone else -1
        self.comm.recorder.step = decision.step
        gradient = self._gradient(decision)
        if self._clips:
            gradient.mul_(self._clip(gradient))
        self.comm.wait_all(self._direct)  # nobody shall read half an update
        self._direct = []
        with self.comm.span("update", gradient.nbytes, peer, decision.version, flops=float(gradient.numel())):
            whose = decision.take[0] if self._corrects else None
            self.update.apply(gradient, decision.rate, decision.momentum, whose, decision.used)

    def _gradient(self, decision: Decision) -> torch.Tensor:
        """The mean of the gradients taken, summed in rank order; one alone lies where it came. Raises NanError."""
        from hpctrain.blocks import add_up
        from hpctrain.replica import as_tensor

        parts = [as_tensor(self._gradients[worker].mine) for worker in decision.take]
        if len(parts) == 1:
            finite, whole = add_up(parts, parts[0], decision.weight), parts[0]
        else:
            whole = self._sum
            with self.comm.span("reduce", whole.nbytes * len(parts), flops=float(whole.numel() * len(parts))):
                finite = add_up(parts, whole, decision.weight)
        if not finite:
            raise self._gradient_error(decision, whole)
        if len(parts) == 1 and self._compensation is not None:
            self._compensation.correct(whole, self.values, as_tensor(self._copies[decision.take[0]].mine))
        return whole

    def _gradient_error(self, decision: Decision, whole: torch.Tensor) -> NanError:
        """Whose gradient of which parameter it was. The server alone raises it: the workers have their replies."""
        from hpctrain.replica import as_tensor

        layout, phase = self.phase.replica.layout, self.phase
        error = sum_error(phase, layout.first_not_finite(whole, self.low), decision.step)
        for worker in decision.take:
            if bad := layout.first_not_finite(as_tensor(self._gradients[worker].mine), self.low):
                error = nan_error(phase, self.wiring.workers[worker], 0.0, decision.step, bad)
                break
        error.everywhere = False
        return error

    @property
    def _clips(self) -> bool:
        """Whether the sum is clipped here; a worker's own gradient is clipped by the worker."""
        return self.phase.clip_norm is not None and self.options.lockstep

    def _clip(self, gradient: torch.Tensor) -> float:
        """The factor for all shards. Collective over the servers."""
        from hpctrain.replica import sum_of_squares

        assert self.between is not None and self.phase.clip_norm is not None
        squares = np.array([sum_of_squares(gradient)])
        return clip_factor(float(self.between.gather_rows(squares).sum()), self.phase.clip_norm)

    def _expect(self, worker: int) -> None:
        if self.low < self.high:
            rank = self.wiring.workers[worker]
            self.pushes[worker] = self.comm.start_recv(self._gradients[worker].mine, rank, Tag.PUSH)

    def _give(self, worker: int) -> None:
        rank = self.wiring.workers[worker]
        if worker not in self._copies:
            self._direct.append(self.comm.start_send(self._shard, rank, Tag.PULL))
            return
        self._remember(worker)  # its last pull has arrived: it has pushed since
        self._sending = [request for request in self._sending if not request.test()]
        self._sending.append(self.comm.start_send(self._copies[worker].mine, rank, Tag.PULL))

    def _remember(self, worker: int) -> None:
        from hpctrain.replica import as_tensor

        as_tensor(self._copies[worker].mine).copy_(self.values)

    def _remember_all(self) -> None:
        """What the workers begin with."""
        for worker in self._copies:
            self._remember(worker)

    def _send_state(self) -> None:
        from hpctrain.state import send_state

        if self.coordinator is None and self.low == self.high:
            return
        with self.update.common_velocity(len(self.wiring.workers)):
            state = self.update.view()
            if self._compensation is not None:
                state.section(STRATEGY).flat |= self._compensation.view()
            if self.coordinator is not None:
                state.counters = self.coordinator.counters()
                if self.phase.conductor.rule is not None:
                    state.rule = self.phase.conductor.rule.state()
            send_state(self.comm, state, 0)


class ParameterServer(Strategy):
    """The worker half: push, pull."""

    Options = ParameterServerOptions
    Server = ParameterServerServer
    options: ParameterServerOptions
    tested_with = (
        {"mode": "sync"},
        {"mode": "sync", "servers": 2},
        {"mode": "sync", "servers": 2, "colocated": True},
        {"mode": "sync", "backup_workers": 1, "colocated": True},
        {},
        {"servers": 2, "colocated": True, "delay_compensation": "adaptive"},
        {"mode": "bounded", "bound": 1},
    )

    def __init__(self, options: ParameterServerOptions) -> None:
        super().__init__(options)
        self.exact = self.deterministic = options.lockstep and not options.backup_workers
        self.needs = Needs(lockstep=options.lockstep, queue=not options.lockstep)

    @staticmethod
    def roles(options: ParameterServerOptions) -> tuple[int, bool]:
        return options.servers, options.colocated

    @staticmethod
    def check(options: ParameterServerOptions, roles: Roles) -> None:
        if options.backup_workers >= (workers := len(roles.workers)):
            raise ClusterError(
                f"strategy.backup_workers = {options.backup_workers}: of {workers} workers at least one must be waited "
                "for; lower strategy.backup_workers or start more ranks"
            )

    @staticmethod
    def fills(options: ParameterServerOptions, roles: Roles, rank: int) -> float:
        """Everybody parameters of its own, and what the phase before has; rank 0 the optimizer's state, as it comes and
        goes; a server its workers' gradients and velocities, their sum, the state, and what an update takes."""
        shards = (2 * len(roles.workers) + 5) / len(roles.servers) if rank in roles.servers else 0.0
        return 2.0 + 3.0 * (rank == 0) + shards

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.phase = phase
        self.wiring = Wiring(phase, self.options)
        self.comm = self.wiring.service
        beside = phase.comm.rank in phase.roles.servers
        self._server = ParameterServerServer(self.options) if beside else None
        if self._server is not None:
            part = self.wiring.shard(phase)
            shard = phase.comm.arena(part.size, part.dtype, "rank").mine
            shard[...] = part
            self._server.attach(phase, self.wiring, shard, lane=1)
        _deal(phase, self.wiring, state, self._server)
        self._thread: Thread | None = phase.comm.spawn(self._server.serve) if self._server else None
        self._slices: list[Stretch] = []
        self._running = self._running_clip()
        answer = np.zeros(REPLY, np.uint8)
        self.comm.recv(answer, self.wiring.coordinator, Tag.REPLY)
        self._take(answer)

    def slices(self) -> list[Stretch] | None:
        return None if self.options.lockstep else self._slices

    def step(self, samples: int, loss: float) -> Outcome:
        phase, wiring = self.phase, self.wiring
        values, gradient = phase.replica.value_arena, phase.replica.gradient_arenas[0]
        assert values is not None
        self._slices = self._slices[1:]
        if samples and not self.options.lockstep:
            self._clip(samples)
        part, slots = Contribution.of(phase, samples, loss), len(phase.replica.layout.slots)
        header = Header(Kind.STEP, self.version, phase.round_end, phase.step, part)
        answer = np.zeros(REPLY, np.uint8)
        requests = [self.comm.start_recv(answer, wiring.coordinator, Tag.REPLY)]
        for server, low, high in wiring.shards():
            requests.append(self.comm.start_recv(values.mine[low:high], server, Tag.PULL))
        requests.append(self.comm.start_send(header.encode(slots), wiring.coordinator, Tag.CONTROL))
        for server, low, high in wiring.shards():
            requests.append(self.comm.start_send(gradient.mine[low:high], server, Tag.PUSH))
        self.comm.wait_all(requests)
        return self._outcome(self._take(answer))

    def _running_clip(self) -> RunningClip | None:
        """Where gradients come late, as they do not from a worker that is alone."""
        longest = self.options.clip_pushes or (None if self.phase.adaptive else 2.0)
        alone = len(self.phase.roles.workers) == 1
        return RunningClip(longest) if longest is not None and not alone else None

    def _clip(self, samples: int) -> None:
        """This worker's own gradient, as the mean over its samples: nobody else's is at hand."""
        limit, running = self.phase.clip_norm, self._running
        if limit is None and running is None:
            return
        from hpctrain.blocks import is_finite
        from hpctrain.replica import sum_of_squares

        gradient, weight = self.phase.replica.gradient, self.phase.weight or samples
        squares = sum_of_squares(gradient) * (self.phase.batch / weight) ** 2
        if squares - squares != 0.0 and not is_finite(gradient):  # left to the server, which names the parameter
            return
        factor = clip_factor(squares, limit) if limit is not None else 1.0
        if running is not None:
            factor *= running.factor(factor * squares**0.5)
        if factor < 1.0:
            gradient.mul_(factor)

    def _take(self, answer: Any) -> dict[str, Any]:
        """What the coordinator says."""
        reply: dict[str, Any] = json.loads(answer.tobytes().rstrip(b"\0"))
        if reply["nan"] is not None:
            raise nan_error(self.phase, *reply["nan"])
        self.version, self.phase.cursor = reply["version"], reply["cursor"]
        self._slices += [(start, stop) for start, stop in reply.get("slices", [])]
        return reply

    def _outcome(self, reply: dict[str, Any]) -> Outcome:
        return Outcome(
            reply["result"],
            reply["cursor"],
            reply["loss"],
            reply["samples"],
            Ask(reply["ask"]),
            self.version,
            (reply["staleness"], reply["staleness"]),
            reply["why"],
            reply.get("held", 0),
        )

    def state(self) -> State | None:
        whole = None
        if self.comm.rank == 0:
            from hpctrain.state import State, collect_state

            self._tell(Kind.STATE)
            servers = [server for server, _, _ in self.wiring.keepers()]
            whole = collect_state(self.comm, State(0, 0), servers, self.phase.replica.layout.length)
        return whole

    def own(self) -> Own:
        return Own(numbers={CLIP: self._running.counters()} if self._running is not None else {})

    def load_own(self, own: Own) -> None:
        if self._running is not None and CLIP in own.numbers:
            self._running.load(own.numbers[CLIP])

    def leave(self) -> State | None:
        state = self.state()
        self._tell(Kind.LEAVE)
        if self._thread is not None:
            self._thread.join()
        self.wiring.free()
        return state

    def withdraw(self) -> Ask:
        values, answer = self.phase.replica.value_arena, np.zeros(REPLY, np.uint8)
        assert values is not None
        requests = [self.comm.start_recv(answer, self.wiring.coordinator, Tag.REPLY)]
        for server, low, high in self.wiring.shards():
            requests.append(self.comm.start_recv(values.mine[low:high], server, Tag.PULL))
        self._tell(Kind.WITHDRAW)
        self.comm.wait_all(requests)
        return Ask(self._take(answer)["ask"])

    def _tell(self, kind: Kind) -> None:
        slots = len(self.phase.replica.layout.slots)
        self.comm.send(Header(kind).encode(slots), self.wiring.coordinator, Tag.CONTROL)


def _deal(phase: Phase, wiring: Wiring, state: State | None, server: ParameterServerServer | None) -> None:
    """Give every server its part of the state, from rank 0. Collective over the phase's ranks."""
    from hpctrain.state import recv_state, send_state

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
