"""Calibrations from the traces of runs: what went into a simulation comes out of its traces."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from hpctrain.cli import main
from hpctrain.errors import ClusterError
from hpctrain.hosts import Description
from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration, HandlingCosts, LinkCosts, MeasuredCost, ModelCosts
from hpctrain.simulate.runs import RankCosts, RealRun, calibration_of, handling_of
from hpctrain.simulate.simulation import Simulation
from hpctrain.trace import Run, open_run

CODED = {"encode": MeasuredCost(each_s=3e-9), "decode": MeasuredCost(each_s=2e-9)}
DIGITS = Path(__file__).parents[2] / "jobs" / "digits.toml"
FORWARD = MeasuredCost(fixed_s=2e-3, least=1, most=64)
TEN, PARAMETERS = list(range(10)), 72842
APART = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 100.0}}
SPANS = {"update": MeasuredCost(each_s=1e-9), "data": MeasuredCost(), "send": MeasuredCost(each_s=1e-9)}


def known(forward: MeasuredCost = FORWARD) -> Calibration:
    """Costs of the digits' net in which each kind has its own price."""
    model = ModelCosts(
        name="convnet", parameters=PARAMETERS, order=TEN[::-1], shares=[0.1] * 10,
        forward=forward, backward=MeasuredCost(fixed_s=3e-3, least=1, most=64),
    )  # fmt: skip
    codecs = {"int8": {**CODED, "reduce": MeasuredCost()}, "none": {**CODED, "reduce": MeasuredCost(each_s=1e-10)}}
    free = HandlingCosts(message_s=0.0, byte_s=0.0, napping=0.0)
    between = LinkCosts(latency_s=1e-4)
    return Calibration(source="a test", model=model, spans=SPANS, codecs=codecs, between=between, handling=free)


def trained(folder: Path, *keys: str, learn: bool = False) -> Run:
    """A simulated run of the digits."""
    words = ["strategy=all_reduce", "threads=1", "train={steps=40, batch_size=32}", "trace.report=false", *keys]
    job = Job.load(DIGITS, [*words, f"output={folder}"])
    return open_run(Simulation(job, Description.model_validate(APART), learn=learn).run(known()).folder)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated runs pass for real ones."""
    attributes = Run.attributes
    monkeypatch.setattr(Run, "simulated", "")
    monkeypatch.setattr(Run, "attributes", lambda run, rank: {**attributes(run, rank), "device": "cpu"})


@pytest.mark.usefixtures("real")
def test_costs_come_out_of_traces(tmp_path: Path) -> None:
    shape = known().model_copy(update={"handling": HandlingCosts(byte_s=7e-9), "spans": {}, "codecs": {}})
    runs = [RealRun.of(trained(tmp_path, f"strategy.codec={codec}")) for codec in ("int8", "none")]
    found = calibration_of(runs, shape)
    assert found.model.forward.seconds(32) == pytest.approx(2e-3, rel=0.01)
    assert found.model.backward.seconds(32) == pytest.approx(3e-3, rel=0.01)
    assert found.spans["update"].each_s == pytest.approx(1e-9, rel=0.01)
    for kind, cost in CODED.items():
        assert found.codecs["int8"][kind].each_s == pytest.approx(cost.each_s, rel=0.05)
    assert found.step.fixed_s == pytest.approx(0.0, abs=1e-4)
    assert found.handling == shape.handling, "no processor use was traced"
    assert found.between == shape.between, "no link was measured"
    assert found.model.order == shape.model.order


@pytest.mark.usefixtures("real")
def test_two_batch_sizes_give_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rising = MeasuredCost(fixed_s=1e-3, each_s=1e-4, least=1, most=64)
    monkeypatch.setattr(f"{__name__}.known", partial(known, rising))
    runs = [RealRun.of(trained(tmp_path, f"train.batch_size={batch}")) for batch in (16, 32)]
    forward = calibration_of(runs, known()).model.forward
    assert forward.fixed_s == pytest.approx(1e-3, rel=0.02)
    assert forward.each_s == pytest.approx(1e-4, rel=0.02)
    assert forward.most == 32


def rank(messages: float, nbytes: float, waited: float, used: float) -> RankCosts:
    return RankCosts(1, 0.0, used, waited, True, messages, nbytes, {})


def test_processor_time_of_messages_comes_from_what_computing_does_not_explain() -> None:
    amounts = [(8, 494e3, 0.023), (0.6, 62e3, 0.004), (6, 124e3, 0.006), (12, 19e3, 0.005), (6, 247e3, 0.011)]
    ranks = [rank(m, b, w, 60e-6 * m + 2e-9 * b + 0.04 * w + 4e-4) for m, b, w in amounts]
    found = handling_of(ranks, {}, 0.0, HandlingCosts())
    assert found.message_s == pytest.approx(60e-6)
    assert found.byte_s == pytest.approx(2e-9)
    assert found.napping == pytest.approx(0.04)
    assert found.step_s == pytest.approx(4e-4)


def test_no_cost_is_negative() -> None:
    ranks = [rank(8, 5e5, 0.02, 1e-3), rank(1, 6e4, 0.004, 2e-3), rank(12, 2e4, 0.005, 1.5e-3)]
    found = handling_of(ranks, {}, 0.0, HandlingCosts())
    assert min(found.message_s, found.byte_s, found.napping, found.step_s) >= 0


def test_ranks_that_polled_say_nothing_of_naps() -> None:
    usual = HandlingCosts(napping=0.07)
    ranks = [RankCosts(1, 0.0, w + 2e-9 * b, w, False, 8, b, {}) for b, w in ((494e3, 0.023), (62e3, 0.004))]
    found = handling_of(ranks, {}, 0.0, usual)
    assert found.napping == usual.napping
    assert found.byte_s == pytest.approx(2e-9)
    assert handling_of([RankCosts(1, 0.0, None, 1.0, True, 1.0, 1.0, {})], {}, 0.0, usual) == usual


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.steps=8", "traces of 8 steps, of which the first 20% do not count; at least 14 are needed"),
        ("threads=2", "rank 0 computed with 2 threads; a calibration is of single cores: train with threads=1"),
        ("strategy=switch strategy.until={rule='after',epochs=1}", "its job has several phases"),
    ],
    ids=["short", "threads", "phases"],
)
def test_runs_without_what_is_needed(key: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=message):
        calibration_of([RealRun.of(trained(tmp_path, *key.split()))], known())


@pytest.mark.usefixtures("real")
def test_steps_with_evaluations_do_not_count(tmp_path: Path) -> None:
    """With one in every step, nothing is left."""
    keys = ["train={steps=16, batch_size=32, evaluate_every={steps=1}}"]
    with pytest.raises(ClusterError, match="rank 0 was evaluated or saved in every step"):
        calibration_of([RealRun.of(trained(tmp_path, *keys, learn=True))], known())


def test_simulated_runs_are_no_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(tmp_path).folder
    assert main(["calibrate", str(folder)]) == 2
    assert f"{folder} was simulated; a calibration needs real runs" in capsys.readouterr().err


def test_calibrate_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 2
    assert "needs folders of runs" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
