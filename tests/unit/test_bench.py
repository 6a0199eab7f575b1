"""`hpctrain bench`: its tables, its JSON, and that it runs with and without a launcher."""

from __future__ import annotations

import json
import math
import os
import runpy
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain import bench
from hpctrain.bench import (
    alone,
    asynchronous,
    checks,
    codecs,
    comparison,
    device,
    limits,
    reading,
    simulated,
    start,
    steps,
    switching,
    together,
    tracing,
    workload,
)
from hpctrain.bench.report import FigureTable, Report, Sample, number
from hpctrain.bench.workload import LARGE
from hpctrain.cli import main
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError, HpctrainError
from hpctrain.job import Job
from hpctrain.launcher.facts import MARK
from hpctrain.replica import blocks
from hpctrain.trace import open_run, sum_times
from hpctrain.trace.schema import CLOCK, KIND_CODES, SPANS, STEPS
from tests.stand_in_cupy import Cuda
from tests.traces import HandMade


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    """Shorten every measurement."""
    torch.set_num_threads(1)
    monkeypatch.setattr(alone, "RANKS", 8)
    monkeypatch.setattr(together, "SECONDS", 0.0)
    monkeypatch.setattr(together, "STRETCH", 0.0)
    monkeypatch.setattr(together, "FEWEST", 2)
    monkeypatch.setattr(together, "SIZES", {"4 KiB": 4096, "16 KiB": 16384})
    monkeypatch.setattr(steps, "LOADS", {workload.MLP: LINEAR})
    monkeypatch.setattr(checks, "LOADS", {"linear": LINEAR})
    monkeypatch.setattr(asynchronous, "PUSHED", LINEAR)
    monkeypatch.setattr(asynchronous, "BLOCKS", 2)
    monkeypatch.setattr(asynchronous, "PUSHES", 8)
    monkeypatch.setattr(asynchronous, "REPETITIONS", 1)
    model = switching.SwitchedModel({"name": "mlp", "inputs": 6, "hidden": [5]}, {"name": "Adam"}, (6,))
    monkeypatch.setattr(switching, "MODELS", {"small": model})
    monkeypatch.setattr(switching, "RUNS", 2)
    monkeypatch.setattr(limits, "COPIED", 1000)
    monkeypatch.setattr(codecs, "ELEMENTS", 4096 * 8)
    monkeypatch.setattr(codecs, "REPETITIONS", 2)
    monkeypatch.setattr(reading, "RANKS", 3)
    monkeypatch.setattr(reading, "SPANS_EACH", 1600)
    monkeypatch.setattr(reading, "REPETITIONS", 2)


LINEAR = workload.Load(lambda: torch.nn.Linear(6, 10), (6,), 4, 2, 2)
MS = 1_000_000


def silent(text: str) -> None:
    pass


def test_sample_has_median_and_middle_half():
    sample = Sample((5.0, 1.0, 2.0, 4.0, 3.0), "ms")
    assert (sample.median, sample.quartiles) == (3, (2, 4))
    assert str(sample) == "3 (2-4)"


def test_numbers_have_three_significant_digits():
    assert [number(x) for x in (0.01234, 1.236, 45.67, 345.6, 234567.8)] == [
        "0.0123",
        "1.24",
        "45.7",
        "346",
        "234,568",
    ]


def test_table_is_aligned():
    table = FigureTable("t", "title, ms", ["a", "bb"])
    table.rows = {"first": {"a": Sample((1,), "ms"), "bb": Sample((1000,), "ms")}, "no": {"a": Sample((2,), "ms")}}
    assert table.text().splitlines() == [
        "title, ms",
        "             a                   bb",
        "first  1 (1-1)  1,000 (1,000-1,000)",
        "no     2 (2-2)                    -",
    ]


def test_bench_virtual_counts_resumptions():
    rates = alone.ring_rates(8, FreeNetwork(), apart=False)
    assert rates[1] > rates[0] > 0
    table = alone.measure_virtual(silent)
    assert set(table.rows) == set(alone.NETWORKS)


def test_bench_simulate_measures_both_networks_and_both_ways(monkeypatch):
    for name, value in {"RANKS": 4, "MANY": 6, "STEPS": 2, "REPETITIONS": 1}.items():
        monkeypatch.setattr(simulated, name, value)
    table = simulated.measure_simulate(silent)
    assert list(table.rows) == ["ring of 4 ranks, by messages", "ring of 4 ranks, as one loop",
                                "2 steps of 6 ranks, as one loop"]  # fmt: skip
    assert all(set(cells) == {"links", "flows"} for cells in table.rows.values())


