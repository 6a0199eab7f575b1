"""The layout of a trace file, version 3: span kinds, row types, codes. No h5py here.

A file is `trace/rank_RRRRR.h5` (attempt 1) or `trace/rank_RRRRR.A.h5` (the run resumed for the A-th time). It
has one one-dimensional dataset per entry of `TABLES`. Codes start at 1, so that a row of zeros is a row that
never reached the file (a truncated one, say). All times are nanoseconds of the rank's own clock.

A number that its column cannot hold is written as the nearest that it can: no run ends because of its trace. Which
columns a job can bring there is said beside them; the others are far wider than any run. `versions` has the layouts of
older files.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Any

import numpy as np

from hpctrain.trace.events import JSON_BYTES, KIND_BYTES

SCHEMA_VERSION = 3


class Kind(IntEnum):
    """Every kind of span there is; the value is its code in the file."""

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
    """What became of a step's gradient."""

    APPLIED = 1
    DROPPED = 2
    LOCAL = 3
    SKIPPED = 4


KINDS: tuple[str, ...] = tuple(kind.name.lower() for kind in Kind)
OUTCOMES: tuple[str, ...] = tuple(outcome.name.lower() for outcome in OutcomeCode)


class _Codes(dict[Any, int]):
    """Code of a name, or of a code; anything else is a programming error, said in a sentence."""

    def __init__(self, what: str, codes: type[IntEnum]) -> None:
        super().__init__({code.name.lower(): int(code) for code in codes} | {int(code): int(code) for code in codes})
        self._what = what

    def __missing__(self, key: Any) -> int:
        names = ", ".join(name for name in self if isinstance(name, str))
        raise ValueError(f"{key!r} is no {self._what}; there are {names}")


KIND_CODES = _Codes("span kind", Kind)
OUTCOME_CODES = _Codes("outcome", OutcomeCode)
COMMUNICATION = (Kind.SEND, Kind.RECV, Kind.NOTIFY, Kind.WAIT, Kind.REDUCE)


def is_communication(kind: Any, id: Any) -> Any:
    """Of arrays (or columns) of spans: whether the rank was in the communicator. A sum out of shared memory, which is
    a `reduce` without a number, is computation."""
    return np.isin(kind, COMMUNICATION) & ~((kind == Kind.REDUCE) & (id < 0))


# A span. Spans of one lane never overlap: one that another opens inside of is cut there, and `piece` counts
# its pieces (0 the first, which carries bytes, items and flops; later ones carry none; 255 stands for 255 and more).
# lane: 0 the rank's own course, 1 a colocated server's thread. peer: rank of the whole run, -1 none. items: samples
# that were loaded or computed on, flops: floating-point operations; 0 where they have no meaning or are not known.
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

# One row per step of a worker. samples: what this rank consumed in it; cursor: samples that the whole run had
# consumed after it (-1 unknown); staleness in versions, -1 where it has no meaning (2^31 - 1 stands for that and more);
# phase: its number in the job; t_ns: the step's end.
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
# started, the whole node without loopback; gpu: % busy, gpu_memory: bytes used on the device. -1: not known.
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

# What happened, as `events` writes it: kind, and a JSON object. Both are UTF-8. Of fixed length, because strings of
# variable length do not survive kill -9 in a file that is read while it is written; what is longer is shortened by
# `events` so that it stays JSON.
EVENTS = np.dtype([("t_ns", "<i8"), ("kind", f"S{KIND_BYTES}"), ("json", f"S{JSON_BYTES}")])

# This rank's clock + offset_ns = rank 0's clock, give or take error_ns; measured at t_ns of this rank's.
CLOCK = np.dtype([("t_ns", "<i8"), ("offset_ns", "<i8"), ("error_ns", "<i8")])

TABLES: dict[str, np.dtype[Any]] = {
    "spans": SPANS,
    "steps": STEPS,
    "resources": RESOURCES,
    "events": EVENTS,
    "clock": CLOCK,
}
