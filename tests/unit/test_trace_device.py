"""Device times: read late but in order, on the host's clock, in files old and new, and in the report. The device is a
stand-in; nothing here has run on a GPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain.analysis import Analysis
from hpctrain.run.tracing import Tracing
from hpctrain.trace import Kind, Recorder, device, open_run, versions, writer
from hpctrain.trace.device import DRIFT, MOST_PENDING, RESOLUTION_NS, DeviceTimes
from hpctrain.trace.events import DeviceTimesMissing
from hpctrain.trace.files import event_of
from hpctrain.trace.reader import Run
from hpctrain.views.export import export_run
from hpctrain.views.report import write_report
from hpctrain.views.report.tables import MOST_CELLS, device_times
from tests.traces import HandMade

US, MS, S = 1_000, 1_000_000, 1_000_000_000


class Device:
    """A device whose clock runs at `rate` of the host's. Times are host nanoseconds. `waits`: how often the host waited
    for an event that had not passed."""

    def __init__(self, rate: float = 1.0, latency: int = 0) -> None:
        self.now = self.busy_until = 5 * S
        self.rate, self.latency = rate, latency
        self.waits = self.made = 0
        self.failing = False

    def clock(self) -> int:
        return self.now

    def launch(self, ns: int) -> None:
        """Queue work of that length."""
        self.busy_until = max(self.busy_until, self.now) + ns

    def event(self) -> Event:
        self.made += 1
        return Event(self)


class Event:
    """Like torch.cuda.Event(enable_timing=True)."""

    def __init__(self, owner: Device) -> None:
        self.device = owner
        self.passes: int | None = None

    def record(self) -> None:
        if self.device.failing:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.passes = max(self.device.busy_until, self.device.now) + self.device.latency

    def query(self) -> bool:
        assert self.passes is not None
        self.device.now += US // 10
        return self.device.now >= self.passes

    def synchronize(self) -> None:
        assert self.passes is not None
        self.device.waits += self.device.now < self.passes
        self.device.now = max(self.device.now, self.passes)

    def elapsed_time(self, end_event: Event) -> float:
        assert self.passes is not None
        assert end_event.passes is not None
        if self.device.now < max(self.passes, end_event.passes):
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return (end_event.passes - self.passes) * self.device.rate / 1e6


def timed(gpu: Device) -> tuple[Recorder, DeviceTimes]:
    recorder = Recorder(gpu.clock)
    return recorder, DeviceTimes(recorder, gpu.event)


def step(recorder: Recorder, gpu: Device, number: int, work: int = MS, host: int = 10 * US) -> None:
    """The host is faster than the device."""
    recorder.step = number
    for kind in ("data", "forward", "backward", "reduce", "update"):
        with recorder.span(kind):
            gpu.now += host
            if kind in ("forward", "backward", "update"):
                gpu.launch(work)


def events(rows: dict[str, Any]) -> list[Any]:
    return [event_of(kind, json) for _, kind, json in rows["events"].tolist()]


# -- recording -------------------------------------------------------------------------------------------------
def test_spans_are_read_once_the_device_has_passed_them_and_never_waited_for() -> None:
    gpu = Device()
    recorder, times = timed(gpu)
    begin, waits = gpu.now, gpu.waits
    for number in range(2):
        step(recorder, gpu, number)
    assert not len(recorder.drain()["device"])  # the host is at most 0.1 ms further, the device has 6 ms to do
    gpu.now = begin + 3 * MS + MS // 2
    step(recorder, gpu, 2)
    some = recorder.drain()["device"]
    assert some[["step", "kind"]].tolist() == [(0, Kind.FORWARD), (0, Kind.BACKWARD), (0, Kind.UPDATE)]
    assert gpu.waits == waits
    times.settle()
    rest = recorder.drain()["device"]
    assert rest[["step", "kind"]].tolist() == [
        (number, kind) for number in (1, 2) for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.UPDATE)
    ]
    both = [*some.tolist(), *rest.tolist()]
    for (_, _, _, end, _), (_, _, start, _, _) in zip(both, both[1:], strict=False):
        assert start == pytest.approx(end, abs=2)  # the device did one after the other
    # The first forward waited for nothing; its stretch includes the host's time before the launch.
    assert both[0][3] - both[0][2] == pytest.approx(MS + 10 * US, abs=2 * US)


def test_host_spans_are_the_same_with_and_without_a_device() -> None:
    plain, gpu = Recorder(clock := Device().clock), Device()
    recorder, times = timed(gpu)
    assert clock() == 5 * S
    for each in (plain, recorder):
        each.step = 4
        with each.span("backward", 7, items=3), each.span("send", 8, 1, 5):
            pass
    times.settle()
    with_, without = recorder.drain(), plain.drain()
    names = ["step", "kind", "lane", "piece", "bytes", "peer", "id", "items"]
    assert with_["spans"][names].tolist() == without["spans"][names].tolist()
    assert not len(without["device"])
    assert with_["device"][["step", "kind"]].tolist() == [(4, Kind.BACKWARD)]  # whole, although the host's was cut


def test_events_are_reused_and_the_queue_is_bounded() -> None:
    gpu = Device()
    recorder, times = timed(gpu)
    for number in range(1000):
        step(recorder, gpu, number)
        gpu.now = max(gpu.now, gpu.busy_until)
    assert gpu.made < 10
    for number in range(MOST_PENDING):  # the device does nothing for so long
        step(recorder, gpu, number, work=S)
    assert gpu.made < 2 * MOST_PENDING + 10
    times.settle()
    rows = recorder.drain()
    assert len(rows["device"]) == 3 * 1000 + MOST_PENDING
    assert [event.spans for event in events(rows)] == [2 * MOST_PENDING]
    step(recorder, gpu, 0)
    times.settle()
    rows = recorder.drain()
    assert len(rows["device"]) == 3
    assert not events(rows)


# -- clocks ----------------------------------------------------------------------------------------------------
def test_anchor_ties_the_device_to_the_host_within_its_error() -> None:
    gpu = Device(latency=8 * US)
    gpu.launch(3 * MS)  # still busy when tracing begins
    recorder, times = timed(gpu)
    gpu.now += 500 * MS
    asked = gpu.now
    step(recorder, gpu, 0)
    times.settle()
    row = recorder.drain()["device"][0]
    passed = asked + 10 * US + 8 * US  # the data span, then the event
    assert abs(int(row["start_ns"]) - passed) <= row["error_ns"]
    assert row["error_ns"] == pytest.approx(4 * US + RESOLUTION_NS + DRIFT * 500 * MS, abs=2 * US)


@pytest.mark.parametrize("rate", [1 - DRIFT, 1 + DRIFT])
def test_anchor_is_renewed_while_the_device_is_idle(rate: float) -> None:
    gpu = Device(rate)
    recorder, times = timed(gpu)
    waits, errors = gpu.waits, []
    for number in range(100):
        gpu.now += S // 2
        asked = gpu.now
        step(recorder, gpu, number)
        gpu.now = max(gpu.now, gpu.busy_until)
        times.read()
        row = recorder.drain()["device"][0]
        assert abs(int(row["start_ns"]) - asked - 10 * US) <= row["error_ns"]
        errors.append(int(row["error_ns"]))
    assert max(errors) < DRIFT * 2 * S
    assert gpu.waits == waits


def test_anchor_stays_while_the_device_is_busy() -> None:
    gpu = Device()
    recorder, times = timed(gpu)
    gpu.launch(30 * S)
    gpu.now += 2 * S
    step(recorder, gpu, 0)
    assert gpu.now < 8 * S
    times.settle()
    row = recorder.drain()["device"][0]
    assert row["start_ns"] == pytest.approx(35 * S, abs=int(row["error_ns"]))
    assert row["error_ns"] > DRIFT * 29 * S


# -- errors ----------------------------------------------------------------------------------------------------
def test_error_of_the_device_ends_the_timing_but_not_the_run() -> None:
    gpu = Device()
    recorder, times = timed(gpu)
    step(recorder, gpu, 0)
    gpu.failing = True
    for number in (1, 2):
        step(recorder, gpu, number)
    times.settle()
    times.read()
    rows = recorder.drain()
    assert len(rows["spans"]) == 15
    (event,) = events(rows)
    assert isinstance(event, DeviceTimesMissing)
    assert "illegal memory access" in str(event)
    assert type(recorder.span("forward")).__name__ == "Span"


# -- a run -----------------------------------------------------------------------------------------------------
def test_a_phase_ends_with_all_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Device()
    recorder = Recorder(gpu.clock)
    comm: Any = SimpleNamespace(recorder=recorder, concurrent=True, rank=0, now=gpu.clock)
    trace: Any = SimpleNamespace(enabled=True, flush_seconds=2.0, resources_seconds=1.0)
    monkeypatch.setattr("hpctrain.run.tracing._attributes", lambda *arguments: {"rank": 0, "size": 1})
    monkeypatch.setattr("hpctrain.run.tracing._gpu", lambda prepared: None)
    monkeypatch.setattr("hpctrain.run.tracing.time_on_cuda", lambda recorder: DeviceTimes(recorder, gpu.event))
    for kind, rows in (("cpu", 0), ("cuda", 3)):
        tracing = Tracing(comm, tmp_path / kind)
        prepared: Any = SimpleNamespace(device=SimpleNamespace(type=kind))
        tracing.open(SimpleNamespace(trace=trace), prepared, 1)  # type: ignore[arg-type]
        step(recorder, gpu, 0)
        tracing.settle()
        assert (gpu.now >= gpu.busy_until) is (kind == "cuda")  # it has waited for the last span
        step(recorder, gpu, 1)
        gpu.now += S
        tracing.close()
        found = open_run(tmp_path / kind).device()
        assert len(found) == 2 * rows
        assert sorted(set(found["kind"])) == (["backward", "forward", "update"] if rows else [])


# -- files and views -------------------------------------------------------------------------------------------
def trained(folder: Path, ranks: int = 2, rows: bool = True) -> Run:
    """Two phases of two steps; devices are 3 ms behind their hosts, and rank 1's takes twice as long."""
    folder.mkdir(exist_ok=True)
    with HandMade(folder, ranks, offsets=[0.0] + [-7.0] * (ranks - 1)) as run:
        for rank, trace in run.ranks.items():
            for phase in range(2):
                trace.phase(20.0 * phase, phase, "worker", "all_reduce")
                for number in (2 * phase, 2 * phase + 1):
                    at = 1.0 + 10.0 * number
                    trace.span("forward", at, at + 0.5, number)
                    trace.span("update", at + 0.5, at + 0.75, number)
                    if rows:
                        own = trace.recorder
                        start, took = trace._at(at + 3.0), (1 + (rank == 1)) * 2 * MS
                        own.device(number, Kind.FORWARD, start, start + took, 5 * US)
                        own.device(number, Kind.UPDATE, start + took, start + took + MS // 4, 5 * US)
                    trace.done(at + 0.8, number, samples=32, cursor=64 * (number + 1), phase=phase)
    return open_run(folder)


def test_analysis_shows_device_times_beside_host_times(tmp_path: Path) -> None:
    run = trained(tmp_path)
    assert run.device()["start_s"].min() == pytest.approx(0.003)  # rank 1's clock is corrected
    frame = Analysis(run).device_times.set_index(["phase", "rank", "kind"])
    assert len(frame) == 8
    for phase in (0, 1):
        assert frame.loc[(phase, 1, "forward"), "device_ms_per_step"] == pytest.approx(4.0)
        assert frame.loc[(phase, 0, "forward"), "device_ms_per_step"] == pytest.approx(2.0)
        assert frame.loc[(phase, 0, "forward"), "host_ms_per_step"] == pytest.approx(0.5)
        assert frame.loc[(phase, 0, "update"), "device_s"] == pytest.approx(0.0005)
        assert frame.loc[(phase, 0, "update"), "steps"] == 2
    assert not run.notes


def test_report_and_export_show_device_times_only_if_there_are_any(tmp_path: Path) -> None:
    for name, rows in (("gpu", True), ("cpu", False)):
        run = trained(tmp_path / name, rows=rows)
        folder = export_run(run.folder, "csv")
        assert (folder / "device.csv").exists() is rows
        assert (device_times(Analysis(run).device_times) is None) is not rows
        if rows:
            report = write_report(run.folder)[0].read_text()
            assert "What the devices did" in report
            assert "could not be computed" not in report
            assert "forward, device" in report
            assert ">4.000<" in report.replace(" ", "")
            lines = (folder / "device.csv").read_text().splitlines()
            assert len(lines) == 1 + 2 * 8
            assert lines[1].startswith("0,1,0,forward,")


def test_table_of_many_ranks_shows_means(tmp_path: Path) -> None:
    table = device_times(Analysis(trained(tmp_path, ranks=MOST_CELLS + 1)).device_times)
    assert table is not None
    assert [row[:2] for row in table.rows] == [["0", "mean"], ["1", "mean"]]
    assert table.rows[0][2] == f"{(2 * MOST_CELLS + 4) / (MOST_CELLS + 1):.3f}"


def test_files_without_the_table_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "TABLES", versions.layout(3))
    monkeypatch.setattr(writer, "SCHEMA_VERSION", 3)
    run = trained(tmp_path)
    assert len(run.spans()) == 16
    assert run.rows("device") == {(0, 1): 0, (1, 1): 0}
    assert not len(run.device())
    assert list(run.device().columns) == list(open_run(tmp_path).device().columns)
    assert not len(Analysis(run).device_times)
    assert not run.notes
    assert set(versions.layout(1)) == set(versions.layout(3))


def test_module_does_not_import_torch() -> None:
    assert "torch" not in vars(device)