def test_cost_of_a_span():
    rows = alone.measure_trace(silent).rows
    assert all(0 < rows[name]["us"].median < 10_000 for name in ("span", "sample"))


@pytest.mark.parametrize("nodes", [(0, 0, 0), (0, 1, 1)])
def test_all_reduce_by_algorithm_and_size(nodes):
    tables = World(3, nodes).run(lambda comm: together.measure_all_reduce(comm, silent))
    one_node = len(set(nodes)) == 1
    assert set(tables[0].rows) == {*together.ALGORITHMS, *([together.SHARED] if one_node else [])}
    assert all(set(cells) == set(together.SIZES) for cells in tables[0].rows.values())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_shared_sum_result(size):
    def body(comm):
        shared = together.SharedSum(comm, 1000)
        for step in range(3):
            shared.given.mine[:] = np.arange(1000) + comm.rank + step
            shared.run()
            assert (shared.summed.parts[0] == size * (np.arange(1000) + step) + sum(range(size))).all()
            comm.barrier()
        shared.free()

    World(size).run(body)


@pytest.mark.parametrize("size", [1, 3])
def test_steps_by_strategy(size):
    tables = World(size).run(lambda comm: steps.measure_mlp(comm, silent))
    assert set(tables[0].rows) == {steps.NOTHING, *steps.ON_A_NODE.ways}
    assert len(tables[0].rows["all_reduce"][steps.WALL].values) == LINEAR.blocks


@pytest.mark.parametrize("way", [*steps.ON_A_NODE.ways.values(), *steps.BETWEEN_NODES.ways.values()])
def test_measured_step_trains(way):
    """After a block all ranks hold equal parameters, which have changed."""

    def body(comm):
        bench = steps.StepBench(comm, LINEAR)
        before = next(bench.replica.model.parameters()).detach().clone()
        bench.block(way)
        return before, next(bench.replica.model.parameters()).detach()

    got = World(2).run(body)
    assert not torch.equal(got[0][0], got[0][1])
    assert torch.equal(got[0][1], got[1][1])


@pytest.mark.parametrize("size", [1, 2])
def test_cost_of_checking_gradients(size):
    """One training, half of it without the check, which is restored afterwards."""
    before = blocks._is_finite
    table = World(size).run(lambda comm: checks.measure_checks(comm, silent))[0]
    assert {len(cell.values) for cell in table.rows["linear"].values()} == {LINEAR.blocks}
    assert blocks._is_finite is before


# -- asynchronous parameter server -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [2, 3])
def test_round_trips_by_kind_of_server(size):
    table = World(size, network=LinkNetwork()).run(lambda comm: asynchronous.measure_pushes(comm, silent))[0]
    alone = "" if size == 2 else "s"
    assert set(table.rows) == {f"dedicated server, {size - 1} worker{alone}", f"colocated server, {size} workers"}
    for cells in table.rows.values():
        assert set(cells) == {"no computation", "with gradients"}
        assert all(len(sample.values) == 2 and min(sample.values) > 0 for sample in cells.values())


def test_round_trips_of_all_workers_are_added_up():
    """Each of three workers takes 10 ms per round trip, without delaying another."""

    class Slow(workload.Workload):
        def compute(self):
            self.comm.sleep(0.01)
            return super().compute()

    def body(comm):
        trips = Slow(comm, LINEAR, momentum=0.0)
        return asynchronous.push_rate(trips, {}, 24, computes=True)

    assert World(4, network=FreeNetwork()).run(body) == pytest.approx([300] * 4)


def test_pushed_gradients_are_applied():
    def body(comm):
        trips = workload.Workload(comm, LINEAR, momentum=0.0)
        before = next(trips.replica.model.parameters()).detach().clone()
        asynchronous.push_rate(trips, {}, 8, computes=False)
        return before, next(trips.replica.model.parameters()).detach()

    before, after = World(2).run(body)[0]
    assert not torch.equal(before, after)


def test_first_and_last_round_trips_do_not_count():
    seconds = [0.0, 5.0, 6.0, 7.0, 8.0, 100.0]
    assert asynchronous._rate_of([int(s * 1e9) for s in seconds]) == pytest.approx(1.0)
    assert asynchronous._rate_of([0, 5]) == 0


