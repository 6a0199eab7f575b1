"""What decides in a parameter server: the coordinator, which lives on the first server.

Workers send it a header with each push. It decides, for all shards, which gradients are applied in what order and
who gets parameters when. Its decisions reach the other servers as one ordered stream, so every shard makes the same
updates in the same order: the versions that a worker pulls, and the snapshots that are evaluated or saved, are the
same on all shards.

`Rounds` closes rounds (synchronous, with backup workers: Chen et al. 2016). `Asynchronous` applies each gradient as it
comes (Dean et al. 2012), and deals out the samples. `Bounded` lets no worker run more than so many steps ahead of the
slowest (stale-synchronous: Ho et al. 2013, section 3).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hpctrain.comm.base import Tag
from hpctrain.data.queue import SharedQueue, StaticQueue, Stretch
from hpctrain.schedule import Ask
from hpctrain.strategies.contribution import Contribution, RoundTotals, Used, nan_error, pack, unpack, words

if TYPE_CHECKING:
    from hpctrain.comm.base import Buffer, Request
    from hpctrain.data.queue import Queue
    from hpctrain.strategies.parameter_server import ParameterServerServer

REPLY = 2048  # bytes of a reply at most: JSON
ENDS = Ask.STOP | Ask.END_PHASE | Ask.INTERRUPT
NOTHING = Contribution(0, 0.0, 0.0, Ask.NOTHING)


class Kind(IntEnum):
    """What a worker's header says."""

    STEP = 1
    STATE = 2
    LEAVE = 3
    WITHDRAW = 4


@dataclass(frozen=True)
class Header:
    """What a worker says with each push, as float64 on the wire. `version`: of the parameters that it computed on;
    `part`: its contribution, of a STEP."""

    kind: Kind
    version: int = 0
    round_end: int = 0
    step: int = 0
    part: Contribution = NOTHING

    @staticmethod
    def length(slots: int) -> int:
        """Elements of an encoded header, for a layout of so many parameters."""
        return 4 + Contribution.length(slots)

    def encode(self, slots: int) -> Buffer:
        """As float64."""
        numbers = np.array([self.kind, self.version, self.round_end, self.step], np.float64)
        return np.concatenate([numbers, self.part.encode(slots)])

    @classmethod
    def decode(cls, row: Buffer, slots: int) -> Header:
        """The inverse of `encode`."""
        kind, version, round_end, step = (int(number) for number in row[:4])
        return cls(Kind(kind), version, round_end, step, Contribution.decode(row[4:], slots))


class What(IntEnum):
    """What the coordinator has all servers do with the gradients of `take`."""

    UPDATE = 1
    DROP = 2
    STATE = 3
    END = 4
    NAN = 5


class Decision(NamedTuple):
    """One of the ordered stream. Gradients of the workers `take` are consumed, then `give` get the parameters.

    UPDATE: their sum divided by `weight` is applied with `rate` times the learning rate and `momentum` times the
    momentum, as version `version`, to the parameters that are `used`. NAN: `take` is the worker, `weight` its loss,
    `bad` as in its `Contribution`.
    """

    what: What
    take: tuple[int, ...] = ()
    give: tuple[int, ...] = ()
    version: int = 0
    step: int = 0
    weight: float = 1.0
    rate: float = 1.0
    momentum: float = 1.0
    bad: int = 0
    used: Used = None

    @staticmethod
    def length(workers: int, slots: int) -> int:
        """Elements of an encoded decision, for so many workers and parameters."""
        return 7 + 2 * workers + words(slots)

    def encode(self, workers: int, slots: int) -> Buffer:
        """As float64, with a flag for each worker in `take`, one for each in `give`, and a bit for each parameter."""
        flags = np.zeros(2 * workers, np.float64)
        flags[list(self.take)] = 1
        flags[workers:][list(self.give)] = 1
        numbers = [self.what, self.version, self.step, self.weight, self.rate, self.momentum, self.bad]
        return np.concatenate([np.array(numbers, np.float64), flags, pack(self.used, slots)])

    @classmethod
    def decode(cls, row: Buffer, workers: int, slots: int) -> Decision:
        """The inverse of `encode`."""
        flags, used = row[7 : 7 + 2 * workers], unpack(row[7 + 2 * workers :], slots)
        take, give = (tuple(int(i) for i in np.flatnonzero(part)) for part in flags.reshape(2, -1))
        what, version, step = (int(number) for number in row[:3])
        weight, rate, momentum = (float(number) for number in row[3:6])
        return cls(What(what), take, give, version, step, weight, rate, momentum, int(row[6]), used)


