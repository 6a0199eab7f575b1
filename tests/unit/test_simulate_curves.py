"""Simulations with the losses of an earlier run, and what evaluations and checkpoints add to the predicted time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hpctrain.analysis import analyse
from hpctrain.cli import main
from hpctrain.conformance import Subject
from hpctrain.conformance.task import noisy_net, points, small_job
from hpctrain.data.splits import Splits
from hpctrain.errors import HpctrainError, JobError
from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration, MeasuredCost
from hpctrain.simulate.curve import Curve
from hpctrain.simulate.simulation import Simulated
from hpctrain.simulate.summary import lines, predict
from tests.marks import mostly_slow
from tests.unit.test_simulate import FIRST, FORWARD, SUBJECTS, calibration, simulate

RULE = {"rule": "loss_stable", "rounds": 5, "window": 3, "threshold": 0.02, "armed": 0.98}
SWITCH = {"name": "switch", "until": RULE}
DATA = Splits(points(), points(20), points(11))
LONG = {"epochs": 20, "batch_size": 6}


def job(folder: Path, **tables: Any) -> Job:
    return small_job(folder, **{"data": DATA, "trace": {"enabled": True}, "train": LONG, **tables})


def trained(job: Job) -> Path:
    """A run with losses."""
    return simulate(job, learn=True).folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(job(tmp_path_factory.mktemp("earlier"), strategy=SWITCH))


def phases(found: Simulated) -> list[int]:
    return [phase.samples for phase in found.phases]


# -- rules on losses ---------------------------------------------------------------------------------------------
def test_rule_fires_where_it_fired_in_the_run_of_the_curve(earlier: Path, tmp_path: Path) -> None:
    made = job(tmp_path, strategy=SWITCH)
    found = simulate(made, curve=Curve.of(earlier, made))
    before, after = analyse(earlier), analyse(found.folder)
    assert after.rules[["samples", "text"]].equals(before.rules[["samples", "text"]])
    assert len(phases(found)) == 2
    losses, known = (each.convergence.query("phase == 0")["loss"].tolist() for each in (after, before))
    assert losses == pytest.approx(known)
    assert after.run.notes[0].endswith(f"with the losses of {earlier}")


def losses_below(losses: list[float], limit: float) -> str | None:
    return f"below {limit}" if losses[-1] < limit else None


@pytest.mark.parametrize("hosts", [1, 3])
def test_rule_on_other_ranks_observes_the_losses_by_samples(hosts: int, earlier: Path, tmp_path: Path) -> None:
    """A function of the mean losses of 10 rounds each, which are of another size than those of the earlier run."""
    curve = Curve.of(earlier, job(tmp_path))
    limit = (curve.loss(0, 400) + curve.loss(1660, 2060)) / 2
    made = job(tmp_path, strategy={**SWITCH, "until": {"rule": losses_below, "limit": limit}})
    found = simulate(made, {"hosts": [{"count": hosts, "ranks": 2}]}, curve=curve)
    end, interval = phases(found)[0], 10 * 6 * 2 * hosts
    assert len(phases(found)) == 2
    assert curve.loss(end - interval, end) == pytest.approx(limit, abs=0.02)
    assert curve.loss(end - 2 * interval, end - interval) > limit - 0.01  # the last round of an epoch is smaller


@pytest.mark.parametrize("subject", mostly_slow(SUBJECTS, FIRST), ids=lambda subject: subject.label)
def test_every_strategy_stops_where_it_stops_with_gradients(subject: Subject, tmp_path: Path) -> None:
    """By the losses and evaluations of its own run."""
    stops = {"steps": 24, "evaluate_every": {"steps": 4}, "patience": 2}
    made = subject.job(tmp_path, data=DATA, trace={"enabled": True}, train=stops, optimizer={"name": "SGD", "lr": 0.3})
    learnt = simulate(made, learn=True)
    followed = simulate(made, curve=Curve.of(learnt.folder, made))
    assert phases(followed) == phases(learnt)
    assert [len(tally.steps) for tally in followed.tallies] == [len(tally.steps) for tally in learnt.tallies]


@pytest.mark.parametrize("keep", ["metric", "loss", "recall"])
def test_best_models_are_not_kept_where_nothing_is_learnt(keep: str, earlier: Path, tmp_path: Path) -> None:
    made = job(tmp_path, strategy=SWITCH, train={**LONG, "keep_best": keep, "patience": 99})
    found = simulate(made, curve=Curve.of(earlier, made))
    assert len(phases(found)) == 2
    assert not (found.folder / "best.safetensors").exists()


# -- evaluations that decide -------------------------------------------------------------------------------------
@cache
def evaluated(folder: Path) -> tuple[Path, list[tuple[int, float]]]:
    """A run with validation metrics: the folder, and the metric at each cursor."""
    made = job(folder, train={**LONG, "evaluate_every": {"epochs": 2}}, optimizer={"name": "SGD", "lr": 0.5})
    run = trained(made)
    rows = [row.split(",") for row in (run / "metrics.csv").read_text().splitlines()]
    head = rows[0]
    column = {name: head.index(name) for name in ("samples", "split", "metric")}
    found = [row for row in rows[1:] if row[column["split"]] == "validation"]
    return run, [(int(row[column["samples"]]), float(row[column["metric"]])) for row in found]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, float]]]:
    return evaluated(tmp_path_factory.mktemp("measured"))


def test_training_stops_where_the_curve_reaches_the_target(measured: Any, tmp_path: Path) -> None:
    run, metrics = measured
    target = sorted(value for _, value in metrics)[len(metrics) // 2]
    first = next(cursor for cursor, value in metrics if value >= target)
    made = job(tmp_path, train={**LONG, "evaluate_every": {"epochs": 2}, "target": target})
    found = simulate(made, curve=Curve.of(run, made))
    assert sum(phases(found)) == first
    assert found.left == 0
    shown = [" ".join(line.split()) for line in lines(found, predict(found, calibration()))]
    assert f"stopped early at sample {first:,} of 2,060" in shown


def test_patience_and_a_rule_by_evaluations_observe_the_curve(measured: Any, tmp_path: Path) -> None:
    run, metrics = measured
    values = [value for _, value in metrics]
    best = max(values[:4])
    every = {"evaluate_every": {"epochs": 2}}
    waits = next((at for at in range(2, len(values)) if max(values[at - 1 : at + 1]) <= max(values[: at - 1])), None)
    patient = job(tmp_path, train={**LONG, **every, "patience": 2})
    expected = metrics[waits][0] if waits is not None else 20 * 103
    assert sum(phases(simulate(patient, curve=Curve.of(run, patient)))) == expected
    ruled = job(tmp_path, train={**LONG, **every}, strategy={**SWITCH, "until": {"rule": "target", "metric": best}})
    first = next(cursor for cursor, value in metrics if value >= best)
    assert phases(simulate(ruled, curve=Curve.of(run, ruled)))[0] == first


# -- curves that do not fit --------------------------------------------------------------------------------------
def refused(made: Job, curve: Path, words: str) -> None:
    with pytest.raises(HpctrainError, match=words) as caught:
        simulate(made, curve=Curve.of(curve, made))
    assert "\n" not in str(caught.value)


def test_curve_of_something_else_is_refused(earlier: Path, measured: Any, tmp_path: Path) -> None:
    refused(job(tmp_path, strategy=SWITCH), tmp_path / "none", "none")
    refused(job(tmp_path, strategy=SWITCH), tmp_path, "no run|not a run|job.toml|trace")
    refused(job(tmp_path, strategy=SWITCH, model=noisy_net), earlier, "that run has model.name = .*net.*, and this")
    refused(job(tmp_path, metric={"name": "balanced_accuracy"}), earlier, "has metric.name = 'accuracy', and this")
    costs = simulate(job(tmp_path / "costs")).folder
    refused(job(tmp_path, strategy=SWITCH), costs, "that run has no losses")
    stops = job(tmp_path, train={**LONG, "patience": 2})
    refused(stops, trained(job(tmp_path / "bare", data=(points(), points(11)), train={"steps": 3})), "data")
    dense = job(tmp_path, train={**LONG, "evaluate_every": {"epochs": 1}, "patience": 2})
    refused(dense, measured[0], "from sample 206 .*needs one at sample 103; evaluate less often")


def test_curve_without_evaluations_is_refused_where_they_decide(tmp_path: Path) -> None:
    run = trained(job(tmp_path / "bare", train={"steps": 8, "evaluate_every": {"fraction": 1.0}}))
    (run / "metrics.csv").unlink()
    refused(job(tmp_path, train={"steps": 8, "patience": 1}), run, "has no validation metrics, by which this job ends")


def test_curve_that_is_too_short_is_refused_where_a_rule_still_waits(tmp_path: Path) -> None:
    run = trained(job(tmp_path / "short", train={"steps": 8}))
    words = "that run has losses up to sample 175, and at sample 175 phase 0 still waits for its rule; give"
    refused(job(tmp_path, strategy={**SWITCH, "until": {**RULE, "armed": 0.01}}), run, words)


def test_losses_beyond_the_curve_are_not_made_up(tmp_path: Path) -> None:
    run = trained(job(tmp_path / "short", train={"steps": 8}))
    made = job(tmp_path, train={"steps": 20})
    losses = analyse(simulate(made, curve=Curve.of(run, made)).folder).convergence
    assert losses["loss"].notna().tolist() == [True] * 8 + [False] * (len(losses) - 8)
    assert len(losses) == 20


def test_guard_on_parameters_is_refused_with_a_curve_too(earlier: Path, tmp_path: Path) -> None:
    made = job(tmp_path, strategy={"name": "local_sgd", "every": "auto"})
    with pytest.raises(JobError, match="strategy.every: its guard depends on how far parameters move"):
        simulate(made, curve=Curve.of(earlier, made))


# -- evaluations and checkpoints in the predicted time -----------------------------------------------------------
def saving(seconds: float) -> Calibration:
    """With checkpoints that take so long."""
    base = calibration()
    return base.model_copy(update={"spans": {**base.spans, "checkpoint": MeasuredCost(fixed_s=seconds)}})


def test_time_to_finish_has_evaluations_and_checkpoints(tmp_path: Path) -> None:
    """On two workers, each evaluates 10 of 20 validation samples, in two passes, and 5 or 6 test samples in one."""
    train = {"epochs": 40, "evaluate_every": {"epochs": 3}, "checkpoint_every": {"steps": 100}}
    hosts = {"hosts": [{"count": 2, "speed": 0.5}]}
    for steps in (None, 30):  # extrapolated, or all of it
        found = simulate(job(tmp_path, train=train), hosts, saving(0.25), steps=steps)
        assert found.pauses.evaluations == 13 + 1
        assert found.pauses.evaluating == pytest.approx(2 * FORWARD * (2 * 13 + 1))
        assert found.pauses.checkpoints == 40 * 9 // 100 + 1
        assert found.pauses.saving == pytest.approx(0.25 * found.pauses.checkpoints)
        assert predict(found, saving(0.25)).whole == pytest.approx(40 * 9 * 0.0101 + found.pauses.seconds, rel=0.05)


def test_validation_at_the_end_precedes_the_final_test(tmp_path: Path) -> None:
    train = {"epochs": 4, "evaluate_every": {"epochs": 2}}
    both, alone = (simulate(job(tmp_path, train=train, data=data)).pauses for data in (DATA, (points(), points(11))))
    assert both.evaluations == 1 + 1 + 1
    assert alone.evaluations == 1 + 1  # the last one is the final test


@pytest.mark.parametrize("strategy", ["all_reduce", "local_sgd", "parameter_server", "phases"])
@pytest.mark.parametrize(
    "every", [{"steps": 2}, {"steps": 5}, {"epochs": 0.3}, {"epochs": 1}, {"fraction": 0.25}, {"samples": 5}], ids=str
)
def test_as_many_evaluations_as_with_gradients(strategy: str, every: dict[str, float], tmp_path: Path) -> None:
    """The rows of metrics.csv."""
    tables: dict[str, Any] = {"strategy": {"name": strategy}}
    if strategy == "phases":
        tables = {"strategy": {"name": "switch", "until": {"rule": "after", "steps": 7}}}
    elif strategy == "local_sgd":
        tables["strategy"]["every"] = 3
    made = job(tmp_path, train={"steps": 24, "evaluate_every": every}, **tables)
    rows = (simulate(made, learn=True).folder / "metrics.csv").read_text().splitlines()[1:]
    assert simulate(made).pauses.evaluations == len(rows)


def test_ranks_that_share_cores_evaluate_more_slowly(tmp_path: Path) -> None:
    made = job(tmp_path, train={"epochs": 2})
    free, shared = (simulate(made, {"hosts": [{"ranks": 4, "cores": cores}]}).pauses for cores in (4.0, 1.0))
    assert free.evaluating is not None
    assert shared.evaluating == pytest.approx(4 * free.evaluating, rel=0.01)


def test_what_is_not_known_is_said_to_be_left_out(tmp_path: Path) -> None:
    found = simulate(job(tmp_path))
    assert found.pauses.saving is None
    text = "\n".join(lines(found, predict(found, calibration())))
    assert "without start-up and checkpoints\n" in text
    assert "the calibration does not say in what time" in text
    for most, is_known in ((216 * 8, True), (100, False)):
        cost = MeasuredCost(each_s=1e-6, least=most, most=most)
        spans = {**calibration().spans, "checkpoint": cost}
        found = simulate(job(tmp_path), known=calibration(spans=spans))
        assert (found.pauses.saving is not None) == is_known
    known = simulate(job(tmp_path), known=saving(1.0))
    assert "without start-up\n" in "\n".join(lines(known, predict(known, saving(1.0))))


# -- the command -------------------------------------------------------------------------------------------------
def test_command_takes_a_curve(tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    cluster = tmp_path / "c.toml"
    cluster.write_text("[[hosts]]\ncount = 2\nranks = 2\n")
    rule = "strategy.until={rule='loss_stable',rounds=3,window=2,armed=2.0,threshold=1.0}"
    words = ["jobs/digits.toml", rule, "train.epochs=4", f"output={tmp_path}", "threads=1"]
    calibrated = str(tmp_path / "known.toml")
    assert main(["calibrate", "--measure", *words, "-o", calibrated]) == 0
    options = ["--cluster", str(cluster), "--calibration", calibrated]
    assert main(["simulate", *words, *options, "--learn"]) == 0
    run = next(tmp_path.glob("digits-simulated*"))
    capfd.readouterr()
    assert main(["simulate", *words, *options, "--curve", str(run)]) == 0
    shown = capfd.readouterr().out
    assert f"costs only, with the losses of {run}" in shown
    assert "phase 1" in shown
    patient = ["strategy=all_reduce", "train.patience=2", "--steps", "8"]
    assert main(["simulate", words[0], *words[2:], *options, *patient]) == 0
    assert "note: train.target and train.patience do not stop it" in capfd.readouterr().out
    assert main(["simulate", *words, *options, "--curve", str(run), "--learn"]) == 2
    assert main(["simulate", *words, *options, "--curve", str(tmp_path)]) == 2
    errors = capfd.readouterr().err
    assert "leave --learn and --steps out" in errors
    assert "Traceback" not in errors
