"""Calibrations from the traces of runs: what went into a simulation comes out of its traces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpctrain.cli import main
from hpctrain.conformance.task import small_job
from hpctrain.errors import ClusterError
from hpctrain.simulate.calibration import Calibration, HandlingCosts, LinkCosts, MeasuredCost
from hpctrain.simulate.runs import RankCosts, calibration_of, handling_of, job_of
from hpctrain.trace import Run, open_run
from tests.unit.test_simulate import calibration, simulate

CODED = {"encode": MeasuredCost(each_s=3e-7), "decode": MeasuredCost(each_s=2e-7)}
APART = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 100.0}}
SPANS = {"update": MeasuredCost(each_s=1e-6), "data": MeasuredCost(), "send": MeasuredCost(each_s=1e-9)}


def known() -> Calibration:
    """Costs in which each kind has its own price."""
    codecs = {"int8": {**CODED, "reduce": MeasuredCost()}, "none": {**CODED, "reduce": MeasuredCost(each_s=1e-8)}}
    free = HandlingCosts(message_s=0.0, byte_s=0.0, napping=0.0)
    return calibration(spans=SPANS, codecs=codecs, between=LinkCosts(latency_s=1e-4), handling=free)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Two runs, as if they had been real."""
    monkeypatch.setattr(Run, "simulated", "")
    found = []
    for codec in ("int8", "none"):
        job = small_job(tmp_path / codec, strategy={"name": "all_reduce", "codec": codec}, train={"steps": 40})
        found.append(open_run(simulate(job, APART, known()).folder))
    return found


def test_costs_come_out_of_traces(runs: list[Run]) -> None:
    shape = calibration(handling=HandlingCosts(byte_s=7e-9))
    found = calibration_of(runs, shape)
    before = known()
    batch = found.model.forward.most
    assert found.model.forward.seconds(batch) == pytest.approx(before.model.forward.seconds(batch), rel=0.01)
    assert found.model.backward.seconds(batch) == pytest.approx(before.model.backward.seconds(batch), rel=0.01)
    assert found.spans["update"].each_s == pytest.approx(1e-6, rel=0.01)
    for kind, cost in CODED.items():
        assert found.codecs["int8"][kind].each_s == pytest.approx(cost.each_s, rel=0.05)
    assert found.step.fixed_s == pytest.approx(0.0, abs=1e-4)
    assert found.handling == shape.handling, "no processor use was traced"
    assert found.between == shape.between, "no link was measured"
    assert found.model.order == shape.model.order


def test_two_batch_sizes_give_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "simulated", "")
    rising = calibration().model.model_copy(update={"forward": MeasuredCost(fixed_s=1e-3, each_s=1e-4, most=64)})
    found = []
    for batch in (4, 8):
        train = {"steps": 40, "batch_size": batch}
        job = small_job(tmp_path / f"{batch}", strategy={"name": "all_reduce"}, train=train)
        found.append(open_run(simulate(job, APART, known().model_copy(update={"model": rising})).folder))
    forward = calibration_of(found, calibration()).model.forward
    assert forward.fixed_s == pytest.approx(1e-3, rel=0.02)
    assert forward.each_s == pytest.approx(1e-4, rel=0.02)
    assert (forward.least, forward.most) == (4, 8)


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"steps": 8}}, r"traces of 8 steps, of which the first 20% do not count; at least 14 are needed"),
        ({"strategy": {"name": "all_reduce"}, "trace": {"enabled": False}}, "this run has no traces"),
    ],
)
def test_runs_without_what_is_needed(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "simulated", "")
    job = small_job(tmp_path, **{"strategy": {"name": "all_reduce"}, **changes})
    folder = simulate(job, APART, known()).folder
    with pytest.raises(Exception, match=message):
        calibration_of([open_run(folder)], calibration())


def test_simulated_runs_are_no_measurements(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = small_job(tmp_path, strategy={"name": "all_reduce"}, train={"steps": 40})
    folder = simulate(job, APART, known()).folder
    with pytest.raises(ClusterError, match="was simulated; a calibration needs real runs"):
        job_of(open_run(folder))
    assert main(["calibrate", str(folder)]) == 2
    assert "was simulated; a calibration needs real runs" in capsys.readouterr().err


def test_calibrate_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 2
    assert "needs folders of runs" in capsys.readouterr().err
    assert main(["calibrate", str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
