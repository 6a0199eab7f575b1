"""`hpctrain watch` on runs that grow, end, die or have not started, and how it fits a terminal."""

import io
import os
import shutil
import time

import numpy as np
import pytest
from rich.console import Console

from hpctrain.errors import HpctrainError, TraceError
from hpctrain.trace.files import open_h5
from hpctrain.trace.schema import STEPS
from hpctrain.views.watch import _redraw, watch
from hpctrain.views.watch.history import History
from hpctrain.views.watch.picture import LivePicture, duration, line, sparkline
from hpctrain.views.watch.snapshot import RankView, RunStatus, Snapshot
from hpctrain.views.watch.tail import Tail
from hpctrain.views.watch.watcher import Watcher
from tests.traces import HandMade

JOB = 'model = "mlp"\ndata = "digits"\ntrain.epochs = 10\ntrain.batch_size = 10\n'
SWITCH = (
    JOB + '[[phases]]\nstrategy = "all_reduce"\nuntil = {rule = "after", epochs = 1}\n'
    '[[phases]]\nstrategy = {name = "parameter_server", mode = "async", servers = 1}\n'
)
SECOND = 1000.0  # HandMade counts milliseconds


class Going:
    """A run that is being written: `show` copies what its ranks have flushed so far to the watched folder."""

    def __init__(self, tmp_path, size=2, job=JOB, attempt=1, **how):
        self.folder, self.now = tmp_path / "run", time.time()
        self._size, self._written = size, tmp_path / f"written.{attempt}"
        self._written.mkdir()
        self.ranks = HandMade(self._written, size, job=job, attempt=attempt, **how)
        (self.folder / "trace").mkdir(parents=True, exist_ok=True)
        (self.folder / "job.toml").write_text(job)

    def __getitem__(self, rank):
        return self.ranks[rank]

    def steps(self, first, last, rank_ms=(), cursor=None, start=0.0, phase=0, **columns):
        """Steps of 100 ms and 10 samples on every rank: `rank_ms[rank]` ms (40) of computation, then waiting."""
        for step in range(first, last):
            for number, rank in self.ranks.ranks.items():
                at = start + 100.0 * step
                took = rank_ms[number] if rank_ms else 40.0
                rank.span("forward", at, at + took / 2, step)
                rank.span("backward", at + took / 2, at + took, step)
                rank.span("wait", at + took, at + 100.0, step, id=step)
                consumed = 10 * self._size * (step + 1) if cursor is None else cursor
                rank.done(at + 100.0, step, samples=10, cursor=consumed, epoch=consumed / 1000, phase=phase, **columns)

    def show(self, *ranks, later=0.0):
        """`later`: seconds since the last time."""
        self.now += later
        for number in ranks or self.ranks.ranks:
            writer = self[number].writer
            if writer._file is not None:
                writer._append()
                writer._file.flush()
            target = self.folder / "trace" / writer.path.name
            shutil.copyfile(writer.path, target)
            os.utime(target, (self.now, self.now))

    def close(self):
        for rank in self.ranks.ranks.values():
            rank.close()

    def watcher(self):
        return Watcher(self.folder, lambda: self.now)


@pytest.fixture
def going(tmp_path):
    made = []

    def make(*arguments, **how):
        made.append(Going(tmp_path, *arguments, **how))
        return made[-1]

    yield make
    for run in made:
        for rank in run.ranks.ranks.values():
            if rank.writer._file is not None:
                rank.close()


def begin(run, index=0, strategy="all_reduce", servers=(), at=0.0):
    for number, rank in run.ranks.ranks.items():
        rank.phase(at, index, "server" if number in servers else "worker", strategy)


# -- numbers -----------------------------------------------------------------------------------------------------
def test_rates_and_waiting_shares_come_from_the_spans(going):
    run = going(2)
    begin(run)
    run.steps(0, 20, (40.0, 80.0))
    run.show()
    shot = run.watcher().look()
    assert [view.rate for view in shot.ranks] == pytest.approx([100.0, 100.0])
    assert shot.rate == pytest.approx(200.0)
    assert [view.waiting for view in shot.ranks] == pytest.approx([0.6, 0.2])
    assert [view.sample_seconds for view in shot.ranks] == pytest.approx([0.004, 0.008])
    assert (shot.phase, shot.strategy, shot.size, shot.status) == (0, "all_reduce", 2, RunStatus.RUNNING)
    assert [view.role for view in shot.ranks] == ["worker", "worker"]
    assert shot.elapsed == pytest.approx(2.0)


