"""The loss over time, condensed to a few dozen numbers however long the run."""

from __future__ import annotations

import numpy as np

from hpctrain.trace.files import Rows


class History:
    """Mean losses over at most `most` equal stretches of samples, whose width doubles as the run grows."""

    def __init__(self, most: int = 60) -> None:
        self._most, self._width = most, 1
        self._sums: dict[int, tuple[float, float]] = {}  # by stretch: sum of losses, number of losses

    def add(self, steps: Rows) -> None:
        """Add rows of /steps; those with an unknown cursor or without a finite loss do not count."""
        steps = steps[(steps["cursor"] >= 0) & np.isfinite(steps["loss"]) & (steps["samples"] > 0)]
        if not len(steps):
            return
        while int(steps["cursor"].max()) // self._width >= self._most:
            self._double()
        place = steps["cursor"] // self._width
        for stretch in np.unique(place).tolist():
            losses = steps["loss"][place == stretch]
            total, count = self._sums.get(stretch, (0.0, 0.0))
            self._sums[stretch] = total + float(losses.sum()), count + len(losses)

    def forget(self, cursor: int) -> None:
        """Drop everything beyond `cursor`, where a resumed run continues."""
        self._sums = {stretch: sums for stretch, sums in self._sums.items() if stretch * self._width < cursor}

    def means(self) -> list[float]:
        """The mean losses in order of samples, without stretches that have no step."""
        return [total / count for _, (total, count) in sorted(self._sums.items())]

    def _double(self) -> None:
        self._width *= 2
        halves, self._sums = self._sums, {}
        for stretch, (total, count) in halves.items():
            before = self._sums.get(stretch // 2, (0.0, 0.0))
            self._sums[stretch // 2] = before[0] + total, before[1] + count
