"""Parameter server, synchronous: servers own shards of the parameters and the optimizer; workers push gradients
and pull parameters (Li et al. 2014; backup workers: Chen et al. 2016).

The first server is the coordinator: workers send it a header with each push, and it decides, for all shards, when
a round closes and with whose gradients. Its decisions reach the other servers as one ordered stream, so every
shard makes the same updates in the same order, and a worker always pulls one version of all shards.
"""

from __future__ import annotations

import json
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from hpctrain.comm.base import Tag
from hpctrain.errors import ClusterError
from hpctrain.jobspec import Options
from hpctrain.schedule import Ask
from hpctrain.strategies.base import Outcome, Phase, Server, Strategy, nan_error

if TYPE_CHECKING:
    from hpctrain.cluster import Roles
    from hpctrain.comm.base import Buffer, Communicator, Request, Thread
    from hpctrain.optimizer import Update
    from hpctrain.state import State

REPLY = 512  # bytes of a reply: JSON, padded


class Kind(IntEnum):
    """What a worker's header says."""

    STEP = 1
    STATE = 2
    LEAVE = 3


class Decision(IntEnum):
    """What the coordinator has all servers do."""

    UPDATE = 1
    SKIP = 2
    RELEASE = 3
    STATE = 4
    END = 5
    NAN = 6


