"""Rules that end a phase: after an amount, by losses, by evaluations, or by a user's function. Pure."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from traceback import extract_tb
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hpctrain.clock.samples import RunClock
from hpctrain.errors import JobError
from hpctrain.job.registry import describe
from hpctrain.job.spec import bound
from hpctrain.options import Options
from hpctrain.text import shown
from hpctrain.trace.events import RuleStatistic


class Rule:
    """Ends a phase. Uses only values that all ranks agree on, so that no rank decides alone.

    A rule class has `Options` (pydantic). It is built once per phase from them, the clock (with the phase's round size)
    and the cursor at which the phase begins. `news`: the latest comparison with the threshold; whoever reads it resets
    it to None.
    """

    Options: ClassVar[type[BaseModel]]
    news: RuleStatistic | None = None

    def __init__(self, options: Any, clock: RunClock, start: int) -> None:
        self.options, self.clock, self.start = options, clock, start

    def observe(self, cursor: int, loss: float) -> str | None:
        """Called after every agreed step: the reason why the phase ends here, or None.

        `cursor`: samples consumed so far. `loss`: the mean loss since the last call: in synchronous phases of a round
        over all workers; in asynchronous ones (on the coordinator, after every update) of one worker's batch. Not
        finite, or 0, if the step was skipped.
        """
        raise NotImplementedError

    def evaluated(self, cursor: int, metric: float, higher_is_better: bool) -> str | None:
        """Called after every evaluation in the phase, on all workers alike: why the phase ends here, or None."""
        return None

    def due(self, cursor: int) -> int | None:
        """The cursor beyond `cursor` at which the phase ends in any case; None if that cannot be predicted."""
        return None

    def unfit(self, evaluates: bool) -> str | None:
        """Why this rule can never end its phase, and what to do, as the end of a sentence; None if it can.

        `evaluates`: whether the phase has evaluations.
        """
        return None

    def too_short(self) -> str | None:
        """Why this run is too short for the rule ever to end its phase, as a clause; None if it is long enough.

        Shortening a run is not a mistake: the phase then lasts until the end of the run.
        """
        return None

    def state(self) -> dict[str, Any]:
        """What a checkpoint must store, as plain values; a new rule that loads it continues as this one would have."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a saved state."""


class AfterOptions(Options):
    """The keys of rule = "after"; exactly one must be set."""

    epochs: float | None = Field(None, gt=0, description="end after this many epochs of this phase")
    steps: int | None = Field(None, gt=0, description="end after this many rounds")
    samples: int | None = Field(None, gt=0, description="end after this many samples")
    fraction: float | None = Field(None, gt=0, le=1, description="end after this share of the whole run")

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if len(self.plain()) != 1:
            raise ValueError("must have exactly one of epochs, steps, samples and fraction")
        return self


class After(Rule):
    """Ends a phase once it has consumed a given amount, counted from the start of the phase."""

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


ROUNDS = 10  # the number of rounds that a function's losses are averaged over


class Intervals:
    """Mean losses, weighted by samples, over intervals of `rounds` rounds of the clock, starting at the cursor `start`.

    Ignores losses that are not finite, and losses of exactly 0, which a skipped step reports.
    """

    def __init__(self, clock: RunClock, start: int, rounds: int) -> None:
        self.clock, self.rounds = clock, rounds
        self.first_round = clock.rounds(start)
        self.previous, self.ended = start, 0
        self.total, self.samples = 0.0, 0

    def add(self, cursor: int, loss: float) -> float | None:
        """Add the mean `loss` up to `cursor`. Returns the mean of an interval that ends there; None without one."""
        samples, self.previous = cursor - self.previous, cursor
        if math.isfinite(loss) and loss != 0.0:
            self.total += float(loss) * samples
            self.samples += samples
        ended = (self.clock.rounds(cursor) - self.first_round) // self.rounds
        if ended == self.ended:
            return None
        mean = self.total / self.samples if self.samples else None
        self.ended, self.total, self.samples = ended, 0.0, 0
        return mean

    def left(self) -> int:
        """The number of rounds from the start of the phase to the end of the run."""
        return self.clock.rounds(self.clock.total) - self.first_round

    def state(self) -> dict[str, Any]:
        """The state that `load` restores, as plain values."""
        return {name: getattr(self, name) for name in ("previous", "ended", "total", "samples")}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the state of another instance."""
        for name, value in state.items():
            setattr(self, name, value)


class LossRule(Rule, ABC):
    """Ends a phase by the mean losses of its intervals: keeps the first one, and a window of the latest.

    Subclasses implement `statistic`; their options include window, threshold and rounds.
    """

    extra: ClassVar[int] = 0  # losses in a window in addition to options.window

    def __init__(self, options: Any, clock: RunClock, start: int) -> None:
        super().__init__(options, clock, start)
        self.intervals = Intervals(clock, start, options.rounds)
        self.length = options.window + self.extra
        self.losses: list[float] = []
        self.first: float | None = None

    def observe(self, cursor: int, loss: float) -> str | None:
        mean = self.intervals.add(cursor, loss)
        if mean is None:
            return None
        if self.first is None:
            self.first = mean
        self.losses = [*self.losses, mean][-self.length :]
        return self._judge(mean, self.first)

    def _judge(self, loss: float, first: float) -> str | None:
        if len(self.losses) < self.length:
            return None
        value = self.statistic(first)
        fires = value <= self.options.threshold
        sign, unready = "<=" if fires else ">", self.unready(loss, first) or ""
        self.news = RuleStatistic(self.name, value, sign, self.options.threshold, unready=unready)
        return str(self.news) if self.news.fired else None

    name: ClassVar[str]

    @abstractmethod
    def statistic(self, first: float) -> float:
        """The statistic of `self.losses`, a full window, oldest first; `first` is the loss of the first interval."""

    def unready(self, loss: float, first: float) -> str | None:
        """Why the rule does not fire yet, whatever its statistic; None if it may fire."""
        return None

    def too_short(self) -> str | None:
        needed, left = self.length * self.options.rounds, self.intervals.left()
        if left > needed:
            return None
        return (
            f"one window of losses takes {needed} rounds, but no more than {left} remain when the phase starts; lower "
            f"window (now {self.options.window}) or rounds (now {self.options.rounds}), or train longer"
        )

    def state(self) -> dict[str, Any]:
        return {"intervals": self.intervals.state(), "losses": self.losses, "first": self.first}

    def load(self, state: dict[str, Any]) -> None:
        self.intervals.load(state["intervals"])
        self.losses, self.first = list(state["losses"]), state["first"]


def _changes(losses: list[float]) -> list[float]:
    return [abs(after - before) for before, after in zip(losses, losses[1:], strict=False)]


class LossStableOptions(Options):
    """The keys of rule = "loss_stable"."""

    window: int = Field(6, ge=1, le=10**6, description="the number of changes of the loss to average")
    threshold: float = Field(
        0.01, ge=0, le=1e12,
        description="end the phase when the mean change, as a share of the phase's first loss, is at most this"
    )
    rounds: int = Field(
        10, ge=1, le=10**12,
        description="the number of rounds (samples of all workers) that each loss is averaged over"
    )
    armed: float = Field(
        0.5, gt=0, le=1e12, description="do not end the phase until a loss has been below this share of the first one"
    )


class LossStable(LossRule):
    """Ends a phase once its loss has come down and no longer changes much.

    The statistic is the mean of |L[i] - L[i-1]| over a window, divided by the loss of the phase's first interval:
    relative to the first loss rather than the last, it falls as the loss does. Losses are means over intervals, because
    those of single steps are too noisy. The rule is armed once a loss is below a share of the first, because a plateau
    at the start is stable too. Intended for positive losses.
    """

    Options = LossStableOptions
    name = "loss_stable"
    extra = 1  # a window of n changes needs n + 1 losses

    def __init__(self, options: LossStableOptions, clock: RunClock, start: int) -> None:
        super().__init__(options, clock, start)
        self.armed = False

    def _judge(self, loss: float, first: float) -> str | None:
        self.armed = self.armed or loss < self.options.armed * first
        return super()._judge(loss, first)

    def statistic(self, first: float) -> float:
        changes = _changes(self.losses)
        return sum(changes) / len(changes) / abs(first)

    def unready(self, loss: float, first: float) -> str | None:
        if first < 0:
            return f"never armed: the first loss, {first:.3g}, is negative"
        return None if self.armed else f"not armed: loss {loss:.3g} of first {first:.3g}"

    def state(self) -> dict[str, Any]:
        return {**super().state(), "armed": self.armed}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.armed = state["armed"]


class LossStablePublishedOptions(Options):
    """The keys of rule = "loss_stable_published"."""

    window: int = Field(6, ge=2, le=10**6, description="the number of losses to compare")
    threshold: float = Field(
        0.01, ge=0, le=1e12, description="end the phase when the mean relative change is at most this"
    )
    rounds: int = Field(
        1, ge=1, le=10**12, description="the number of rounds that each loss is averaged over; as published: 1"
    )


class LossStablePublished(LossRule):
    """Ends a phase as published: mean of |L[i] - L[i-1]| / L[i-1] over a window of losses, at most a threshold.

    The rule of Strategy-Switch (Provatas et al., IEEE Access 13:9510, 2025), as in its open implementation. In tests,
    it fires on the first plateau, before anything is learnt (losses of steps), or never (losses of epochs); in that
    implementation's own benchmark it never fired. Provided for comparison only; use loss_stable.
    """

    Options = LossStablePublishedOptions
    name = "loss_stable_published"

    def statistic(self, first: float) -> float:
        before = [abs(loss) for loss in self.losses]
        shares = [c / b if b else math.inf for c, b in zip(_changes(self.losses), before, strict=False)]
        return sum(shares) / len(shares)


class TargetOptions(Options):
    """The keys of rule = "target"."""

    metric: float = Field(
        description="end the phase when the metric reaches this value, in the direction of metric.goal"
    )


class Target(Rule):
    """Ends a phase when an evaluation during it reaches a target value of the metric."""

    Options = TargetOptions

    def observe(self, cursor: int, loss: float) -> str | None:
        return None

    def evaluated(self, cursor: int, metric: float, higher_is_better: bool) -> str | None:
        target = self.options.metric
        reached = metric >= target if higher_is_better else metric <= target
        sign = ">=" if higher_is_better else "<="
        if not reached:
            sign = "<" if higher_is_better else ">"
        self.news = RuleStatistic("target", metric, "against" if math.isnan(metric) else sign, target, of="metric")
        return str(self.news) if reached else None

    def unfit(self, evaluates: bool) -> str | None:
        if evaluates:
            return None
        return (
            "it needs evaluations, but there are none in this phase; hold samples back with data.validation, and "
            "set train.evaluate_every to less than the run"
        )


# -- functions ----------------------------------------------------------------------------------------------------
class FunctionOptions(Options):
    """The keyword arguments of a function that serves as a rule."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True)
class FunctionAsRule:
    """Makes a rule that calls a plain function; used in place of a rule class.

    The function is called as `f(losses, **options)` after every interval of 10 rounds, with the mean losses of the
    phase's intervals so far (a list of float, oldest first; never empty), on the rank that decides; it must depend on
    nothing else. If it returns a true value, the phase ends; a string is the reason.
    """

    function: Callable[..., Any]
    Options: ClassVar[type[FunctionOptions]] = FunctionOptions

    def __call__(self, options: FunctionOptions, clock: RunClock, start: int) -> FunctionRule:
        """The rule for a phase that begins at `start`."""
        return FunctionRule(self.function, options, clock, start)

    def check(self, options: FunctionOptions) -> None:
        """Raises JobError if the function does not take these keyword arguments."""
        bound(f'rule "{describe("rule", self.function)}"', self.function, options.model_extra or {}, 1)


class FunctionRule(Rule):
    """Ends a phase when a function of its losses returns a true value; see `FunctionAsRule`."""

    def __init__(self, function: Callable[..., Any], options: FunctionOptions, clock: RunClock, start: int) -> None:
        super().__init__(options, clock, start)
        self.function, self.name = function, describe("rule", function)
        self.intervals = Intervals(clock, start, ROUNDS)
        self.losses: list[float] = []

    def observe(self, cursor: int, loss: float) -> str | None:
        mean = self.intervals.add(cursor, loss)
        if mean is None:
            return None
        self.losses.append(mean)
        try:
            answer = self.function(list(self.losses), **(self.options.model_extra or {}))
            ends = bool(answer)
        except Exception as error:  # a user's function may raise anything
            raise JobError(self._failure(error)) from error
        if not ends:
            return None
        return answer if isinstance(answer, str) else f"{self.name} after {len(self.losses)} intervals: {answer}"

    def _failure(self, error: Exception) -> str:
        frame = extract_tb(error.__traceback__)[-1]
        text = shown(" ".join(str(error).split()) or "no message")
        return (
            f'rule "{self.name}" raised {type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} '
            f"after {len(self.losses)} intervals of {ROUNDS} rounds: {text}; it is called with a list of losses, and "
            "must return true or a string to end the phase"
        )

    def too_short(self) -> str | None:
        left = self.intervals.left()
        if left > ROUNDS:
            return None
        return f"it is called every {ROUNDS} rounds, but no more than {left} remain when the phase starts; train longer"

    def state(self) -> dict[str, Any]:
        return {"intervals": self.intervals.state(), "losses": self.losses}

    def load(self, state: dict[str, Any]) -> None:
        self.intervals.load(state["intervals"])
        self.losses = list(state["losses"])
