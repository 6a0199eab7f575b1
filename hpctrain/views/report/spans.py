"""The data for the report's timeline: a run's spans, reduced to a number of bytes that fits on the page.

Times are rounded down to a grid, whose step is the quantum. Spans that begin and end between two grid points disappear;
the quantum is doubled until the others fit. Spans are read rank by rank, so that memory holds only the spans kept and
those of one rank.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpctrain.trace import Run

Column = np.ndarray[Any, Any]
FIRST_QUANTUM_NS = 1000
TYPES = {"start": np.int64, "end": np.int64, "kind": np.uint8, "step": np.int64, "peer": np.int32, "bytes": np.int64}
COLUMNS = ("gap", "duration", "step", "peer", "bytes")  # their order in a packed row, after the kinds


@dataclass
class Spans:
    """Spans of one rank's lane on a grid, sorted by time: start, end (in quanta since the run's start), kind, step,
    peer, bytes. `hidden`, `hidden_ns`: number and total time of the spans lost to the grid. Spans of zero length (for
    messages that arrived before their rank waited) are in neither.
    """

    rank: int
    lane: int
    columns: dict[str, Column] = field(default_factory=lambda: {n: np.zeros(0, type) for n, type in TYPES.items()})
    hidden: int = 0
    hidden_ns: int = 0

    def __len__(self) -> int:
        return len(self.columns["start"])

    def append(self, rows: Column, origin_ns: int, quantum_ns: int) -> None:
        """Add rows of the trace's /spans, all of this lane."""
        start, end = rows["start_ns"] - origin_ns, rows["end_ns"] - origin_ns
        seen = start // quantum_ns < end // quantum_ns
        self.hidden += int(((end > start) & ~seen).sum())
        self.hidden_ns += int((end - start)[~seen].sum())
        more = {"start": start[seen] // quantum_ns, "end": end[seen] // quantum_ns}
        more |= {name: rows[name][seen] for name in ("kind", "step", "peer", "bytes")}
        self.columns = {name: np.concatenate([self.columns[name], part]) for name, part in more.items()}

    def coarsen(self, quantum_ns: int) -> None:
        """Double the quantum, which is now `quantum_ns`. The result is as if the spans had been read on that grid."""
        start, end = self.columns["start"], self.columns["end"]
        seen = start // 2 < end // 2
        self.hidden += len(start) - int(seen.sum())
        self.hidden_ns += int((end - start)[~seen].sum()) * quantum_ns
        self.columns = {name: column[seen] for name, column in self.columns.items()}
        self.columns["start"], self.columns["end"] = self.columns["start"] // 2, self.columns["end"] // 2

    def sort(self) -> None:
        """Sort by time and remove overlaps (which damaged traces and clocks that were set back can cause)."""
        start = self.columns["start"]
        if (np.diff(start) < 0).any():
            order = np.argsort(start, kind="stable")
            self.columns = {name: column[order] for name, column in self.columns.items()}
        ends = self.columns["end"]
        np.minimum(ends[:-1], np.maximum(self.columns["start"][1:], self.columns["start"][:-1]), out=ends[:-1])

    def pack(self) -> PackedSpans:
        """Compress the columns one after the other, each split into byte planes: adjacent similar bytes compress best.

        Durations are sorted by kind for the same reason; the reader restores their order.
        """
        start, end, kind, step = (self.columns[name] for name in ("start", "end", "kind", "step"))
        values = {
            "gap": start[1:] - end[:-1],
            "duration": (end - start)[np.argsort(kind, kind="stable")],
            "step": zigzag(np.diff(step, prepend=0)),
            "peer": self.columns["peer"].astype(np.int64) + 1,
            "bytes": np.maximum(self.columns["bytes"], 0),
        }
        planes = {name: _planes(values[name]) for name in COLUMNS}
        data = zlib.compress(kind.tobytes() + b"".join(plane.tobytes() for plane in planes.values()), 6)
        first = int(start[0]) if len(start) else 0
        return PackedSpans(len(kind), first, [len(planes[name]) for name in COLUMNS], data)


@dataclass
class PackedSpans:
    """`count` spans, compressed with zlib. `first`: start of the first, in quanta; `planes`: bytes per value, by column
    of COLUMNS."""

    count: int
    first: int
    planes: list[int]
    data: bytes

    def base64(self) -> str:
        return base64.b64encode(self.data).decode()


def zigzag(values: Column) -> Column:
    """Map signed to unsigned values, keeping small ones small: 0, -1, 1, -2 ... -> 0, 1, 2, 3 ..."""
    return np.where(values < 0, -2 * values - 1, 2 * values)


def _planes(values: Column) -> Column:
    """Byte planes, of shape (bytes the largest value needs, len(values)): all lowest bytes, then all second ones ..."""
    width = max(1, (int(values.max(initial=0)).bit_length() + 7) // 8)
    return values.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width].T


@dataclass
class SpanStore:
    """All rows of a run's timeline on one grid of `quantum_ns`, within `budget` bytes of base64."""

    budget: int
    quantum_ns: int = FIRST_QUANTUM_NS
    rows: list[tuple[Spans, PackedSpans]] = field(default_factory=list)

    def add(self, rows: Iterable[Spans], share: float) -> None:
        """Add rows read on the current grid. `share`: of the run's ranks, the part (0 to 1) added after this call."""
        for spans in rows:
            spans.sort()
            self.rows.append((spans, spans.pack()))
        # Ranks differ (servers, workers), so the first ones may take more than their share.
        while self.size() > self.budget * min(1.0, 1.5 * share):
            for spans, _ in self.rows:
                spans.coarsen(self.quantum_ns)
            self.quantum_ns *= 2
            self.rows = [(spans, spans.pack()) for spans, _ in self.rows]

    def size(self) -> int:
        """Size in bytes of base64."""
        return sum((len(packed.data) + 2) // 3 * 4 for _, packed in self.rows)

    @property
    def hidden(self) -> tuple[int, int, float]:
        """(number of spans lost to the grid, number of all spans, seconds of those lost)."""
        hidden = sum(spans.hidden for spans, _ in self.rows)
        return hidden, hidden + sum(len(spans) for spans, _ in self.rows), sum(s.hidden_ns for s, _ in self.rows) / 1e9


def collect_spans(run: Run, budget: int, notify: Callable[[str], None] = lambda text: None) -> SpanStore:
    """The spans of all ranks and lanes within `budget` bytes; `notify` is called with progress messages."""
    store, origin = SpanStore(budget), run.start_ns
    for place, rank in enumerate(run.ranks, 1):
        notify(f"report: reading the spans of rank {rank} of {run.size}")
        lanes = {0: Spans(rank, 0)}
        for _, _, block in run.blocks("spans", rank):
            for lane in np.unique(block["lane"]).tolist():
                spans = lanes.setdefault(lane, Spans(rank, lane))
                spans.append(block[block["lane"] == lane], origin, store.quantum_ns)
        store.add((lanes[lane] for lane in sorted(lanes)), place / len(run.ranks))
    return store