class ParameterServerOptions(Options):
    """The keys of strategy.name = "parameter_server"."""

    mode: Literal["sync"] = Field(
        "sync", description="sync: one update per round, of all workers' gradients summed in rank order"
    )
    servers: int = Field(1, ge=1, description="how many ranks own a shard of the parameters")
    colocated: bool = Field(
        False, description="put the servers beside workers (a thread of their ranks) instead of on ranks of their own"
    )
    backup_workers: int = Field(
        0,
        ge=0,
        description="close a round without waiting for so many of the slowest workers, and drop their late gradients",
    )


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
        comm.broadcast(phase.replica.value_arena.mine)

    @property
    def coordinator(self) -> int:
        return self.servers[0]

    def shards(self) -> list[tuple[int, int, int]]:
        """(server's rank, low, high) of every shard that is not empty."""
        cuts = zip(self.servers, self.bounds, self.bounds[1:], strict=False)
        return [(server, low, high) for server, low, high in cuts if low < high]

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
    """Owns one shard: sums the accepted gradients in rank order, updates, sends parameters back."""

    options: ParameterServerOptions

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.wiring = Wiring(phase, self.options)
        self.attach(phase, self.wiring, lane=0)
        _deal(phase, self.wiring, state, self)

    def attach(self, phase: Phase, wiring: Wiring, lane: int) -> None:
        """Take the shard's parameters (by now rank 0's) and post the receives. Not collective."""
        from hpctrain.replica import as_tensor

        self.phase, self.wiring, self._lane = phase, wiring, lane
        self.comm = wiring.service.lane(lane)
        self.between = wiring.between_servers.lane(lane) if wiring.between_servers is not None else None
        index = wiring.servers.index(phase.comm.rank)
        self.low, self.high = wiring.bounds[index], wiring.bounds[index + 1]
        length, dtype = self.high - self.low, phase.replica.layout.dtype
        self._arena = phase.comm.arena(length, dtype, "rank")
        self.values = as_tensor(self._arena.mine)
        self.values.copy_(phase.replica.values[self.low : self.high])
        self.update: Update = phase.make_update(self.values, self.low, self.high)
        self._gradients = [phase.comm.arena(length, dtype, "rank") for _ in wiring.workers]
        self._pushes: list[Request | None] = [None] * len(wiring.workers)
        self._sum = as_tensor(phase.comm.arena(length, dtype, "rank").mine)
        if self.comm.rank == wiring.coordinator:
            self.coordinator = Coordinator(self)

    def load(self, state: State) -> None:
        """Take over this server's part of a checkpoint, or of the phase before."""
        self.update.load(state)
        if self.comm.rank == self.wiring.coordinator:
            self.coordinator.dropped = int(state.counters.get("dropped", 0))

    def serve(self) -> None:
        """Until every worker has left. Raises NanError (as the workers do) if a loss is not finite."""
        for worker in range(len(self.wiring.workers)):
            self._expect(worker)
        try:
            if self.comm.rank == self.wiring.coordinator:
                self.coordinator.run()
            else:
                self._follow()
        finally:
            for request in self._pushes:
                if request is not None:
                    request.cancel()
        if self._lane == 0:
            self.wiring.free()

    def _follow(self) -> None:
        decision = np.zeros(self.decision_size, np.float64)
        while True:
            self.comm.recv(decision, self.wiring.coordinator, Tag.DECISION)
            what = Decision(int(decision[0]))
            if what is Decision.END:
                return
            if what is Decision.NAN:
                raise nan_error(self.phase, int(decision[1]), float(decision[3]), int(decision[2]))
            self.execute(decision)

    @property
    def decision_size(self) -> int:
        return 3 + len(self.wiring.workers)

    def execute(self, decision: Buffer) -> None:
        """Do what the coordinator decided: [Decision, weight, learning rate factor, 1 for each worker concerned].

        Of NAN: [NAN, rank, step, loss].
        """
        what = Decision(int(decision[0]))
        concerned = [i for i, flag in enumerate(decision[3:]) if flag]
        if what is Decision.STATE:
            self._send_state()
            return
        if self.low == self.high:
            if what is Decision.UPDATE and self.phase.clip_norm is not None:
                self._clip()
            return
        for worker in concerned:
            push = self._pushes[worker]
            assert push is not None
            push.wait()
        if what is Decision.UPDATE:
            self._apply(concerned, weight=decision[1], factor=decision[2])
        for worker in concerned:
            self._expect(worker)
        pulls = [
            self.comm.start_send(self._arena.mine, self.wiring.workers[worker], Tag.PULL) for worker in concerned
        ]
        self.comm.wait_all(pulls)

    def _apply(self, workers: list[int], weight: float, factor: float) -> None:
        from hpctrain.replica import as_tensor

        with self.comm.span("reduce", self._sum.nbytes * len(workers), flops=float(self._sum.numel() * len(workers))):
            self._sum.copy_(as_tensor(self._gradients[workers[0]].mine))
            for worker in workers[1:]:
                self._sum.add_(as_tensor(self._gradients[worker].mine))
            if weight != 1.0:
                self._sum.mul_(1.0 / weight)
        if self.phase.clip_norm is not None:
            self._sum.mul_(self._clip())
        with self.comm.span("update", self._sum.nbytes, flops=float(self._sum.numel())):
            self.update.apply(self._sum, factor)

    def _clip(self) -> float:
        from hpctrain.strategies.all_reduce import clip_factor

        assert self.between is not None and self.phase.clip_norm is not None
        squares = np.array([float(self._sum.double().square().sum())])
        return clip_factor(float(self.between.gather_rows(squares).sum()), self.phase.clip_norm)

    def _expect(self, worker: int) -> None:
        if self.low < self.high:
            rank = self.wiring.workers[worker]
            self._pushes[worker] = self.comm.start_recv(self._gradients[worker].mine, rank, Tag.PUSH)

    def _send_state(self) -> None:
        from hpctrain.state import send_state

        state, leads = self.update.state(), self.comm.rank == self.wiring.coordinator
        if leads:
            state.counters = {"dropped": self.coordinator.dropped}
        if leads and self.phase.conductor.rule is not None:
            state.rule = self.phase.conductor.rule.state()
        if leads or self.low < self.high:
            send_state(self.comm, state, 0)


