"""The arithmetic of a study's tables: means and spreads over seeds, what is saved, how long a step takes, verdicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from hpctrain.study.case import Measure

LIMITS = {"10 Mbit/s": 10e6, "100 Mbit/s": 100e6, "1 Gbit/s": 1e9}


@dataclass(frozen=True)
class Line:
    """One row of a table. `mean`, `spread`: of the metric over `seeds` runs (the standard deviation of a sample; 0 of
    one run); `loss`: the mean. `points`: how far the metric is from the base's, times 100, and `error`, the standard
    error of that, over pairs of runs with the same seed; `loss_change`: the loss relative to the base's, minus 1.
    `payload`, `received`, `busiest`: bytes per step, see `runs.figures_of`; `saved`, `link_saved`: how many times less
    payload, and bytes on the busiest link, than the base takes."""

    row: str
    seeds: int
    mean: float
    spread: float
    loss: float
    points: float
    error: float
    loss_change: float
    payload: float
    received: float
    busiest: float
    saved: float
    link_saved: float

    @property
    def uncertainty(self) -> str:
        """Of `points`, if there is more than one seed."""
        return f" ± {self.error:.2f}" if self.seeds > 1 else ""

    def wire_seconds(self, bits_per_second: float) -> float:
        """What the busiest link takes for a step's bytes, at that rate."""
        return self.busiest * 8 / bits_per_second


@dataclass(frozen=True)
class Wanted:
    """What a row should reach. `points`: how far the metric may be below the base's, in hundredths; `loss`: by which
    share the loss may exceed the base's; `payload`: by which factor it must be smaller than the base's, to three
    digits."""

    row: str
    measure: Measure
    bound: float

    def verdict(self, line: Line) -> tuple[str, bool]:
        """(what was found, whether it reaches the target)."""
        if self.measure == "payload":
            saved = f"{line.saved:.3g}"
            return f"{saved} times less", float(saved) >= self.bound
        if self.measure == "loss":
            return f"{100 * line.loss_change:+.1f} % ({line.seeds})", line.loss_change <= self.bound
        return f"{line.points:+.2f} points{line.uncertainty} ({line.seeds})", line.points >= -self.bound

    @property
    def text(self) -> str:
        """What is wanted."""
        return {
            "payload": f"payload {self.bound:g} times less",
            "loss": f"loss at most {100 * self.bound:g} % above",
            "points": f"metric at most {self.bound:g} points below",
        }[self.measure]


def lines(found: pd.DataFrame, rows: Sequence[str], base: str) -> list[Line]:
    """The rows that have results, in that order. `found`: a run per row, of one setting. Only seeds that the base has,
    too, are compared with it."""
    if found.empty:
        return []
    by = {name: runs.set_index("seed").sort_index() for name, runs in found.groupby("row")}
    reference = by.get(base)
    return [_line(name, by[name], reference) for name in rows if name in by]


def _line(name: str, runs: pd.DataFrame, base: pd.DataFrame | None) -> Line:
    first = runs.mean(numeric_only=True)
    common = runs.index.intersection(base.index) if base is not None else runs.index[:0]
    own, other = runs.loc[common], (base.loc[common] if base is not None else runs.loc[common])
    points = 100 * (own["metric"] - other["metric"])
    return Line(
        row=name,
        seeds=len(runs),
        mean=float(first["metric"]),
        spread=_spread(runs["metric"]),
        loss=float(first["loss"]),
        points=float(points.mean()),
        error=_spread(points) / math.sqrt(len(points)) if len(points) else math.nan,
        loss_change=float(own["loss"].mean() / other["loss"].mean() - 1),
        payload=float(first["payload"]),
        received=float(first["received"]),
        busiest=float(first["busiest"]),
        saved=_ratio(other["payload"].mean(), first["payload"]),
        link_saved=_ratio(other["busiest"].mean(), first["busiest"]),
    )


def _spread(values: pd.Series[float]) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _ratio(whole: float, part: float) -> float:
    return float(whole / part) if part else math.nan
