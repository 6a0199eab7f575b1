"""The running totals of a run, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from hpctrain.clock.decisions import Ask, EarlyStopping
from hpctrain.run.best import Best
from hpctrain.run.folder import PhaseSummary


class Ending(Enum):
    """What ends at a cursor, before the run's samples are used up. The values are those in checkpoints."""

    NOTHING = "on"
    PHASE = "phase"
    RUN = "stop"


@dataclass
class Totals:
    """The counters of a run, the same on all workers of a phase.

    `cursor`: samples consumed. `step`: steps taken. `phase`: the index of the phase, which began at the cursor
    `phase_start`. `stopping`: early stopping. `ending`: what ends with the current phase, and `why`. `owed`: what an
    interruption left pending at `cursor`. `interrupted`, `left`: how this process ends the run early; not saved in
    checkpoints. `best`: by train.keep_best; None without that key.
    """

    stopping: EarlyStopping
    cursor: int = 0
    step: int = 0
    phase: int = 0
    phase_start: int = 0
    summaries: list[PhaseSummary] = field(default_factory=list)
    ending: Ending = Ending.NOTHING
    why: str = ""
    owed: Ask = Ask.NOTHING
    interrupted: bool = False
    left: bool = False
    best: Best | None = None

    @property
    def seconds(self) -> float:
        """Training time in all phases, without evaluations and checkpoints."""
        return sum(summary.seconds for summary in self.summaries)

    def plain(self, newest: int | None = None) -> dict[str, Any]:
        """The totals as plain values, for the ranks of the next phase and for checkpoints. `newest`: how many of the
        latest summaries to include, for ranks that have the earlier ones."""
        summaries = self.summaries if newest is None else self.summaries[-newest:]
        counters = {name: getattr(self, name) for name in ("cursor", "step", "phase", "phase_start")}
        books = {**counters, "summaries": [vars(summary) for summary in summaries]}
        ending = {"ending": self.ending.value, "why": self.why, "owed": int(self.owed)}
        best = {"best": self.best.plain()} if self.best is not None else {}
        return {"books": books, "stopping": vars(self.stopping), **best, **ending}

    def take(self, plain: dict[str, Any]) -> None:
        """Continue from these values, which `plain` returned on another rank or in another process."""
        books = plain["books"]
        self.cursor, self.step = books["cursor"], books["step"]
        self.phase, self.phase_start = books["phase"], books["phase_start"]
        summaries = [PhaseSummary(**row) for row in books["summaries"]]
        before = [summary for summary in self.summaries if summaries and summary.index < summaries[0].index]
        self.summaries = before + summaries
        known = {item.name for item in fields(EarlyStopping)}  # version 0.1 saved one more
        self.stopping = EarlyStopping(**{key: value for key, value in plain["stopping"].items() if key in known})
        self.ending, self.why = Ending(plain["ending"]), plain["why"]
        self.owed = Ask(plain.get("owed", 0))  # version 0.1 began without it
        if self.best is not None:
            self.best.take(plain.get("best"))  # a run without train.keep_best has none


class TrainingClock:
    """Adds a phase's time to its summary. It stands still during evaluations and checkpoints. `now`: in nanoseconds."""

    def __init__(self, now: Callable[[], int], summary: PhaseSummary) -> None:
        self._now, self._summary = now, summary
        self._since = now()

    @property
    def seconds(self) -> float:
        """Training time in this phase so far."""
        return (self._now() - self._since) / 1e9 + self._summary.seconds

    @contextmanager
    def stopped(self, held: int) -> Iterator[None]:
        """Exclude the time inside the context from training time, and the `held` nanoseconds before it, in which this
        worker waited for the others to reach it."""
        summary, began = self._summary, self._now() - held
        summary.seconds += (began - self._since) / 1e9
        try:
            yield
        finally:
            self._since = self._now()
            summary.pauses += (self._since - began) / 1e9