class Coordinator:
    """The first server's other task: hears the headers, closes rounds, announces decisions, answers workers."""

    def __init__(self, server: ParameterServerServer) -> None:
        self.server, self.comm = server, server.comm
        self.phase, self.wiring = server.phase, server.wiring
        self.version = 0
        self.dropped = 0
        self.cursor = self.phase.cursor
        self.ask = Ask.NOTHING
        self.present = set(range(len(self.wiring.workers)))
        self.waiting: dict[int, Buffer] = {}
        self.needed = len(self.present) - server.options.backup_workers
        self.nan: tuple[int, float, int] | None = None
        self.left: set[int] = set()

    def run(self) -> None:
        """Until every worker has left (or, after a NaN, been told). Raises NanError then."""
        headers = [np.zeros(7, np.float64) for _ in self.wiring.workers]
        requests: dict[int, Request] = {i: self._listen(header, i) for i, header in enumerate(headers)}
        while requests:
            senders = list(requests)
            worker = senders[self.comm.wait_any([requests[sender] for sender in senders])]
            header = headers[worker].copy()
            requests[worker] = self._listen(headers[worker], worker)
            self._hear(worker, header)
            for gone in self.left & set(requests):
                requests.pop(gone).cancel()
        if self.nan is None:
            self._decide(Decision.END)
            return
        rank, loss, step = self.nan
        self._decide(Decision.NAN, weight=rank, factor=step, loss=loss)
        raise nan_error(self.phase, rank, loss, step)

    def _listen(self, header: Buffer, worker: int) -> Request:
        return self.comm.start_recv(header, self.wiring.workers[worker], Tag.CONTROL)

    def _hear(self, worker: int, header: Buffer) -> None:
        """Act on a header."""
        kind = Kind(int(header[0]))
        if kind is Kind.LEAVE:
            self.left.add(worker)
        elif kind is Kind.STATE:
            self._decide(Decision.STATE)
            self.server.execute(np.array([Decision.STATE, 0, 0], np.float64))
        elif header[1] < self.version or self.nan is not None:
            self._release(worker, int(header[2]))
        else:
            self.waiting[worker] = header
            if len(self.waiting) >= self.needed:
                self._close_round()

    def _close_round(self) -> None:
        phase, accepted = self.phase, sorted(self.waiting)
        table = np.array([self.waiting.pop(worker) for worker in accepted])
        total = int(table[:, 2].sum())
        losses = np.where(table[:, 2] > 0, table[:, 3], 0.0)
        mean = float((table[:, 2] * losses).sum() / max(1, total))
        ranks = tuple(self.wiring.workers[worker] for worker in accepted)
        bad = [(r, float(x)) for r, x in zip(ranks, losses, strict=True) if not np.isfinite(x)]
        if bad and phase.nan == "stop":
            self.nan = (*bad[0], int(table[0, 6]))
        factor = phase.rate(self.cursor)
        self.version += 1
        before, self.cursor = self.cursor, int(table[:, 5].max())
        wish = Ask(int(np.bitwise_or.reduce(table[:, 4].astype(np.int64))))
        self.ask = phase.conductor.decide(before, self.cursor, mean, wish)
        for worker in accepted:
            self._reply(worker, "skipped" if bad else "applied", mean, total, late=0)
        self._decide(Decision.SKIP if bad else Decision.UPDATE, accepted, total / phase.batch, factor)

    def _release(self, worker: int, samples: int) -> None:
        """Too late for its round: its gradient is dropped, and it goes on with the parameters of now."""
        self.dropped += 1
        self._reply(worker, "dropped", 0.0, samples, late=1)
        self._decide(Decision.RELEASE, [worker])

    def _reply(self, worker: int, result: str, loss: float, samples: int, late: int) -> None:
        if self.nan is not None:  # it will raise, and send no more
            self.left.add(worker)
        text = json.dumps(
            {
                "result": result,
                "cursor": self.cursor,
                "loss": loss,
                "samples": samples,
                "ask": int(self.ask),
                "version": self.version,
                "late": late,
                "nan": self.nan,
                "why": self.phase.conductor.why[:160],
            }
        ).encode()
        buffer = np.frombuffer(text.ljust(REPLY, b"\0"), np.uint8).copy()
        self.comm.send(buffer, self.wiring.workers[worker], Tag.REPLY)

    def _decide(
        self, what: Decision, workers: list[int] | None = None, weight: float = 0, factor: float = 0, loss: float = 0
    ) -> None:
        """Tell the other servers, then do the same here."""
        decision = np.zeros(self.server.decision_size, np.float64)
        decision[:4] = what, weight, factor, loss
        decision[3:][workers or []] = 1
        sends = [self.comm.start_send(decision, server, Tag.DECISION) for server in self.wiring.servers[1:]]
        if workers:
            self.server.execute(decision)
        self.comm.wait_all(sends)


