"""Sums over a rank's last seconds, updated as its rows arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hpctrain.trace.files import Rows
from hpctrain.trace.schema import SPANS, Kind, is_communication

SECONDS = 10  # how far back "recent" reaches
STEPS = 5  # ... or this many steps, if they take longer
_SECOND = 1_000_000_000
_COMPUTING = np.isin(np.arange(256), (Kind.FORWARD, Kind.BACKWARD))


@dataclass
class Sums:
    """Sums over everything that ended in one or several seconds. `start_ns`, `end_ns`: the extent of its spans;
    `computing`, `waiting`: seconds; `staleness`: (sum, number of steps, largest), over steps with a staleness."""

    start_ns: int = 1 << 62
    end_ns: int = -(1 << 62)
    computing: float = 0.0
    waiting: float = 0.0
    steps: int = 0
    samples: int = 0
    loss: float = 0.0  # weighted by samples
    staleness: tuple[int, int, int] = (0, 0, -1)

    def __add__(self, other: Sums) -> Sums:
        mine, theirs = self.staleness, other.staleness
        return Sums(
            min(self.start_ns, other.start_ns), max(self.end_ns, other.end_ns), self.computing + other.computing,
            self.waiting + other.waiting, self.steps + other.steps, self.samples + other.samples,
            self.loss + other.loss, (mine[0] + theirs[0], mine[1] + theirs[1], max(mine[2], theirs[2])),
        )  # fmt: skip

    @property
    def seconds(self) -> float:
        """Seconds from the start of the first span to the end of the last."""
        return max(0.0, (self.end_ns - self.start_ns) / _SECOND)

    @property
    def rate(self) -> float | None:
        """Samples per second."""
        return self.samples / self.seconds if self.samples and self.seconds else None

    @property
    def sample_seconds(self) -> float | None:
        """Seconds of forward and backward pass per sample."""
        return self.computing / self.samples if self.samples and self.computing else None

    @property
    def waiting_share(self) -> float | None:
        """The share of the time spent in messages, collectives and barriers, including waiting for them."""
        return self.waiting / self.seconds if self.seconds else None


@dataclass
class Recent:
    """Sums over the last `SECONDS` or `STEPS` of one phase, by second. Steps are not split: everything since the
    previous step counts in the second in which the step ends. Without steps, each span counts where it ends."""

    since_ns: int = -(1 << 62)
    _by_second: dict[int, Sums] = field(default_factory=dict)
    _pending: Rows = field(default_factory=lambda: np.zeros(0, SPANS))  # of a step that has not ended yet

    def begin(self, t_ns: int) -> None:
        """Begin a phase: earlier spans and steps no longer count."""
        self.since_ns = t_ns
        self._by_second = {second: s for second, s in self._by_second.items() if s.start_ns >= t_ns}

    def add(self, spans: Rows, steps: Rows, takes_steps: bool = True, cut: bool = False) -> None:
        """Add new rows of /spans (only lane 0, the rank's main thread, counts) and /steps. `takes_steps`: the rank is
        a worker; `cut`: earlier spans are unknown."""
        ends = steps["t_ns"]
        if cut and len(spans) and len(steps):  # the first fully known step begins where the previous one ends
            first = np.searchsorted(ends, spans["start_ns"][0])
            self.since_ns = max(self.since_ns, int(ends[min(first, len(ends) - 1)]))
        self.since_ns = max(self.since_ns, _reach(ends))
        spans = np.concatenate([self._pending, spans[spans["lane"] == 0]])
        spans, steps = spans[spans["start_ns"] >= self.since_ns], steps[ends > self.since_ns]
        if takes_steps:
            place = np.searchsorted(steps["t_ns"], spans["end_ns"])
            known = place < len(steps)
            self._pending = spans[~known]
            spans, when = spans[known], steps["t_ns"][place[known]]
        else:
            when = spans["end_ns"]
        for second, rows in _by_second(spans, when):
            self._count(second, _of_spans(rows))
        for second, rows in _by_second(steps, steps["t_ns"]):
            self._count(second, _of_steps(rows))
        self._by_second = {second: self._by_second[second] for second in self._kept()}

    def sums(self) -> Sums:
        """The total over all seconds kept."""
        return sum(self._by_second.values(), Sums())

    def _count(self, second: int, sums: Sums) -> None:
        self._by_second[second] = self._by_second.get(second, Sums()) + sums

    def _kept(self) -> list[int]:
        kept: list[int] = []
        steps, enough = 0, STEPS if any(sums.steps for sums in self._by_second.values()) else 0
        for second in sorted(self._by_second, reverse=True):
            if kept and second <= kept[0] - SECONDS and steps >= enough:
                break
            kept.append(second)
            steps += self._by_second[second].steps
        return kept


def _reach(ends: Rows) -> int:
    """The end of the last step that need not be counted because enough steps follow."""
    if len(ends) <= STEPS:
        return -(1 << 62)
    kept = min(int(np.searchsorted(ends, ends[-1] - (SECONDS + 1) * _SECOND)), len(ends) - STEPS)
    return int(ends[kept - 1]) if kept else -(1 << 62)


def _by_second(rows: Rows, times: Rows) -> list[tuple[int, Rows]]:
    seconds = times // _SECOND
    return [(second, rows[seconds == second]) for second in np.unique(seconds).tolist()]


def _of_spans(spans: Rows) -> Sums:
    took = (spans["end_ns"] - spans["start_ns"]) / _SECOND
    kind = spans["kind"]
    waiting = is_communication(spans)
    return Sums(
        int(spans["start_ns"].min()), int(spans["end_ns"].max()),
        float(took[_COMPUTING[kind]].sum()), float(took[waiting].sum()),
    )  # fmt: skip


def _of_steps(steps: Rows) -> Sums:
    stale = steps["staleness_max"][steps["staleness_max"] >= 0]
    consumed = steps[steps["samples"] > 0]
    return Sums(
        steps=len(steps),
        samples=int(steps["samples"].sum()),
        loss=float((consumed["loss"] * consumed["samples"]).sum()),
        staleness=(int(stale.sum()), len(stale), int(stale.max(initial=-1))),
    )
