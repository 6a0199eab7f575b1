"""Comparisons of figures that were measured in turn: paired by block, with 95 % intervals.

Block i of one thing ran just before or after block i of the other, so that a machine that drifts changes both. The
interval is the delete-one-block jackknife's, with Student's t; for a ratio, of the mean logarithm of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.bench.report import Sample, number

LEVEL = 0.95
TINY = 1e-12  # stands for times of 0, which only virtual ranks have
Statistic = Callable[[Sequence[np.ndarray]], float]


@dataclass(frozen=True)
class Goal:
    """What a comparison should reach: at least `value`, or at most."""

    value: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        return value >= self.value if self.at_least else value <= self.value

    def __str__(self) -> str:
        return f"{'at least' if self.at_least else 'at most'} {self.value:g}"


@dataclass(frozen=True)
class Comparison:
    """A figure of `what` in `column`, derived from several rows, with its interval (NaN for fewer than two blocks)."""

    what: str
    column: str
    value: float
    low: float
    high: float
    blocks: int
    target: Goal | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met, and whether that is certain: not if it lies in the interval; "" without one."""
        if self.target is None:
            return ""
        if math.isnan(self.value):
            return "unknown"
        certain = not self.low < self.target.value < self.high and not (self.blocks > 1 and math.isnan(self.low))
        unsure = "" if certain else ", not certain"
        return ("met" if self.target.met(self.value) else "not met") + unsure

    def __str__(self) -> str:
        known = not np.isnan(self.low)
        interval = f" ({number(self.low)} to {number(self.high)})" if known else ""
        target = f"; target {self.target}: {self.verdict}" if self.target is not None else ""
        return f"{self.what}, {self.column}: {number(self.value)}{interval}{target}"

    def plain(self) -> dict[str, Any]:
        """Plain values for JSON."""
        target = {} if self.target is None else {"target": str(self.target), "verdict": self.verdict}
        return {"what": self.what, "column": self.column, "value": self.value, "low": self.low, "high": self.high,
                "blocks": self.blocks, **target}  # fmt: skip


def ratio(what: str, column: str, mine: Sample, other: Sample, target: Goal | None = None) -> Comparison:
    """`mine` over `other`, block by block: the geometric mean."""
    blocks = [np.maximum(part, TINY) for part in _blocks(mine, other)]
    found = jackknife(blocks, lambda parts: float(np.mean(np.log(parts[0]) - np.log(parts[1]))))
    value, low, high = (math.exp(each) for each in found)
    return Comparison(what, column, value, low, high, len(blocks[0]), target)


def difference(
    what: str, column: str, mine: Sample, other: Sample, scale: float, target: Goal | None = None
) -> Comparison:
    """The mean of `mine` minus `other`, block by block, times `scale`."""
    blocks = _blocks(mine, other)
    found = jackknife(blocks, lambda parts: scale * float((parts[0] - parts[1]).mean()))
    return Comparison(what, column, *found, blocks=len(blocks[0]), target=target)


def exposed(what: str, column: str, mine: Sample, other: Sample, without: Sample, target: Goal | None) -> Comparison:
    """The communication that `mine` adds to a step `without` any, over what `other` adds: the ratio of the means."""
    blocks = _blocks(mine, other, without)

    def statistic(parts: Sequence[np.ndarray]) -> float:
        own, others, none = (float(part.mean()) for part in parts)
        return (own - none) / (others - none) if others > none else float("nan")

    return Comparison(what, column, *jackknife(blocks, statistic), blocks=len(blocks[0]), target=target)


def jackknife(blocks: Sequence[np.ndarray], statistic: Statistic) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of several series, of which each block is left out in turn."""
    from scipy.stats import t

    count, value = len(blocks[0]), statistic(blocks)
    if count < 2:
        return value, float("nan"), float("nan")
    without = np.array([statistic([np.delete(part, block) for part in blocks]) for block in range(count)])
    error = np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())
    reach = float(t.ppf(0.5 + LEVEL / 2, count - 1) * error)
    return value, value - reach, value + reach


def _blocks(*samples: Sample) -> list[np.ndarray]:
    count = min(len(sample.values) for sample in samples)
    return [np.asarray(sample.values[:count]) for sample in samples]
