"""Totals of a hand-built trace, and the figure that analysis/loss.py draws of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.trace import Recorder, TraceWriter, format_totals, open_run, sum_times, trace_path

SECOND = 10**9
LOSS = Path(__file__).resolve().parents[2] / "analysis" / "loss.py"


def build(folder):
    """Rank 0: 10 s, of which forward 4, wait 3 (around a send of 1), 2 s uncovered; a server thread beside it."""
    now = [0]
    recorder = Recorder(lambda: now[0])
    writer = TraceWriter(trace_path(folder, 0), recorder, {"rank": 0, "size": 2, "role": "worker"}, 1e6)

    def span(kind, start, end, lane=0, nbytes=0):
        recorder.lane(lane).open(kind, start * SECOND, nbytes)
        recorder.lane(lane).close(end * SECOND)

    span("forward", 5, 9)
    recorder.open("wait", 9 * SECOND)
    span("send", 10, 11, nbytes=100)
    recorder.close(13 * SECOND)
    span("update", 1, 6, lane=1)
    for step in range(4):
        recorder.step, now[0] = step, (6 + step) * SECOND
        recorder.step_done(0, 1.0 / (step + 1), 25, 0.1)
    span("data", 15, 15)
    writer._append()
    writer.close()
    other = TraceWriter(trace_path(folder, 1), Recorder(lambda: 0), {"rank": 1, "size": 2, "role": "server"})
    other._file.close()
    other._file = None


def test_totals_equal_what_was_written(tmp_path):
    build(tmp_path)
    rows = sum_times(open_run(tmp_path)).to_dict("records")
    frame = {(row["rank"], row["lane"]): row for row in rows}
    own = frame[0, 0]
    assert {kind: own[kind] for kind in ("forward", "wait", "send", "data", "backward")} == {
        "forward": 4.0,
        "wait": 3.0,
        "send": 1.0,
        "data": 0.0,
        "backward": 0.0,
    }
    assert (own["time"], own["unaccounted"]) == (10.0, 2.0)
    assert (own["steps"], own["samples"], own["rate"]) == (4, 100, 10.0)
    server = frame[0, 1]
    assert (server["time"], server["update"], server["unaccounted"], server["steps"]) == (5.0, 5.0, 0.0, 0)
    assert frame[1, 0]["time"] == 0.0


TABLE = """\
                      rank 0          rank 0+           rank 1
role                  worker    server thread           server
seconds       10.000 100.0 %    5.000 100.0 %            0.000
forward       4.000   40.0 %    0.000   0.0 %            0.000
send          1.000   10.0 %    0.000   0.0 %            0.000
wait          3.000   30.0 %    0.000   0.0 %            0.000
update        0.000    0.0 %    5.000 100.0 %            0.000
unaccounted   2.000   20.0 %    0.000   0.0 %            0.000
steps                      4                                 0
samples                  100                                 0
samples/s               10.0                               0.0"""


def test_totals_table(tmp_path):
    build(tmp_path)
    text = format_totals(open_run(tmp_path))
    assert [line.split() for line in text.splitlines()] == [line.split() for line in TABLE.splitlines()]
    assert max(len(line) for line in text.splitlines()) <= 80
    narrow = format_totals(open_run(tmp_path), width=30)
    assert narrow.count("role") == 3


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_loss_figure_is_drawn(tmp_path, suffix):
    build(tmp_path)
    figure = tmp_path / f"loss.{suffix}"
    done = subprocess.run([sys.executable, LOSS, tmp_path, "-o", figure], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert figure.stat().st_size > 5000


@pytest.mark.slow
def test_loss_figure_of_a_wrong_folder_is_one_message(tmp_path):
    done = subprocess.run([sys.executable, LOSS, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "not a run folder" in done.stderr
    assert "Traceback" not in done.stderr
