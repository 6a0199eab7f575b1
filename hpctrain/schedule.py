"""Phases, the rules that end them, and everything else that is timed by the clock of a run: its samples.

Pure: no torch, no MPI. The same decisions come out wherever the same numbers are observed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntFlag
from functools import cached_property
from typing import Any, ClassVar, Self

from pydantic import BaseModel, Field, model_validator

from hpctrain.errors import JobError
from hpctrain.jobspec import Options
from hpctrain.trace.events import Event, RuleStatistic


class Ask(IntFlag):
    """What is asked of the trainer after a step."""

    NOTHING = 0
    EVALUATE = 1
    CHECKPOINT = 2
    END_PHASE = 4
    STOP = 8
    INTERRUPT = 16  # a signal came: checkpoint, then stop before the end
    LEAVE = 32  # a worker's program has left the training loop


@dataclass(frozen=True)
class RunClock:
    """Converts epochs, steps and fractions to samples. `epoch` samples per epoch, `round` samples per round."""

    epoch: int
    round: int
    total: int

    def samples(self, amount: Any) -> int:
        """Of an Amount (one of epochs, steps, samples, fraction set); at least 1."""
        if amount.epochs is not None:
            return max(1, round(amount.epochs * self.epoch))
        if amount.steps is not None:
            return int(max(1, self._steps(amount.steps)))
        if amount.samples is not None:
            return int(max(1, amount.samples))
        return max(1, math.ceil(round(amount.fraction * self.total, 6)))  # 0.07 * 100 is a little more than 7

    def until(self, start: int, amount: Any) -> int:
        """The cursor at which an Amount ends that begins at the cursor `start`."""
        if amount.steps is None or (into := start % self.epoch) == 0:
            return start + self.samples(amount)
        rest = self.epoch - into  # in mid-epoch: its remaining rounds first
        rounds = -(-rest // self.round)
        if amount.steps <= rounds:
            return start + min(amount.steps * self.round, rest)
        return start + rest + self._steps(amount.steps - rounds)

    def _steps(self, steps: int) -> int:
        """Samples of so many rounds from an epoch's start: they do not cross its end, its last one is smaller."""
        per_epoch = -(-self.epoch // self.round)
        whole, rest = divmod(steps, per_epoch)
        return whole * self.epoch + rest * self.round

    def rounds(self, cursor: int) -> int:
        """How many rounds have ended at `cursor`, counted from 0 in rounds of this size."""
        whole, into = divmod(cursor, self.epoch)
        return whole * -(-self.epoch // self.round) + into // self.round

    def round_end(self, rounds: int) -> int:
        """The first cursor at which so many rounds have ended."""
        return self._steps(rounds)


@dataclass(frozen=True)
class Every:
    """An interval of `steps` rounds: not the same as their samples, for the last round of an epoch is smaller."""

    clock: RunClock
    steps: int

    def passed(self, cursor: int) -> int:
        """How many such intervals have ended at `cursor`."""
        return self.clock.rounds(cursor) // self.steps

    def next(self, cursor: int) -> int:
        """Where the interval ends in which `cursor` lies."""
        return self.clock.round_end((self.passed(cursor) + 1) * self.steps)


def interval(clock: RunClock, amount: Any) -> int | Every:
    """An Amount that comes again and again: in samples, or in rounds."""
    return clock.samples(amount) if amount.steps is None else Every(clock, amount.steps)


def run_total(train: Any, epoch: int, round_size: int) -> int:
    """Samples of the whole run, from train.epochs or train.steps (rounds)."""
    clock = RunClock(epoch, round_size, 0)
    return clock.round_end(train.steps) if train.steps is not None else max(1, round(train.epochs * epoch))


# -- rules that end a phase -----------------------------------------------------------------------------------
class Rule:
    """Ends a phase. Sees only what all ranks agree on, so that no rank decides alone.

    A rule class has `Options` (pydantic), and is built once per phase with them, the clock (whose rounds are the
    phase's) and the cursor at which the phase begins. `news`: what was just compared with the threshold; whoever
    reads it sets it to None.
    """

    Options: ClassVar[type[BaseModel]]
    news: RuleStatistic | None = None

    def __init__(self, options: Any, clock: RunClock, start: int) -> None:
        self.options, self.clock, self.start = options, clock, start

    def observe(self, cursor: int, loss: float) -> str | None:
        """After every agreed step: why the phase ends here, or None.

        `cursor`: samples consumed so far. `loss`: the mean of what was consumed since the last call: in synchronous
        phases a round's, of all workers; in asynchronous ones (on the coordinator, after every update) a batch's,
        of one worker. Not finite, or 0, where the step was skipped.
        """
        raise NotImplementedError

    def evaluated(self, cursor: int, metric: float, higher_is_better: bool) -> str | None:
        """After every evaluation in the phase, on all workers alike: why the phase ends here, or None."""
        return None

    def due(self, cursor: int) -> int | None:
        """Where beyond `cursor` the phase will end whatever is observed; None if that cannot be foreseen."""
        return None

    def unfit(self, evaluates: bool) -> str | None:
        """Why this rule can never end its phase, and what to do, as the end of a sentence; None if it can.

        `evaluates`: whether there are evaluations in the phase.
        """
        return None

    def too_short(self) -> str | None:
        """Why this run is too short for the rule ever to end its phase, as a clause; None if it is long enough.

        A run that was shortened is no mistake: the phase then lasts to its end.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, as plain values: with it a new rule goes on as this one would have."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take it over."""


class AfterOptions(Options):
    """The keys of rule = "after"; exactly one."""

    epochs: float | None = Field(None, gt=0, description="end after so many epochs of this phase")
    steps: int | None = Field(None, gt=0, description="end after so many rounds")
    samples: int | None = Field(None, gt=0, description="end after so many samples")
    fraction: float | None = Field(None, gt=0, le=1, description="end after this share of the whole run")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.plain()) != 1:
            raise ValueError("must have exactly one of epochs, steps, samples and fraction")
        return self


class After(Rule):
    """Ends a phase when it has consumed a given amount, counted from its own start."""

    Options = AfterOptions

    def observe(self, cursor: int, loss: float) -> str | None:
        done, limit = cursor - self.start, self._end - self.start
        return f"after {done} >= {limit} samples" if done >= limit else None

    def due(self, cursor: int) -> int | None:
        return max(self._end, cursor + 1)

    def too_short(self) -> str | None:
        if self._end < self.clock.total:
            return None
        return f"it ends a phase at sample {self._end:,} at the earliest, and the run has {self.clock.total:,}"

    @cached_property
    def _end(self) -> int:
        return self.clock.until(self.start, self.options)


# -- decisions ---------------------------------------------------------------------------------------------------
def _untold(event: Event) -> None:
    """Nobody is told."""


@dataclass
class Conductor:
    """Turns agreed numbers into what is asked of the trainer: wherever it runs, it answers the same.

    `evaluate_every`, `checkpoint_every`: samples (0: never), or rounds. `tell` is called with what the rule
    computed. `higher_is_better`: how values of the metric compare. `why`: the rule's reason, once
    it has ended the phase.
    """

    total: int
    evaluate_every: int | Every
    checkpoint_every: int | Every
    rule: Rule | None
    why: str = ""
    tell: Callable[[Event], None] = field(default=_untold)
    higher_is_better: bool = True

    def decide(self, before: int, after: int, loss: float, wish: Ask) -> Ask:
        """The cursor went from `before` to `after` in one step; `wish` is what any rank wants besides."""
        ask = wish
        if _crossed(before, after, self.evaluate_every):
            ask |= Ask.EVALUATE
        if _crossed(before, after, self.checkpoint_every):
            ask |= Ask.CHECKPOINT
        if after >= self.total:
            ask |= Ask.STOP
        elif self.rule is not None:
            ask |= self._ruled(self.rule, self.rule.observe(after, loss))
        return ask

    def evaluated(self, cursor: int, metric: float) -> Ask:
        """After an evaluation at `cursor`, on all workers alike: END_PHASE if the rule says so, else NOTHING."""
        if self.rule is None:
            return Ask.NOTHING
        return self._ruled(self.rule, self.rule.evaluated(cursor, metric, self.higher_is_better))

    def due(self, cursor: int) -> int:
        """The first cursor beyond `cursor` at which `decide` is foreseeably going to ask for something.

        What nobody can foresee (a rule that looks at losses, wishes) may come sooner.
        """
        marks = [max(self.total, cursor + 1)]
        marks += [mark for every in (self.evaluate_every, self.checkpoint_every) if (mark := _next(cursor, every))]
        end = self.rule.due(cursor) if self.rule is not None else None
        return min(marks if end is None else [*marks, end])

    def ends(self, cursor: int) -> int:
        """Where beyond `cursor` the phase ends at the latest, as far as that can be foreseen."""
        end = self.rule.due(cursor) if self.rule is not None else None
        return self.total if end is None else min(self.total, end)

    def _ruled(self, rule: Rule, why: str | None) -> Ask:
        news, rule.news = rule.news, None
        if news is not None:
            self.tell(news)
        if why is None:
            return Ask.NOTHING
        self.why = why
        return Ask.END_PHASE


def _crossed(before: int, after: int, every: int | Every) -> bool:
    if isinstance(every, Every):
        return every.passed(after) > every.passed(before)
    return every > 0 and after // every > before // every


def _next(cursor: int, every: int | Every) -> int | None:
    if isinstance(every, Every):
        return every.next(cursor)
    return (cursor // every + 1) * every if every > 0 else None


@dataclass
class Progress:
    """Early stopping and the target, judged on agreed evaluations; the same on all workers.

    `higher_is_better` says how metric values compare.
    """

    target: float | None
    patience: int | None
    min_delta: float
    higher_is_better: bool = True
    best: float | None = None
    waited: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, value: float) -> str | None:
        """Why training should stop after this evaluation, or None."""
        sign = 1.0 if self.higher_is_better else -1.0
        if not math.isnan(value) and (self.best is None or sign * (value - self.best) > self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.target is not None and sign * (value - self.target) >= 0:
            return f"target {self.target:g} reached: {value:.4f}"
        if self.patience is not None and self.waited >= self.patience:
            best = "none" if self.best is None else f"{self.best:.4f}"
            return f"no improvement in {self.waited} evaluations (best {best})"
        return None


# -- the learning rate's course: factors of the base rate, by progress 0..1 ---------------------------------------
def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float, end: float = 0.0) -> float:
    """From 1 straight to `end`."""
    return 1.0 + (end - 1.0) * progress


def cosine(progress: float, end: float = 0.0) -> float:
    """From 1 to `end` along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def step(progress: float, gamma: float = 0.1, every: float = 1 / 3) -> float:
    """Multiplied by `gamma` each time another share `every` of the run is done."""
    return float(gamma ** int(progress / every + 1e-9))


class RateCourse(ABC):
    """The factors of the base learning rate and of momentum at every cursor of a run: a pure function of it."""

    @abstractmethod
    def factor(self, cursor: int) -> float:
        """Of the learning rate, at `cursor` samples (the step that begins there)."""

    def momentum(self, cursor: int) -> float:
        """Of the momentum."""
        return 1.0

    @abstractmethod
    def anew(self, start: int) -> RateCourse:
        """The same course, begun at the cursor `start` and over what remains of the run from there."""


@dataclass(frozen=True)
class Course(RateCourse):
    """A linear warm-up, then a function of the share of what remains: from the cursor `start`, over `total` samples."""

    function: Any
    options: dict[str, Any]
    warmup: int
    total: int
    start: int = 0

    def __post_init__(self) -> None:
        """JobError where the function fails, or gives what is no factor, at one of five points of the run."""
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            try:
                value = float(self.function(share, **self.options))
            except Exception as error:  # a function of the user's may raise anything
                raise JobError(
                    f"optimizer.schedule: {str(error) or type(error).__name__}; check the keys of [optimizer.schedule] "
                    "(a function there is called with the share of the run that is done, 0 to 1, and returns the "
                    "factor of optimizer.lr)"
                ) from error
            if not (math.isfinite(value) and value >= 0):
                raise JobError(
                    f"optimizer.schedule: its factor at {share:.0%} of the run is {value:g}; expected a number >= 0"
                )

    def factor(self, cursor: int) -> float:
        done = cursor - self.start
        if done < self.warmup:
            return (done + 1) / (self.warmup + 1)
        progress = min(1.0, (done - self.warmup) / max(1, self.total - self.warmup))
        return float(self.function(progress, **self.options))

    def anew(self, start: int) -> Course:
        rest = max(1, self.total - start)
        return Course(self.function, self.options, round(self.warmup * rest / max(1, self.total)), rest, start)


@dataclass(frozen=True)
class SteppedCourse(RateCourse):
    """Factors out of a table of steps, such as torch's schedulers give, times a linear warm-up.

    `factors(n)`: (of the learning rate, of the momentum) after n steps. A step is a round of `clock`, or an epoch
    if `by_epoch`, counted from the cursor `start`; the warm-up does not delay them.
    """

    factors: Callable[[int], tuple[float, float]]
    clock: RunClock
    by_epoch: bool
    warmup: int
    start: int = 0

    def factor(self, cursor: int) -> float:
        done = cursor - self.start
        warm = (done + 1) / (self.warmup + 1) if done < self.warmup else 1.0
        return warm * self.factors(self.steps(cursor))[0]

    def momentum(self, cursor: int) -> float:
        return self.factors(self.steps(cursor))[1]

    def steps(self, cursor: int) -> int:
        """How many have been taken at `cursor`."""
        if self.by_epoch:
            return (cursor - self.start) // self.clock.epoch
        return self.clock.rounds(cursor) - self.clock.rounds(self.start)

    def anew(self, start: int) -> SteppedCourse:
        total = self.clock.total
        warmup = round(self.warmup * max(1, total - start) / max(1, total))
        return SteppedCourse(self.factors, self.clock, self.by_epoch, warmup, start)


@dataclass(frozen=True)
class Pace:
    """The factors of the base learning rate and of momentum in one phase, which begins at the cursor `start`.

    `learning_rate`: "auto" and "keep": the course goes on; "scale": the same times `scale`; "reset": the course
    begins anew, with its warm-up, squeezed into what remains of the run (warm restarts: Loshchilov and Hutter 2017,
    section 3); "ramp": times a linear rise to 1 over `ramp` samples. `momentum` (what to do about it when training
    becomes asynchronous: Li et al., Sync-Switch, ICDCS 2021): "keep"; "scale": times `scale`; "ramp": times a linear
    rise to 1 over `ramp` samples; "reset": the optimizer's state is not handed over.
    """

    course: RateCourse
    start: int
    learning_rate: str
    momentum: str
    scale: float
    ramp: int

    @property
    def resets(self) -> bool:
        """Whether the phase begins with a fresh optimizer."""
        return self.momentum == "reset"

    @property
    def per_update(self) -> bool:
        """Whether the strategy's own correction of the rate (lr_per_update) applies: not where a policy sets it."""
        return self.learning_rate not in ("keep", "scale")

    def rate(self, cursor: int) -> float:
        """The learning rate's factor for the step that begins at `cursor`."""
        if self.learning_rate == "reset":
            return self._anew.factor(cursor)
        return self.course.factor(cursor) * self._factor(self.learning_rate, cursor)

    def momentum_factor(self, cursor: int) -> float:
        """The momentum's factor for the step that begins at `cursor`."""
        course = self._anew if self.learning_rate == "reset" else self.course
        return course.momentum(cursor) * self._factor(self.momentum, cursor)

    def _factor(self, policy: str, cursor: int) -> float:
        if policy == "scale":
            return self.scale
        return min(1.0, (cursor - self.start + 1) / (self.ramp + 1)) if policy == "ramp" else 1.0

    @cached_property
    def _anew(self) -> RateCourse:
        return self.course.anew(self.start)
