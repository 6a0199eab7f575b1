"""What `hpctrain watch` shows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RunStatus(Enum):
    """The state of a run, as far as its folder shows."""

    WAITING = "has not started writing"
    RUNNING = "running"
    SILENT = "silent"  # open files without new rows: the run hangs or was killed
    STOPPED = "stopped before its end"  # interrupted, or ended by an error
    FINISHED = "finished"

    @property
    def over(self) -> bool:
        """Whether no more rows will follow."""
        return self in (RunStatus.STOPPED, RunStatus.FINISHED)

    @property
    def going(self) -> bool:
        """Whether ranks appear to be at work."""
        return self in (RunStatus.WAITING, RunStatus.RUNNING)


@dataclass(frozen=True)
class RankView:
    """One rank in the last seconds. None: unknown or meaningless.

    `rate`: samples per second; `sample_seconds`: forward and backward pass of one sample; `waiting`: share of its time
    in communication; `staleness`: (mean, largest) of its steps; `slowness`: its `sample_seconds` relative to the other
    workers' median, if that makes it a straggler; `silent`: seconds since it last wrote, if too long; `ended`: whether
    it has closed its trace.
    """

    rank: int
    role: str
    rate: float | None = None
    sample_seconds: float | None = None
    waiting: float | None = None
    staleness: tuple[float, int] | None = None
    slowness: float | None = None
    silent: float | None = None
    ended: bool = False


@dataclass(frozen=True)
class EvaluationRow:
    """A row of metrics.csv. `loss`: None if the model returned none."""

    split: str
    epoch: float
    loss: float | None
    metric: float


@dataclass(frozen=True)
class Notice:
    """An event to show, `seconds` after the first rank began to write."""

    seconds: float
    kind: str
    text: str


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    `since`: time of the last write, in seconds since 1970; `silence`: seconds since then. `phases`: the number of
    phases of the job, if known. `cursor`, `total`: samples consumed so far and samples of the whole run; `left`:
    seconds the rest takes at the recent pace (an upper bound if it `may_stop_early`). `rate`: samples per second of all
    workers. `loss`: mean of the last seconds; `history`: mean losses over the whole run so far. `evaluations`: the
    newest of each split; `best`: the best of the first split. `notices`: the newest event of each kind that is shown.
    """

    name: str
    folder: str
    status: RunStatus
    since: float
    silence: float
    attempt: int = 1
    size: int = 0
    nodes: int = 0
    elapsed: float = 0.0
    phase: int = -1
    phases: int | None = None
    strategy: str = ""
    epoch: float | None = None
    epochs: float | None = None
    cursor: int | None = None
    total: int | None = None
    left: float | None = None
    may_stop_early: bool = False
    rate: float | None = None
    loss: float | None = None
    history: tuple[float, ...] = ()
    metric: str = "metric"
    evaluations: tuple[EvaluationRow, ...] = ()
    best: EvaluationRow | None = None
    notices: tuple[Notice, ...] = ()
    ranks: tuple[RankView, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """The share of the run's samples consumed so far: 0 to 1."""
        return min(1.0, self.cursor / self.total) if self.cursor is not None and self.total else None