def test_slow_worker_delays_strategies_that_wait_for_it():
    """In virtual time, where the result is known."""
    table = World(5, network=FreeNetwork()).run(lambda comm: asynchronous.measure_slow(comm, silent))[0]
    rows = {name: {column: sample.median for column, sample in cells.items()} for name, cells in table.rows.items()}
    assert rows["all_reduce"] == {"seconds": pytest.approx(asynchronous.SAMPLES / (4 * 32) * 0.03)}
    assert rows["parameter_server, async"]["of all_reduce"] == pytest.approx(0.4, abs=0.05)
    assert 0.8 < rows["parameter_server, bounded"]["of all_reduce"] <= 1.0
    for name in ("local_sgd, every 4", "parameter_server, sync"):
        assert rows[name]["of all_reduce"] == pytest.approx(1.0, abs=0.02)
    for name in ("all_reduce, balance", "local_sgd, every 4, balance", "parameter_server, sync, balance"):
        assert 0.4 < rows[name]["of all_reduce"] < 0.55
    assert [row["limit"] for row in rows.values() if "limit" in row] == [0.55, 0.55, 0.45, 1.0]
    assert sum(note.endswith(": met") for note in table.notes) == 4


@pytest.mark.parametrize(
    ("measure", "size", "advice"),
    [("measure_pushes", 1, "-n 3"), ("measure_slow", 1, "-n 5"), ("measure_slow", 4, "-n 5")],
)
def test_unsuitable_numbers_of_ranks_are_refused(measure: str, size: int, advice: str):
    with pytest.raises(ClusterError, match=rf"^hpctrain bench \w+: .*{advice}[^.]*$"):
        World(size).run(lambda comm: getattr(asynchronous, measure)(comm, silent))


# -- switch ------------------------------------------------------------------------------------------------------
def test_switches_in_both_directions_are_measured():
    """Virtual time passes only in communication: every switch and broadcast takes some time."""
    tables = World(4, network=LinkNetwork()).run(lambda comm: switching.measure_switch(comm, silent))
    row = tables[0].rows["small"]
    assert set(row) == {"to async", "to all_reduce", "broadcast", "limit"}
    each = switching.RUNS * switching.SWITCHES // 2
    assert [len(row[name].values) for name in ("to async", "to all_reduce")] == [each, each]
    assert min(min(sample.values) for sample in row.values()) > 0
    assert row["limit"].median == pytest.approx(50 + 2 * row["broadcast"].median)
    assert any(note.startswith("small: ") and note.endswith(": met") for note in tables[0].notes)


def test_slow_switch_is_reported():
    table = FigureTable("switch", "", [])
    times = {"to async": (60.0, 60.0), "to all_reduce": (70.0, 90.0), "broadcast": (10.0, 14.0)}
    switching._fill_row(table, "large", {name: Sample(values, "ms") for name, values in times.items()})
    assert table.notes == ["large: 80.0 ms, limit 74.0 ms: not met"]


def test_switch_time_is_that_of_the_slowest_rank():
    """From phase 0 to 1, in ms: rank 0 takes 35, rank 1 40. Rank 2 was a server in phase 0, and its clock is 5 behind:
    it takes 50 from the workers' last step, at 10, to its first forward."""
    steps = {0: [(0, 5), (0, 10), (1, 90)], 1: [(0, 10), (1, 91)], 2: [(1, 92)]}
    forwards = {0: [(0, 1), (1, 45), (1, 70)], 1: [(0, 1), (1, 50)], 2: [(1, 55)]}

    def body(comm):
        traced = {
            "steps": np.zeros(len(steps[comm.rank]), STEPS),
            "spans": np.zeros(len(forwards[comm.rank]), SPANS),
            "clock": np.zeros(1, CLOCK),
        }
        traced["clock"]["offset_ns"] = 5 * MS if comm.rank == 2 else 0
        for row, (phase, end) in zip(traced["steps"], steps[comm.rank], strict=True):
            row["phase"], row["step"], row["t_ns"] = phase, phase, end * MS
        for row, (step, begin) in zip(traced["spans"], forwards[comm.rank], strict=True):
            row["step"], row["start_ns"], row["kind"] = step, begin * MS, KIND_CODES["forward"]
        return switching.pauses_between(comm, 2, traced)

    assert World(3).run(body) == [[pytest.approx(0.05)]] * 3


def test_switch_time_of_a_server_starts_at_the_workers_last_step():
    assert switching._pause(np.array([20, 30, -1]), np.array([40, 45, 100])) == 70
    assert switching._pause(np.array([20, 30, 10]), np.array([40, 45, -1])) == 20