def test_messages_and_collectives_count_as_waiting_but_not_local_sums(going):
    run = going(1)
    begin(run)
    for step in range(5):
        at = 100.0 * step
        for index, (kind, id) in enumerate([("send", 1), ("recv", 1), ("reduce", 1), ("reduce", -1), ("update", -1)]):
            flops = 50.0 * (kind == "reduce" and id < 0)
            run[0].span(kind, at + 20.0 * index, at + 20.0 * (index + 1), step, id=id, flops=flops)
        run[0].done(at + 100.0, step)
    run.show()
    assert run.watcher().look().ranks[0].waiting == pytest.approx(0.6)


def test_colocated_servers_thread_is_not_counted(going):
    run = going(1)
    begin(run)
    run.steps(0, 5)
    run[0].span("wait", 0.0, 400.0, lane=1)
    run.show()
    assert run.watcher().look().ranks[0].waiting == pytest.approx(0.6)


def test_only_the_last_seconds_count(going):
    run = going(2)
    begin(run)
    run.steps(0, 200, (80.0, 80.0), loss=5.0)
    run.steps(200, 320, (20.0, 20.0), loss=1.0)
    run.show()
    shot = run.watcher().look()
    assert [view.sample_seconds for view in shot.ranks] == pytest.approx([0.002, 0.002])
    assert shot.loss == pytest.approx(1.0)


def test_long_steps_are_averaged_over_several(going):
    run = going(1)
    begin(run)
    for step in range(8):
        at = 30 * SECOND * step
        run[0].span("forward", at, at + 15 * SECOND, step)
        run[0].span("wait", at + 15 * SECOND, at + 30 * SECOND, step)
        run[0].done(at + 30 * SECOND, step, samples=60 if step < 7 else 120)
    run.show()
    (view,) = run.watcher().look().ranks
    assert (view.rate, view.waiting) == (pytest.approx(360 / 150), pytest.approx(0.5))


def test_rows_are_read_only_once(going):
    run = going(2)
    begin(run)
    run.steps(0, 10, loss=3.0)
    run.show()
    watcher = run.watcher()
    first = watcher.look()
    run.steps(10, 20, loss=1.0)
    run.show(later=2.0)
    second = watcher.look()
    assert (first.rate, second.rate) == (pytest.approx(200.0), pytest.approx(200.0))
    assert (first.loss, second.loss) == (pytest.approx(3.0), pytest.approx(2.0))
    assert (first.history[-1], second.history[-1]) == (pytest.approx(3.0), pytest.approx(1.0))
    assert (first.cursor, second.cursor) == (200, 400)


def test_partly_flushed_step_counts_as_a_whole(going):
    run = going(1)
    begin(run)
    run.steps(0, 1)
    run[0].span("forward", 100.0, 180.0, 1)
    run.show()
    watcher = run.watcher()
    watcher.look()
    run[0].span("wait", 180.0, 200.0, 1)
    run[0].done(200.0, 1, samples=10)
    run.show(later=2.0)
    (view,) = watcher.look().ranks
    assert (view.sample_seconds, view.waiting) == (pytest.approx(0.12 / 20), pytest.approx(0.4))


def test_only_the_end_of_a_long_file_is_read_and_the_loss_is_sampled(going, monkeypatch):
    monkeypatch.setattr("hpctrain.views.watch.tail.MOST_ROWS", 60)
    run = going(1)
    begin(run)
    run.steps(0, 3000, loss=4.0)
    run.steps(3000, 6000, loss=2.0)
    run.show()
    tail = Tail(run.folder / "trace" / "rank_00000.h5", 0, 1)
    news = tail.look(run.now)
    assert news is not None
    assert (len(news.spans), len(news.steps)) == (60, 60)
    shot = run.watcher().look()
    assert shot.history[0] == pytest.approx(4.0) and shot.history[-1] == pytest.approx(2.0)
    assert 30 <= len(shot.history) <= 60
    assert shot.rate == pytest.approx(100.0)


