"""Collects a rank's spans, steps and events in memory until the writer drains them. Does not use h5py.

Recording is cheap: a span costs about a microsecond (`measure_span_cost`) and 63 bytes. Nothing is ever dropped; a
number outside its column's range is replaced by the nearest value in range.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np

from hpctrain.trace.events import Event, written
from hpctrain.trace.schema import (
    CLOCK,
    DEVICE,
    EVENTS,
    KIND_CODES,
    OUTCOME_CODES,
    RESOURCES,
    SPAN_STRUCT,
    SPANS,
    STEPS,
)

Clock = Callable[[], int]
NOTHING = nullcontext()
UNFIT = struct.error, OverflowError, TypeError, ValueError  # raised for a value that a column cannot hold
_pack = SPAN_STRUCT.pack


class _Store:
    """The buffers that all lanes of a rank write to. Every change is one append or extend: atomic under the GIL."""

    __slots__ = ("clock", "device", "events", "lanes", "resources", "spans", "steps")

    def __init__(self) -> None:
        self.spans = bytearray()
        self.steps: list[tuple[Any, ...]] = []
        self.resources: list[tuple[Any, ...]] = []
        self.events: list[tuple[Any, ...]] = []
        self.clock: list[tuple[Any, ...]] = []
        self.device: list[tuple[Any, ...]] = []
        self.lanes: dict[int, Recorder] = {}


class Span:
    """A span of one lane, used in a `with` statement. It can be entered again later.

    A span that begins inside another cuts it: spans of one lane never overlap. `now` defaults to the recorder's clock.
    """

    __slots__ = ("_piece", "_recorder", "_start", "_step", "bytes", "flops", "id", "items", "kind", "peer")

    def __init__(
        self, recorder: Recorder, kind: int | str, bytes: int, peer: int, id: int, items: int, flops: float
    ) -> None:
        self._recorder = recorder
        self.kind = KIND_CODES[kind]
        self.bytes = bytes
        self.peer = peer
        self.id = id
        self.items = items
        self.flops = flops

    # After a model's forward pass none of this is in the CPU caches: make few calls, and none to helpers.
    def __enter__(self, now: int | None = None) -> None:
        recorder = self._recorder
        stack = recorder.stack
        if now is None:
            now = recorder.now()
        if stack:
            stack[-1].cut(now)
        self._start = now
        self._step = recorder.step
        self._piece = 0
        stack.append(self)

    def __exit__(self, kind: object = None, error: object = None, trace: object = None, now: int | None = None) -> None:
        recorder = self._recorder
        if now is None:
            now = recorder.now()
        stack = recorder.stack
        stack.pop()
        if self._piece:
            self.cut(now)
        else:
            try:
                recorder.emit(_pack(
                    self._step, self.kind, recorder.number, 0, self._start, now, self.bytes, self.peer, self.id,
                    self.items, self.flops,
                ))  # fmt: skip
            except UNFIT:
                self.cut(now)
        if stack:
            stack[-1]._start = now

    def cut(self, now: int) -> None:
        """Write the piece that ends at `now`."""
        piece, recorder = self._piece, self._recorder
        if piece and now == self._start:  # adds nothing to the first piece
            return
        nbytes, items, flops = (0, 0, 0.0) if piece else (self.bytes, self.items, self.flops)
        row = (
            self._step, self.kind, recorder.number, piece, self._start, now, nbytes, self.peer, self.id, items, flops
        )  # fmt: skip
        try:
            recorder.emit(_pack(*row))
        except UNFIT:
            recorder.emit(_pack(*_nearest(row, SPANS)))
        if piece < 255:
            self._piece = piece + 1


class Recorder:
    """Records one rank's main thread (lane 0) and provides lanes for its other threads.

    `step`: the step that new spans belong to, set by the trainer (-1 outside steps; each lane has its own).
    `now`: the clock, in nanoseconds, for the timestamps of steps, events and clock measurements. It is the
    communicator's clock, so that they match the spans.
    `make`: builds the spans of `span`; `device.DeviceTimes` replaces it where a device computes.
    """

    __slots__ = ("_store", "emit", "make", "now", "number", "stack", "step")
    keeps: ClassVar[bool] = True  # whether a run with traces writes a file for it

    def __init__(self, now: Clock = time.monotonic_ns) -> None:
        self._begin(now, 0, _Store())

    def _begin(self, now: Clock, number: int, store: _Store) -> None:
        self.step = -1
        self.now = now
        self.number = number
        self._store = store
        self.make: Callable[[Recorder, int | str, int, int, int, int, float], Span] = Span
        self.stack: list[Span] = []  # open spans
        self.emit = store.spans.extend
        store.lanes[number] = self

    def lane(self, number: int) -> Recorder:
        """The recorder for another thread of this rank (1: a colocated server), with its own spans and step."""
        known = self._store.lanes.get(number)
        if known is not None:
            return known
        if not 0 <= number <= 255:
            raise ValueError(f"lane {number}: lanes are numbered 0 to 255")
        other = Recorder.__new__(Recorder)
        other._begin(self.now, number, self._store)
        return other

    # -- spans -------------------------------------------------------------------------------------------
    def span(
        self, kind: int | str, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0, flops: float = 0.0
    ) -> AbstractContextManager[None]:
        """A span for a `with` statement, timed by the clock `now`. For the columns see `schema.SPAN_FIELDS`."""
        return self.make(self, kind, bytes, peer, id, items, flops)

    def open(
        self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1, items: int = 0,
        flops: float = 0.0,
    ) -> None:  # fmt: skip
        """Begin a span. If another span is open, it is cut here."""
        Span(self, kind, bytes, peer, id, items, flops).__enter__(now_ns)

    def close(self, now_ns: int) -> None:
        """End the innermost open span; the enclosing span continues from here."""
        if not self.stack:
            raise RuntimeError(f"lane {self.number}: closed a span that was never opened")
        self.stack[-1].__exit__(None, None, None, now_ns)

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        """Record a span from `start_ns` until now, within which no other one began: at half the cost of `span`."""
        now, stack = self.now(), self.stack
        if stack:
            stack[-1].cut(start_ns)
            stack[-1]._start = now
        row = (self.step, kind, self.number, 0, start_ns, now, bytes, -1, id, 0, 0.0)
        try:
            self.emit(_pack(*row))
        except UNFIT:
            self.emit(_pack(*_nearest(row, SPANS)))

    def learn(self, bytes: int, peer: int, id: int) -> None:
        """Set fields of the innermost open span that are known only at its end."""
        span = self.stack[-1]
        span.bytes, span.peer, span.id = bytes, peer, id

    # -- everything else ---------------------------------------------------------------------------------
    def step_done(
        self,
        epoch: float,
        loss: float,
        samples: int,
        lr: float,
        outcome: int | str = "applied",
        staleness_min: int = -1,
        staleness_max: int = -1,
        phase: int = 0,
        cursor: int = -1,
    ) -> None:
        """Record that the step `self.step` ended now. For the columns see `schema.STEPS`."""
        code = OUTCOME_CODES[outcome]
        row = (
            self.step,
            epoch,
            loss,
            samples,
            lr,
            code,
            staleness_min,
            staleness_max,
            phase,
            cursor,
            self.now(),
        )
        self._store.steps.append(row)

    def event(self, event: Event) -> None:
        """Record an event that happened now."""
        self._store.events.append((self.now(), *written(event)))

    def clock(self, offset_ns: int, error_ns: int) -> None:
        """Record a measurement taken now: this rank's clock + `offset_ns` = rank 0's clock, within `error_ns`."""
        self._store.clock.append((self.now(), offset_ns, error_ns))

    def device(self, step: int, kind: int, start_ns: int, end_ns: int, error_ns: int) -> None:
        """Record when the device worked on a span. For the columns see `schema.DEVICE`."""
        self._store.device.append((step, kind, start_ns, end_ns, error_ns))

    def resource(
        self,
        cpu: float,
        resident: int,
        net_in: int = -1,
        net_out: int = -1,
        gpu: float = -1.0,
        gpu_memory: int = -1,
    ) -> None:
        """Record one sample of resource use, taken now. For the columns see `schema.RESOURCES`."""
        self._store.resources.append((self.now(), cpu, resident, net_in, net_out, gpu, gpu_memory))

    def drain(self) -> dict[str, np.ndarray[Any, Any]]:
        """Remove and return everything recorded since the last drain, of all lanes, by table; open spans stay open."""
        store = self._store
        size = len(store.spans)
        spans = store.spans[:size]
        del store.spans[:size]
        return {
            "spans": np.frombuffer(spans, SPANS),
            "steps": _take(store.steps, STEPS),
            "resources": _take(store.resources, RESOURCES),
            "events": _take(store.events, EVENTS),
            "clock": _take(store.clock, CLOCK),
            "device": _take(store.device, DEVICE),
        }


def _take(rows: list[tuple[Any, ...]], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # Rows that another thread appends meanwhile stay for the next drain.
    count = len(rows)
    taken = rows[:count]
    del rows[:count]
    with np.errstate(over="ignore"):  # float32 overflow becomes infinity
        try:
            return np.array(taken, dtype)
        except UNFIT:
            return np.array([_nearest(row, dtype) for row in taken], dtype)


def _nearest(row: Iterable[Any], dtype: np.dtype[Any]) -> tuple[Any, ...]:
    """The row with each number replaced by the nearest that its column can hold; 0 for anything not a number."""
    return tuple(_held(value, dtype[name]) for value, name in zip(row, dtype.names or (), strict=True))


def _held(value: Any, dtype: np.dtype[Any]) -> Any:
    if dtype.kind == "S":
        return value
    try:
        if dtype.kind == "f":
            return float(value)
        limits = np.iinfo(dtype)
        return min(max(int(value), limits.min), limits.max)
    except UNFIT:
        return 0


class NullRecorder(Recorder):
    """Records nothing; costs only the call."""

    __slots__ = ()

    def lane(self, number: int) -> Recorder:
        return self

    def span(self, *arguments: Any, **named: Any) -> AbstractContextManager[None]:
        return NOTHING

    def open(self, *arguments: Any, **named: Any) -> None:
        return None

    def close(self, now_ns: int) -> None:
        return None

    def passed(self, kind: int, start_ns: int, bytes: int, id: int) -> None:
        return None

    def learn(self, bytes: int, peer: int, id: int) -> None:
        return None

    def step_done(self, *arguments: Any, **named: Any) -> None:
        return None

    def event(self, event: Event) -> None:
        return None

    def clock(self, offset_ns: int, error_ns: int) -> None:
        return None

    def device(self, *arguments: Any, **named: Any) -> None:
        return None

    def resource(self, *arguments: Any, **named: Any) -> None:
        return None


def measure_span_cost(n: int = 100_000) -> float:
    """Seconds per span, mean of `n`: two clock readings, opening, closing and its share of the drain."""
    recorder, now = Recorder(), time.monotonic_ns
    recorder.drain()
    start = now()
    for _ in range(n):
        with recorder.span("send", 4096, 1, 7):
            pass
    recorder.drain()
    return (now() - start) / n / 1e9