class Coordinator(ABC):
    """The first server's other task: hears the headers, decides, answers the workers."""

    def __init__(self, server: ParameterServerServer) -> None:
        self.server, self.comm, self.options = server, server.comm, server.options
        self.phase, self.wiring = server.phase, server.wiring
        self.workers, self.slots = len(self.wiring.workers), len(self.phase.replica.layout.slots)
        self.version = self.dropped = 0
        self.cursor = self.phase.cursor
        self.ask, self.why = Ask.NOTHING, ""
        self.nan: tuple[int, float, int, int] | None = None  # rank, loss, step, bad
        self._left: set[int] = set()
        self._withdrawn: set[int] = set()  # whose programs have left the training loop

    def load(self, counters: dict[str, float]) -> None:
        """Go on from a checkpoint of this phase."""
        self.version, self.dropped = int(counters.get("version", 0)), int(counters.get("dropped", 0))

    def counters(self) -> dict[str, float]:
        """What a checkpoint must keep."""
        return {"version": self.version, "dropped": self.dropped}

    def run(self) -> None:
        """Until every worker has left (or, after a NaN, been told). Raises NanError then."""
        for worker in range(self.workers):
            self.begin(worker)
        rows = [np.zeros(Header.length(self.slots), np.float64) for _ in range(self.workers)]
        heard: dict[int, Header] = {}  # whose gradient is still on its way
        requests: dict[int, Request] = {worker: self._listen(row, worker) for worker, row in enumerate(rows)}
        while requests:
            senders = list(requests)
            worker = senders[self.comm.wait_any([requests[sender] for sender in senders])]
            header = heard.pop(worker, None)
            if header is None:
                header = Header.decode(rows[worker], self.slots)
                push = self.server.pushes[worker]
                if header.kind == Kind.STEP and push is not None and not push.test():
                    heard[worker], requests[worker] = header, push
                    continue
            del requests[worker]  # behind the others, or those of high rank are never heard where this one is busy
            requests[worker] = self._listen(rows[worker], worker)
            self._hear(worker, header)
            for gone in self._left & set(requests):
                requests.pop(gone).cancel()
        if self.nan is None:
            self.decide(Decision(What.END))
            return
        rank, loss, step, bad = self.nan
        self.decide(Decision(What.NAN, take=(self.wiring.workers.index(rank),), step=step, weight=loss, bad=bad))
        raise nan_error(self.phase, *self.nan)

    def _listen(self, row: Buffer, worker: int) -> Request:
        return self.comm.start_recv(row, self.wiring.workers[worker], Tag.CONTROL)

    def _hear(self, worker: int, header: Header) -> None:
        if header.kind is Kind.LEAVE:
            self._left.add(worker)
        elif header.kind is Kind.STATE:
            self.decide(Decision(What.STATE))
        elif header.kind is Kind.WITHDRAW:
            self._withdrawn.add(worker)
            if self.nan is not None:
                self.reply(worker)
                self.decide(Decision(What.DROP, give=(worker,)))
            else:
                self.hear_withdrawal(worker)
        elif self.nan is not None:
            self.reply(worker)
            self.decide(Decision(What.DROP, take=(worker,), give=(worker,)))
        else:
            self.hear_step(worker, header)

    def begin(self, worker: int) -> None:
        """The first words to a worker, before its first step; it has parameters already."""
        self.reply(worker)

    @abstractmethod
    def hear_step(self, worker: int, header: Header) -> None:
        """A worker's header and gradient have come."""

    @abstractmethod
    def hear_withdrawal(self, worker: int) -> None:
        """A worker's program has left the training loop: its gradients are not waited for any more."""

    def dismiss(self, waiting: tuple[int, ...], take: tuple[int, ...]) -> None:
        """Tell all workers, once each has withdrawn or waits for one that has, so that they agree on what to do about
        it, and give them the parameters. `waiting`: who waits; gradients of `take` are to be dropped."""
        if not self._withdrawn or len(self._withdrawn) + len(waiting) < self.workers:
            return
        self.ask, self._withdrawn = Ask.LEAVE, set()
        for worker in range(self.workers):
            self.reply(worker, result="dropped", loss=0.0, samples=0, staleness=0)
        self.decide(Decision(What.DROP, take=take, give=tuple(range(self.workers))))

    def reply(self, worker: int, **told: Any) -> None:
        """Answer a worker's push; after a NaN, which it will raise, there is no other to come."""
        if self.nan is not None:
            self._left.add(worker)
        state = {"cursor": self.cursor, "ask": int(self.ask), "version": self.version, "nan": self.nan}
        text = json.dumps({**state, "why": self.why[:160], **told}, ensure_ascii=False).encode()
        buffer = np.frombuffer(text, np.uint8).copy()
        self.comm.send(buffer, self.wiring.workers[worker], Tag.REPLY)

    def decide(self, decision: Decision) -> None:
        """Tell the other servers, then do the same here."""
        row = decision.encode(self.workers, self.slots)
        sends = [self.comm.start_send(row, server, Tag.DECISION) for server in self.wiring.servers[1:]]
        if decision.what not in (What.END, What.NAN):
            self.server.execute(decision)
        self.comm.wait_all(sends)

    def observe(self, samples_end: int, loss: float, wish: Ask) -> Ask:
        """Move the clock on, and hear what is asked of the trainers."""
        before, self.cursor = self.cursor, samples_end
        ask = self.phase.conductor.decide(before, self.cursor, loss, wish)
        if ask & Ask.END_PHASE and not self.why:
            self.why = self.phase.conductor.why
        return ask


