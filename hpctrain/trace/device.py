"""When a device worked on the spans of forward, backward and update, whose host times only say when it was asked to.

NOT YET RUN ON A GPU: tested with a stand-in for CUDA's events. Does not import torch: `DeviceTimes` is given what makes
an event.

An event is recorded on the current stream at both ends of a span and read once the device has passed it, so nothing
waits during training. A row's duration includes gaps in which the stream waited for the host to launch the next kernel;
it excludes work on other streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from hpctrain.trace.events import DeviceTimesMissing
from hpctrain.trace.recorder import Recorder, Span
from hpctrain.trace.schema import KIND_CODES, Kind

TIMED = (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)
MOST_PENDING = 256  # spans that the device may be behind; CUDA itself makes the host wait after about 1000 launches
REANCHOR_NS = 1_000_000_000
QUERIES = 32  # to find an event passed on an idle stream: a microsecond each
RESOLUTION_NS = 1_000  # CUDA documents "around 0.5 microseconds" for an event
DRIFT = 100e-6  # assumed limit of how fast the device's clock and the host's drift apart; not measured


class DeviceEvent(Protocol):
    """The part of torch.cuda.Event(enable_timing=True) that is used here."""

    def record(self) -> None: ...

    def query(self) -> bool: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Any, /) -> float: ...  # milliseconds


class Pending(NamedTuple):
    """A span that the device may not have finished."""

    step: int
    kind: int
    start: DeviceEvent
    end: DeviceEvent


class Anchor(NamedTuple):
    """The device passed `event` at `host_ns` on the host's clock, within `error_ns`."""

    event: DeviceEvent
    host_ns: int
    error_ns: int


class DeviceTimes:
    """Times the spans of `recorder` (lane 0) on the device, from now on. `event`: makes an event of this rank's device.

    Nothing is waited for, except here and in `settle`, so call that only where the run stands still anyway. An error of
    the device ends the timing, never the run: the code that caused it will meet it too.
    """

    def __init__(self, recorder: Recorder, event: Callable[[], DeviceEvent]) -> None:
        self._recorder, self._make_event = recorder, event
        self._pending: deque[Pending] = deque()
        self._free: list[DeviceEvent] = []
        self._untimed = 0
        self._stopped = False
        self._anchor: Anchor | None = None
        recorder.make = self._make_span
        self.settle()

    def read(self) -> None:
        """Record what the device has finished; does not wait for the rest."""
        if self._stopped:
            return
        try:
            self._collect()
        except Exception as error:
            self._stop(error)

    def settle(self) -> None:
        """Wait for the device, record what is pending, and tie its clock to the host's again."""
        if self._stopped:
            return
        try:
            for span in self._pending:
                span.end.synchronize()
            self._collect()
            self._wait_for_anchor()
        except Exception as error:
            self._stop(error)
        if self._untimed:
            self._recorder.event(DeviceTimesMissing(self._untimed, f"the device was {MOST_PENDING} spans behind"))
            self._untimed = 0

    # -- called by the spans -----------------------------------------------------------------------------------
    def begin(self) -> DeviceEvent | None:
        """Mark the start of a span on the stream; None if it is not timed."""
        if self._stopped:
            return None
        try:
            self._collect()
            if len(self._pending) == MOST_PENDING:
                self._untimed += 1
                return None
            if not self._pending:
                self._renew_anchor()
            return self._mark()
        except Exception as error:
            self._stop(error)
            return None

    def end(self, start: DeviceEvent, step: int, kind: int) -> None:
        """Mark its end."""
        if self._stopped:
            return
        try:
            self._pending.append(Pending(step, kind, start, self._mark()))
        except Exception as error:
            self._stop(error)

    def _make_span(self, recorder: Recorder, kind: int | str, *fields: Any) -> Span:
        if KIND_CODES[kind] not in TIMED or self._stopped:
            return Span(recorder, kind, *fields)
        return DeviceSpan(self, recorder, kind, *fields)

    # -- events ------------------------------------------------------------------------------------------------
    def _mark(self) -> DeviceEvent:
        event = self._free.pop() if self._free else self._make_event()
        event.record()
        return event

    def _collect(self) -> None:
        """Record the spans that the device has finished, in the order in which they were queued."""
        pending, anchor = self._pending, self._anchor
        while pending and anchor is not None and pending[0].end.query() and pending[0].start.query():
            span = pending.popleft()
            after = anchor.event.elapsed_time(span.start) * 1e6
            start = anchor.host_ns + round(after)
            took = max(0, round(span.start.elapsed_time(span.end) * 1e6))
            error = anchor.error_ns + RESOLUTION_NS + round(DRIFT * abs(after))
            self._recorder.device(span.step, span.kind, start, start + took, error)
            self._free += span.start, span.end

    def _wait_for_anchor(self) -> None:
        first = self._mark()
        first.synchronize()  # the stream is idle from here on
        self._free.append(first)
        before = self._recorder.now()
        event = self._mark()
        event.synchronize()
        self._put_anchor(event, before, self._recorder.now())

    def _renew_anchor(self) -> None:
        """Once a second, if the device turns out to be idle; does not wait for it."""
        anchor, before = self._anchor, self._recorder.now()
        if anchor is None or before - anchor.host_ns < REANCHOR_NS:
            return
        event = self._mark()
        if any(event.query() for _ in range(QUERIES)):
            self._put_anchor(event, before, self._recorder.now())
        else:
            self._free.append(event)

    def _put_anchor(self, event: DeviceEvent, before: int, after: int) -> None:
        if self._anchor is not None:
            self._free.append(self._anchor.event)
        self._anchor = Anchor(event, (before + after) // 2, (after - before + 1) // 2)

    def _stop(self, error: Exception) -> None:
        self._stopped = True
        lost, self._untimed = len(self._pending) + self._untimed, 0
        self._pending.clear()
        self._recorder.event(DeviceTimesMissing(lost, f"{type(error).__name__}: {error}; later spans are missing too"))


class DeviceSpan(Span):
    """A span that is also timed on the device."""

    __slots__ = ("_begun", "_times")

    def __init__(self, times: DeviceTimes, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._times = times
        self._begun: DeviceEvent | None = None

    def __enter__(self, now: int | None = None) -> None:
        super().__enter__(now)
        self._begun = self._times.begin()

    def __exit__(self, kind: object = None, error: object = None, trace: object = None, now: int | None = None) -> None:
        if self._begun is not None:
            self._times.end(self._begun, self._step, self.kind)
            self._begun = None
        super().__exit__(kind, error, trace, now)


def time_on_cuda(recorder: Recorder) -> DeviceTimes:
    """Time spans on torch's current CUDA device."""
    import torch

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)

    return DeviceTimes(recorder, event)
