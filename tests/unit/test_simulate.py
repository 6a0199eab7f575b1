"""The simulator: costs without numbers, gradients on virtual time, and what it predicts."""

from __future__ import annotations

import resource
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hpctrain.cli import main
from hpctrain.comm.virtual.world import World
from hpctrain.conformance import Subject, registered
from hpctrain.conformance.task import small_job
from hpctrain.errors import ClusterError, JobError
from hpctrain.hosts import Description
from hpctrain.job import Job
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.simulate.calibration import Calibration, LinkCosts, MeasuredCost, ModelCosts
from hpctrain.simulate.measure import measure
from hpctrain.simulate.samples import Samples
from hpctrain.simulate.simulation import Simulated, Simulation
from hpctrain.simulate.summary import predict
from hpctrain.strategies.all_reduce import AllReduce
from hpctrain.strategies.round import Round
from hpctrain.trace import open_run
from tests.marks import mostly_slow

SUBJECTS = registered()
NAMES = [subject.name for subject in SUBJECTS]
FIRST = [subject for place, subject in enumerate(SUBJECTS) if NAMES.index(subject.name) == place]
KINDS = ("reduce", "update", "encode", "decode", "send")
SIX = list(range(6))
TWO = {"hosts": [{"count": 2, "ranks": 2}]}
FORWARD, BACKWARD, EACH_BYTE = 2e-3, 3e-3, 1e-9  # seconds


def calibration(spread: float = 0.0, **changes: Any) -> Calibration:
    """For the net of the conformance tasks, which has six parameters. A pass takes 5 ms."""
    known = ModelCosts(
        name="net",
        parameters=192,
        forward=MeasuredCost(fixed_s=FORWARD, least=1, most=64, spread=spread),
        backward=MeasuredCost(fixed_s=BACKWARD, least=1, most=64),
        order=SIX[::-1],
        shares=[0.5, 0.1, 0.1, 0.1, 0.1, 0.1],
    )
    spans = {kind: MeasuredCost(each_s=EACH_BYTE, least=1, most=1e9) for kind in KINDS} | {"data": MeasuredCost()}
    return Calibration(**{"model": known, "spans": spans, "source": "a test", "turns": 1.0, **changes})


def simulate(
    job: Job, cluster: dict[str, Any] | None = None, known: Calibration | None = None, **named: Any
) -> Simulated:
    described = Description.model_validate(cluster or TWO)
    return Simulation(job, described, **named).run(known or calibration())


def intervals(found: Simulated) -> list[list[int]]:
    """Of each worker: the nanoseconds between the ends of its steps."""
    return [[b - a for a, b in pairwise(found.tallies[rank].steps)] for rank in found.workers]


# -- costs alone -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("subject", mostly_slow(SUBJECTS, FIRST), ids=lambda subject: subject.label)
def test_costs_alone_take_the_time_that_gradients_take(subject: Subject, tmp_path: Path) -> None:
    """Whatever a strategy does, it does at the same times if no numbers exist."""
    job = subject.job(tmp_path, train={"steps": 12, "evaluate_every": {"fraction": 1.0}})
    known = calibration(spread=0.2)
    costs, learnt = (intervals(simulate(job, known=known, learn=learn)) for learn in (False, True))
    assert [len(each) for each in costs] == [len(each) for each in learnt]
    for alone, computed in zip(costs, learnt, strict=True):
        assert alone[:-1] == pytest.approx(computed[:-1], abs=1000)  # after the last step come texts with losses