def test_switch_needs_a_server_and_a_worker():
    with pytest.raises(ClusterError, match=r"^hpctrain bench switch: .*-n 4, for example$"):
        World(1).run(lambda comm: switching.measure_switch(comm, silent))


def test_codecs_are_measured_with_the_bytes_of_their_messages() -> None:
    table = codecs.measure_codecs(silent)
    assert set(table.rows) > {"bfloat16", "float16", "int8", "int4", "sign", "topk", "demo"}
    for name, cells in table.rows.items():
        joint = name in ("powersgd", "acp")
        assert set(cells) == set(table.columns) - ({codecs.ADD} if joint else set())
        assert all(len(cells[time].values) >= 2 and cells[time].median > 0 for time in codecs.TIMES if time in cells)
    rows, columns = 39 + 39 + 10, 784 + 39 + 39  # of three matrices
    assert table.rows["powersgd"][codecs.BYTES].median == pytest.approx(2 * (rows + columns) * 4 / 1e6)
    assert table.rows["acp"][codecs.BYTES].median < 0.6 * table.rows["powersgd"][codecs.BYTES].median
    assert table.rows["bfloat16"][codecs.RATIO].median == 2
    assert table.rows["int8"][codecs.BYTES].median == pytest.approx((32768 + 16 * 4) / 1e6)
    assert table.rows["topk"][codecs.RATIO].median > 60
    assert "1 Gbit/s" in table.text()



