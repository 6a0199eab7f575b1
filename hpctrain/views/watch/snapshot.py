"""What `hpctrain watch` shows, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RunStatus(Enum):
    """How a run stands, as far as its folder tells."""

    WAITING = "has not begun to write"
    RUNNING = "running"
    SILENT = "silent"  # open files that nobody writes to: it hangs, or was killed
    STOPPED = "stopped before its end"  # interrupted, or ended by an error
    FINISHED = "finished"

    @property
    def over(self) -> bool:
        """Whether nothing more will come."""
        return self in (RunStatus.STOPPED, RunStatus.FINISHED)

    @property
    def going(self) -> bool:
        """Whether, as far as one can tell, ranks are at work."""
        return self in (RunStatus.WAITING, RunStatus.RUNNING)


@dataclass(frozen=True)
class RankView:
    """One rank in the last seconds. None: not known, or without meaning.

    `rate`: samples per second; `sample_seconds`: forward and backward pass of one sample; `waiting`: share of its time
    in communication; `staleness`: (mean, largest) of its steps; `slowness`: how many times its `sample_seconds` are the
    other workers' median, if that makes it a straggler; `silent`: seconds since it wrote, if that is too long; `ended`:
    whether it has closed its trace.
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
    """A row of metrics.csv. `loss`: None where the model returned none."""

    split: str
    epoch: float
    loss: float | None
    metric: float


@dataclass(frozen=True)
class Notice:
    """An event worth a line, `seconds` after the first rank began to write."""

    seconds: float
    kind: str
    text: str


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    `since`: when something was last written, in seconds since 1970; `silence`: how long before this moment that was.
    `phases`: how many the job has, if known. `cursor`, `total`: samples consumed and of the whole run; `left`: seconds
    that the rest takes at the pace of late, at most if it `may_stop_early`. `rate`: samples per second of all workers.
    `loss`: mean of the last seconds; `history`: of the whole run so far. `evaluations`: the newest of each split;
    `best`: the best on the first of these. `told`: the newest event of each kind that says how the run goes.
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
    told: tuple[Notice, ...] = ()
    ranks: tuple[RankView, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float | None:
        """Of the run's samples, how many are consumed: 0 to 1."""
        return min(1.0, self.cursor / self.total) if self.cursor is not None and self.total else None
