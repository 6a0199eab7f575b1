"""Runs side by side: hand-built runs with known results, and notes on runs that cannot be compared."""

from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest

from hpctrain.analysis import Analysis
from hpctrain.errors import HpctrainError, TraceError
from hpctrain.trace import open_run
from hpctrain.views import compare
from hpctrain.views.compare.differences import job_notes, spread
from hpctrain.views.compare.scaling import curves, scaling
from hpctrain.views.compare.summary import RunSummary, summarise
from hpctrain.views.compare.table import WIDTH, as_text, comparison_frame
from hpctrain.views.compare.targets import choose_targets
from tests.traces import HandMade

JOB = """name = "t"
seed = {seed}
[model]
name = "{model}"
[data]
name = "digits"
[metric]
name = "accuracy"
goal = "{goal}"
[train]
epochs = 1.0
[strategy]
name = "all_reduce"
"""
LOSSES = (4.0, 3.0, 2.0, 1.0)
ROUND = 32  # samples, of all workers together


def make(
    folder: Path, losses=LOSSES, ranks=2, round_ms=100.0, busy_ms=60.0, seed=0, model="mlp", goal="max",
    evaluations=(), first=0, attempt=1, killed=False,
) -> Path:  # fmt: skip
    """An all-reduce run of equally long rounds, in which each rank computes `busy_ms` and sends 1000 bytes to the next.

    `evaluations`: (after which round, split, metric); `first`: the first round's number.
    """
    folder.mkdir(exist_ok=True)
    with HandMade(folder, ranks, attempt=attempt, job=JOB.format(seed=seed, model=model, goal=goal)) as run:
        for rank, trace in run.ranks.items():
            trace.phase(0.0, 0, "worker", "all_reduce")
            for i, loss in enumerate(losses):
                start, step = i * round_ms, first + i
                trace.span("forward", start, start + busy_ms, step=step)
                if ranks > 1:
                    sent, peer = start + busy_ms, (rank + 1) % ranks
                    trace.span("send", sent, sent + 1, step=step, bytes=1000, peer=peer, id=i)
                trace.done(start + round_ms, step, loss, ROUND // ranks, cursor=(step + 1) * ROUND)
        if killed:
            run[0].kill()
    write_metrics(folder, evaluations)
    if not killed:
        (folder / "model.safetensors").write_bytes(b"")
    return folder


def write_metrics(folder: Path, evaluations) -> None:
    if evaluations:
        rows = [(n, n * ROUND, 0.1 * n, 0.1 * n, split, 9 - n, metric) for n, split, metric in evaluations]
        columns = ["step", "samples", "epoch", "seconds", "split", "loss", "metric"]
        pd.DataFrame(rows, columns=columns).to_csv(folder / "metrics.csv", index=False)


def summary(folder: Path) -> RunSummary:
    return summarise(Analysis(open_run(folder)), folder.name)


def frame_of(*runs: RunSummary, baseline=None, loss=None, metric=None) -> pd.DataFrame:
    named = dict(zip("ABCDEF", runs, strict=False))
    return comparison_frame(named, choose_targets(named, loss, metric), baseline)


def change_schema(folder: Path, version=99) -> None:
    for path in (folder / "trace").glob("rank_*.h5"):
        with h5py.File(path, "r+") as file:
            file.attrs["schema_version"] = version


# -- what is computed from a run -------------------------------------------------------------------------------
def test_time_to_a_loss_is_the_first_step_at_or_below_it(tmp_path):
    run = summary(make(tmp_path / "a"))
    assert run.time_to_loss(2.0, ROUND) == pytest.approx(0.3)
    assert run.time_to_loss(2.5, ROUND) == pytest.approx(0.3)


def test_loss_is_averaged_over_the_window_of_samples(tmp_path):
    run = summary(make(tmp_path / "a"))
    means = run.mean_losses(2 * ROUND)
    assert means["loss"].tolist() == pytest.approx([3.5, 2.5, 1.5])
    assert means["seconds"].tolist() == pytest.approx([0.2, 0.3, 0.4])
    assert run.time_to_loss(2.0, 2 * ROUND) == pytest.approx(0.4)
    assert run.mean_losses(1.5 * ROUND)["loss"].tolist() == pytest.approx([(3 + 4 / 2) / 1.5, (2 + 3 / 2) / 1.5, 4 / 3])


def test_steps_without_a_loss_count_as_time_but_not_in_the_mean(tmp_path):
    run = summary(make(tmp_path / "a", losses=(4.0, float("nan"), 2.0, 1.0)))
    assert run.time_to_loss(2.0, ROUND / 2) == pytest.approx(0.3)
    assert run.training_s == pytest.approx(0.4)
    assert run.steps == 4


def test_unreached_loss_takes_forever_and_missing_losses_are_unknown(tmp_path):
    assert summary(make(tmp_path / "a")).time_to_loss(0.5, ROUND) == np.inf
    assert np.isnan(summary(make(tmp_path / "b", losses=(float("nan"),) * 3)).time_to_loss(0.5, ROUND))


def test_time_to_a_metric_is_the_first_evaluation_that_reaches_it(tmp_path):
    evaluations = [(1, "validation", 0.3), (2, "validation", 0.6), (3, "validation", 0.5), (4, "validation", 0.7)]
    run = summary(make(tmp_path / "a", evaluations=[*evaluations, (4, "test", 0.9)]))
    assert run.time_to_metric(0.4) == pytest.approx(0.2)
    assert run.time_to_metric(0.7) == pytest.approx(0.4)
    assert run.time_to_metric(0.8) == np.inf
    assert (run.best_metric, run.test_metric, run.test_loss) == (0.7, 0.9, 5)


def test_lower_is_better_metric_is_reached_from_above(tmp_path):
    run = summary(make(tmp_path / "a", goal="min", evaluations=[(1, "test", 0.8), (2, "test", 0.4), (4, "test", 0.6)]))
    assert run.time_to_metric(0.5) == pytest.approx(0.2)
    assert run.best_metric == 0.4


def test_run_without_evaluations_has_no_time_to_a_metric(tmp_path):
    run = summary(make(tmp_path / "a"))
    assert run.split == ""
    assert np.isnan([run.time_to_metric(0.5), run.best_metric, run.test_metric]).all()


def test_samples_per_second_and_rank_seconds(tmp_path):
    run = summary(make(tmp_path / "a", ranks=4))
    assert run.samples_per_s == pytest.approx(4 * ROUND / 0.4)
    assert run.total_s == pytest.approx(0.4)
    assert run.rank_seconds == pytest.approx(1.6)


def test_evaluation_counts_in_the_cost_but_not_in_the_training_time(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0, 0, "worker", "all_reduce")
        for start in (0, 500):
            run[0].span("forward", start, start + 100, step=start // 500)
            run[0].done(start + 100, start // 500, cursor=32 * (1 + start // 500))
            run[0].span("evaluate", start + 100, start + 500)
        run[0].event(1000, "checkpoint", "x")
    found = summary(tmp_path)
    assert found.training_s == pytest.approx(0.2)
    assert found.samples_per_s == pytest.approx(64 / 0.2)
    assert found.rank_seconds == pytest.approx(1.0)


def test_bytes_per_step_cover_all_ranks(tmp_path):
    frame = frame_of(summary(make(tmp_path / "a", ranks=4)))
    assert frame["bytes_per_step"].iloc[0] == 4000
    assert frame["bytes_per_sample"].iloc[0] == 4000 / ROUND


def test_efficiency_is_weighted_by_the_seconds_of_the_phases(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0, 0, "worker", "all_reduce")
        run[0].span("forward", 0, 100, step=0)  # 100 ms, all of it useful
        run[0].done(100, 0, cursor=32, phase=0)
        run[0].phase(100, 1, "worker", "parameter_server (async)")
        run[0].span("forward", 100, 250, step=1)  # 150 of 300 ms
        run[0].done(400, 1, cursor=64, phase=1)
    found = summary(tmp_path)
    assert found.parallel_efficiency == pytest.approx((1.0 * 100 + 0.5 * 300) / 400)
    assert found.strategy == "all_reduce → parameter_server (async)"


def test_staleness_covers_all_gradients(tmp_path):
    with HandMade(tmp_path, 3, roles=["worker", "worker", "server"]) as run:
        run[2].phase(0, 0, "server", "parameter_server (async)")
        for rank in (0, 1):
            run[rank].phase(0, 0, "worker", "parameter_server (async)")
            for i in range(10):
                run[rank].span("forward", 10 * i, 10 * i + 5, step=i)
                stale = 10 * rank * (i == 9)
                cursor = 16 * (2 * i + rank + 1)
                run[rank].done(10 * i + 8 + rank, i, cursor=cursor, staleness_min=0, staleness_max=stale)
    found = summary(tmp_path)
    assert found.staleness_mean == pytest.approx(10 / 20)
    assert found.staleness_p95 == pytest.approx(np.percentile([0] * 19 + [10], 95))
    assert (found.workers, found.servers, found.steps) == ((2,), (1,), 20)


def test_attempts_are_summed_without_the_time_in_between(tmp_path):
    make(tmp_path, losses=LOSSES[:2], killed=True)
    make(tmp_path, losses=LOSSES[2:], first=2, attempt=2)
    run = summary(tmp_path)
    assert run.attempts == 2
    assert run.total_s == pytest.approx(0.4)
    assert run.samples == 4 * ROUND


def test_run_that_ended_before_its_first_step_is_shown(tmp_path, capsys):
    (tmp_path / "b").mkdir()
    with HandMade(tmp_path / "b", 2) as run:
        run[0].phase(0, 0, "worker", "all_reduce")
    assert compare.main([make(tmp_path / "a"), tmp_path / "b"], output=tmp_path / "pictures") == 0
    printed = capsys.readouterr().out
    assert "B: not finished (still running, interrupted or killed), 0 samples so far" in printed
    assert "nan" not in printed


def test_killed_run_has_what_was_flushed(tmp_path, capsys):
    killed = make(tmp_path / "killed", losses=LOSSES[:3], killed=True)
    assert compare.main([make(tmp_path / "whole"), killed]) == 0
    printed = capsys.readouterr().out
    assert "B: not finished (still running, interrupted or killed), 96 samples so far" in printed
    assert "B: rank 0 of 2: trace not closed" in printed
    assert "A: not finished" not in printed


# -- targets -------------------------------------------------------------------------------------------------
def test_default_targets_are_the_best_values_of_the_worst_run(tmp_path):
    good = summary(make(tmp_path / "a", evaluations=[(2, "test", 0.7), (4, "test", 0.9)]))
    bad = summary(make(tmp_path / "b", losses=(4.0, 3.0, 2.5, 2.6), evaluations=[(2, "test", 0.6), (4, "test", 0.5)]))
    targets = choose_targets({"A": good, "B": bad})
    assert targets.loss == pytest.approx(2.5)
    assert targets.metric == 0.6
    assert "2.5 (the best of B, the worst run)" in targets.notes[0]
    frame = comparison_frame({"A": good, "B": bad}, targets)
    assert frame["time_to_loss_s"].tolist() == pytest.approx([0.3, 0.3])
    assert frame["time_to_metric_s"].tolist() == pytest.approx([0.2, 0.2])


def test_requested_targets_need_not_be_reached_by_every_run(tmp_path, capsys):
    runs = [make(tmp_path / "a"), make(tmp_path / "b", losses=(4.0, 3.0, 2.5, 2.6))]
    compare.main(runs, target_loss=1.5, csv=tmp_path / "c.csv")
    assert pd.read_csv(tmp_path / "c.csv")["time_to_loss_s"].tolist() == [pytest.approx(0.4), np.inf]
    printed = capsys.readouterr().out
    assert "Target loss 1.5 (as requested)" in printed
    assert "never" in printed


def test_different_metrics_are_not_compared(tmp_path):
    a = summary(make(tmp_path / "a", evaluations=[(2, "test", 0.7)]))
    b = summary(make(tmp_path / "b", goal="min", evaluations=[(2, "test", 0.7)]))
    targets = choose_targets({"A": a, "B": b})
    assert np.isnan(targets.metric)
    assert any("different metrics" in note for note in targets.notes)


# -- scaling -------------------------------------------------------------------------------------------------
def test_scaling_against_a_baseline(tmp_path):
    one = summary(make(tmp_path / "1", ranks=1, round_ms=100, busy_ms=80))
    four = summary(make(tmp_path / "4", ranks=4, round_ms=40, busy_ms=25))
    found = scaling(four, one)
    assert found["speed_up"] == pytest.approx(100 / 40)
    assert found["scaling_efficiency"] == pytest.approx(100 / 40 / 4)
    assert found["computation_scaling"] == pytest.approx(80 / (4 * 25))
    assert list(scaling(one, one).values()) == pytest.approx([1, 1, 1])


def test_speed_up_compares_equal_numbers_of_samples(tmp_path):
    short = summary(make(tmp_path / "short", losses=LOSSES[:2]))
    assert scaling(short, summary(make(tmp_path / "long")))["speed_up"] == pytest.approx(1.0)


def test_scaling_curve_has_one_strategy_ordered_by_ranks(tmp_path):
    runs = [summary(make(tmp_path / f"{i}", ranks=n, seed=i)) for i, n in enumerate((4, 1, 4))]
    found = curves(frame_of(*runs, baseline="B"))
    assert list(found) == ["all_reduce"]
    assert found["all_reduce"]["ranks"].tolist() == [1, 4, 4]


def test_baseline_comes_first_and_only_once(tmp_path, capsys):
    runs = [make(tmp_path / name) for name in ("a", "b")]
    compare.main(runs, baseline=runs[1] / "job.toml", csv=tmp_path / "c.csv")
    frame = pd.read_csv(tmp_path / "c.csv")
    assert frame["name"].tolist() == ["b", "a"]
    assert frame["baseline"].tolist() == ["A", "A"]
    assert "Scaling against A" in capsys.readouterr().out


def test_unreadable_baseline_is_reported_and_the_rest_compared(tmp_path, capsys):
    compare.main([make(tmp_path / "a")], baseline=tmp_path / "none")
    printed = " ".join(capsys.readouterr().out.split())
    assert "no such run folder" in printed
    assert "speed-up" not in printed


# -- notes ---------------------------------------------------------------------------------------------------
def test_differing_job_keys_are_listed_with_their_values(tmp_path):
    runs = {"A": summary(make(tmp_path / "a")), "B": summary(make(tmp_path / "b", model="convnet", seed=1))}
    notes = job_notes(runs)
    assert notes[0].startswith("the runs differ in model")
    assert notes[1:] == ["job key model.name differs: 'mlp' in A; 'convnet' in B"]


def test_all_differing_keys_are_listed_model_and_data_first(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    text = (b / "job.toml").read_text().replace("epochs = 1.0", "epochs = 2.0").replace('"digits"', '"mnist"')
    (b / "job.toml").write_text(f"threads = 2\n{text}")
    notes = job_notes({"A": summary(a), "B": summary(b)})
    assert [note.split()[2] for note in notes[1:]] == ["data.name", "train.epochs", "threads"]


def test_differing_seed_ranks_and_strategy_are_not_noted(tmp_path):
    runs = {"A": summary(make(tmp_path / "a")), "B": summary(make(tmp_path / "b", seed=7, ranks=4))}
    text = (tmp_path / "b" / "job.toml").read_text().replace("all_reduce", "parameter_server")
    (tmp_path / "b" / "job.toml").write_text(f'output = "x"\nranks = 4\n{text}')
    runs["B"] = summary(tmp_path / "b")
    assert runs["B"].job["strategy.name"] == "parameter_server"
    assert job_notes(runs) == []


def test_notes_omit_what_most_runs_have_in_common():
    assert spread({"A": "1", "B": "2", "C": "1"}) == "1 in A, C; 2 in B"
    assert spread({"A": "1", "B": "2", "C": "1", "D": "1", "E": "1"}) == "2 in B; 1 in the others"


def test_evaluations_on_different_samples_are_noted(tmp_path):
    a = summary(make(tmp_path / "a", evaluations=[(2, "validation", 0.7), (4, "test", 0.9)]))
    b = summary(make(tmp_path / "b", evaluations=[(4, "test", 0.8)]))
    notes = choose_targets({"A": a, "B": b}).notes
    assert "validation samples in A; test samples in B" in notes[-1]


def test_key_missing_from_one_job_is_noted(tmp_path):
    runs = {"A": summary(make(tmp_path / "a")), "B": summary(make(tmp_path / "b"))}
    with open(tmp_path / "b" / "job.toml", "a") as file:
        file.write("[debug]\nslow = {2 = 2.0}\n")
    runs["B"] = summary(tmp_path / "b")
    assert job_notes(runs) == ["job key debug.slow.2 differs: not set in A; 2.0 in B"]


def test_run_of_another_schema_is_left_out_with_a_note(tmp_path, capsys):
    runs = [make(tmp_path / name) for name in ("a", "b", "c")]
    change_schema(runs[1])
    assert compare.main(runs, csv=tmp_path / "c.csv") == 0
    assert pd.read_csv(tmp_path / "c.csv")["name"].tolist() == ["a", "c"]
    printed = " ".join(capsys.readouterr().out.split())
    assert "note: left out:" in printed
    assert "schema version 99" in printed


def test_no_readable_run_is_one_message(tmp_path):
    run = make(tmp_path / "a")
    change_schema(run)
    with pytest.raises(TraceError, match="there is no run to compare.*schema version 99.*no such run folder"):
        compare.main([run, tmp_path / "none"])


def test_run_given_twice_is_shown_once(tmp_path):
    run = make(tmp_path / "a")
    compare.main([run, run / "trace.h5", run], csv=tmp_path / "c.csv")
    assert len(pd.read_csv(tmp_path / "c.csv")) == 1


def test_runs_with_equal_names_are_distinguished_by_folder():
    assert compare.distinct_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert compare.distinct_names([Path("/x/run"), Path("/x/b")]) == ["run", "b"]


# -- table, CSV file, pictures -------------------------------------------------------------------------------
def test_csv_file_reads_back(tmp_path):
    evaluations = [(2, "test", 0.7), (4, "test", 0.9)]
    a = make(tmp_path / "a", evaluations=evaluations)
    runs = [a, make(tmp_path / "b", round_ms=50, busy_ms=30, evaluations=evaluations)]
    compare.main(runs, baseline=runs[0], csv=tmp_path / "c.csv")
    frame = frame_of(*map(summary, runs), baseline="A")
    read = pd.read_csv(tmp_path / "c.csv", dtype={"workers": str, "servers": str})
    pd.testing.assert_frame_equal(read, frame, check_dtype=False)
    assert frame["samples_per_s"].tolist() == pytest.approx([320, 640])


def test_table_fits_with_long_names(tmp_path):
    run = summary(make(tmp_path / ("very-long-name-" * 6), ranks=4, losses=[4e6, 123.0]))
    frame = frame_of(*[run] * 6, baseline="A")
    frame["strategy"] = "all_reduce → parameter_server (async)"
    frame["samples"] = 123_456_789
    text = as_text(frame, ["a definition of some-thing " * 20], ["a note " * 40])
    assert max(map(len, text.splitlines())) <= WIDTH


def test_missing_values_are_shown_as_a_dash(tmp_path):
    text = as_text(frame_of(summary(make(tmp_path / "a"))), [], [])
    row = text.split("\n\n")[1].splitlines()[-1].split()
    assert row == ["A", "all_reduce", "0.40", "-", "1.000", "-", "-", "-", "-"]
    assert "nan" not in text


def test_figures_are_written_for_the_available_data(tmp_path):
    bare, evaluated = make(tmp_path / "a"), make(tmp_path / "b", evaluations=[(2, "test", 0.7)])
    compare.main([bare], output=tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"loss.png", "bars.png"}
    compare.main([bare, evaluated], baseline=bare, output=tmp_path / "two")
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert names == {"loss.png", "metric.png", "bars.png", "scaling.png"}


def test_unwritable_output_is_one_message(tmp_path):
    run = make(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(HpctrainError, match="choose another folder with -o"):
        compare.main([run], output=tmp_path / "file" / "x")
    with pytest.raises(HpctrainError, match="choose another file with --csv"):
        compare.main([run], csv=tmp_path / "none" / "c.csv")
