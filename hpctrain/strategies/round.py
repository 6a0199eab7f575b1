"""Strategies whose workers agree in rounds, and the work that all of them share.

A subclass of `RoundStrategy` defines how a round's gradients become an update (`apply`) and, if rounds have several
steps, what a worker does on its own in each step (`local`). This module does the rest: exchanging the workers' rows,
the mean loss, train.nan, train.clip_norm, learning rate and momentum, parameters without a gradient, the run's clock,
requests to the trainer, and the optimizer state across phases and in checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpctrain.clock.decisions import Ask
from hpctrain.codecs import CodecChoice, codec_by
from hpctrain.errors import HpctrainError
from hpctrain.replica.state import (
    MEMORY,
    OPTIMIZER,
    REST,
    STRATEGY,
    Own,
    Section,
    State,
    collect_state,
    recv_state,
    send_state,
    start_send_state,
)
from hpctrain.strategies.balance import BALANCE, Balance, BatchBalance, StepBalance
from hpctrain.strategies.base import Outcome, Strategy
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.contribution import Contribution, RoundTotals, Used, nan_error
from hpctrain.strategies.phase import Phase
from hpctrain.strategies.tuning import USUAL

PARTS = 32  # into which an update is divided, at most: each costs some Python

if TYPE_CHECKING:
    import torch

    from hpctrain.replica.update import Update
    from hpctrain.strategies.exchange import Exchange


@dataclass(frozen=True)
class Step:
    """One mini-batch of this worker in a round of several steps. Its mean gradient is in the replica's arena."""

    number: int  # in the run, from 0
    index: int  # in the round, from 0
    samples: int
    rate: float  # factor of the learning rate
    momentum: float  # factor of the momentum
    skip: bool  # nothing to apply: no samples, or not finite with train.nan = "skip" or under the loss scale
    used: Used = None  # the parameters with a gradient; None: all


@dataclass(frozen=True)
class Round:
    """One agreement among all workers."""

    number: int  # in the phase, from 0
    start: int  # the run's clock at the start of the round, in samples
    steps: int  # steps per worker
    samples: int  # of all workers
    share: float  # this worker's weight in averages: by samples, unless the loss says otherwise
    divisor: float  # divides the sum of the gradient arenas to give the mean gradient (rounds of one step)
    rate: float  # factor of the learning rate
    momentum: float  # factor of the momentum
    last: bool  # the phase is known to end with this round
    skip: bool  # nothing may be applied: no samples, or not finite with train.nan = "skip" or under the loss scale
    used: Used = None  # the parameters with a gradient on any worker; None: all