def test_costs_alone_hold_no_memory(tmp_path: Path) -> None:
    """A model of 64 MB on 64 ranks, with a momentum."""
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
    job = small_job(tmp_path, model=wide_net, optimizer=optimizer, train={"steps": 3, "precision": "float32"})
    model = ModelCosts(
        name="wide", parameters=2**24, forward=MeasuredCost(fixed_s=1.0, least=1, most=64),
        backward=MeasuredCost(fixed_s=2.0), order=[1, 0], shares=[0.5, 0.5],
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = simulate(job, {"hosts": [{"count": 32, "ranks": 2}]}, calibration(model=model), steps=3)
    assert len(found.workers) == 64
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    assert grown < 1000  # MiB; with memory, all ranks together would need 12,288


def wide_net() -> torch.nn.Module:
    return torch.nn.Linear(7, 2**21)


def test_same_seed_gives_the_same_times_to_the_last_digit(tmp_path: Path) -> None:
    job = small_job(tmp_path, strategy={"name": "parameter_server"})
    cluster = {"hosts": [{"count": 3, "jitter": 0.3, "slow": {"every_s": 0.1, "for_s": 0.02, "factor": 3.0}}]}
    first, again = (simulate(job, cluster, calibration(0.2)) for _ in range(2))
    other = simulate(job.override(["seed=1"]), cluster, calibration(0.2))
    assert intervals(first) == intervals(again) != intervals(other)


# -- what things take --------------------------------------------------------------------------------------------
def test_synchronous_step_by_hand(tmp_path: Path) -> None:
    """Two hosts: the passes, one message each way of half the gradient and one of its sum, and the update."""
    job = small_job(tmp_path, strategy={"name": "all_reduce", "exchange": "message"})
    rate, latency, padded = 1e6, 1e-3, 208 * 8  # bytes per second, seconds, bytes of the arena
    cluster = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 8 * rate / 1e6}}
    quick = LinkCosts(latency_s=latency, eager_bytes=10**6)
    found = simulate(job, cluster, calibration(between=quick))
    update = padded * EACH_BYTE
    exchange = 2 * latency + padded / rate
    row = 2 * (latency + 7 * 8 / rate)  # who does what in the round, to the other rank
    expected = FORWARD + BACKWARD + exchange + update + row
    assert fmean(intervals(found)[0]) / 1e9 == pytest.approx(expected, rel=0.05)


def test_slow_host_sets_the_pace_of_synchronous_workers_only(tmp_path: Path) -> None:
    cluster = {"hosts": [{"count": 2}, {"speed": 0.25}]}
    apart = {"link": {"mbit_per_s": 1e6}, **cluster}
    together = intervals(simulate(small_job(tmp_path), apart))
    assert {round(fmean(each) / 1e6) for each in together} == {20}
    served = small_job(tmp_path, strategy={"name": "parameter_server", "servers": 1, "colocated": True})
    alone = [round(fmean(each) / 1e6) for each in intervals(simulate(served, apart))]
    assert max(alone[:2]) <= 6
    assert alone[2] >= 20


@pytest.mark.parametrize(("cores", "times"), [(None, 1.0), (2.0, 1.0), (1.0, 2.0), (0.5, 4.0)])
def test_ranks_share_the_cores_of_their_host(cores: float | None, times: float, tmp_path: Path) -> None:
    group = {"ranks": 2} if cores is None else {"ranks": 2, "cores": cores}
    found = simulate(small_job(tmp_path, strategy={"name": "local_sgd", "every": 8}), {"hosts": [group]})
    assert fmean(intervals(found)[0]) / 1e6 == pytest.approx(5.0 * times, rel=0.1)


def test_gradients_leave_while_backward_goes_on(tmp_path: Path) -> None:
    """With the default between nodes, half of the pass is left when the first bucket can go."""
    slow = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 4.0}}
    base = {"name": "all_reduce", "exchange": "message", "bucket_mb": 1e-4}
    whole = simulate(small_job(tmp_path, strategy=base), slow)
    early = simulate(small_job(tmp_path, strategy={**base, "overlap": True}), slow)
    assert fmean(intervals(early)[0]) < 0.95 * fmean(intervals(whole)[0])