class Rounds(Coordinator):
    """Synchronous: one update per round, with the gradients of all workers but the slowest `backup_workers`."""

    def __init__(self, server: ParameterServerServer) -> None:
        super().__init__(server)
        self.waiting: dict[int, Header] = {}
        self.needed = self.workers - self.options.backup_workers

    def hear_step(self, worker: int, header: Header) -> None:
        if header.version < self.version:
            self._release(worker, header.part.samples)
            return
        self.waiting[worker] = header
        self._go_on()

    def hear_withdrawal(self, worker: int) -> None:
        if self.options.backup_workers:  # nor do the others wait for it: they may be about to leave as well
            self.needed = min(self.needed, self.workers - len(self._withdrawn))
        self._go_on()

    def _go_on(self) -> None:
        if len(self.waiting) >= max(1, self.needed):
            self._close_round()
        waiting = tuple(sorted(self.waiting))
        self.dismiss(waiting, take=waiting)

    def _release(self, worker: int, samples: int) -> None:
        """Too late for its round: its gradient is dropped, and it goes on with the parameters of now."""
        self.dropped += 1
        self.reply(worker, result="dropped", loss=0.0, samples=samples, staleness=1)
        self.decide(Decision(What.DROP, take=(worker,), give=(worker,)))

    def _close_round(self) -> None:
        phase, accepted = self.phase, tuple(sorted(self.waiting))
        headers = [self.waiting.pop(worker) for worker in accepted]
        found, step = RoundTotals.of([header.part for header in headers]), headers[0].step
        if found.faulty is not None and phase.nan == "stop":
            part = headers[found.faulty].part
            self.nan = (self.wiring.workers[accepted[found.faulty]], part.loss, step, part.bad)
        rate, momentum = phase.rate(self.cursor), phase.momentum(self.cursor)
        self.version += 1
        self.ask = self.observe(max(header.round_end for header in headers), found.loss, found.wish)
        if self.ask and self._withdrawn:  # what all workers are to do together these cannot
            self.ask |= Ask.LEAVE
        withdrawn = tuple(self._withdrawn) if self.ask else ()
        for worker in withdrawn:
            self.reply(worker)
        result = "skipped" if found.skip else "applied"
        for worker in accepted:
            self.reply(worker, result=result, loss=found.loss, samples=found.samples, staleness=0)
        what, weight = What.DROP if found.skip else What.UPDATE, found.divisor(phase.batch)
        self.decide(
            Decision(what, accepted, accepted + withdrawn, self.version, step, weight, rate, momentum, used=found.used)
        )


