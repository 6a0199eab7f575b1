"""Decides what the trainers do after a step, and when training stops early. Pure: no torch, no MPI.

The same observed numbers always lead to the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntFlag

from hpctrain.clock.rules import Rule
from hpctrain.clock.samples import Every
from hpctrain.trace.events import Event


class Ask(IntFlag):
    """What the trainer should do after a step."""

    NOTHING = 0
    EVALUATE = 1
    CHECKPOINT = 2
    END_PHASE = 4
    STOP = 8
    INTERRUPT = 16  # a signal arrived: checkpoint, then stop before the end
    LEAVE = 32  # a worker's program has left the training loop


def _ignore(event: Event) -> None:
    """Record nothing."""


@dataclass
class Conductor:
    """Decides from agreed numbers what the trainer should do; the result is the same wherever it runs.

    `evaluate_every`, `checkpoint_every`: samples (0: never), or rounds. `notify` is called with the rule's statistic.
    `higher_is_better`: the direction of the metric. `why`: the rule's reason, once it has ended the phase.
    """

    total: int
    evaluate_every: int | Every
    checkpoint_every: int | Every
    rule: Rule | None
    why: str = ""
    notify: Callable[[Event], None] = field(default=_ignore)
    higher_is_better: bool = True

    def decide(self, before: int, after: int, loss: float, wish: Ask) -> Ask:
        """What to do after a step from cursor `before` to `after`; `wish` is what any rank requests in addition."""
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
        """After an evaluation at `cursor`, on all workers alike: END_PHASE if the rule ends the phase, else NOTHING."""
        if self.rule is None:
            return Ask.NOTHING
        return self._ruled(self.rule, self.rule.evaluated(cursor, metric, self.higher_is_better))

    def due(self, cursor: int) -> int:
        """The first cursor beyond `cursor` at which `decide` is known to request something.

        Unpredictable requests (by a rule that uses losses, or by ranks) may come sooner.
        """
        marks = [max(self.total, cursor + 1)]
        marks += [mark for every in (self.evaluate_every, self.checkpoint_every) if (mark := _next(cursor, every))]
        end = self.rule.due(cursor) if self.rule is not None else None
        return min(marks if end is None else [*marks, end])

    def ends(self, cursor: int) -> int:
        """The cursor beyond `cursor` at which the phase ends at the latest, as far as that can be predicted."""
        end = self.rule.due(cursor) if self.rule is not None else None
        return self.total if end is None else min(self.total, end)

    def _ruled(self, rule: Rule, why: str | None) -> Ask:
        news, rule.news = rule.news, None
        if news is not None:
            self.notify(news)
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
class EarlyStopping:
    """Early stopping and the target, decided on agreed evaluations; the same on all workers.

    `higher_is_better`: the direction of the metric.
    """

    target: float | None
    patience: int | None
    min_delta: float
    higher_is_better: bool = True
    best: float | None = None
    waited: int = 0

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
