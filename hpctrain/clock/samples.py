"""A run's clock in samples: what epochs, steps and fractions are in it. Pure: no torch, no MPI."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Duration(Protocol):
    """An amount of training, with one of these set: a job's `Amount`, or the options of the rule `after`."""

    @property
    def epochs(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...
    @property
    def samples(self) -> int | None: ...
    @property
    def fraction(self) -> float | None: ...


class RunLength(Protocol):
    """How long a run trains, with one of these set: a job's [train]."""

    @property
    def epochs(self) -> float | None: ...
    @property
    def steps(self) -> int | None: ...


@dataclass(frozen=True)
class RunClock:
    """Converts epochs, steps and fractions to samples. `epoch` samples per epoch, `round` samples per round."""

    epoch: int
    round: int
    total: int

    def samples(self, amount: Duration) -> int:
        """Of an Amount (one of epochs, steps, samples, fraction set); at least 1."""
        if amount.epochs is not None:
            return max(1, round(amount.epochs * self.epoch))
        if amount.steps is not None:
            return int(max(1, self._steps(amount.steps)))
        if amount.samples is not None:
            return int(max(1, amount.samples))
        share = amount.fraction or 0.0
        return max(1, math.ceil(round(share * self.total, 6)))  # 0.07 * 100 is a little more than 7

    def until(self, start: int, amount: Duration) -> int:
        """The cursor at which an Amount ends that begins at the cursor `start`."""
        if amount.steps is None or (into := start % self.epoch) == 0:
            return start + self.samples(amount)
        rest = self.epoch - into  # in mid-epoch: its remaining rounds first
        rounds = -(-rest // self.round)
        if amount.steps <= rounds:
            return start + min(amount.steps * self.round, rest)
        return start + rest + self._steps(amount.steps - rounds)

    def _steps(self, steps: int) -> int:
        """Samples in this many rounds from the start of an epoch. They do not cross its end; the last is smaller."""
        per_epoch = -(-self.epoch // self.round)
        whole, rest = divmod(steps, per_epoch)
        return whole * self.epoch + rest * self.round

    def rounds(self, cursor: int) -> int:
        """How many rounds have ended at `cursor`, counted from 0 in rounds of this size."""
        whole, into = divmod(cursor, self.epoch)
        return whole * -(-self.epoch // self.round) + into // self.round

    def round_end(self, rounds: int) -> int:
        """The first cursor at which this many rounds have ended."""
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


def interval(clock: RunClock, amount: Duration) -> int | Every:
    """An Amount that comes again and again: in samples, or in rounds."""
    return clock.samples(amount) if amount.steps is None else Every(clock, amount.steps)


def run_total(train: RunLength, epoch: int, round_size: int) -> int:
    """Samples of the whole run, from train.epochs or train.steps (rounds)."""
    clock = RunClock(epoch, round_size, 0)
    if train.steps is not None:
        return clock.round_end(train.steps)
    return max(1, round((train.epochs or 0.0) * epoch))