class Asynchronous(Coordinator):
    """Every gradient is applied as it comes. Deals out the samples; where something is asked of the trainers, lets
    the workers finish what they were dealt first, so that what has been consumed is a prefix of the run, and answers
    all of them with the same parameters."""

    def __init__(self, server: ParameterServerServer) -> None:
        super().__init__(server)
        phase = self.phase
        assert phase.epoch is not None
        cls = SharedQueue if phase.queue == "shared" else StaticQueue
        self.queue: Queue = cls(phase.cursor, phase.epoch, phase.batch, self.workers)
        self.limit = self._next_limit()
        self.dealt = [0] * self.workers  # stretches that a worker has been dealt and not pushed yet
        self.done = [0] * self.workers  # steps since all were last together
        self.idle: dict[int, tuple[dict[str, Any], int]] = {}  # replies held back, and since when
        self.losses: deque[float] = deque(maxlen=self.workers)

    def begin(self, worker: int) -> None:
        self.reply(worker, slices=self._deal(worker))

    def hear_step(self, worker: int, header: Header) -> None:
        part, samples = header.part, header.part.samples
        if not part.finite and self.phase.nan == "stop":
            self._stop_for_nan(worker, header)
            return
        staleness = self.version - header.version
        if samples:
            self.dealt[worker] -= 1
            self.done[worker] += 1
        decision = self._decision(worker, header, staleness)
        asked = self.observe(self.cursor + samples, part.loss, part.wish) if samples else part.wish
        if asked & ~self.ask:
            self.ask |= asked
            self.limit = min(self.limit, self.queue.stop_at(self.queue.furthest))
        mean = sum(self.losses) / max(1, len(self.losses))
        result = "applied" if decision.what is What.UPDATE else "skipped"
        told = {"result": result, "loss": mean, "samples": samples, "staleness": staleness}
        self.idle[worker] = told, self.comm.now()
        self._go_on(decision)

    def hear_withdrawal(self, worker: int) -> None:
        """What it was dealt nobody will push; who waited for it may go on."""
        self.dealt[worker] = 0
        self._go_on(Decision(What.DROP, version=self.version))

    def _decision(self, worker: int, header: Header, staleness: int) -> Decision:
        """What becomes of the gradient: an update, unless it is of no samples or not finite."""
        part = header.part
        if not part.samples or not part.finite:
            return Decision(What.DROP, take=(worker,), version=self.version, step=header.step)
        self.version += 1
        self.losses.append(part.loss)
        return Decision(
            What.UPDATE,
            take=(worker,),
            version=self.version,
            step=header.step,
            weight=RoundTotals.of([part]).divisor(self.phase.batch),
            rate=self.phase.rate(self.cursor) * self.options.per_update(self.phase, staleness),
            momentum=self.phase.momentum(self.cursor),
            used=part.used,
        )

    def _go_on(self, decision: Decision) -> None:
        """Answer whom there is something to do for, and have the servers carry out the decision."""
        asked, slices = Ask.NOTHING, self._deal_out()
        released = [worker for worker in slices if self.dealt[worker]]
        if len(self.idle) == self.workers and not any(self.dealt):
            asked, self.ask = self.ask, Ask.NOTHING
            released, self.done = sorted(self.idle), [0] * self.workers
            if not asked & ENDS:
                self.limit = self._next_limit()
                slices = self._deal_out()
        for worker in released:
            told, since = self.idle.pop(worker)
            held = self.comm.now() - since
            self.reply(worker, **told, ask=int(asked), slices=slices.get(worker, []), held=held)
        self.decide(decision._replace(give=tuple(released)))
        if not any(self.dealt):
            self.dismiss(tuple(sorted(self.idle)), take=())

    def _deal_out(self) -> dict[int, list[Stretch]]:
        """What those get who wait and may go on, if there is anything before the limit; see `Bounded.may_go`."""
        found = {}
        for worker in sorted(self.idle, key=lambda worker: (self.done[worker], worker)):
            if self.may_go(worker):
                found[worker] = self._deal(worker)
        return found

    def _next_limit(self) -> int:
        return self.queue.stop_at(self.phase.conductor.due(self.cursor))

    def _deal(self, worker: int) -> list[Stretch]:
        """Stretches for a worker, as many as it likes to know of ahead; fewer, or none, near the limit."""
        found: list[Stretch] = []
        while self.dealt[worker] <= self.phase.ahead:
            stretch = self.queue.take(worker, self.limit)
            if stretch is None:
                break
            found.append(stretch)
            self.dealt[worker] += 1
        return found

    def may_go(self, worker: int) -> bool:
        """Whether a worker may begin another step now."""
        return True

    def _stop_for_nan(self, worker: int, header: Header) -> None:
        self.nan = (self.wiring.workers[worker], header.part.loss, header.step, header.part.bad)
        told = (worker, *self.idle)
        for each in told:
            self.reply(each)
        self.decide(Decision(What.DROP, take=(worker,), give=told))


class Bounded(Asynchronous):
    """Asynchronous, but a worker waits while it has done more than `bound` steps more than the slowest, counted from
    where all were last together (they need not have equally many stretches from there to the next such point)."""

    def may_go(self, worker: int) -> bool:
        """Workers that have done less were asked about, and dealt samples, before: who has none now is out of the
        race until all are drained."""
        others = (self.done[other] for other in range(self.workers) if other != worker and self.dealt[other])
        return self.done[worker] - min(others, default=self.done[worker]) <= self.options.bound