def test_benchmark_run_leaves_no_files(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    World(3).run(lambda comm: switching.measure_switch(comm, silent))
    assert list(tmp_path.iterdir()) == []


# -- read --------------------------------------------------------------------------------------------------------
def test_bench_read_reads_a_generated_run(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = reading.measure_read(silent)
    row = table.rows["3 ranks"]
    assert row["spans, millions"].median == pytest.approx(3 * 1600 / 1e6)
    assert row["files, MiB"].median > 3 * 1600 * SPANS.itemsize / 2**20
    assert [len(row[name].values) for name in ("seconds", "peak, MiB")] == [2, 2]
    assert min(row["seconds"].values) > 0
    assert 20 < row["peak, MiB"].median < 1000
    assert (row["limit, s"].median, row["limit, MiB"].median) == (30, 2048)
    assert list(tmp_path.iterdir()) == []


def test_generated_run_has_the_stated_size(tmp_path: Path):
    reading.write_run(tmp_path, 4, 4000)
    run = open_run(tmp_path)
    assert (run.ranks, run.notes) == ([0, 1, 2, 3], [])
    assert all(4000 <= count <= 4010 for count in run.rows("spans").values())
    assert len(set(run.clock(0)["offset_ns"])) == 2
    assert (sum_times(run)[list(reading.STEP)] > 0).all(axis=None)


def test_generated_run_is_smaller_on_a_full_disk():
    assert reading.spans_that_fit(2**40) == 1600
    assert reading.spans_that_fit(3 * 1600 * 80) == 800
    assert reading.spans_that_fit(0) == 0
    table = reading._table(800, 1.0, [(31.0, 100.0)])
    assert "this run has 800" in table.notes[0]
    assert table.notes[1] == "31.0 s and 100 MiB: not met"


def test_no_disk_space_for_a_generated_run_is_one_message(monkeypatch):
    monkeypatch.setattr(reading, "spans_that_fit", lambda free: 0)
    with pytest.raises(HpctrainError, match="too little space for traces to read; set TMPDIR"):
        reading.measure_read(silent)


def test_failed_reading_process_reports_why(tmp_path: Path):
    with pytest.raises(RuntimeError, match="no such run folder"):
        reading.summarise(tmp_path / "none")


# -- the cost of tracing -----------------------------------------------------------------------------------------
WRITTEN = tracing.Written(spans=8.0, bytes=400.0, seconds=0.00002)


def test_tracing_cost_is_a_ratio_of_pairs_plus_writing():
    table = FigureTable("tracing", "", [])
    pairs = [(0.005, 0.0051), (0.006, 0.006), (0.004, 0.00404), (0.005, 0.006), (0.005, 0.005)]
    tracing._fill_row(table, "x", pairs, WRITTEN, sampling=0.001)
    row = table.rows["x"]
    assert (row["without, ms"].median, row["with, ms"].median) == pytest.approx((5.0, 5.1))
    assert row["recording, %"].median == pytest.approx(1.0)
    assert (row["spans/step"].median, row["bytes/step"].median) == (8.0, 400.0)
    # The middle half is 0.02 wide; 0.02 of 5 ms are for writing.
    assert table.notes == [
        "Recording: median ratio of 5 pairs of turns 1.0100, standard error 0.0083. Occasional writing: 0.0040. "
        "Sampling of resources: 0.0010.",
        "Together 1.0150, limit 1.01: not met",
    ]


class Turns:
    """A training in which every turn takes the given time."""

    def __init__(self, name: str, seconds: list[float], order: list[str]):
        self.name, self.seconds, self.order = name, iter(seconds), order

    def take_turn(self) -> float | None:
        self.order.append(self.name)
        return next(self.seconds, None)


def test_traced_and_untraced_trainings_alternate_in_going_first(monkeypatch):
    monkeypatch.setattr(tracing, "EARLY", 1)
    order: list[str] = []
    pairs = tracing._take_turns(Turns("without", [9, 1, 2, 3], order), Turns("with", [9, 3, 4, 5], order), silent)
    assert pairs == [(1, 3), (2, 4), (3, 5)]  # the first pairs do not count
    assert order == 2 * ["without", "with", "with", "without"] + ["without", "with"]  # until both have ended


def test_first_quarter_of_the_pairs_is_discarded():
    pairs = tracing._take_turns(Turns("without", [1.0] * 8, []), Turns("with", [2.0] * 8, []), silent)
    assert pairs == [(1.0, 2.0)] * 6


def test_spans_and_bytes_per_step_are_counted(tmp_path: Path):
    with HandMade(tmp_path, size=2) as run:
        for rank in (0, 1):
            for step in range(4):
                for start in range(2 + rank):
                    run[rank].span("forward", 10 * step + start, 10 * step + start + 0.5, step=step)
                run[rank].done(10 * step + 5, step=step)
            run[rank].span("trace", 50, 50.5 + rank)
    written = tracing._account(open_run(tmp_path), 1)
    assert written.spans == pytest.approx(3.25)
    assert written.bytes == pytest.approx(3.25 * SPANS.itemsize + STEPS.itemsize + CLOCK.itemsize / 4)
    assert written.seconds == pytest.approx(0.0015 / 4)


def test_tracing_job_is_linked_from_jobs():
    linked = Path(bench.__file__).parents[2] / "jobs" / "tracing.toml"
    assert linked.resolve() == tracing.JOB.resolve()
    job = Job.load(linked)
    assert job.trace.enabled
    steps = (job.train.epochs or 0) * (1437 // (2 * job.train.batch_size))
    assert steps * 0.005 > 2 * job.trace.flush_seconds  # the trace is flushed meanwhile
    assert steps // tracing.TURN > 10 * tracing.EARLY


def test_device_all_reduce_by_transport_and_size():
    """With stand-ins for CuPy: every way runs, and the shares of what copies reach are stated."""

    def rank(comm):
        cuda = Cuda(comm)
        found = device.all_reduce_table(comm, cuda.gpu(), ["ipc", "nccl", "staged"], silent, {"1 KiB": 1024})
        assert cuda.runtime.opened == []
        assert cuda.cuda.nccl.living == 0
        return found

    table = World(2, network=LinkNetwork()).run(rank)[0]
    assert set(table.rows) == {"ipc", "nccl", "staged", device.ON_DEVICE, device.TO_HOST}
    assert all(set(row) == {"1 KiB"} for row in table.rows.values())
    assert [note.split(",")[0] for note in table.notes] == ["ipc", "staged"]
    assert "(target: 50 %)" in table.notes[0]


def test_device_step_beside_plain_torch():
    (table,) = World(1).run(lambda comm: device.step_table(comm, torch.device("cpu"), LINEAR, silent))
    assert {name: len(row["step"].values) for name, row in table.rows.items()} == {device.PLAIN: 2, device.OURS: 2}
    assert "target: at most +3 %" in table.notes[0]


def test_device_update_beside_a_copy():
    (table,) = World(1).run(lambda comm: device.update_table(comm, torch.device("cpu"), 1000, silent))
    assert set(table.rows) == {device.COPY, *device.PASSES}
    assert table.title == "update of an arena of 0 M float32, one rank"
    assert len(table.notes) == 2


def test_measurements_replace_former_ones_in_the_page():
    page = runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "gpu_page.py"))
    table = FigureTable("device_update", "update, one rank", ["ms"], {"copy": {"ms": Sample((1.0, 2.0), "ms")}}, ["X."])
    measured = Report([table]).plain()
    first = page["put_in"](page["DOCUMENT"].read_text(), measured)
    assert "| update, one rank | ms |\n|---|---|\n| copy | 1.5 (1.25-1.75) |\n\nX.\n" in first
    assert "Nothing yet" not in first
    assert page["put_in"](first, measured) == first


# -- comparisons -------------------------------------------------------------------------------------------------
def test_ratio_of_blocks_and_its_interval():
    """A machine that drifts by a factor of ten changes both: the ratio is exact. Without drift, Student's t."""
    found = comparison.ratio("a / b", "ms", Sample((1.0, 10.0, 5.0), ""), Sample((2.0, 20.0, 10.0), ""))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    logs = np.array([0.1, 0.2, 0.6])
    spread = comparison.ratio("a / b", "ms", Sample(tuple(np.exp(logs)), ""), Sample((1.0, 1.0, 1.0), ""))
    reach = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert np.log([spread.value, spread.low, spread.high]) == pytest.approx([0.3, 0.3 - reach, 0.3 + reach])


@pytest.mark.parametrize(("period", "expected"), [(1, [2, 6]), (4, [4, 8]), (3, [3, 7])])
def test_measured_steps_begin_after_whole_rounds(period: int, expected: list[int], monkeypatch: pytest.MonkeyPatch):
    def body(comm: Any) -> list[int]:
        taken, marks = list[None](), list[int]()
        monkeypatch.setattr(comm, "barrier", lambda: marks.append(len(taken)))
        steps.timed(comm, replace(LARGE, steps=4), lambda: taken.append(None), period)
        return [*marks, len(taken)]

    assert World(1).run(body)[0] == expected


def test_exposed_communication_is_what_a_step_takes_longer():
    mine, other, without = (Sample(values, "ms") for values in ((14.0, 16.0), (20.0, 20.0), (10.0, 10.0)))
    found = comparison.exposed("x", "ms", mine, other, without, comparison.Goal(0.4))
    assert found.value == pytest.approx(0.5)
    assert found.verdict == "not met, not certain"  # 0.4 to 0.6, and far beyond, with two blocks
    assert comparison.Comparison("x", "ms", 0.5, 0.45, 0.6, 9, comparison.Goal(0.4)).verdict == "not met"
    assert comparison.Goal(0.4, at_least=True).met(found.value)


def test_one_block_has_no_interval():
    found = comparison.ratio("a / b", "ms", Sample((1.0,), ""), Sample((2.0,), ""))
    assert found.value == 0.5
    assert str(found) == "a / b, ms: 0.5"


def test_step_is_compared_with_tuned_ddp():
    table = FigureTable("step_mlp", "", [steps.WALL])
    times = {steps.NOTHING: 10.0, steps.DEFAULT: 12.0, steps.MESSAGE: 14.0, steps.BFLOAT16: 11.0, steps.TUNED: 20.0}
    times[steps.TOPK] = 10.5
    table.rows = {name: {steps.WALL: Sample((value, value), "ms")} for name, value in times.items()}
    found = {each.what: each for each in steps.compare(table, workload.MLP, steps.BETWEEN_NODES)}
    assert found["all_reduce / DDP tuned"].value == pytest.approx(0.6)
    assert found["all_reduce / DDP tuned"].verdict == "met"
    assert found["exposed communication, all_reduce, bfloat16 / DDP tuned"].value == pytest.approx(0.1)


def test_every_value_as_csv_and_comparisons_as_a_picture(tmp_path: Path):
    table = FigureTable("t", "title", ["ms"])
    table.rows = {"a": {"ms": Sample((1.0, 2.0), "ms")}, "b": {"ms": Sample((2.0, 2.0), "ms")}}
    table.comparisons = [comparison.ratio("a / b", "ms", table.rows["a"]["ms"], table.rows["b"]["ms"])]
    lines = Report([table]).csv().splitlines()
    assert lines[:3] == ["bench,row,column,block,value,unit", "t,a,ms,0,1.0,ms", "t,a,ms,1,2.0,ms"]
    assert [line.split(",")[3] for line in lines[5:]] == ["", "low", "high"]
    bench._output(Report([table]), bench.Outputs(csv=str(tmp_path / "t.csv"), plot=str(tmp_path / "t.png")))
    assert (tmp_path / "t.csv").read_text().splitlines() == lines
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_page_has_command_date_and_verdicts():
    page = runpy.run_path(str(Path(__file__).parents[2] / "analysis" / "performance_page.py"))
    table = FigureTable("limits", "limits", ["GB/s"], {"copy": {"GB/s": Sample((1.0,), "GB/s")}})
    table.comparisons = [comparison.Comparison("copy", "GB/s", 1.0, 0.9, 1.1, 3, comparison.Goal(0.5))]
    about = {"command": "hpctrain bench limits", "measured": "2026-01-01 10:00 UTC", "commit": "abc"}
    text = "\n".join(page["page"]({"limits": {**about, **Report([table]).plain()}}))
    assert "## `hpctrain bench limits`\n\n2026-01-01 10:00 UTC, commit abc, " in text
    assert "| copy | 1 |" in text
    assert "| copy, GB/s | 1 | 0.9 to 1.1 | at most 0.5: **not met** |" in text
    assert all(words[0] in bench.CHOICES for words in page["SECTIONS"].values())


def test_limits_of_ranks():
    table = World(3, (0, 1, 1), network=LinkNetwork()).run(lambda comm: limits.measure_limits(comm, silent))[0]
    assert len(table.rows) == 2
    assert table.rows["messages between ranks 0 and 1, one at a time"][limits.BANDWIDTH].median > 0


def test_traffic_needs_several_nodes():
    with pytest.raises(ClusterError, match=r"^hpctrain bench traffic: .*clusters/lan4.toml$"):
        World(2).run(lambda comm: limits.measure_traffic(comm, silent))


def test_sent_bytes_are_those_of_each_node(monkeypatch):
    """Counted once per node, although every rank reads the counters."""
    counts = iter(range(0, 600, 100))
    monkeypatch.setattr(limits, "_counted", lambda: next(counts))
    rows = World(3, (0, 1, 1)).run(lambda comm: limits._sent(comm, lambda: None).tolist())
    assert rows == [[300.0, 300.0]] * 3


def test_device_bench_without_a_gpu_is_one_message(monkeypatch):
    monkeypatch.setattr(device, "usable_gpus", lambda: (0, None))
    with pytest.raises(ClusterError, match="hpctrain bench device: a rank has no GPU that torch can use"):
        World(2).run(lambda comm: device.measure_step(comm, silent))


def test_which_measurements_need_ranks():
    assert bench.needs_ranks("all", {})
    assert bench.needs_ranks("step", {"PATH": "/bin"})
    assert not bench.needs_ranks("virtual", {})
    assert not bench.needs_ranks("trace", {})
    assert not bench.needs_ranks("read", {})
    assert bench.needs_ranks("tracing", {})
    for launcher in ({"PMI_SIZE": "1"}, {"OMPI_COMM_WORLD_SIZE": "4"}, {MARK: "x"}):
        assert not bench.needs_ranks("all", launcher)


def test_figures_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "figures.json"
    assert main(["bench", "trace", "--json", str(path)]) == 0
    reported = json.loads(path.read_text())
    assert reported["trace"]["rows"]["span"]["us"]["unit"] == "us"
    out = capsys.readouterr()
    assert "cost of a span" in out.out
    assert out.err == "bench: trace\n"


@pytest.mark.parametrize("name", ["no such folder/figures.json", "."])
def test_unwritable_output_file_is_reported_before_measuring(name: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "trace", "--json", name]) == 2
    out = capsys.readouterr()
    assert out.err.startswith(f"hpctrain: --json {name}: ")
    assert "bench: trace" not in out.err
    with pytest.raises(HpctrainError, match="--json"):
        bench.check_path(name)


