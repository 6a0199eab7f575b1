"""The layout of a trace file, version 4: span kinds, row types, codes. Does not use h5py.

A file is `trace/rank_RRRRR.h5` (attempt 1) or `trace/rank_RRRRR.A.h5` (attempt A of a resumed run). It has one
one-dimensional dataset per entry of `TABLES`. Codes start at 1, so a row of zeros is a row that never reached the file
(because the file was truncated, for example). All times are nanoseconds on the rank's own clock.

A number outside its column's range is written as the nearest value in range, so that tracing never ends a run. Columns
for which a job can cause this have a comment; the others have more range than any run needs. `versions` has the
layouts of older files.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

import numpy as np

from hpctrain.trace.events import JSON_BYTES, KIND_BYTES

SCHEMA_VERSION = 4


class Kind(IntEnum):
    """The kinds of spans; the value is the code in the file."""

    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    ENCODE = 4
    DECODE = 5
    SEND = 6
    RECV = 7
    REDUCE = 8
    NOTIFY = 9
    WAIT = 10
    UPDATE = 11
    SWITCH = 12
    EVALUATE = 13
    CHECKPOINT = 14
    TRACE = 15


class OutcomeCode(IntEnum):
    """What happened to a step's gradient."""

    APPLIED = 1
    DROPPED = 2
    LOCAL = 3
    SKIPPED = 4


KINDS: tuple[str, ...] = tuple(kind.name.lower() for kind in Kind)
OUTCOMES: tuple[str, ...] = tuple(outcome.name.lower() for outcome in OutcomeCode)


class _Codes(dict[Any, int]):
    """Maps a name or a code to the code; anything else is a programming error and raises ValueError."""

    def __init__(self, what: str, codes: type[IntEnum]) -> None:
        super().__init__({code.name.lower(): int(code) for code in codes} | {int(code): int(code) for code in codes})
        self._what = what

    def __missing__(self, key: Any) -> int:
        names = ", ".join(name for name in self if isinstance(name, str))
        raise ValueError(f"{key!r} is not a known {self._what}; choose from {names}")


KIND_CODES = _Codes("span kind", Kind)
OUTCOME_CODES = _Codes("outcome", OutcomeCode)
COMMUNICATION = (Kind.SEND, Kind.RECV, Kind.NOTIFY, Kind.WAIT, Kind.REDUCE)


def is_communication(spans: Any) -> Any:
    """For rows (or a frame) of spans: whether each is communication.

    Of the `reduce` spans, only a sum that a rank computes itself is not, such as one over memory that ranks share: it
    records its additions (flops). An all-reduce records none, by whatever way it goes, nor do the copies around one.
    """
    own = (spans["kind"] == Kind.REDUCE) & (spans["flops"] > 0)
    return np.isin(spans["kind"], COMMUNICATION) & ~own


# The threads of a rank besides its main one, by lane.
THREADS = {1: "server thread", 2: "reduce thread"}

# A span. Spans of one lane never overlap: a span is cut where another opens inside it, and `piece` numbers its pieces
# (0 for the first, which carries bytes, items and flops; later ones carry none; 255 means 255 or more).
# lane: 0 for the rank's main thread, otherwise see THREADS. peer: rank in the whole run, -1 for none.
# items: samples loaded or computed on; flops: floating-point operations; 0 where meaningless or unknown.
SPAN_FIELDS = (
    ("step", "<i8", "q"),
    ("kind", "u1", "B"),
    ("lane", "u1", "B"),
    ("piece", "u1", "B"),
    ("start_ns", "<i8", "q"),
    ("end_ns", "<i8", "q"),
    ("bytes", "<i8", "q"),
    ("peer", "<i4", "i"),
    ("id", "<i8", "q"),
    ("items", "<i8", "q"),
    ("flops", "<f8", "d"),
)
SPANS = np.dtype([(name, code) for name, code, _ in SPAN_FIELDS])
SPAN_STRUCT = struct.Struct("<" + "".join(letter for _, _, letter in SPAN_FIELDS))

# One row per step of a worker. samples: samples this rank consumed in the step; cursor: samples the whole run had
# consumed after it (-1 if unknown); staleness: in versions, -1 where it has no meaning (2^31 - 1 means that or more);
# phase: its number in the job; t_ns: the end of the step.
STEPS = np.dtype(
    [
        ("step", "<i8"),
        ("epoch", "<f8"),
        ("loss", "<f8"),
        ("samples", "<i8"),
        ("lr", "<f8"),
        ("outcome", "u1"),
        ("staleness_min", "<i4"),
        ("staleness_max", "<i4"),
        ("phase", "<i4"),
        ("cursor", "<i8"),
        ("t_ns", "<i8"),
    ]
)

# cpu: % of one core, this process; resident: bytes, this process; net_in, net_out: bytes since the node
# started, whole node without loopback; gpu: % busy; gpu_memory: bytes used on the device. -1: unknown.
RESOURCES = np.dtype(
    [
        ("t_ns", "<i8"),
        ("cpu", "<f4"),
        ("resident", "<i8"),
        ("net_in", "<i8"),
        ("net_out", "<i8"),
        ("gpu", "<f4"),
        ("gpu_memory", "<i8"),
    ]
)

# Events as written by `events`: the kind and a JSON object, both UTF-8. The length is fixed because variable-length
# strings do not survive kill -9 in a file that is read while it is written; `events` shortens longer texts so that
# the result is still JSON.
EVENTS = np.dtype([("t_ns", "<i8"), ("kind", f"S{KIND_BYTES}"), ("json", f"S{JSON_BYTES}")])

# This rank's clock + offset_ns = rank 0's clock, within error_ns; measured at t_ns on this rank's clock.
CLOCK = np.dtype([("t_ns", "<i8"), ("offset_ns", "<i8"), ("error_ns", "<i8")])

# When the rank's device worked on a span of lane 0 (see `device`), on the rank's own clock; empty on the CPU. One row
# per span, however often it was cut. error_ns: how far start_ns may be off; end_ns - start_ns does not depend on it.
DEVICE = np.dtype(
    [
        ("step", "<i8"),
        ("kind", "u1"),
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("error_ns", "<i8"),
    ]
)

TABLES: dict[str, np.dtype[Any]] = {
    "spans": SPANS,
    "steps": STEPS,
    "resources": RESOURCES,
    "events": EVENTS,
    "clock": CLOCK,
    "device": DEVICE,
}
