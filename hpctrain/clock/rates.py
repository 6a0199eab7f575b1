"""The factors of the base learning rate and of momentum over the course of a run. Pure: no torch, no MPI."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hpctrain.clock.samples import RunClock
from hpctrain.errors import JobError


def constant(progress: float) -> float:
    """Always 1."""
    return 1.0


def linear(progress: float, end: float = 0.0) -> float:
    """Linear from 1 to `end`."""
    return 1.0 + (end - 1.0) * progress


def cosine(progress: float, end: float = 0.0) -> float:
    """From 1 to `end` along half a cosine (Loshchilov and Hutter 2017, without restarts)."""
    return end + (1.0 - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def step(progress: float, gamma: float = 0.1, every: float = 1 / 3) -> float:
    """Multiplied by `gamma` each time a further share `every` of the run is done."""
    return float(gamma ** int(progress / every + 1e-9))


class RateCourse(ABC):
    """The factors of the base learning rate and of momentum at every cursor of a run: a pure function of it."""

    @abstractmethod
    def factor(self, cursor: int) -> float:
        """The learning rate's factor at `cursor` samples (for the step that begins there)."""

    def momentum(self, cursor: int) -> float:
        """The momentum's factor at `cursor`."""
        return 1.0

    @abstractmethod
    def restarted(self, start: int) -> RateCourse:
        """The same course, restarted at the cursor `start` over the rest of the run."""


@dataclass(frozen=True)
class FunctionCourse(RateCourse):
    """A linear warm-up, then a function of the completed share: from the cursor `start`, over `total` samples."""

    function: Any
    options: dict[str, Any]
    warmup: int
    total: int
    start: int = 0

    def __post_init__(self) -> None:
        """Raises JobError if the function fails, or returns an invalid factor, at one of five points of the run."""
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            try:
                value = float(self.function(share, **self.options))
            except Exception as error:  # a user's function may raise anything
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

    def restarted(self, start: int) -> FunctionCourse:
        rest = max(1, self.total - start)
        return FunctionCourse(self.function, self.options, round(self.warmup * rest / max(1, self.total)), rest, start)


@dataclass(frozen=True)
class SteppedCourse(RateCourse):
    """Factors from a table of steps, as torch's schedulers produce, times a linear warm-up.

    `factors(n)`: (of the learning rate, of the momentum) after n steps. A step is a round of `clock`, or an epoch if
    `by_epoch`, counted from the cursor `start`; the warm-up does not delay them.
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
        """The number of steps taken at `cursor`."""
        if self.by_epoch:
            return (cursor - self.start) // self.clock.epoch
        return self.clock.rounds(cursor) - self.clock.rounds(self.start)

    def restarted(self, start: int) -> SteppedCourse:
        total = self.clock.total
        warmup = round(self.warmup * max(1, total - start) / max(1, total))
        return SteppedCourse(self.factors, self.clock, self.by_epoch, warmup, start)


@dataclass(frozen=True)
class Pace:
    """The factors of the base learning rate and of momentum in one phase, which begins at the cursor `start`.

    `learning_rate`: "auto" and "keep": the course continues; "scale": the same times `scale`; "reset": the course
    restarts, including its warm-up, compressed into the rest of the run (warm restarts: Loshchilov and Hutter 2017,
    section 3); "ramp": times a linear rise to 1 over `ramp` samples. `momentum` (how to adjust it when training becomes
    asynchronous: Li et al., Sync-Switch, ICDCS 2021): "keep"; "scale": times `scale`; "ramp": times a linear rise to 1
    over `ramp` samples; "reset": the optimizer's state is not carried over. `factor`: of all learning rates.
    """

    course: RateCourse
    start: int
    learning_rate: str
    momentum: str
    scale: float
    ramp: int
    factor: float = 1.0

    @property
    def resets(self) -> bool:
        """Whether the phase begins with a new optimizer."""
        return self.momentum == "reset"

    @property
    def per_update(self) -> bool:
        """Whether the strategy's own rate correction (lr_per_update) applies: not if a policy sets the rate."""
        return self.learning_rate not in ("keep", "scale")

    def rate(self, cursor: int) -> float:
        """The learning rate's factor for the step that begins at `cursor`."""
        if self.learning_rate == "reset":
            return self.factor * self._restarted.factor(cursor)
        return self.factor * self.course.factor(cursor) * self._factor(self.learning_rate, cursor)

    def momentum_factor(self, cursor: int) -> float:
        """The momentum's factor for the step that begins at `cursor`."""
        course = self._restarted if self.learning_rate == "reset" else self.course
        return course.momentum(cursor) * self._factor(self.momentum, cursor)

    def _factor(self, policy: str, cursor: int) -> float:
        if policy == "scale":
            return self.scale
        return min(1.0, (cursor - self.start + 1) / (self.ramp + 1)) if policy == "ramp" else 1.0

    @cached_property
    def _restarted(self) -> RateCourse:
        return self.course.restarted(self.start)