def test_missing_rows_are_waited_for(going):
    run = going(1)
    begin(run)
    run.steps(0, 4)
    run.show()
    path = run.folder / "trace" / "rank_00000.h5"
    whole = path.read_bytes()
    with open_h5(path) as h5:
        chunk = h5["steps"].id.get_chunk_info(0)
        row = h5["steps"].dtype.itemsize
    torn = whole[: chunk.byte_offset + 2 * row] + bytes(row) + whole[chunk.byte_offset + 3 * row :]
    path.write_bytes(torn)
    watcher = run.watcher()
    assert watcher.look().cursor == 20
    path.write_bytes(whole)
    assert watcher.look().cursor == 40


def test_loss_history_is_averaged_as_it_grows():
    history, losses = History(most=10), np.linspace(5.0, 1.0, 160)
    for start in range(0, 160, 7):
        part = losses[start : start + 7]
        rows = np.zeros(len(part), STEPS)
        rows["cursor"], rows["loss"], rows["samples"] = np.arange(start, start + len(part)), part, 1
        history.add(rows)
    assert history.means() == pytest.approx(losses.reshape(10, 16).mean(axis=1).tolist())


# -- stragglers, staleness, roles --------------------------------------------------------------------------------
def test_straggler_is_marked_with_its_slowdown(going):
    run = going(4)
    begin(run)
    run.steps(0, 20, (40.0, 42.0, 84.0, 38.0))
    run.show()
    assert {view.rank: view.slowness for view in run.watcher().look().ranks} == {
        0: None, 1: None, 2: pytest.approx(2.1), 3: None,
    }  # fmt: skip


def test_slightly_slower_rank_is_no_straggler(going):
    run = going(2)
    begin(run)
    run.steps(0, 20, (40.0, 50.0))
    run.show()
    assert all(view.slowness is None for view in run.watcher().look().ranks)


def test_staleness_is_shown_per_rank_if_there_is_any(going):
    run = going(2)
    begin(run, strategy="parameter_server (async)")
    run.steps(0, 5, staleness_min=1, staleness_max=1)
    run.steps(5, 10, staleness_min=1, staleness_max=4)
    run.show()
    shot = run.watcher().look()
    assert shot.ranks[0].staleness == (pytest.approx(2.5), 4)
    assert "2.5, max 4" in drawn(shot)


def test_server_without_a_trace_yet_is_known_from_the_job(going):
    run = going(3, SWITCH)
    begin(run)
    run.steps(0, 10)
    run.show()
    watcher = run.watcher()
    watcher.look()
    for number in (0, 1):
        run[number].phase(1.0 * SECOND, 1, "worker", "parameter_server (async)")
    run.show(0, 1, later=100.0)
    shot = watcher.look()
    assert [view.role for view in shot.ranks] == ["worker", "worker", "server"]
    assert (shot.phase, shot.phases, shot.strategy) == (1, 2, "parameter_server (async)")
    assert shot.ranks[2] == RankView(2, "server")


def test_phase_starts_with_its_own_figures(going):
    run = going(2, SWITCH)
    begin(run)
    run.steps(0, 20, (80.0, 80.0))
    run.show()
    watcher = run.watcher()
    watcher.look()
    run.steps(20, 25, (80.0, 80.0))
    begin(run, 1, "parameter_server (async)", at=7.5 * SECOND)
    run.steps(25, 35, (10.0, 10.0), start=5 * SECOND, phase=1)
    run.show(later=2.0)
    shot = watcher.look()
    assert shot.left == pytest.approx((10_000 - 700) / 200)
    assert [view.waiting for view in shot.ranks] == pytest.approx([0.9, 0.9])
    assert "phase 1    parameter_server (async)\n" in drawn(shot)


# -- how far ----------------------------------------------------------------------------------------------------
def test_progress_and_time_left_follow_from_the_job(going):
    run = going(2)
    begin(run)
    run.steps(0, 40)
    run.show()
    shot = run.watcher().look()
    assert (shot.cursor, shot.total, shot.epochs) == (800, 10_000, 10.0)
    assert shot.share == pytest.approx(0.08)
    assert shot.left == pytest.approx((10_000 - 800) / 200)
    assert "8 %, 0:00:46 left\n" in drawn(shot)


def test_steps_of_a_run_are_rounds_of_all_workers(going):
    run = going(2, JOB.replace("train.epochs = 10", "train.steps = 130"))
    begin(run)
    run.steps(0, 40)
    run.show()
    shot = run.watcher().look()
    assert shot.total == 2600  # of 20 samples each; 50 of them make an epoch of 1000
    assert shot.epochs is None


