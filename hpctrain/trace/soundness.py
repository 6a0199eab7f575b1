"""What can stand in a trace: the limits of every number, which distinguish sound rows and attributes from damaged ones.

Whatever reads traces may take them for granted: rows and attributes that are outside are left out where files are
read (`files`), and noted. They are wide: nothing that a rank has ever written is beyond them.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import Any

import numpy as np

from hpctrain.trace.schema import KINDS, OUTCOMES

Rows = np.ndarray[Any, Any]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_RANKS = 10**6  # as a job has them
MOST = 10**15  # of steps, samples and bytes: a thousand rows of it can be summed up in 64 bits
LATEST_NS = 1 << 62  # of any clock; nanoseconds of the calendar reach it in 2116
LONGEST_NS = 1 << 56  # that anything lies apart from when its file was made: over two years
FARTHEST_NS = 1 << 60  # that ranks begin apart: 36 years, for clocks that were never set

Limits = tuple[float, float]
LIMITS: dict[str, dict[str, Limits]] = {
    "spans": {
        "step": (-1, MOST),
        "kind": (1, len(KINDS)),
        "lane": (0, 1),
        "bytes": (-1, MOST),
        "peer": (-1, MOST_RANKS - 1),
        "id": (-1, LATEST_NS),
        "items": (0, MOST),
        "flops": (0, 1e30),
    },
    "steps": {
        "step": (-1, MOST),
        "epoch": (0, 1e12),
        "samples": (0, MOST),
        "outcome": (1, len(OUTCOMES)),
        "staleness_min": (-1, 2**31),
        "staleness_max": (-1, 2**31),
        "phase": (0, 2**31),
        "cursor": (-1, MOST),
    },
    "resources": {
        "cpu": (-1, 1e9),
        "resident": (-1, 2**60),
        "net_in": (-1, 2**62),
        "net_out": (-1, 2**62),
        "gpu": (-1, 1e9),
        "gpu_memory": (-1, 2**60),
    },
    "events": {},
    "clock": {"offset_ns": (-LATEST_NS, LATEST_NS), "error_ns": (0, LATEST_NS)},
}
TIMES = ("start_ns", "end_ns", "t_ns")

INTEGERS: dict[str, Limits] = {
    "schema_version": (0, MOST),
    "rank": (0, MOST_RANKS - 1),
    "size": (1, MOST_RANKS),
    "node": (0, MOST_RANKS - 1),
    "attempt": (1, 9999),
    "parameters": (0, MOST),
    "clock_ns": (-LATEST_NS, LATEST_NS),
    "unix_ns": (0, LATEST_NS),
}


def sound_attribute(name: str, value: object) -> bool:
    """Whether that can stand in an attribute: a number within its limits; under other names a text or a number."""
    if name in INTEGERS:
        low, high = INTEGERS[name]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, (str, int, float))


def sound_rows(table: str, rows: Rows, made_ns: int, ranks: int = MOST_RANKS) -> Rows:
    """The `rows` of a table (with the rank's own times) that a rank can have written in a run of `ranks` ranks.

    `made_ns`: when its file was made, by the same clock.
    """
    if not len(rows):
        return rows
    names = rows.dtype.names or ()
    limits = LIMITS[table] | {name: (made_ns - LONGEST_NS, made_ns + LONGEST_NS) for name in TIMES if name in names}
    if "peer" in limits:
        limits["peer"] = (-1, ranks - 1)
    faults = [mask for name, (low, high) in limits.items() if (mask := _outside(rows[name], low, high)) is not None]
    if "end_ns" in names:
        backwards: Mask = rows["end_ns"] < rows["start_ns"]
        faults += [backwards] if backwards.any() else []
    return rows[~np.logical_or.reduce(faults)] if faults else rows


def _outside(column: Rows, low: float, high: float) -> Mask | None:
    """Which values are not within the limits, NaN among them; None if all are."""
    column = np.ascontiguousarray(column)  # rows are packed: going through them twice costs more than a copy
    if low <= column.min() and column.max() <= high:
        return None
    return ~((column >= low) & (column <= high))


def made_ns(attributes: Mapping[str, Any], clock: Rows) -> int:
    """When a file was made, by its rank's clock; 0 if nothing says. `clock`: its rows."""
    moments = clock["t_ns"].tolist() + [attributes[name] for name in ("clock_ns",) if name in attributes]
    return median_low(moments) if moments else 0