def test_report_has_all_tables():
    tables = [FigureTable("a", "A, ms", ["x"]), FigureTable("b", "B, us", ["y"])]
    report = Report(tables)
    assert "A, ms" in report.text()
    assert set(report.plain()) == {"machine", "a", "b"}


def _bench_on_ranks(folder: Path, program: str, *arguments: str) -> tuple[Any, Any]:
    """Run a program on two real ranks; the last of its arguments is a file for its figures. Returns (the ended process,
    the figures)."""
    import subprocess

    from hpctrain import launcher

    source, path = folder / "bench.py", folder / "figures.json"
    source.write_text(program)
    code = "import sys; from hpctrain import launcher; sys.exit(launcher.run(2, sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, str(source), *arguments, str(path)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(Path(launcher.__file__).resolve().parents[2]), "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr
    return done, json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.launch
def test_bench_starts_ranks_itself(tmp_path: Path):
    """One size with the real launcher; `hpctrain bench` runs all of it."""
    done, found = _bench_on_ranks(
        tmp_path,
        "import sys\n"
        "from hpctrain.bench import together\n"
        "together.SIZES = {'4 KiB': 4096}\n"
        "together.SECONDS = 0.0\n"
        "from hpctrain.cli import main\n"
        "sys.exit(main(['bench', 'all_reduce', '--json', sys.argv[1]]))\n",
    )
    assert "all-reduce of 2 ranks" in done.stdout
    assert done.stderr.splitlines()[0] == "bench: all-reduce of 4 KiB"
    assert set(found["all_reduce"]["rows"]) >= {"library", together.SHARED}


