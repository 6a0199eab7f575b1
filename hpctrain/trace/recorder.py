"""Where a rank's spans, steps and events gather in memory until the writer drains them. No h5py here.

Cheap: a span costs about a microsecond (`measure_span_cost`) and 47 bytes. Nothing is ever dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from hpctrain.trace.schema import (
    CLOCK,
    EVENTS,
    KIND_CODES,
    OUTCOME_CODES,
    RESOURCES,
    SPAN_STRUCT,
    SPANS,
    STEPS,
    fit_text,
)

Clock = Callable[[], int]
_pack = SPAN_STRUCT.pack


class _Store:
    """What all lanes of a rank write into. Every change is one append or extend: atomic under the GIL."""

    __slots__ = ("clock", "events", "lanes", "resources", "spans", "steps")

    def __init__(self) -> None:
        self.spans = bytearray()
        self.steps: list[tuple[Any, ...]] = []
        self.resources: list[tuple[Any, ...]] = []
        self.events: list[tuple[Any, ...]] = []
        self.clock: list[tuple[Any, ...]] = []
        self.lanes: dict[int, Recorder] = {}


class Recorder:
    """Records one rank's course (lane 0) and hands out lanes for its other threads.

    `step` is what new spans are filed under; the trainer sets it (-1 outside steps; each lane has its own).
    `now` is the clock, in nanoseconds, that steps, events and clock measurements are stamped with: the
    communicator's, so that they fit the spans.
    """

    __slots__ = ("_emit", "_number", "_stack", "_store", "now", "step")

    def __init__(self, now: Clock = time.monotonic_ns) -> None:
        self._begin(now, 0, _Store())

    def _begin(self, now: Clock, number: int, store: _Store) -> None:
        self.step = -1
        self.now = now
        self._number = number
        self._store = store
        self._stack: list[list[Any]] = []  # open spans: [kind, start, bytes, peer, id, step, piece]
        self._emit = store.spans.extend
        store.lanes[number] = self

    def lane(self, number: int) -> Recorder:
        """The recorder of another thread of this rank (1: a colocated server); own spans, own step."""
        known = self._store.lanes.get(number)
        if known is not None:
            return known
        if not 0 <= number <= 255:
            raise ValueError(f"lane {number}: lanes are numbered 0 to 255")
        other = Recorder.__new__(Recorder)
        other._begin(self.now, number, self._store)
        return other

    # -- spans -------------------------------------------------------------------------------------------
    def open(self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1) -> None:
        """Begin a span inside the open one, which is cut here: spans of one lane never overlap."""
        stack = self._stack
        if stack:
            self._cut(stack[-1], now_ns)
        stack.append([KIND_CODES[kind], now_ns, bytes, peer, id, self.step, 0])

    def close(self, now_ns: int) -> None:
        """End the innermost open span; the one around it goes on from here."""
        stack = self._stack
        if not stack:
            raise RuntimeError(f"lane {self._number}: a span is closed that was never opened")
        self._cut(stack.pop(), now_ns)
        if stack:
            stack[-1][1] = now_ns

    def learn(self, bytes: int, peer: int, id: int) -> None:
        """What is known of the innermost open span only at its end."""
        self._stack[-1][2:5] = bytes, peer, id

    def _cut(self, span: list[Any], now_ns: int) -> None:
        kind, start, nbytes, peer, id, step, piece = span
        if piece:
            if now_ns == start:  # says nothing that the first piece did not
                return
            nbytes = 0
        self._emit(_pack(step, kind, self._number, piece, start, now_ns, nbytes, peer, id))
        if piece < 255:
            span[6] = piece + 1

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
        """The step `self.step` ended now. For the columns see `schema.STEPS`."""
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

    def event(self, kind: str, text: str = "") -> None:
        """Something worth a mark in the timeline: role, switch, rebalance, failure, checkpoint ..."""
        self._store.events.append((self.now(), fit_text(kind, 24), fit_text(text, 240)))

    def clock(self, offset_ns: int, error_ns: int) -> None:
        """Measured now: this rank's clock + `offset_ns` is rank 0's, give or take `error_ns`."""
        self._store.clock.append((self.now(), offset_ns, error_ns))

    def resource(
        self,
        cpu: float,
        resident: int,
        net_in: int = -1,
        net_out: int = -1,
        gpu: float = -1.0,
        gpu_memory: int = -1,
    ) -> None:
        """One sample of the machine, taken now. For the columns see `schema.RESOURCES`."""
        self._store.resources.append((self.now(), cpu, resident, net_in, net_out, gpu, gpu_memory))

    def drain(self) -> dict[str, np.ndarray[Any, Any]]:
        """Everything recorded since the last drain, of all lanes, by table; open spans stay open."""
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
        }


def _take(rows: list[tuple[Any, ...]], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    # What another thread appends meanwhile stays for the next time.
    count = len(rows)
    block = np.array(rows[:count], dtype)
    del rows[:count]
    return block


class NullRecorder(Recorder):
    """Records nothing, at the cost of a call."""

    __slots__ = ()

    def lane(self, number: int) -> Recorder:
        return self

    def open(self, kind: int | str, now_ns: int, bytes: int = 0, peer: int = -1, id: int = -1) -> None:
        return None

    def close(self, now_ns: int) -> None:
        return None

    def learn(self, bytes: int, peer: int, id: int) -> None:
        return None

    def step_done(self, *arguments: Any, **named: Any) -> None:
        return None

    def event(self, kind: str, text: str = "") -> None:
        return None

    def clock(self, offset_ns: int, error_ns: int) -> None:
        return None

    def resource(self, *arguments: Any, **named: Any) -> None:
        return None


def measure_span_cost(n: int = 100_000) -> float:
    """Seconds that a span takes, mean of `n`: two clock readings, open, close, its share of the drain."""
    recorder, now = Recorder(), time.monotonic_ns
    recorder.drain()
    start = now()
    for _ in range(n):
        recorder.open("send", now(), 4096, 1, 7)
        recorder.close(now())
    recorder.drain()
    return (now() - start) / n / 1e9