def test_possible_early_stop_is_shown(going):
    run = going(2, JOB + "train.patience = 3\n")
    begin(run)
    run.steps(0, 40)
    run.show()
    assert "left at most" in drawn(run.watcher().look())


def test_no_time_left_is_shown_without_a_loadable_job(going):
    run = going(2)
    begin(run)
    run.steps(0, 40)
    run.show()
    (run.folder / "job.toml").write_text("not = [toml")
    shot = run.watcher().look()
    assert (shot.total, shot.left, shot.share) == (None, None, None)
    assert "job.toml cannot be read" in shot.notes[0]
    assert "the total is unknown" in drawn(shot)
    assert shot.rate == pytest.approx(200.0)


def test_evaluations_are_shown_but_not_a_half_written_line(going):
    run = going(2)
    begin(run)
    run.steps(0, 10)
    run.show()
    (run.folder / "metrics.csv").write_text(
        "step,samples,epoch,seconds,split,loss,metric\n50,1000,1.0,1,validation,0.9,0.75\n"
        "100,2000,2.0,2,validation,0.8,0.7\n150,3000,3.0,3,validation,0.7,0.9"
    )
    shot = run.watcher().look()
    assert [(row.epoch, row.metric) for row in shot.evaluations] == [(2.0, 0.7)]
    assert "validation accuracy 0.7000, loss 0.8000 at epoch 2.00, best 0.7500" in drawn(shot)


def test_rule_news_and_the_switch_are_shown(going):
    run = going(2, SWITCH)
    begin(run)
    run.steps(0, 10)
    run[0].event(0.5 * SECOND, "rule", "loss_stable 0.2000 > 0.01")
    run[0].event(1.0 * SECOND, "rule", "loss_stable 0.0090 <= 0.01")
    run[1].event(1.1 * SECOND, "switch", "loss_stable 0.0090 <= 0.01")
    run.show()
    text = drawn(run.watcher().look())
    assert "rule       at 0:00:01: loss_stable 0.0090 <= 0.01" in text
    assert "switch     at 0:00:01: loss_stable 0.0090 <= 0.01" in text
    assert "0.2 >" not in text


# -- beginnings and ends -----------------------------------------------------------------------------------------
def test_run_without_traces_yet_is_waited_for(going):
    run = going(2)
    watcher = run.watcher()
    assert watcher.look().status is RunStatus.WAITING
    begin(run)
    run.steps(0, 5)
    run.show()
    assert watcher.look().status is RunStatus.RUNNING


def test_rank_with_a_late_file_is_noted_until_it_appears(going):
    run = going(3)
    begin(run)
    run.steps(0, 5)
    run.show(0, 2)
    watcher = run.watcher()
    assert watcher.look().notes == ("no trace file yet from rank 1",)
    run.show(1)
    shot = watcher.look()
    assert shot.notes == () and [view.rank for view in shot.ranks] == [0, 1, 2]


def test_rank_that_stops_writing_is_silent(going):
    run = going(3)
    begin(run)
    run.steps(0, 5)
    run.show()
    watcher = run.watcher()
    watcher.look()
    run.steps(5, 10)
    run.show(0, 1, later=9.0)
    assert all(view.silent is None for view in watcher.look().ranks)
    run.steps(10, 15)
    run.show(0, 1, later=9.0)
    shot = watcher.look()
    assert [view.silent for view in shot.ranks] == [None, None, pytest.approx(18.0)]
    assert "silent for 0:00:18" in drawn(shot)


def test_killed_run_shows_the_time_of_the_last_write(going):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.show()
    written = run.now
    watcher = run.watcher()
    watcher.look()
    run.now += 125.0
    shot = watcher.look()
    assert shot.status is RunStatus.SILENT and shot.since == pytest.approx(written)
    at = time.strftime("%H:%M:%S", time.localtime(written))
    assert f"nothing written since {at} (0:02:05 ago): the run hangs or was killed" in drawn(shot)
    assert shot.left is None or "left" not in drawn(shot)


