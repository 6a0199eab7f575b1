"""The reader: corrected times, resumed runs, and notes instead of errors for missing or damaged data."""

import os
import random
import shutil
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.cli import main
from hpctrain.errors import TraceError
from hpctrain.trace import SCHEMA_VERSION, Recorder, TraceWriter, format_totals, open_run, sum_times, trace_path
from hpctrain.trace.events import PhaseSwitch
from hpctrain.trace.files import TraceFile
from hpctrain.trace.schema import CLOCK

ADVICE = f"this hpctrain reads version {SCHEMA_VERSION}; read it with the hpctrain that wrote it"


class Writing:
    """A rank whose clock the test sets."""

    def __init__(self, folder, rank, size=1, attempt=1, **attributes):
        self.now = 1000
        self.recorder = Recorder(lambda: self.now)
        self.writer = TraceWriter(
            trace_path(folder, rank, attempt),
            self.recorder,
            {"rank": rank, "size": size, "role": "worker", "attempt": attempt, **attributes},
        )

    def span(self, kind, start, end, nbytes=0, peer=-1, step=None, lane=0):
        recorder = self.recorder.lane(lane)
        recorder.step = step if step is not None else recorder.step
        recorder.open(kind, start, nbytes, peer)
        recorder.close(end)
        self.now = end

    def close(self):
        self.writer._append()  # without the span of a flush, so that the file holds what the test wrote
        self.writer._file.close()
        self.writer._file = None


def write(folder, ranks=2, size=None, steps=100, per_step=20):
    for rank in range(ranks):
        writing = Writing(folder, rank, size or ranks)
        for step in range(steps):
            for number in range(per_step):
                start = 1000 + 10 * (step * per_step + number)
                writing.span("send", start, start + 7, 8, 0, step)
            writing.recorder.step_done(0, 1.0, 32, 0.1)
        writing.close()


def test_times_are_corrected_piecewise(tmp_path):
    for rank in (0, 1):
        writing = Writing(tmp_path, rank, 2)
        writing.now = 1_000
        writing.recorder.clock(10**18 * rank, 1)
        writing.now = 2_000
        writing.recorder.clock(10**18 * rank + 100 * rank, 1)
        writing.span("send", 500, 1_000)
        writing.span("recv", 1_500, 1_800)
        writing.span("wait", 3_000, 4_000)
        writing.close()
    base = 10**18
    spans = open_run(tmp_path).spans(1)
    assert spans["start_ns"].tolist() == [base + 500, base + 1_550, base + 3_100]
    assert spans["end_ns"].tolist() == [base + 1_000, base + 1_880, base + 4_100]
    own = open_run(tmp_path).spans(0)
    assert own["start_ns"].tolist() == [500, 1_500, 3_000]
    assert own["start_s"].tolist() == [0.0, 1e-6, 2.5e-6]
    assert open_run(tmp_path).clock(1)["offset_ns"].tolist() == [base, base + 100]


def test_correction_keeps_nanoseconds_of_calendar_times():
    begin = 1_800_000_000_000_000_001
    clock = np.array([(begin, -5, 0), (begin + 1000, 95, 0)], CLOCK)
    file = TraceFile(Path("x"), 0, 1, {}, True, clock)
    times = np.array([begin, begin + 510, begin + 2000], np.int64)
    assert (file.correct(times) - begin).tolist() == [-5, 510 + 46, 2095]