class ParameterServer(Strategy):
    """The worker half: push, pull."""

    Options = ParameterServerOptions
    Server = ParameterServerServer
    options: ParameterServerOptions

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

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.phase = phase
        self.wiring = Wiring(phase, self.options)
        self.comm = self.wiring.service
        self.version = 0
        beside = phase.comm.rank in phase.roles.servers
        self._server = ParameterServerServer(self.options) if beside else None
        if self._server is not None:
            self._server.attach(phase, self.wiring, lane=1)
        _deal(phase, self.wiring, state, self._server)
        self._thread: Thread | None = phase.comm.spawn(self._server.serve) if self._server else None

    def step(self, samples: int, loss: float) -> Outcome:
        phase, wiring = self.phase, self.wiring
        values, gradient = phase.replica.value_arena, phase.replica.gradient_arenas[0]
        assert values is not None
        header = np.array([Kind.STEP, self.version, samples, loss, phase.wish, phase.round_end, phase.step], np.float64)
        reply = np.zeros(REPLY, np.uint8)
        requests = [self.comm.start_recv(reply, wiring.coordinator, Tag.REPLY)]
        for server, low, high in wiring.shards():
            requests.append(self.comm.start_recv(values.mine[low:high], server, Tag.PULL))
        requests.append(self.comm.start_send(header, wiring.coordinator, Tag.CONTROL))
        for server, low, high in wiring.shards():
            requests.append(self.comm.start_send(gradient.mine[low:high], server, Tag.PUSH))
        self.comm.wait_all(requests)
        return self._outcome(json.loads(reply.tobytes().rstrip(b"\0")))

    def _outcome(self, reply: dict[str, Any]) -> Outcome:
        if reply["nan"] is not None:
            raise nan_error(self.phase, *reply["nan"])
        self.version = reply["version"]
        self.phase.cursor = reply["cursor"]
        return Outcome(
            reply["result"],
            reply["cursor"],
            reply["loss"],
            reply["samples"],
            Ask(reply["ask"]),
            self.version,
            (reply["late"], reply["late"]),
            reply["why"],
        )

    def state(self) -> State | None:
        assert self.phase.workers is not None
        whole = None
        if self.comm.rank == 0:
            from hpctrain.state import merge, recv_state

            self._tell(Kind.STATE)
            pieces = [recv_state(self.comm, server) for server, _, _ in self.wiring.keepers()]
            whole = merge(pieces, self.phase.replica.layout.length)
        self.phase.workers.barrier()
        return whole

    def leave(self) -> State | None:
        state = self.state()
        self._tell(Kind.LEAVE)
        if self._thread is not None:
            self._thread.join()
        self.wiring.free()
        return state

    def _tell(self, kind: Kind) -> None:
        header = np.zeros(7, np.float64)
        header[0] = kind
        self.comm.send(header, self.wiring.coordinator, Tag.CONTROL)


def _deal(
    phase: Phase, wiring: Wiring, state: State | None, server: ParameterServerServer | None
) -> None:
    """Give every server its part of the optimizer state, from rank 0. Collective over the phase's ranks."""
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