def test_run_with_a_model_is_finished(going):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.show()
    watcher = run.watcher()
    watcher.look()
    run.close()
    run.show(later=1.0)
    states = [watcher.look().status for _ in range(2)]
    assert states[-1] is RunStatus.STOPPED
    assert f"hpctrain train --resume {run.folder}" in drawn(watcher.look(), width=400)
    (run.folder / "model.safetensors").touch()
    assert watcher.look().status is RunStatus.FINISHED
    assert watcher.look().ranks[0].rate == pytest.approx(100.0)  # its last summary


def test_resumed_run_is_followed_into_its_next_attempt(going):
    run = going(2)
    begin(run)
    run.steps(0, 20, loss=3.0)
    run.show()
    watcher = run.watcher()
    assert watcher.look().attempt == 1
    again = going(2, attempt=2)
    begin(again)
    again.steps(10, 15, loss=1.0)
    again.now = run.now
    again.show()
    shot = watcher.look()
    assert (shot.attempt, shot.cursor, shot.status) == (2, 300, RunStatus.RUNNING)
    assert shot.loss == pytest.approx(1.0)
    assert shot.history[0] == pytest.approx(3.0) and shot.history[-1] == pytest.approx(1.0)
    assert sum(loss == pytest.approx(3.0) for loss in shot.history) <= 11  # repeated steps are dropped
    assert "attempt 2" in drawn(shot)


# -- what cannot be read -----------------------------------------------------------------------------------------
def test_damaged_file_is_noted_and_the_rest_shown(going):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.show()
    (run.folder / "trace" / "rank_00001.h5").write_bytes(b"no HDF5 at all")
    watcher = run.watcher()
    for _ in range(3):
        shot = watcher.look()
        assert [view.rank for view in shot.ranks] == [0]
        assert "rank 1: trace/rank_00001.h5 cannot be read" in shot.notes[0]


def test_unreadable_run_is_an_error(going):
    run = going(1)
    run.show()
    (run.folder / "trace" / "rank_00000.h5").write_bytes(b"no HDF5 at all")
    with pytest.raises(TraceError, match="none of its traces can be read: rank 0"):
        run.watcher().look()


def test_folder_that_is_not_a_run_is_an_error(tmp_path):
    with pytest.raises(TraceError, match="not a run folder"):
        watch(tmp_path)
    with pytest.raises(TraceError, match="no such run folder"):
        watch(tmp_path / "absent")


def test_run_with_tracing_disabled_is_an_error(going):
    run = going(1, JOB + "trace.enabled = false\n")
    with pytest.raises(TraceError, match=r"writes no traces \(trace.enabled = false\)"):
        watch(run.folder)


def test_zero_interval_is_an_error(going):
    with pytest.raises(HpctrainError, match="--every 0: expected 0.1 to 3600 seconds"):
        watch(going(1).folder, every=0.0)


# -- pictures ----------------------------------------------------------------------------------------------------
def drawn(shot, width=80, height=None, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, height=height, highlight=False).print(LivePicture(shot, fit=height is not None))
    out.flush()
    return out.buffer.getvalue().decode(encoding)


def full(size, **changes):
    """A snapshot with content in every line."""
    views = [
        RankView(r, "server" if r % 16 == 15 else "worker", 1234.5, 0.00123, 0.421, (2.3, 9), None, None)
        for r in range(size)
    ]
    views[2] = RankView(2, "worker", 617.2, 0.0026, 0.05, (9.9, 31), 2.1, None)
    values = {
        "name": "digits", "folder": "runs/d", "status": RunStatus.RUNNING, "since": 0.0, "silence": 1.0, "attempt": 2,
        "size": size, "nodes": 4, "elapsed": 3725.0, "phase": 0, "phases": 2, "strategy": "all_reduce",
        "epoch": 12.34, "epochs": 90.0, "cursor": 15_812_345, "total": 115_315_200, "left": 100_000.0,
        "may_stop_early": True, "rate": 79_000.0, "loss": 1.2345, "history": tuple(3.0 - 0.03 * i for i in range(60)),
        "ranks": tuple(views),
        "notes": ("no trace file yet from ranks 64, 65, 66, 67, 68, 69, 70, 71, 72, 73, 74, 75, 76",),
    }  # fmt: skip
    return Snapshot(**{**values, **changes})


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 15), (200, 60)])
def test_picture_fits_the_terminal(size, width, height):
    lines = drawn(full(size), width, height).splitlines()
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    assert any("straggler" in text for text in lines)
    assert any("no trace file yet" in text for text in lines)