@pytest.mark.slow
def test_a_rank_does_as_much_however_many_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By messages, a single gather of rows takes as many turns of each rank as there are ranks."""
    worlds: list[World] = []

    class KeptWorld(World):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            worlds.append(self)

    monkeypatch.setattr("hpctrain.simulate.simulation.World", KeptWorld)
    job = small_job(tmp_path, strategy={"name": "all_reduce"}, train={"steps": 6})
    for ranks in (32, 320):
        found = simulate(job, {"hosts": [{"count": ranks, "jitter": 0.1}]})
        assert found.workers == list(range(ranks))
        assert {len(tally.steps) for tally in found.tallies} == {6}
    few, many = (world.resumptions / world.size for world in worlds)
    assert many < 1.3 * few


# -- with gradients ----------------------------------------------------------------------------------------------
def test_learning_is_what_the_job_does_on_virtual_ranks(tmp_path: Path) -> None:
    """With the same order of updates come the same losses."""
    job = small_job(tmp_path, strategy={"name": "all_reduce"})
    found = simulate(job, learn=True)
    results = World(4, (0, 0, 1, 1)).run(lambda comm: train(job, comm, out=Narrator(enabled=False)))
    saved = load_file(found.folder / "model.safetensors")
    for name, parameter in results[0].model.named_parameters():
        assert torch.equal(saved[name], parameter)


def test_losses_come_against_simulated_seconds(tmp_path: Path) -> None:
    job = small_job(tmp_path, train={"steps": 30, "evaluate_every": {"steps": 10}}, trace={"enabled": True})
    found = simulate(job, learn=True)
    rows = (found.folder / "metrics.csv").read_text().splitlines()
    seconds = [float(row.split(",")[3]) for row in rows[1:]]
    assert len(rows) >= 4
    assert seconds == sorted(seconds)
    assert seconds[-1] == pytest.approx(30 * 5.0e-3, rel=0.3)
    assert found.tallies[0].losses[-1] < found.tallies[0].losses[0]


def test_staleness_of_equal_workers_is_one_less_than_their_number(tmp_path: Path) -> None:
    job = small_job(tmp_path, strategy={"name": "parameter_server"}, train={"steps": 100})
    found = simulate(job, {"hosts": [{"count": 9, "jitter": 0.1}]})
    predicted = predict(found, calibration())
    assert predicted.staleness is not None
    assert predicted.staleness[0] == pytest.approx(7, abs=0.5)


# -- what comes out ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    job = small_job(tmp_path_factory.mktemp("runs"), trace={"enabled": True})
    return simulate(job, {"name": "two", **TWO}).folder


def test_run_folder_is_an_ordinary_one_and_says_that_it_is_simulated(run_folder: Path, capfd: Any) -> None:
    run = open_run(run_folder)
    assert run.ranks == [0, 1, 2, 3]
    assert run.notes == ["simulated, not measured: two: 2 hosts, 1000 Mbit/s"]
    assert run.attributes(2)["host"] == "node2"
    assert run.steps()["loss"].isna().all()  # nothing was computed
    for words in (["trace"], ["report"], ["watch", "--once"], ["trace", "export"], ["compare"]):
        folders = [str(run_folder)] * (2 if words == ["compare"] else 1)
        assert main([*words[:1], *words[1:], *folders] if words[0] != "watch" else ["watch", *folders, "--once"]) == 0
    shown = capfd.readouterr().out
    assert "simulated, not measured: two" in shown
    assert "stopped before its end" not in shown
    assert "simulated, not measured: two" in (run_folder / "report.html").read_text()


def test_traces_cover_the_simulated_time(run_folder: Path) -> None:
    spans = open_run(run_folder).spans()
    passes = spans[spans["kind"] == "backward"]
    taken = (passes["end_ns"] - passes["start_ns"]) / 1e6
    assert taken.tolist() == pytest.approx([3.0] * len(taken))


def test_step_is_that_of_whole_rounds_however_many_are_simulated(tmp_path: Path) -> None:
    """Rounds of 4 steps: one exchange in each. A job is never made longer."""
    job = small_job(tmp_path, strategy={"name": "local_sgd", "every": 4}, train={"steps": 40})
    slow = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 1.0}}
    found = {steps: simulate(job, slow, steps=steps) for steps in (None, 8, 24, 1000)}
    steps = {key: predict(each, calibration()).step for key, each in found.items()}
    assert steps[8] == pytest.approx(steps[None], rel=0.02)
    assert steps[24] == pytest.approx(steps[None], rel=0.02)
    assert steps[1000] == steps[None]
    whole = {key: predict(each, calibration()).whole for key, each in found.items()}
    assert whole[24] == pytest.approx(whole[None], rel=0.05)
    assert len(found[1000].tallies[0].steps) == 40


def test_too_short_a_simulation_says_so(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="too few rounds were simulated"):
        predict(simulate(small_job(tmp_path), steps=1), calibration())


def test_servers_have_jitter_too(tmp_path: Path) -> None:
    job = small_job(tmp_path, strategy={"name": "parameter_server", "mode": "sync"}, trace={"enabled": True})
    costly = {kind: MeasuredCost(each_s=1e-6) for kind in KINDS} | {"data": MeasuredCost()}
    found = simulate(job, {"hosts": [{"count": 3, "jitter": 0.3}]}, calibration(spans=costly))
    spans = open_run(found.folder).spans(rank=2)
    updates = spans[spans["kind"] == "update"]
    assert (updates["end_ns"] - updates["start_ns"]).nunique() > 2


def test_command_prints_a_prediction(tmp_path: Path, capfd: Any) -> None:
    calibrated = tmp_path / "known.toml"
    words = ["jobs/digits.toml", "strategy=all_reduce", "train.epochs=4", f"output={tmp_path}"]
    assert main(["calibrate", "--measure", *words, "-o", str(calibrated)]) == 0
    options = ["--cluster", "clusters/lan1g.toml", "-n", "6", "--calibration", str(calibrated)]
    assert main(["simulate", *words, *options]) == 0
    shown = capfd.readouterr().out
    for word in ("step ", "samples per second", "time to finish", "efficiency", "busiest link", "rank-seconds"):
        assert word in shown
    assert "+-" in shown


# -- measuring ---------------------------------------------------------------------------------------------------
def test_measured_step_has_what_the_job_does(tmp_path: Path) -> None:
    job = small_job(tmp_path, strategy={"name": "parameter_server", "codec": "int8"})
    found = measure(job, [0, 0, 1, 1])
    assert sorted(found.model.order) == SIX
    assert sum(found.model.shares) == pytest.approx(1.0)
    assert {"data", "update"} <= set(found.spans)
    assert {"decode", "encode"} <= set(found.codecs["int8"])
    assert found.model.forward.seconds(6) > 0
    assert found.model.forward.most == 6


def test_calibration_survives_its_file(tmp_path: Path) -> None:
    known = calibration(spread=0.1)
    known.save(tmp_path / "known.toml")
    assert Calibration.load(tmp_path / "known.toml") == known


def test_line_through_measurements() -> None:
    samples = Samples()
    for n in (10, 20, 40):
        for noise in (-0.01, 0.0, 0.01):
            samples.add("forward", n, (1.0 + 0.5 * n) * (1 + noise))
    found = samples.cost("forward")
    assert found.seconds(30) == pytest.approx(16.0, rel=0.01)
    assert found.knows(80)
    assert not found.knows(81)


# -- mistakes ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"strategy": {"name": "local_sgd", "every": "auto"}}, "strategy.every: its guard depends on"),
        (
            {"strategy": {"name": "switch"}},
            "depends on losses or evaluations, which a simulation of costs does not have; simulate it with --learn",
        ),
    ],
)
def test_what_numbers_decide_needs_gradients(tables: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=words):
        simulate(small_job(tmp_path, **tables))


class Peeking(AllReduce):
    """Decides by a number of its own."""

    def apply(self, round: Round) -> None:
        if float(self.phase.replica.gradient.abs().max()) < 1e9:
            super().apply(round)


def test_strategy_that_reads_numbers_is_named(tmp_path: Path) -> None:
    job = small_job(tmp_path, strategy={"name": Peeking})
    assert simulate(job, learn=True).workers == [0, 1, 2, 3]
    with pytest.raises(ClusterError, match="Peeking or optimizer SGD reads numbers that"):
        simulate(job)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": wide_net}, "is of a model with 192 parameters, but this job's has 16,777,216, and it does not"),
        ({"train": {"batch_size": 200}}, "has measured batches of 1 to 64 samples, and what others cost is not known"),
    ],
)
def test_calibration_of_something_else_is_refused(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=words):
        simulate(small_job(tmp_path, **changes))
    assert not list(tmp_path.iterdir())  # no run folder of a run that has not begun


def test_unknown_cost_is_not_made_up(tmp_path: Path) -> None:
    bare = calibration(spans={"data": MeasuredCost(), "reduce": MeasuredCost(each_s=1e-9)})
    with pytest.raises(ClusterError, match='does not tell what "update" costs'):
        simulate(small_job(tmp_path), known=bare)


@pytest.mark.parametrize(
    ("words", "cluster", "text"),
    [
        (["-n", "9"], "[[hosts]]\ncount = 2\nranks = 4\n", "-n 9: the cluster has places for 1 to 8 ranks"),
        ([], "[[hosts]]\n[link]\nmbit_per_s = 0.0\n", "mbit_per_s = 0"),
        ([], "[[hosts]]\n[link]\ngigabit = 1.0\n", "gigabit"),
        (["--calibration", "none.toml"], "[[hosts]]\n", "there is no calibration file none.toml"),
    ],
)
def test_mistakes_end_with_status_2(
    words: list[str], cluster: str, text: str, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.toml").write_text(cluster)
    job = str(Path(__file__).parents[2] / "jobs" / "all_reduce.toml")
    assert main(["simulate", job, "--cluster", "c.toml", *words]) == 2
    assert text in capfd.readouterr().err
