"""Selects the part of a run to export: ranks, and an interval of time given in steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.errors import HpctrainError
from hpctrain.trace import Run
from hpctrain.trace.reader import name_ranks

Rows = np.ndarray[Any, Any]
Window = tuple[int, int]
BEGINNING, END = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True)
class Selection:
    """The part of a run to export. `ranks`: in ascending order. `steps`: the requested steps, None for all. `windows`:
    by attempt, start (exclusive) and end of the selected steps in nanoseconds on the run's clock; other attempts are
    left out.
    """

    ranks: list[int]
    steps: range | None
    windows: dict[int, Window] | None

    def window(self, attempt: int) -> Window | None:
        """The attempt's window; None if nothing of the attempt is selected."""
        return (BEGINNING, END) if self.windows is None else self.windows.get(attempt)

    def cut(self, attempt: int, rows: Rows) -> Rows:
        """The rows (of any table, with corrected times) in the window, including spans that only overlap it."""
        window = self.window(attempt)
        if window is None:
            return rows[:0]
        if self.windows is None:
            return rows
        after, until = window
        if "start_ns" in (rows.dtype.names or ()):
            return rows[(rows["end_ns"] > after) & (rows["start_ns"] < until)]
        return rows[(rows["t_ns"] > after) & (rows["t_ns"] <= until)]


def select(run: Run, ranks: Iterable[int] | None, steps: range | None) -> Selection:
    """Select ranks and steps (None: all). Raises HpctrainError if no readable trace has such a rank or step."""
    wanted = sorted(set(run.ranks if ranks is None else ranks))
    absent = [rank for rank in wanted if rank not in run.ranks]
    if absent or not wanted:
        raise HpctrainError(
            f"{run.folder}: no readable trace of rank {', '.join(map(str, absent)) or '(none given)'}; "
            f"choose from {name_ranks(run.ranks)}"
        )
    return Selection(wanted, steps, None if steps is None else _windows(run, steps))


def _windows(run: Run, steps: range) -> dict[int, Window]:
    """Compute the windows from the ends of steps, which only workers record: a server's spans carry the numbers of its
    updates instead."""
    before: dict[tuple[int, int], int] = {}
    windows: dict[int, Window] = {}
    last: dict[tuple[int, int], int] = {}
    seen = [END, -1]
    for rank, attempt, rows in run.blocks("steps", columns=("step", "t_ns")):
        step, key = rows["step"], (rank, attempt)
        seen = [min(seen[0], int(step.min())), max(seen[1], int(step.max()))]
        earlier = rows["t_ns"][step < steps.start]
        before[key] = max(before.get(key, BEGINNING), int(earlier.max(initial=BEGINNING)))
        inside = rows["t_ns"][(step >= steps.start) & (step < steps.stop)]
        if len(inside):
            last[key] = max(last.get(key, BEGINNING), int(inside.max()))
    for (rank, attempt), until in last.items():
        after = before[rank, attempt]
        known = windows.get(attempt, (after, until))
        windows[attempt] = min(known[0], after), max(known[1], until)
    if not windows:
        there = f"the run has steps {seen[0]} to {seen[1]}" if seen[1] >= 0 else "no step was traced"
        raise HpctrainError(f"{run.folder}: no rank has any of the steps {steps.start} to {steps.stop - 1}; {there}")
    return windows
