"""Follows one rank's trace file while it grows: reads only new rows, and only the last of them if there are many.

The file is read through SWMR, without locks, and reopened for every look: this does not disturb a run in progress, and
on a network file system every look sees the latest rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.trace.files import Rows, TraceFile, open_file, open_h5, read_rows, rows_there
from hpctrain.trace.soundness import TIMES

MOST_ROWS = 1 << 15  # read from one table per look
STRETCHES, STRETCH_ROWS = 64, 16


@dataclass
class News:
    """New rows since the last look, with times on rank 0's clock. `sampled`: some of the skipped steps; `cut`: whether
    spans were skipped."""

    events: Rows
    spans: Rows
    steps: Rows
    sampled: Rows
    cut: bool

    def __bool__(self) -> bool:
        return any(map(len, (self.events, self.spans, self.steps)))


class Tail:
    """The end of a trace file.

    Attributes: `file`: its attributes and state; `damaged`: the number of invalid rows left out; `changed`: when it
    last gained rows, in seconds since 1970 (before the first new rows: when it was last written to); `closed`: whether
    its writer has closed it and all of it has been read.

    Raises TraceError for an unknown schema version, TraceError or one of `files.UNREADABLE` for an unreadable file.
    """

    def __init__(self, path: Path, rank: int, attempt: int) -> None:
        self.file: TraceFile = open_file(path, rank, attempt)
        self.changed = path.stat().st_mtime
        self.closed = False
        self.damaged = 0
        self._seen = {"events": 0, "spans": 0, "steps": 0}
        self._stamp: tuple[int, int] | None = None
        self._settled = False

    def look(self, now: float, sample: bool = True) -> News | None:
        """Return the new rows, or None. `now`: seconds since 1970. Raises the same errors as the class.

        In a table with more than `MOST_ROWS` new rows, the older ones are skipped; skipped steps are sampled if
        `sample` is set. Returns None until the clocks have been measured or the file is closed.
        """
        stat = self.file.path.stat()
        stamp, before = (stat.st_size, stat.st_mtime_ns), self._stamp
        if self.closed or (stamp == before and self._settled):
            return None
        if stamp == before or not len(self.file.clock):  # a growing file cannot be closed: no need to check
            self.file = open_file(self.file.path, self.file.rank, self.file.attempt)
        closed = self.file.closed  # taken before the rows are read: if True, the rows are complete
        if not len(self.file.clock) and not closed:
            return None
        news = self._read(sample)
        if news and before is not None:
            self.changed = now
        # A file read twice with the same stamp has no more rows. Once is not enough: file times have a resolution of
        # milliseconds.
        self._stamp, self._settled, self.closed = stamp, stamp == before, closed
        return news or None

    def _read(self, sample: bool) -> News:
        path, seen = self.file.path, self._seen
        with open_h5(path) as h5:
            there = {name: rows_there(h5[name], path)[1] for name in seen}
            starts = {name: max(seen[name], rows - MOST_ROWS) for name, rows in there.items()}
            read = read_rows if self.file.closed else _new_rows  # a closed file gets no more rows
            blocks = {name: read(h5[name], starts[name], rows) for name, rows in there.items()}
            passed = (seen["steps"], starts["steps"]) if sample else (0, 0)
            blocks["sampled"] = _sample(h5["steps"], *passed)
        cut = starts["spans"] > seen["spans"]
        self._seen = {name: starts[name] + len(blocks[name]) for name in seen}
        if self.file.closed:
            self.damaged += sum(there[name] - self._seen[name] for name in seen)
        for name, rows in blocks.items():
            table = "steps" if name == "sampled" else name
            blocks[name] = self.file.sound(table, rows)
            self.damaged += len(rows) - len(blocks[name])
        for rows in blocks.values():
            for column in set(TIMES) & set(rows.dtype.names or ()):
                rows[column] = self.file.correct(rows[column])
        return News(**blocks, cut=cut)


def _new_rows(table: Any, start: int, stop: int) -> Rows:
    """Rows start to stop, up to the first that has not reached the file yet (all zeros)."""
    if start >= stop:
        return np.zeros(0, table.dtype)
    rows: Rows = table[start:stop]
    there = rows.view((np.uint8, (rows.dtype.itemsize,))).any(axis=1)
    return rows if there.all() else rows[: int(there.argmin())]


def _sample(table: Any, start: int, stop: int) -> Rows:
    """A sample of the rows from start to stop, in equally spaced short stretches."""
    begins = np.linspace(start, stop, STRETCHES, endpoint=False, dtype=np.int64) if stop > start else np.zeros(0, int)
    parts = [_new_rows(table, begin, min(begin + STRETCH_ROWS, stop)) for begin in begins.tolist()]
    return np.concatenate([np.zeros(0, table.dtype), *parts])
