"""The coordinator of a parameter server. It makes the decisions and lives on the first server.

Workers send it a header with each push. It decides, for all shards, which gradients are applied in what order and when
each worker gets parameters. Its decisions reach the other servers as one ordered stream, so every shard makes the same
updates in the same order: the versions that a worker pulls, and the snapshots that are evaluated or saved, are the same
on all shards.

The coordinator is pure: it takes headers and the time, and returns replies and decisions in the order in which they
must be sent. `server` sends them. Each decision is executed before any later message is sent.

`Rounds` is synchronous, with optional backup workers (Chen et al. 2016). `Asynchronous` applies each gradient as it
arrives (Dean et al. 2012) and deals out the samples. `Bounded` keeps every worker within `bound` steps of the slowest
(stale-synchronous: Ho et al. 2013, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hpctrain.clock.decisions import Ask
from hpctrain.data.queue import SharedQueue, StaticQueue, Stretch
from hpctrain.strategies.balance import BALANCE
from hpctrain.strategies.contribution import RoundTotals
from hpctrain.strategies.parameter_server.wire import Decision, Header, HeaderKind, NotFinite, Reply, What

if TYPE_CHECKING:
    from hpctrain.clock.decisions import Conductor
    from hpctrain.data.queue import Queue
    from hpctrain.strategies.balance import BatchBalance
    from hpctrain.strategies.parameter_server.options import ParameterServerOptions

ENDS = Ask.STOP | Ask.END_PHASE | Ask.INTERRUPT
Message = Reply | Decision


@dataclass(frozen=True)
class Terms:
    """What a coordinator needs to know about its phase."""

    workers: int  # how many workers there are
    options: ParameterServerOptions
    conductor: Conductor
    cursor: int  # the run's clock at the start of the phase, in samples
    batch: int  # maximum samples per worker and round
    nan: Literal["stop", "skip"]  # what to do about a loss or gradient that is not finite, except by the loss scale
    rate: Callable[[int], float]  # factor of the learning rate at a cursor
    momentum: Callable[[int], float]  # factor of the momentum at a cursor
    per_update: Callable[[int], float]  # factor of the learning rate for one worker's gradient, by its staleness
    queue: Literal["static", "shared"]  # how samples are dealt if workers do not step together
    epoch: int | None  # samples per epoch; needed only if samples are dealt from a queue
    ahead: int  # how many stretches a worker gets in advance, beyond its next one
    balance: BatchBalance | None = None  # changes the shares of workers that step together; None: they stay equal


class Coordinator(ABC):
    """Makes the decisions of one phase.

    `left`: workers that send no more headers; once all have left, the last decision (END or NAN) has been returned.
    `nan`: set if the phase ends with NanError. `version`: updates so far. `dropped`: gradients that arrived too late
    for their round.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms, self.workers = terms, terms.workers
        self.version = self.dropped = 0
        self.cursor = terms.cursor
        self.ask, self.why = Ask.NOTHING, ""
        self.nan: NotFinite | None = None
        self.left: set[int] = set()
        self._withdrawn: set[int] = set()  # workers whose programs have left the training loop

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint of this phase."""
        self.version, self.dropped = int(state.get("version", 0)), int(state.get("dropped", 0))

    def state(self) -> dict[str, Any]:
        """The counters that a checkpoint saves."""
        return {"version": self.version, "dropped": self.dropped}

    def begin(self, now: int) -> list[Message]:
        """The replies before the workers' first steps; the workers already have the parameters. `now`: nanoseconds."""
        return [self._first(worker) for worker in range(self.workers)]

    def receive(self, worker: int, header: Header, now: int) -> list[Message]:
        """The messages to send after a header; its push may still be under way. `now`: nanoseconds."""
        messages = list(_matched(self._answer(worker, header, now)))
        if len(self.left) == self.workers:
            messages.append(Decision(What.END) if self.nan is None else Decision(What.NAN, nan=self.nan))
        return messages

    def _answer(self, worker: int, header: Header, now: int) -> Iterator[Message]:
        if header.kind is HeaderKind.LEAVE:
            self.left.add(worker)
        elif header.kind is HeaderKind.STATE:
            yield Decision(What.STATE)
        elif self.nan is not None:
            yield self._reply(worker)
            yield Decision(What.DROP, take=(worker,) if header.kind is HeaderKind.STEP else (), give=(worker,))
        elif header.kind is HeaderKind.WITHDRAW:
            self._withdrawn.add(worker)
            yield from self._withdraw(worker, now)
        else:
            yield from self._step(worker, header, now)

    def _first(self, worker: int) -> Reply:
        return self._reply(worker)

    @abstractmethod
    def _step(self, worker: int, header: Header, now: int) -> Iterator[Message]:
        """A worker has pushed a gradient."""

    @abstractmethod
    def _withdraw(self, worker: int, now: int) -> Iterator[Message]:
        """A worker's program has left the training loop: do not wait for its gradients."""

    def _dismiss(self, waiting: tuple[int, ...], take: tuple[int, ...]) -> Iterator[Message]:
        """Once every worker has withdrawn or waits for one that has, reply to all of them, so that they leave together,
        and send them the parameters. `waiting`: the workers that wait. The gradients of `take` are dropped."""
        if not self._withdrawn or len(self._withdrawn) + len(waiting) < self.workers:
            return
        self.ask, self._withdrawn = Ask.LEAVE, set()
        for worker in range(self.workers):
            yield self._reply(worker, result="dropped")
        yield Decision(What.DROP, take=take, give=tuple(range(self.workers)))

    def _reply(self, worker: int, **fields: Any) -> Reply:
        """A reply with the current clock, version and so on, and `fields`. If `nan` is set, the worker raises NanError
        and sends nothing more."""
        if self.nan is not None:
            self.left.add(worker)
        known = Reply(worker, self.cursor, self.version, self.ask, why=self.why, nan=self.nan)
        return known._replace(**fields)

    def _observe(self, samples_end: int, loss: float, wish: Ask) -> Ask:
        """Advance the clock; returns what is asked of the trainers there."""
        conductor = self.terms.conductor
        before, self.cursor = self.cursor, samples_end
        ask = conductor.decide(before, self.cursor, loss, wish)
        if ask & Ask.END_PHASE and not self.why:
            self.why = conductor.why
        return ask