def test_frames_select_ranks_kinds_and_steps(tmp_path):
    for rank in range(3):
        writing = Writing(tmp_path, rank, 3)
        for step in range(5):
            writing.span("forward", 100 * step, 100 * step + 10, step=step)
            writing.span("send", 100 * step + 10, 100 * step + 30, 64, 1, step)
        writing.span("update", 30, 40, step=1, lane=1)
        writing.recorder.event(PhaseSwitch("loss 0.1 <= 0.2"))
        writing.recorder.resource(50.0, 1000)
        writing.close()
    run = open_run(tmp_path)
    assert (run.ranks, run.size, run.attempts, run.notes) == ([0, 1, 2], 3, [1], [])
    assert len(run.spans()) == 33
    assert run.spans([0, 2], "send", (1, 3))[["rank", "step"]].to_numpy().tolist() == [[0, 1], [0, 2], [2, 1], [2, 2]]
    assert len(run.spans(1, ["send", "forward"], range(0, 5))) == 10
    assert len(run.spans(1, steps=range(0))) == 0
    assert run.spans(1, "update")["lane"].tolist() == [1]
    assert run.events()["text"].tolist() == ["loss 0.1 <= 0.2"] * 3
    assert run.resources(2)[["cpu", "resident", "gpu"]].to_numpy().tolist() == [[50.0, 1000.0, -1.0]]
    assert run.metrics().empty
    with pytest.raises(TraceError, match=r"no readable trace of rank 7; choose from ranks 0-2"):
        run.spans(7)
    with pytest.raises(ValueError, match="'sending' is not a known span kind"):
        run.spans(kind="sending")


def test_empty_frames_have_all_columns(tmp_path):
    Writing(tmp_path, 0).close()
    run = open_run(tmp_path)
    assert {"rank", "step", "kind", "start_ns", "end_s"} <= set(run.spans().columns)
    for frame in (run.steps(), run.events(), run.resources(), run.clock()):
        assert len(frame) == 0
        assert {"rank", "attempt", "t_ns", "t_s"} <= set(frame.columns)
    assert "unaccounted" in format_totals(run)


def test_resumed_run_is_one_run(tmp_path):
    """The second attempt starts at step 3; its clock restarted, one minute of wall time later."""
    for attempt, steps in ((1, range(6)), (2, range(3, 8))):
        writing = Writing(tmp_path, 0, attempt=attempt)
        writing.recorder.clock(0, 1)
        for step in steps:
            writing.span("forward", 1000 + 10 * step, 1005 + 10 * step, step=step)
            writing.recorder.step_done(0, float(attempt), 32, 0.1)
        writing.close()
        with h5py.File(trace_path(tmp_path, 0, attempt), "r+") as file:
            file.attrs["clock_ns"], file.attrs["unix_ns"] = 1000, 10**18 + (attempt - 1) * 60 * 10**9
    run = open_run(tmp_path)
    assert run.attempts == [1, 2]
    assert run.steps()["loss"].tolist() == [1.0] * 3 + [2.0] * 5
    assert run.steps()["step"].tolist() == list(range(8))
    assert len(run.steps(rolled_back=True)) == 11
    spans = run.spans()
    assert spans["start_ns"].iloc[6] == 1030 + 60 * 10**9
    assert spans["start_s"].iloc[6] == pytest.approx(60.00000003)
    assert (run.attributes(0)["attempt"], run.attributes(0, 1)["attempt"]) == (2, 1)


def test_missing_rank_is_noted(tmp_path):
    write(tmp_path, ranks=3, size=5, steps=2)
    os.remove(trace_path(tmp_path, 1))
    run = open_run(tmp_path)
    assert run.notes == ["ranks 1, 3-4 of 5: no trace file"]
    assert run.ranks == [0, 2]
    assert run.size == 5
    assert "note: ranks 1, 3-4 of 5: no trace file" in format_totals(run)