@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.any_mpi
def test_first_step_is_timed_beside_torchrun(monkeypatch):
    """Two ranks, once; `hpctrain bench start` starts more of them, and more often."""
    monkeypatch.setattr(start, "RANKS", 2)
    monkeypatch.setattr(start, "REPETITIONS", 1)
    table = start.measure_start(silent)
    assert set(table.rows) == {start.RUN, start.MPIEXEC, start.TORCHRUN}
    for row in table.rows.values():
        assert 0.5 < row[start.SECONDS].median < 100
        assert 50 < row[start.PROPORTIONAL].median < row[start.PEAK].median < 2000


@pytest.mark.slow
@pytest.mark.launch
def test_rivals_are_measured_on_real_ranks(tmp_path: Path):
    """Small sizes; every rival that is installed runs beside ours, and is compared with it."""
    _, found = _bench_on_ranks(
        tmp_path,
        "import sys, torch\n"
        "import hpctrain.bench\n"
        "from hpctrain.bench import asynchronous, steps, together, workload\n"
        "load = workload.Load(lambda: torch.nn.Linear(6, 10), (6,), 4, 2, 2)\n"
        "together.SIZES, together.SECONDS = {'4 KiB': 4096}, 0.0\n"
        "steps.LOADS, asynchronous.PUSHED = {workload.MLP: load}, load\n"
        "asynchronous.BLOCKS, asynchronous.PUSHES = 2, 8\n"
        "hpctrain.bench.SEVERAL['all'] = ('all_reduce', 'step_mlp', 'pushes')\n"
        "hpctrain.bench.OF_ONE = ()\n"
        "from hpctrain.cli import main\n"
        "sys.exit(main(['bench', 'all', '--json', sys.argv[1]]))\n",
    )
    assert {together.PLAIN, together.GLOO} < set(found["all_reduce"]["rows"])
    assert {steps.TUNED, "DDP as it comes", "DDP with ZeroRedundancyOptimizer"} < set(found["step_mlp"]["rows"])
    assert f"{asynchronous.RPC}, 1 worker" in found["pushes"]["rows"]
    assert all(found[name]["comparisons"] for name in ("all_reduce", "step_mlp", "pushes"))