class Rounds(Coordinator):
    """Synchronous: one update per round, with the gradients of all workers except the slowest `backup_workers`."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self._waiting: dict[int, Header] = {}
        self._backup = terms.options.backup_workers
        self._overflow = False  # whether a gradient overflowed in the latest round
        self._needed = self.workers - self._backup
        self._balance = terms.balance

    def load(self, state: Mapping[str, Any]) -> None:
        super().load(state)
        if self._balance is not None and BALANCE in state:
            self._balance.load(state[BALANCE])

    def state(self) -> dict[str, Any]:
        known = super().state()
        return known if self._balance is None else {**known, BALANCE: self._balance.state()}

    def _reply(self, worker: int, **fields: Any) -> Reply:
        shares = self._balance.deal(0, 1) if self._balance is not None else ()
        return super()._reply(worker, shares=shares, **fields)

    def _step(self, worker: int, header: Header, now: int) -> Iterator[Message]:
        if header.version < self.version:
            yield from self._release(worker, header.part.samples)
            return
        self._waiting[worker] = header
        yield from self._go_on()

    def _withdraw(self, worker: int, now: int) -> Iterator[Message]:
        if self._backup:  # a round may close without this worker; the others may be about to leave as well
            self._needed = min(self._needed, self.workers - len(self._withdrawn))
        yield from self._go_on()

    def _go_on(self) -> Iterator[Message]:
        if len(self._waiting) >= max(1, self._needed):
            yield from self._close_round()
        waiting = tuple(sorted(self._waiting))
        yield from self._dismiss(waiting, take=waiting)

    def _release(self, worker: int, samples: int) -> Iterator[Message]:
        """Drop a gradient that arrived too late for its round; its worker continues with the current parameters, and
        with the loss scale of the others, so it learns about their overflow and not about its own."""
        self.dropped += 1
        yield self._reply(worker, result="dropped", samples=samples, staleness=1, overflow=self._overflow)
        yield Decision(What.DROP, take=(worker,), give=(worker,))

    def _close_round(self) -> Iterator[Message]:
        terms, accepted = self.terms, tuple(sorted(self._waiting))
        headers = [self._waiting.pop(worker) for worker in accepted]
        found, step = RoundTotals.of([header.part for header in headers]), headers[0].step
        if found.faulty is not None and terms.nan == "stop":
            part = headers[found.faulty].part
            self.nan = NotFinite(accepted[found.faulty], part.loss, step, part.bad)
        rate, momentum = terms.rate(self.cursor), terms.momentum(self.cursor)
        if self._balance is not None:
            self._follow_speeds(self._balance, headers)
        self.version += 1
        self.ask = self._observe(max(header.round_end for header in headers), found.loss, found.wish)
        if self.ask and self._withdrawn:  # withdrawn workers cannot take part in what all workers are asked to do
            self.ask |= Ask.LEAVE
        withdrawn = tuple(sorted(self._withdrawn)) if self.ask or self.nan is not None else ()
        for worker in withdrawn:
            yield self._reply(worker)
        result, self._overflow = "skipped" if found.skip else "applied", found.overflow
        for worker in accepted:
            fields = {"result": result, "loss": found.loss, "samples": found.samples, "overflow": found.overflow}
            yield self._reply(worker, **fields)
        what, weight = What.DROP if found.skip else What.UPDATE, found.divisor(terms.batch)
        yield Decision(what, accepted, accepted + withdrawn, self.version, step, weight, rate, momentum, found.used)


    def _follow_speeds(self, balance: BatchBalance, headers: list[Header]) -> None:
        """Let the shares follow what the workers measured; `headers`: of all workers that have not withdrawn."""
        if len(headers) == self.workers:
            parts = [header.part for header in headers]
            decision = balance.observe([part.samples for part in parts], [part.seconds for part in parts])
            if decision is not None:
                self.terms.conductor.notify(decision)


class Asynchronous(Coordinator):
    """Applies every gradient as it arrives, and deals out the samples. When something is asked of the trainers, the
    workers first finish the samples already dealt to them, so that the samples consumed are a prefix of the run; then
    all workers get a reply with the same parameters."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        assert terms.epoch is not None
        kind = SharedQueue if terms.queue == "shared" else StaticQueue
        self._queue: Queue = kind(terms.cursor, terms.epoch, terms.batch, self.workers)
        self._limit = self._next_limit()
        self._dealt = [0] * self.workers  # stretches dealt to a worker that it has not pushed yet
        self._done = [0] * self.workers  # steps since all workers were last synchronised
        self._idle: dict[int, tuple[dict[str, Any], int]] = {}  # replies held back, and since when
        self._losses: deque[float] = deque(maxlen=self.workers)

    def _first(self, worker: int) -> Reply:
        return self._reply(worker, slices=self._deal(worker))

    def _step(self, worker: int, header: Header, now: int) -> Iterator[Message]:
        part, samples = header.part, header.part.samples
        if part.faulty and self.terms.nan == "stop":
            yield from self._stop_for_nan(worker, header)
            return
        staleness = self.version - header.version
        if samples:
            self._dealt[worker] -= 1
            self._done[worker] += 1
        decision = self._decision(worker, header, staleness)
        asked = self._observe(self.cursor + samples, part.loss, part.wish) if samples else part.wish
        if asked & ~self.ask:
            self.ask |= asked
            self._limit = min(self._limit, self._queue.stop_at(self._queue.furthest))
        mean = sum(self._losses) / max(1, len(self._losses))
        result = "applied" if decision.what is What.UPDATE else "skipped"
        fields = {"result": result, "loss": mean, "samples": samples, "staleness": staleness, "overflow": part.overflow}
        self._idle[worker] = fields, now
        yield from self._go_on(decision, now)

    def _withdraw(self, worker: int, now: int) -> Iterator[Message]:
        """Nobody will push the samples dealt to this worker; workers that waited for it may continue."""
        self._dealt[worker] = 0
        yield from self._go_on(Decision(What.DROP, version=self.version), now)

    def _decision(self, worker: int, header: Header, staleness: int) -> Decision:
        """What to do with the gradient: update, unless it has no samples or is not finite."""
        part, terms = header.part, self.terms
        if not part.samples or not part.finite:
            return Decision(What.DROP, take=(worker,), version=self.version, step=header.step)
        self.version += 1
        self._losses.append(part.loss)
        return Decision(
            What.UPDATE,
            take=(worker,),
            version=self.version,
            step=header.step,
            weight=RoundTotals.of([part]).divisor(terms.batch),
            rate=terms.rate(self.cursor) * terms.per_update(staleness),
            momentum=terms.momentum(self.cursor),
            used=part.used,
        )

    def _go_on(self, decision: Decision, now: int) -> Iterator[Message]:
        """Reply to the workers that can continue; then return the decision, which sends them parameters."""
        asked, slices = Ask.NOTHING, self._deal_out()
        released = [worker for worker in slices if self._dealt[worker]]
        if len(self._idle) == self.workers and not any(self._dealt):
            asked, self.ask = self.ask, Ask.NOTHING
            released, self._done = sorted(self._idle), [0] * self.workers
            if not asked & ENDS:
                self._limit = self._next_limit()
                slices = self._deal_out()
        for worker in released:
            fields, since = self._idle.pop(worker)
            yield self._reply(worker, **fields, ask=asked, slices=slices.get(worker, ()), held=now - since)
        yield decision._replace(give=tuple(released))
        if not any(self._dealt):
            yield from self._dismiss(tuple(sorted(self._idle)), take=())

    def _deal_out(self) -> dict[int, tuple[Stretch, ...]]:
        """Deal stretches to the waiting workers that may continue, those with the fewest steps first; see
        `Bounded._may_go`."""
        found = {}
        for worker in sorted(self._idle, key=lambda worker: (self._done[worker], worker)):
            if self._may_go(worker):
                found[worker] = self._deal(worker)
        return found

    def _next_limit(self) -> int:
        return self._queue.stop_at(self.terms.conductor.due(self.cursor))

    def _deal(self, worker: int) -> tuple[Stretch, ...]:
        """Deal stretches to a worker until it has `ahead` beyond its next one; fewer, or none, near the limit."""
        found: list[Stretch] = []
        while self._dealt[worker] <= self.terms.ahead:
            stretch = self._queue.take(worker, self._limit)
            if stretch is None:
                break
            found.append(stretch)
            self._dealt[worker] += 1
        return tuple(found)

    def _may_go(self, worker: int) -> bool:
        """Whether a worker may begin another step now."""
        return True

    def _stop_for_nan(self, worker: int, header: Header) -> Iterator[Message]:
        self.nan = NotFinite(worker, header.part.loss, header.step, header.part.bad)
        answered = (worker, *self._idle, *sorted(self._withdrawn))
        for each in answered:
            yield self._reply(each)
        yield Decision(What.DROP, take=(worker,), give=answered)


class Bounded(Asynchronous):
    """Asynchronous, but a worker waits while it is more than `bound` steps ahead of the slowest. Steps are counted from
    the last point where all workers were synchronised (between two such points, workers may get unequal numbers of
    stretches)."""

    def _may_go(self, worker: int) -> bool:
        """Workers with fewer steps are served first, and got samples if there were any; so a worker that has none now
        does not count until all are drained."""
        others = (self._done[other] for other in range(self.workers) if other != worker and self._dealt[other])
        return self._done[worker] - min(others, default=self._done[worker]) <= self.terms.options.bound


def _matched(messages: Iterator[Message]) -> Iterator[Message]:
    """Decisions that give parameters to workers of whom something is asked, in the replies before, are `exact`."""
    asked: set[bool] = set()
    for message in messages:
        if isinstance(message, Reply):
            asked.add(message.exact)
        elif message.give:
            (exact,) = asked
            message, asked = message._replace(exact=exact), set()
        yield message


MODES: dict[str, type[Coordinator]] = {"sync": Rounds, "async": Asynchronous, "bounded": Bounded}
