"""The Trace Event Format: times, names of processes and threads, infrequent events. Does not use pandas."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def microseconds(ns: Numbers) -> Any:
    """Convert to float microseconds that restore every nanosecond, whether a reader multiplies by 1000 and rounds or
    truncates.

    One nanosecond less would make adjacent spans overlap, and Perfetto drops overlapping spans.
    """
    times = ns / 1000
    short = (times * 1000).astype(np.int64) < ns
    times[short] = np.nextafter(times[short], np.inf)
    return times


def microsecond(ns: int) -> float:
    return float(microseconds(np.array([ns], np.int64))[0])


def name_process(pid: int, name: str, place: int) -> Iterator[str]:
    """`place`: the sort key of the process."""
    yield from _metadata("process", pid, 0, name, place)


def name_thread(pid: int, tid: int, name: str, place: int) -> Iterator[str]:
    """`place`: the sort key of the thread within its process."""
    yield from _metadata("thread", pid, tid, name, place)


def _metadata(what: str, pid: int, tid: int, name: str, place: int) -> Iterator[str]:
    for key, args in ((f"{what}_name", {"name": name}), (f"{what}_sort_index", {"sort_index": place})):
        yield json.dumps({"name": key, "ph": "M", "pid": pid, "tid": tid, "args": args})


def instant(name: str, ns: int, pid: int, tid: int, scope: str, args: dict[str, Any]) -> str:
    """`scope`: "g" for a line across the whole timeline, "t" for a mark on the thread."""
    event = {"name": name, "cat": "event", "ph": "i", "s": scope, "ts": microsecond(ns), "pid": pid, "tid": tid}
    return json.dumps({**event, "args": args})


def complete(name: str, category: str, ns: int, length_ns: int, pid: int, tid: int, args: dict[str, Any]) -> str:
    event = {"name": name, "cat": category, "ph": "X", "ts": microsecond(ns), "dur": microsecond(length_ns)}
    return json.dumps({**event, "pid": pid, "tid": tid, "args": args})


def counter(name: str, ns: int, pid: int, tid: int, unit: str, value: float) -> str:
    event = {"name": name, "cat": "resources", "ph": "C", "ts": microsecond(ns), "pid": pid, "tid": tid}
    return json.dumps({**event, "args": {unit: value}})
