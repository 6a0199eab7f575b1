"""Traces: what every rank did, to the microsecond. No other code knows the HDF5 layout.

`open_run(path)` reads a run; `Recorder` and `TraceWriter` write one. Importing this package loads neither
h5py nor pandas.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.trace.reader import Run, open_run
    from hpctrain.trace.recorder import NullRecorder, Recorder, measure_span_cost
    from hpctrain.trace.resources import Sampler
    from hpctrain.trace.schema import SCHEMA_VERSION, Kind
    from hpctrain.trace.totals import format_totals, sum_times
    from hpctrain.trace.writer import TraceWriter, link_ranks, next_attempt, trace_path

_HOME = {
    "Run": "reader",
    "open_run": "reader",
    "NullRecorder": "recorder",
    "Recorder": "recorder",
    "measure_span_cost": "recorder",
    "Sampler": "resources",
    "SCHEMA_VERSION": "schema",
    "Kind": "schema",
    "format_totals": "totals",
    "sum_times": "totals",
    "TraceWriter": "writer",
    "link_ranks": "writer",
    "next_attempt": "writer",
    "trace_path": "writer",
}

__all__ = [
    "SCHEMA_VERSION",
    "Kind",
    "NullRecorder",
    "Recorder",
    "Run",
    "Sampler",
    "TraceWriter",
    "format_totals",
    "link_ranks",
    "measure_span_cost",
    "next_attempt",
    "open_run",
    "sum_times",
    "trace_path",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