@pytest.mark.slow
@pytest.mark.launch
def test_tracing_cost_is_measured_on_real_ranks(tmp_path: Path):
    """A few steps only; `hpctrain bench tracing` runs all of it."""
    short = tmp_path / "short.toml"
    short.write_text(tracing.JOB.read_text().replace("epochs = 200", "epochs = 2"))
    done, found = _bench_on_ranks(
        tmp_path,
        "import sys\n"
        "from pathlib import Path\n"
        "from hpctrain.bench import tracing\n"
        "tracing.JOB, tracing.EARLY, tracing.PROGRESS = Path(sys.argv[1]), 5, 20\n"
        "from hpctrain.cli import main\n"
        "sys.exit(main(['bench', 'tracing', '--json', sys.argv[2]]))\n",
        str(short),
    )
    reported = [line for line in done.stderr.splitlines() if line.startswith("bench")]
    assert reported == [f"bench: tracing, pair {pair} of turns of 2 steps each" for pair in (1, 21)]
    (row,) = found["tracing"]["rows"].values()
    assert row["recording, %"]["n"] == 2 * math.ceil(1437 / 48) // tracing.TURN - 5
    assert row["spans/step"]["median"] > 5
    assert row["bytes/step"]["median"] > 5 * SPANS.itemsize
    assert "limit 1.01" in done.stdout
    assert not list(tmp_path.glob("hpctrain-bench-*"))