def test_silent_and_slow_ranks_come_first_if_not_all_fit():
    shot = full(64)
    views = [*shot.ranks[:40], RankView(40, "worker", silent=33.0), *shot.ranks[41:]]
    text = drawn(full(64, ranks=tuple(views)), 80, 24)
    rows = [row.split()[0] for row in text.split("staleness")[1].splitlines()[1:]]
    assert rows[:2] == ["40", "2"]
    assert f"{len(rows) - 2} of 64 ranks" in text


def test_without_a_height_limit_all_ranks_are_shown():
    assert len([row for row in drawn(full(64)).splitlines() if "server" in row or "worker" in row]) >= 64


def test_terminal_without_unicode_gets_plain_characters():
    drawn(full(4), encoding="ascii").encode("ascii")


def test_line_has_the_essentials():
    text = line(full(4))
    parts = ("running", "14 %", "phase 0 all_reduce", "epoch 12.34", "loss 1.2345", "79,000 samples/s", "waiting 42 %")
    for part in (*parts, "1 d 3:46:40 left at most", "rank 2 straggler: 2.1x"):
        assert part in text


def test_sparkline_spans_lowest_to_highest():
    assert sparkline([0.0, 4.0, 8.0], "abc") == "abc"
    assert sparkline([1.0, 10.0, 100.0], "abc") == "abc"
    assert sparkline([5.0, 5.0], "abc") == "aa"


def test_durations_are_formatted_like_clocks():
    assert [duration(s) for s in (0, 59.6, 3725, 90061)] == ["0:00:00", "0:01:00", "1:02:05", "1 d 1:01:01"]


def test_picture_is_fitted_into_the_screen_on_a_terminal(monkeypatch):
    views = [*full(64).ranks[:63], RankView(63, "worker", 617.2, 0.0027, 0.05, (9.9, 31), 2.2)]
    ended = full(64, status=RunStatus.FINISHED)
    monkeypatch.setattr(Watcher, "look", lambda self: ended)
    out = io.StringIO()
    console = Console(file=out, width=80, height=24, force_terminal=True, color_system=None, highlight=False)
    _redraw(console, Watcher.__new__(Watcher), full(64, ranks=tuple(views)), every=0.0)
    lines = [text.split() for text in out.getvalue().splitlines() if "worker  " in text]
    assert lines[0][0] == "63" and len(lines) < 14


# -- the command -------------------------------------------------------------------------------------------------
def test_once_prints_one_picture(going, capsys):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.show()
    assert watch(run.folder, once=True) == 0
    assert capsys.readouterr().out.count("samples/s, 100 to 100 per worker") == 1


def test_without_a_terminal_watch_prints_lines_until_the_end(going, capsys, monkeypatch):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.show()
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 2:
            run.close()
            run.show(later=1.0)
            (run.folder / "model.safetensors").touch()

    monkeypatch.setattr("hpctrain.views.watch.time.sleep", sleep)
    assert watch(run.folder, every=3.0) == 0
    lines = capsys.readouterr().out.splitlines()
    assert set(looks) == {3.0}
    assert "running" in lines[0] and "phase 0 all_reduce" in lines[0]
    assert any(text.startswith("digits") or text.startswith("train  finished") for text in lines)
    assert any("the run finished at" in text for text in lines)


@pytest.mark.parametrize(("silent", "status"), [(0.0, 130), (1000.0, 0)])
def test_ctrl_c_status_shows_whether_the_run_was_still_going(going, capsys, monkeypatch, silent, status):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.now -= silent
    run.show()

    def interrupt(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("hpctrain.views.watch.time.sleep", interrupt)
    assert watch(run.folder) == status
    assert "per worker" in capsys.readouterr().out


def test_run_killed_long_ago_is_not_waited_for(going, capsys, monkeypatch):
    run = going(2)
    begin(run)
    run.steps(0, 5)
    run.now -= 1000.0
    run.show()
    monkeypatch.setattr("hpctrain.views.watch.time.sleep", lambda seconds: pytest.fail("it waits"))
    assert watch(run.folder) == 0
    assert "was killed" in capsys.readouterr().out


def test_many_notes_leave_room_for_the_ranks():
    text = drawn(full(4, notes=tuple(f"rank {rank}: damaged" for rank in range(30))))
    assert "rank 3: damaged" in text and "rank 4: damaged" not in text
    assert "and 26 more notes" in text