class RoundStrategy(Strategy):
    """Workers take the steps of a round, then agree. Subclasses define `apply`, `local` if rounds are long, and any of
    the methods below it that they need.

    `phase`, `comm` (the workers), `exchange`, `update` (the optimizer for the stretch that the exchange assigns to this
    rank) and `version` (rounds applied so far) are available from `begin` on.
    """

    local: Callable[[Step], None] | None = None
    """Called after every step if the subclass defines it, including the round's last or only one. The gradient arena
    holds this worker's mean gradient, clipped. It must not exchange anything or wait."""

    phase: Phase
    exchange: Exchange
    update: Update

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        if self.local is not None:
            self.needs = replace(self.needs, parameters="rank", lockstep=False)
        self.deterministic = self.deterministic and not self.balances

    # -- defined by subclasses ----------------------------------------------------------------------------------
    def apply(self, round: Round) -> None:
        """Agree with the other workers and change the parameters. Collective; not called if `round.skip`."""
        raise NotImplementedError

    def length(self) -> int:
        """The number of steps in the round that now begins; the same on all workers. More than 1 only with `local`."""
        return 1

    def make_exchange(self) -> Exchange:
        """The exchange that carries this strategy's values between workers: messages, with the codec that the option
        `codec` names, if the strategy has one. Collective."""
        from hpctrain.strategies.exchange import BucketExchange, MessageExchange

        codec: CodecChoice = getattr(self.options, "codec", "none")
        if codec == "none":
            return MessageExchange(self.phase)
        return BucketExchange(self.phase, codec_by(codec, self.phase.seed), int(USUAL * 2**20), early=False)

    def begin(self) -> None:
        """Start the phase: all workers have the same parameters. Allocate memory here. Collective."""

    def skipped(self, round: Round) -> None:
        """The round was closed without `apply`. Not collective."""

    def drain(self) -> None:
        """End the phase: finish pending exchanges, so that all workers have the same parameters. Collective."""

    def common(self) -> Section:
        """The strategy's own state, equal on all workers: arrays over the exchange's stretch, or by parameter.

        Return the section made in `begin` itself, not a copy: a resume writes the checkpoint's values into its arrays
        and numbers.
        """
        return Section()

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
    def join(self, phase: Phase, state: State | None = None) -> None:
        self.phase, self.comm, self.version = phase, phase.worker_comm, 0
        self.exchange = exchange = self.make_exchange()
        values = phase.replica.values[exchange.low : exchange.high]
        self.update = phase.updating.make(values, exchange.low, exchange.high)
        exchange.synchronise()
        part = self._dealt(state)
        if part is not None:
            self.update.load_in_place(part)
        self.balance = self._make_balance(part)
        self.begin()
        if part is not None:
            _fill(self.common(), part.section(STRATEGY))
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

    def _dealt(self, state: State | None) -> State | None:
        """This rank's stretch of the state that rank 0 holds; None if there is none. Collective."""
        comm = self.comm
        if not comm.broadcast_json(state is not None):
            return None
        if state is None:
            return recv_state(comm, 0)
        parts = [state.cut(*bounds, self._names(*bounds)) for bounds in self.exchange.stretches()]
        sends = [start_send_state(comm, parts[rank], rank) for rank in range(1, comm.size)]
        comm.wait_all([request for started in sends for request in started])
        return parts[0]

    def _names(self, low: int, high: int) -> list[str]:
        return [slot.name for slot in self.phase.replica.layout.slots_in(low, high)]

    def state(self) -> State | None:
        comm, keepers = self.comm, self.exchange.keepers()
        part = self.update.view() if self.local is None else self._mean_moments()
        kept = self.common()
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

    def _mean_moments(self) -> State:
        """The optimizer state where every worker has its own: the mean over the workers, and rank 0's plain numbers.
        Collective."""
        comm, state = self.comm, self.update.state()
        rows = comm.gather_json({path: [list(a.shape), str(a.dtype)] for path, a in state.arrays()})
        here = dict(state.arrays())
        for path, (shape, dtype) in sorted({path: row[path] for row in reversed(rows) for path in row}.items()):
            array = here.get(path, _zeros(shape, dtype))
            comm.all_reduce(array.reshape(-1))
            array /= comm.size
            state.place(path, array)
        numbers = comm.gather_json(state.optimizer.numbers)
        state.optimizer.numbers = next((found for found in numbers if found), {})
        return state

    def own(self) -> Own:
        own = self.exchange.own()
        if self.local is not None:
            view = self.update.view()
            own.arrays |= dict(view.arrays())
            own.numbers[OPTIMIZER] = view.optimizer.numbers
        return own

    def load_own(self, own: Own) -> str | None:
        lost = self.exchange.load_own(own)
        if self.local is None or OPTIMIZER not in own.numbers:
            return lost
        state = State(self.exchange.low, self.exchange.high)
        state.optimizer.numbers = own.numbers[OPTIMIZER]
        for path, array in own.arrays.items():
            if path not in (REST, MEMORY):
                state.place(path, array)
        self.update.load(state)
        return lost

    def leave(self) -> State | None:
        self.drain()
        state = self.state()
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

    def ready(self, low: int, high: int) -> None:
        self.exchange.start(low, high)

    def poll(self) -> None:
        self.exchange.poll()

    def _start_round(self) -> None:
        self._start = self.phase.cursor
        self._parts: list[Contribution] = []
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
        if len(self._parts) >= self._length or phase.step.round_end >= self._foreseen:
            return self._close()
        phase.cursor = phase.step.round_end
        self._deal()
        skipped, overflow = bool(samples) and not part.samples, phase.step.bad < 0
        result: Any = "skipped" if skipped else "local"
        return Outcome(result, phase.cursor, part.loss, samples, version=self.version, overflow=overflow)

    def withdraw(self) -> Ask:
        """Close the round here: the other workers reach its end or withdraw as well."""
        self._parts.append(Contribution.of(self.phase, 0, 0.0))
        return self._close().ask

    def _step_locally(self, local: Callable[[Step], None], part: Contribution) -> Contribution:
        """Take a local step; returns what counts of it. Raises NanError, on this worker alone, if it is not finite,
        not because of the loss scale, and train.nan is "stop"."""
        from hpctrain.replica.blocks import add_up, sum_of_squares

        phase, gradient = self.phase, self.phase.replica.gradient
        mean = part.weight / phase.dealing.batch or 1.0
        if part.samples and part.finite and not add_up([gradient], gradient, mean):
            part = replace(part, bad=phase.replica.first_not_finite())
        if not part.finite:
            if part.faulty and phase.updating.nan == "stop":
                error = nan_error(phase, phase.comm.rank, part.loss, phase.step.number, part.bad)
                error.everywhere = False
                raise error
            part = Contribution.nothing(part.wish, len(phase.replica.layout.slots))
        if part.samples and phase.updating.clip_norm is not None:
            gradient.mul_(clip_factor(sum_of_squares(gradient), phase.updating.clip_norm))
        rate, momentum = phase.updating.rate(phase.cursor), phase.updating.momentum(phase.cursor)
        skip, begun = not part.samples, phase.comm.now()
        local(Step(phase.step.number, len(self._parts), part.samples, rate, momentum, skip, part.used))
        return part if skip else replace(part, seconds=part.seconds + (phase.comm.now() - begun) / 1e9)

    def _close(self) -> Outcome:
        """Agree on the round that ends here. Collective."""
        phase, slots = self.phase, len(self.phase.replica.layout.slots)
        own = self._parts[0] if len(self._parts) == 1 else Contribution.sum_of(self._parts)
        table = self.exchange.gather(own.encode(slots))
        parts = [Contribution.decode(row, slots) for row in table]
        found = RoundTotals.of(parts)
        if found.faulty is not None and phase.updating.nan == "stop":
            part = parts[found.faulty]
            self.exchange.settle()  # MPI still writes into the arenas, which are freed after the error
            raise nan_error(phase, phase.roles.workers[found.faulty], part.loss, phase.step.number, part.bad)
        round = self._round(own, found)
        if round.skip:
            self.skipped(round)
        else:
            self.apply(round)
            self.version += 1
        self.exchange.publish()
        if self.balance is not None:
            self._balance(self.balance, parts)
        return self._end(found)

    def _balance(self, balance: Balance, parts: list[Contribution]) -> None:
        """Let the shares follow what the workers measured in the round that ends."""
        samples, seconds = [part.samples for part in parts], [part.seconds for part in parts]
        decision = balance.observe(samples, seconds, self._length)
        if decision is not None:
            self.phase.conductor.notify(decision)

    def _round(self, own: Contribution, found: RoundTotals) -> Round:
        phase = self.phase
        return Round(
            number=self.version,
            start=self._start,
            steps=len(self._parts),
            samples=found.samples,
            share=own.weight / found.weight if found.weight else own.samples / max(1, found.samples),
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


def _fill(section: Section, saved: Section) -> None:
    """Write the saved values into the arrays and numbers of `section`."""
    for key, array in section.flat.items():
        if key in saved.flat:
            array[...] = saved.flat[key]
    for name, own in section.named.items():
        for key, array in own.items():
            if key in saved.named.get(name, {}):
                array[...] = saved.named[name][key]
    for name, numbers in saved.numbers.items():
        section.numbers.setdefault(name, {}).update(numbers)


def _zeros(shape: list[int], dtype: str) -> Any:
    import numpy as np

    from hpctrain.comm.base import BFLOAT16

    return np.zeros(shape, BFLOAT16 if dtype == "bfloat16" else dtype)
