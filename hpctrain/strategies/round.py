"""Strategies whose workers agree in rounds, and the work that all of them share.

A subclass of `RoundStrategy` defines how a round's gradients become an update (`apply`) and, if rounds have several
steps, what a worker does on its own in each step (`local`). This module does the rest: exchanging the workers' rows,
the mean loss, train.nan, train.clip_norm, learning rate and momentum, parameters without a gradient, the run's clock,
requests to the trainer, and the optimizer state across phases and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.clock.decisions import Ask
from hpctrain.codecs import CodecChoice, codec_by
from hpctrain.errors import HpctrainError
from hpctrain.replica.state import (
    CODEC,
    OPTIMIZER,
    STRATEGY,
    Own,
    Section,
    State,
    collect_state,
    send_state,
)
from hpctrain.strategies.balance import BALANCE, Balance, BatchBalance, StepBalance
from hpctrain.strategies.base import Outcome, Strategy
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.contribution import Contribution, RoundTotals, measured_in, nan_error
from hpctrain.strategies.handover import dealt, fill, mean_moments
from hpctrain.strategies.interval import RoundCost, interval_of
from hpctrain.strategies.phase import Phase
from hpctrain.strategies.tuning import USUAL
from hpctrain.strategies.units import Round, Step
from hpctrain.trace.events import IntervalChanged

INTERVAL = "interval"  # the key of the state of the length of rounds
PLACE = "place"  # among a worker's own numbers: what its own state belongs to
MOVED = (
    "each worker's own optimizer state is lost, and all continue with the mean, because the run resumes on other nodes "
    "or with another strategy.island or kind of memory"
)
PARTS = 32  # into which an update is divided, at most: each costs some Python

__all__ = ["Round", "RoundStrategy", "Step"]

if TYPE_CHECKING:
    import torch

    from hpctrain.codecs.base import Codec
    from hpctrain.replica.arenas import Placement
    from hpctrain.replica.update import Update
    from hpctrain.strategies.exchange import Exchange
    from hpctrain.strategies.interval import IslandChoice
    from hpctrain.strategies.island import Island


class RoundStrategy(Strategy):
    """Workers take the steps of a round, then agree. Subclasses define `apply`, `local` if rounds are long, and any of
    the methods below it that they need.

    `phase`, `comm` (the workers), `exchange`, `update` (the optimizer for the stretch that the exchange assigns to this
    rank) and `version` (rounds applied so far) are available from `begin` on.
    """

    local: Callable[[Step], None] | None = None
    """Called after every step if the subclass defines it, including the round's last or only one. The step's gradient
    is clipped. It must not begin to exchange anything."""

    quiet = True  # between the agreements no message is on its way (but for those within an island)

    phase: Phase
    exchange: Exchange
    update: Update
    _island: Island  # with `local` only

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        self._interval = interval_of(options)
        if self.local is not None:
            where: Placement = "node" if self._choice == "node" else "rank"
            self.needs = replace(self.needs, parameters=where, lockstep=False)
        self.deterministic = self.deterministic and not (self.balances or self._interval.measures)

    @property
    def _choice(self) -> IslandChoice:
        """The option `island`, if the strategy has one."""
        island: IslandChoice = getattr(self.options, "island", "worker")
        return island

    # -- defined by subclasses ----------------------------------------------------------------------------------
    def apply(self, round: Round) -> None:
        """Agree with the other workers and change the parameters. Collective; not called if `round.skip`."""
        raise NotImplementedError

    def length(self) -> int:
        """The number of steps in the round that now begins; the same on all workers. More than 1 only with `local`.
        The default follows the option `every`, if the strategy has one."""
        return self._interval.steps

    def make_exchange(self) -> Exchange:
        """The exchange that carries this strategy's values between workers, or between islands of them: with the codec
        that the option `codec` names, and among those that the option `island` names, if the strategy has them.
        Collective."""
        from hpctrain.strategies.exchange import BucketExchange, MessageExchange

        choice: CodecChoice = getattr(self.options, "codec", "none")
        codec, size = self.codec_of(choice), int(USUAL * 2**20)
        if (between := self.between_nodes(codec, size)) is not None:
            return between
        return MessageExchange(self.phase) if choice == "none" else BucketExchange(self.phase, codec, size, early=False)

    def codec_of(self, choice: CodecChoice) -> Codec:
        """A new codec for the phase."""
        return codec_by(choice, self.phase.seed, self.phase.dealing.epoch)

    def between_nodes(self, codec: Codec, size: int) -> Exchange | None:
        """The exchange between nodes whose ranks share memory, if the option `island` says so; else None."""
        from hpctrain.strategies.island import IslandExchange

        shared = self._choice == "node" and self.phase.members.shared
        return IslandExchange(self.phase, codec, size) if shared else None

    def begin(self) -> None:
        """Start the phase: all workers have the same parameters. Allocate memory here. Collective."""

    def skipped(self, round: Round) -> None:
        """The round was closed without `apply`. Not collective."""

    def drain(self) -> None:
        """End the phase: finish pending exchanges, so that all workers have the same parameters. Collective."""

    def common(self) -> Section:
        """The strategy's own state, equal on all workers: arrays over the exchange's stretch, or by parameter.

        Return the section made in `begin` itself, not a copy: `resume` writes the checkpoint's values into its arrays
        and numbers.
        """
        return Section()

    def resume(self, saved: Section) -> None:
        """Continue from what `common` returned on this stretch; after `begin`. Not collective."""
        fill(self.common(), saved)

    def optimize(self, gradient: torch.Tensor, part: Step | Round) -> None:
        """Clip `gradient` and apply one step of the job's optimizer with it.

        For a Round, `gradient` is the mean over all workers of the elements [exchange.low, exchange.high); collective.
        For a Step, it is this worker's gradient, all elements, already clipped. If it is not finite, the parameters
        stay unchanged and the round ends with NanError.
        """
        if part.skip:
            return
        finite = isinstance(part, Step) or self.exchange.check(gradient)
        limit = self.phase.updating.clip_norm
        if isinstance(part, Round) and limit is not None:
            gradient.mul_(clip_factor(self.exchange.squares(gradient), limit))
        if finite:
            with self._update_span(self.exchange.low, self.exchange.high):
                self.update.apply(gradient, part.rate, part.momentum, used=part.used)

    def descend(self, round: Round) -> None:
        """Average the workers' gradients and apply one step of the job's optimizer with their mean. Collective.

        Stretches are updated as they arrive, while others are still on their way, if the optimizer is one of torch's
        elementwise ones and nothing is clipped. Some may then be updated before another is found not finite; the round
        ends with NanError.
        """
        from hpctrain.replica.layout import joined

        exchange = self.exchange
        if not self.update.divisible or self.phase.updating.clip_norm is not None:
            self.optimize(exchange.reduce(round.divisor), round)
            return
        for low, high in joined(exchange.arrivals(round.divisor), (exchange.high - exchange.low) // PARTS):
            if exchange.check(exchange.mean):
                with self._update_span(low, high):
                    self.update.apply(exchange.mean, round.rate, round.momentum, used=round.used, part=(low, high))

    def _update_span(self, low: int, high: int) -> AbstractContextManager[Any]:
        elements = high - low
        return self.comm.span("update", elements * self.phase.replica.values.element_size(), flops=float(elements))

    # -- the phase ---------------------------------------------------------------------------------------------
    def unfit(self, epoch: int | None, size: int, total: int) -> str | None:
        return self._interval.unfit(epoch, size, total)

    def join(self, phase: Phase, state: State | None = None) -> None:
        self.phase, self.comm, self.version = phase, phase.worker_comm, 0
        self._interval.start(phase.dealing.epoch, phase.dealing.batch * len(phase.roles.workers))
        self.exchange = exchange = self.make_exchange()
        if self.local is not None:
            from hpctrain.strategies.island import island_of

            self._island = island_of(self._choice, exchange)
        self.update = phase.updating.make(self._stretch, exchange.low, exchange.high)
        exchange.synchronise()
        part = dealt(self.comm, state, exchange, phase.replica.layout)
        if part is not None:
            self.update.load_in_place(part)
        self.balance = self._make_balance(part)
        self.begin()
        if part is not None:
            saved = part.section(STRATEGY)
            if INTERVAL in saved.numbers:
                self._interval.load(saved.numbers.pop(INTERVAL))
            self.resume(saved)
        self._start_round()

    def _make_balance(self, state: State | None) -> Balance | None:
        """What changes the workers' shares, if the strategy's options ask for it; continues from `state`."""
        if not self.balances:
            return None
        kind = BatchBalance if self.local is None else StepBalance
        balance = kind(self.phase.roles.workers, self.phase.dealing.batch)
        if state is not None and BALANCE in state.counters:
            balance.load(state.counters[BALANCE])
        return balance

    def state(self) -> State | None:
        comm, keepers = self.comm, self.exchange.keepers()
        part = self.update.view() if self.local is None else mean_moments(self.exchange.peers, self.update.state())
        kept = self.common()
        if numbers := self._interval.numbers():
            kept = replace(kept, numbers={**kept.numbers, INTERVAL: numbers})
        if kept.keys():
            part.sections[STRATEGY] = kept
        if comm.rank != 0:
            if comm.rank in keepers:
                send_state(comm, part, 0)
            return None
        whole = collect_state(comm, part, keepers[1:], self.phase.replica.layout.length)
        if self.phase.conductor.rule is not None:
            whole.rule = self.phase.conductor.rule.state()
        if self.balance is not None:
            whole.counters[BALANCE] = self.balance.state()
        return whole

    def own(self) -> Own:
        own = self.exchange.own()
        if self.local is not None:
            view = self.update.view()
            own.arrays |= dict(view.arrays())
            own.numbers |= {OPTIMIZER: view.optimizer.numbers, PLACE: self._place}
        return own

    def load_own(self, own: Own) -> str | None:
        lost = self.exchange.load_own(own)
        if self.local is None or OPTIMIZER not in own.numbers:
            return lost
        if not self._same_place(own):
            return MOVED if lost is None else f"{lost}; {MOVED}"
        state = State(self.exchange.low, self.exchange.high)
        state.optimizer.numbers = own.numbers[OPTIMIZER]
        for path, array in own.arrays.items():
            if not path.startswith(CODEC):
                state.place(path, array)
        self.update.load(state)
        return lost

    @property
    def _place(self) -> list[Any]:
        """What this worker's own state belongs to: a stretch of the arena, and the workers of its island."""
        return [self.exchange.low, self.exchange.high, self._island.members]

    def _same_place(self, own: Own) -> bool:
        """Whether `own` belongs to the same. Without the number it is of a run in which each worker was alone."""
        return bool(own.numbers.get(PLACE, [0, self.phase.replica.layout.length, [self.comm.rank]]) == self._place)

    def leave(self) -> State | None:
        self.drain()
        state = self.state()
        if self.local is not None:
            self._island.free()
        self.exchange.free()
        return state

    # -- rounds ----------------------------------------------------------------------------------------------
    @property
    def bucket_bytes(self) -> int:
        """The exchange's bucket size; 0 with `local`, because nothing is exchanged within a long round."""
        return self.exchange.bucket_bytes if self.local is None else 0

    def before(self) -> None:
        phase = self.phase
        divisor = (phase.step.round_end - phase.cursor) / phase.dealing.batch if self.local is None else 1.0
        self.exchange.begin(self._start, divisor)
        if not self._parts:
            self._began = phase.comm.now()

    def ready(self, low: int, high: int) -> None:
        self.exchange.start(low, high)

    def poll(self) -> None:
        self.exchange.poll()

    def _start_round(self) -> None:
        self._start = self.phase.cursor
        self._parts: list[Contribution] = []
        self._leaving = False  # a worker of the island has left the training loop
        self._length = self.length()
        self._foreseen = self.phase.conductor.ends(self._start)
        if self._length > 1 and self.local is None:
            raise HpctrainError(f"strategy {type(self).__name__} has rounds of {self._length} steps but no local()")
        self._deal()

    def _deal(self) -> None:
        """Name the shares of the next step."""
        step = self.phase.step
        step.shares = step.later = None
        if self.balance is not None:
            step.shares, step.later = self.balance.deal(len(self._parts), self._length)

    def step(self, samples: int, loss: float) -> Outcome:
        phase = self.phase
        part = Contribution.of(phase, samples, loss)
        if self.local is not None:
            part = self._step_locally(self.local, part)
        self._parts.append(part)
        if len(self._parts) >= self._length or phase.step.round_end >= self._foreseen or self._leaving:
            return self._close()
        phase.cursor = phase.step.round_end
        self._deal()
        skipped, overflow = bool(samples) and not part.samples, phase.step.bad < 0
        result: Any = "skipped" if skipped else "local"
        return Outcome(result, phase.cursor, part.loss, samples, version=self.version, overflow=overflow)

    def withdraw(self) -> Ask:
        """Close the round here: the other workers reach its end or withdraw as well. Those of the island take one more
        step with this one, which has no samples in it."""
        part = Contribution.of(self.phase, 0, 0.0)
        self._parts.append(part if self.local is None else self._step_locally(self.local, part))
        return self._close().ask

    def _step_locally(self, local: Callable[[Step], None], part: Contribution) -> Contribution:
        """Take a local step; returns what counts of this worker's part of it. Raises NanError, on this worker alone, if
        its part is not finite, not because of the loss scale, and train.nan is "stop". Collective over the island."""
        phase, island = self.phase, self._island
        self._stop_for(part)
        part, found = island.average(part)
        self._stop_for(part)
        skip = found.skip or not island.finite
        if not skip:
            island.clip()
        rate, momentum = phase.updating.rate(phase.cursor), phase.updating.momentum(phase.cursor)
        index, begun = len(self._parts), phase.comm.now()
        local(Step(phase.step.number, index, found.samples, rate, momentum, skip, island.gradient, found.used))
        taken = (phase.comm.now() - begun) / 1e9
        island.publish()
        self._leaving = bool(found.wish & Ask.LEAVE)
        if found.skip:
            return Contribution.nothing(part.wish, len(phase.replica.layout.slots))
        return replace(part, seconds=part.seconds + taken) if part.samples else part

    def _stop_for(self, part: Contribution) -> None:
        phase = self.phase
        if part.faulty and phase.updating.nan == "stop":
            error = nan_error(phase, phase.comm.rank, part.loss, phase.step.number, part.bad)
            error.everywhere = False
            raise error

    def _close(self) -> Outcome:
        """Agree on the round that ends here. Collective."""
        phase, slots = self.phase, len(self.phase.replica.layout.slots)
        own = self._parts[0] if len(self._parts) == 1 else Contribution.sum_of(self._parts)
        closing = self.comm.now()
        table = self.exchange.gather(own.encode(slots))
        agreeing = self.comm.now()
        found = RoundTotals.of_rows(table, slots)
        if found.faulty is not None and phase.updating.nan == "stop":
            part = Contribution.decode(table[found.faulty], slots)
            self.exchange.settle()  # MPI still writes into the arenas, which are freed after the error
            raise nan_error(phase, phase.roles.workers[found.faulty], part.loss, phase.step.number, part.bad)
        round = self._round([Contribution.decode(table[rank], slots) for rank in self.exchange.island], found)
        if round.skip:
            self.skipped(round)
        else:
            before = self._stretch.clone() if self._interval.measures else None
            self.apply(round)
            self.version += 1
        self.exchange.publish()
        if not round.skip and before is not None:
            self._adapt(closing - self._began, self.comm.now() - agreeing, before)
        if self.balance is not None:
            self._balance(self.balance, *measured_in(table))
        return self._end(found)

    def _adapt(self, computing: int, exchanging: int, before: torch.Tensor) -> None:
        """Adapt the length of rounds to what this one took, in nanoseconds, and to how it changed the parameters, which
        were `before`. Collective."""
        from hpctrain.replica.blocks import sum_of_squares

        after, old = self._stretch, self._interval.steps
        length = sum_of_squares(after) ** 0.5
        change = sum_of_squares(before.sub_(after)) ** 0.5 / length if length else 0.0
        table = self.comm.gather_rows(np.array([computing / 1e9, exchanging / 1e9, change]))
        if why := self._interval.observe([RoundCost(*row) for row in table.tolist()], len(self._parts)):
            self.comm.recorder.event(IntervalChanged(old, self._interval.steps, why))

    def _balance(self, balance: Balance, samples: list[int], seconds: list[float]) -> None:
        """Let the shares follow what the workers measured in the round that ends."""
        decision = balance.observe(samples, seconds, self._length)
        if decision is not None:
            self.phase.conductor.notify(decision)

    @property
    def _stretch(self) -> torch.Tensor:
        return self.phase.replica.values[self.exchange.low : self.exchange.high]

    def _round(self, own: list[Contribution], found: RoundTotals) -> Round:
        """`own`: the contributions of this worker, or of its island."""
        phase = self.phase
        part, whole = sum(each.weight for each in own), found.weight
        if not whole:
            part, whole = sum(each.samples for each in own), max(1, found.samples)
        return Round(
            number=self.version,
            start=self._start,
            steps=len(self._parts),
            samples=found.samples,
            share=part / whole,
            divisor=found.divisor(phase.dealing.batch),
            rate=phase.updating.rate(self._start),
            momentum=phase.updating.momentum(self._start),
            last=phase.step.round_end >= self._foreseen,
            skip=found.skip,
            used=found.used,
        )

    def _end(self, found: RoundTotals) -> Outcome:
        """Advance the clock to the end of the round; the requests made there are the same for every worker."""
        phase = self.phase
        phase.cursor = phase.step.round_end
        ask = phase.conductor.decide(self._start, phase.cursor, found.loss, found.wish)
        self._start_round()
        result: Any = "skipped" if found.skip else "applied"
        overflow = found.overflow or phase.step.bad < 0  # the latter in this worker's own last step of a long round
        return Outcome(
            result, phase.cursor, found.loss, found.samples, ask, self.version, why=phase.conductor.why,
            overflow=overflow,
        )  # fmt: skip
