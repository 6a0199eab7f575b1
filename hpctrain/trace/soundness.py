"""The limits of every number in a trace, which distinguish valid rows and attributes from damaged ones.

Code that reads traces can rely on them: rows and attributes outside the limits are left out, and noted, where files
are read (`files`). The limits are wide: nothing that a rank writes exceeds them.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import Any

import numpy as np

from hpctrain.trace.schema import KINDS, OUTCOMES, THREADS

Rows = np.ndarray[Any, Any]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

MOST_RANKS = 10**6  # the limit for a job
MOST = 10**15  # steps, samples or bytes: the sum of a thousand such rows fits in 64 bits
LATEST_NS = 1 << 62  # on any clock; calendar time in nanoseconds reaches it in 2116
LONGEST_NS = 1 << 56  # between any time and the creation of its file: over two years
FARTHEST_NS = 1 << 60  # between the starts of ranks: 36 years, for clocks that were never set

Limits = tuple[float, float]
LIMITS: dict[str, dict[str, Limits]] = {
    "spans": {
        "step": (-1, MOST),
        "kind": (1, len(KINDS)),
        "lane": (0, max(THREADS)),
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
    "device": {"step": (-1, MOST), "kind": (1, len(KINDS)), "error_ns": (0, LATEST_NS)},
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
    """Whether an attribute is valid: a number within its limits; for names without limits, any text or number."""
    if name in INTEGERS:
        low, high = INTEGERS[name]
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, (str, int, float))


def sound_rows(table: str, rows: Rows, made_ns: int, ranks: int = MOST_RANKS) -> Rows:
    """The valid ones among the `rows` of a table, whose times are on the rank's own clock, in a run of `ranks` ranks.

    `made_ns`: when the file was made, on the same clock.
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
    """Mask of the values outside the limits, including NaN; None if all are within them."""
    column = np.ascontiguousarray(column)  # rows are packed: two strided passes cost more than a copy
    if low <= column.min() and column.max() <= high:
        return None
    return ~((column >= low) & (column <= high))


def made_ns(attributes: Mapping[str, Any], clock: Rows) -> int:
    """When a file was made, on its rank's clock; 0 if unknown. `clock`: the rows of its clock table."""
    moments = clock["t_ns"].tolist() + [attributes[name] for name in ("clock_ns",) if name in attributes]
    return median_low(moments) if moments else 0