def test_truncated_file_gives_only_true_rows(tmp_path):
    write(tmp_path, steps=300)
    path = trace_path(tmp_path, 1)
    data, seen = path.read_bytes(), set()
    cuts = random.Random(0)
    for _ in range(60):
        length = cuts.choice([cuts.randrange(30_000), cuts.randrange(len(data))])
        path.write_bytes(data[:length])
        run = open_run(tmp_path)
        assert len(run.spans(0)) == 6000
        rows = run.spans(1) if 1 in run.ranks else run.spans(0).iloc[:0]
        order = np.arange(len(rows))
        assert (rows["start_ns"] == 1000 + 10 * order).all()
        assert (rows["end_ns"] == 1007 + 10 * order).all()
        assert (rows["step"] == order // 20).all()
        if len(rows) < 6000 or len(run.steps(1)) < 300:
            assert [note for note in run.notes if "rank 1" in note], length
        seen.add(0 if not len(rows) else 1 if len(rows) < 6000 else 2)
    assert {0, 1} <= seen


def test_rows_never_written_are_left_out_with_a_note(tmp_path):
    write(tmp_path, ranks=1, steps=5)
    with h5py.File(trace_path(tmp_path, 0), "r+") as file:
        file["spans"].resize(150, axis=0)
    run = open_run(tmp_path)
    assert len(run.spans()) == 100
    assert [note for note in run.notes if note.startswith("rank 0: 50 of 150 rows of /spans")]


def test_foreign_files_are_refused_by_name(tmp_path):
    write(tmp_path, ranks=4, steps=1)
    trace_path(tmp_path, 1).write_bytes(b"no HDF5 at all" * 100)
    trace_path(tmp_path, 2).write_bytes(b"")
    with h5py.File(trace_path(tmp_path, 3), "r+") as file:
        file.attrs["schema_version"] = 99
    notes = open_run(tmp_path).notes
    damaged = "ranks 1-2: each of their files in trace/ cannot be read: it is damaged or truncated"
    assert any(note.startswith(damaged) for note in notes)
    assert f"rank 3: trace/rank_00003.h5 has schema version 99: {ADVICE}" in notes
    os.remove(trace_path(tmp_path, 0))
    with pytest.raises(TraceError, match=f"none of its traces can be read: {damaged}"):
        open_run(tmp_path)


def set_version(folder, rank, version, attempt=1):
    with h5py.File(trace_path(folder, rank, attempt), "r+") as file:
        file.attrs["schema_version"] = version


def test_ranks_of_another_schema_version_are_left_out_with_a_note(tmp_path):
    write(tmp_path, ranks=5, steps=1)
    for rank in (1, 2, 4):
        set_version(tmp_path, rank, 0)
    run = open_run(tmp_path)
    assert (run.ranks, run.size) == ([0, 3], 5)
    assert run.notes == [f"ranks 1-2, 4: each of their files in trace/ has schema version 0: {ADVICE}"]
    assert set(run.spans()["rank"]) == {0, 3}


def test_older_schema_versions_are_read_with_missing_columns_filled(tmp_path):
    """Version 1 has the layout of version 2."""
    shutil.copytree(Path(__file__).parents[1] / "fixtures" / "runs_0.1" / "all_reduce", tmp_path, dirs_exist_ok=True)
    for rank in (0, 2):
        set_version(tmp_path, rank, 1)
    run = open_run(tmp_path)
    assert run.ranks == [0, 1, 2] and set(run.spans()["rank"]) == {0, 1, 2}
    spans = run.spans()
    assert not spans["items"].any() and set(run.steps()["phase"]) == {0}
    own_sums = (spans["kind"] == "reduce") & (spans["id"] < 0)
    assert own_sums.any() and (spans["flops"] == own_sums).all()  # their number is unknown, but not zero
    lacks = "messages and barriers that no rank waited for are not recorded, nor are items and operations of spans"
    assert run.notes == [f"ranks 0, 2: written in schema version 1: {lacks}"]


def test_attempt_of_another_schema_version_is_left_out_with_a_note(tmp_path):
    for attempt in (1, 2):
        for rank in (0, 1):
            Writing(tmp_path, rank, 2, attempt).close()
            set_version(tmp_path, rank, SCHEMA_VERSION if attempt == 1 else 99, attempt)
    run = open_run(tmp_path)
    assert run.attempts == [1]
    assert run.notes == [f"ranks 0-1: each of their files of attempt 2 in trace/ has schema version 99: {ADVICE}"]


def test_run_of_another_schema_version_is_one_message(tmp_path, capsys):
    write(tmp_path, ranks=4, steps=1)
    for rank in range(4):
        set_version(tmp_path, rank, 99)
    assert main(["trace", str(tmp_path)]) == 2
    what = f"ranks 0-3: each of their files in trace/ has schema version 99: {ADVICE}"
    assert capsys.readouterr().err == f"hpctrain: {tmp_path}: none of its traces can be read: {what}\n"


def test_hdf5_file_that_is_not_a_trace_is_refused(tmp_path):
    write(tmp_path, steps=1)
    with h5py.File(trace_path(tmp_path, 1), "w", libver="latest") as file:
        file["something"] = [1, 2, 3]
    assert open_run(tmp_path).notes == [
        "rank 1: trace/rank_00001.h5 has no schema version, so it is not a trace"
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "not a run folder"),
        (lambda folder: folder.joinpath("job.toml").write_text(""), "has no traces"),
        (lambda folder: folder.joinpath("trace").mkdir(), "has no traces"),
        (lambda folder: folder.rmdir(), "no such run folder"),
    ],
)
def test_folder_without_traces_is_one_message(tmp_path, make, sentence):
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    with pytest.raises(TraceError, match=sentence):
        open_run(folder)


