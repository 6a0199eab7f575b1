"""A run's clock in samples: converts epochs, steps and fractions. Pure: no torch, no MPI."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Duration(Protocol):
    """An amount of training, with exactly one field set: a job's `Amount`, or the options of the rule `after`."""

    @property
    def epochs(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def fraction(self) -> float | None: ...


class RunLength(Protocol):
    """How long a run trains, with exactly one field set: a job's [train]."""

    @property
    def epochs(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...


@dataclass(frozen=True)
class RunClock:
    """Converts epochs, steps and fractions to samples. `epoch`: samples per epoch; `round`: samples per round."""

    epoch: int
    round: int
    total: int

    def samples(self, amount: Duration) -> int:
        """The samples of an Amount (one of epochs, steps, samples, fraction set); at least 1."""
        if amount.epochs is not None:
            return max(1, round(amount.epochs * self.epoch))
        if amount.steps is not None:
            return int(max(1, self._steps(amount.steps)))
        if amount.samples is not None:
            return int(max(1, amount.samples))
        share = amount.fraction or 0.0
        return max(1, math.ceil(round(share * self.total, 6)))  # 0.07 * 100 is slightly more than 7

    def until(self, start: int, amount: Duration) -> int:
        """The cursor at which an Amount that starts at the cursor `start` ends."""
        if amount.steps is None or (into := start % self.epoch) == 0:
            return start + self.samples(amount)
        rest = self.epoch - into  # in mid-epoch: the remaining rounds of the epoch first
        rounds = -(-rest // self.round)
        if amount.steps <= rounds:
            return start + min(amount.steps * self.round, rest)
        return start + rest + self._steps(amount.steps - rounds)

    def _steps(self, steps: int) -> int:
        """Samples in this many rounds from the start of an epoch; its last round is smaller, to end with it."""
        per_epoch = -(-self.epoch // self.round)
        whole, rest = divmod(steps, per_epoch)
        return whole * self.epoch + rest * self.round

    def rounds(self, cursor: int) -> int:
        """Rounds that have ended at `cursor`, counted from 0 in rounds of this size."""
        whole, into = divmod(cursor, self.epoch)
        return whole * -(-self.epoch // self.round) + into // self.round

    def round_end(self, rounds: int) -> int:
        """The first cursor at which this many rounds have ended."""
        return self._steps(rounds)


@dataclass(frozen=True)
class Every:
    """An interval of `steps` rounds. Not a fixed number of samples: the last round of an epoch is smaller."""

    clock: RunClock
    steps: int

    def passed(self, cursor: int) -> int:
        """The number of such intervals that have ended at `cursor`."""
        return self.clock.rounds(cursor) // self.steps

    def next(self, cursor: int) -> int:
        """The end of the interval that contains `cursor`."""
        return self.clock.round_end((self.passed(cursor) + 1) * self.steps)


def interval(clock: RunClock, amount: Duration) -> int | Every:
    """A recurring Amount, in samples or in rounds."""
    return clock.samples(amount) if amount.steps is None else Every(clock, amount.steps)


def run_total(train: RunLength, epoch: int, round_size: int) -> int:
    """The samples of the whole run, from train.epochs or train.steps (rounds)."""
    clock = RunClock(epoch, round_size, 0)
    if train.steps is not None:
        return clock.round_end(train.steps)
    return max(1, round((train.epochs or 0.0) * epoch))