def test_run_is_found_from_its_files(tmp_path):
    write(tmp_path, ranks=1, steps=1)
    (tmp_path / "job.toml").write_text("name = 'x'  # but no [table")
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n10,0,0.5\n20,1,0.25\n")
    for path in (tmp_path, tmp_path / "job.toml", tmp_path / "trace", trace_path(tmp_path, 0)):
        assert open_run(path).folder == tmp_path
    assert open_run(tmp_path).metrics()["loss"].tolist() == [0.5, 0.25]


def test_job_is_text_if_it_cannot_be_loaded(tmp_path):
    write(tmp_path, ranks=1, steps=1)
    assert open_run(tmp_path).job == ""
    (tmp_path / "job.toml").write_text('[model]\nname = "<lambda in train.py:12>"\n')
    assert "<lambda" in str(open_run(tmp_path).job)
    (tmp_path / "job.toml").write_text("this is = = no TOML")
    assert open_run(tmp_path).job == "this is = = no TOML"


def test_blocks_stream_the_rows_of_frames(tmp_path):
    write(tmp_path, steps=50)
    run = open_run(tmp_path)
    blocks = list(run.blocks("spans", rows=300))
    assert [(rank, attempt, len(rows)) for rank, attempt, rows in blocks[:4]] == [(0, 1, 300)] * 3 + [(0, 1, 100)]
    assert np.concatenate([rows["start_ns"] for _, _, rows in blocks]).tolist() == run.spans()["start_ns"].tolist()


def test_blocks_of_some_columns_have_corrected_times(tmp_path):
    writing = Writing(tmp_path, 0)
    writing.recorder.clock(5_000, 1)
    writing.span("send", 1_000, 2_000, 64)
    writing.span("wait", 2_000, 2_500)
    writing.close()
    ((_, _, rows),) = open_run(tmp_path).blocks("spans", columns=["end_ns", "bytes"])
    assert rows.dtype.names == ("end_ns", "bytes")
    assert rows.tolist() == [(7_000, 64), (7_500, 0)]
    frame = open_run(tmp_path).spans(kind="wait", columns=["end_ns", "kind"])
    assert frame.columns.tolist() == ["rank", "attempt", "end_ns", "kind", "end_s"]
    assert frame.iloc[0].tolist() == [0, 1, 7_500, "wait", 1.5e-6]


def test_memory_is_limited_to_what_is_requested(tmp_path):
    writing = Writing(tmp_path, 0)
    for step in range(200):
        for number in range(2000):
            writing.span("update" if number == 0 else "send", 10 * number, 10 * number + 5, step=step)
    writing.close()
    run = open_run(tmp_path)
    whole = 47 * 400_000

    def peak(read):
        read()  # modules
        tracemalloc.start()
        try:
            held = read()
            return len(held), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    for expected, read in (
        (200, lambda: run.spans(kind="update")),
        (4000, lambda: run.spans(steps=(100, 102))),
        (1, lambda: sum_times(run)),
    ):
        rows, most = peak(read)
        assert rows == expected
        assert most < whole / 2
    assert peak(lambda: run.spans(columns=["bytes"]))[1] < whole


def test_metric_entries_may_be_nan_but_not_the_metric(tmp_path: Path) -> None:
    write(tmp_path, ranks=1, steps=1)
    (tmp_path / "metrics.csv").write_text("step,split,loss,metric,metric.f1\n1,test,2,0.5,nan\n2,test,1,nan,0.5\n")
    run = open_run(tmp_path)
    assert run.metrics()["step"].tolist() == [1]
    assert any("1 of 2 rows cannot be read" in note for note in run.notes)
