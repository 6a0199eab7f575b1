"""The headline: a planted straggler is named in every strategy; other headlines on runs built by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hpctrain.analysis import Analysis
from hpctrain.analysis.headline import headline, straggler
from hpctrain.trace import open_run
from tests.helpers import jitter, make_job
from tests.marks import mostly_slow
from tests.traces import HandMade, train_traced

STRATEGIES: dict[str, tuple[dict[str, Any], int]] = {
    "all_reduce": ({"name": "all_reduce"}, 4),
    "message": ({"name": "all_reduce", "exchange": "message"}, 4),
    "ring": ({"name": "all_reduce", "exchange": "message", "algorithm": "ring"}, 4),
    "overlap": ({"name": "all_reduce", "exchange": "message", "overlap": True}, 4),
    "sync": ({"name": "parameter_server", "mode": "sync"}, 4),
    "sync, two servers": ({"name": "parameter_server", "mode": "sync", "servers": 2}, 5),
    "sync, colocated": ({"name": "parameter_server", "mode": "sync", "colocated": True}, 4),
    "bounded": ({"name": "parameter_server", "mode": "bounded", "bound": 1}, 4),
    "async": ({"name": "parameter_server", "mode": "async"}, 4),
    "async, colocated": ({"name": "parameter_server", "mode": "async", "colocated": True, "servers": 2}, 4),
    "switch": ({"name": "switch", "until": {"rule": "after", "fraction": 0.5}}, 4),
}
SLOW = 1


@pytest.mark.parametrize("name", mostly_slow(STRATEGIES, ("all_reduce", "switch")))
def test_straggler_is_named_in_every_strategy(tmp_path: Path, name: str) -> None:
    strategy, size = STRATEGIES[name]
    slow = {"slow": {SLOW: 2.0}}
    job = make_job(tmp_path / "runs", strategy=strategy, train={"epochs": 4, "batch_size": 2}, debug=slow)
    run = train_traced(tmp_path / "run", job, size, compute=jitter(sigma=0.0))
    text = headline(Analysis(run))
    assert f"ank {SLOW}" in text, text
    found = straggler(Analysis(run))
    assert found is not None and found.times == pytest.approx(2.0, rel=0.05)
    if name.startswith(("all_reduce", "message", "ring", "overlap", "sync", "bounded", "switch")):
        assert re.match(r"\d+% of worker time is waiting for rank 1, whose computation takes 2.0x as long", text), text
    if name.startswith(("async", "switch")):
        late, others = re.search(r"arrive ([\d.]+) versions late \(the other workers': ([\d.]+)\)", text).groups()  # type: ignore
        assert float(late) > float(others)


def test_without_a_straggler_no_rank_is_blamed(tmp_path: Path) -> None:
    job = make_job(tmp_path / "runs", strategy={"name": "all_reduce"}, train={"epochs": 4, "batch_size": 2})
    text = headline(Analysis(train_traced(tmp_path / "run", job, 4, compute=jitter(sigma=0.0))))
    assert "no rank holds the others up" in text and "rank 1" not in text


def steps(run: HandMade, rank: int, forward: float, backward: float, waits: float = 0.0) -> None:
    run[rank].phase(0.0, 0, "worker", "all_reduce")
    for step in range(4):
        at = 1.0 + 20.0 * step
        run[rank].span("forward", at, at + forward, step)
        run[rank].span("backward", at + forward, at + forward + backward, step)
        if waits:
            run[rank].span("wait", at + forward + backward, at + 20.0, step, id=1 << 43 | step)
        run[rank].done(at + 20.0, step)


def test_slow_pass_is_named(tmp_path: Path) -> None:
    with HandMade(tmp_path, 3) as run:
        steps(run, 0, 4.0, 4.0, waits=1.0)
        steps(run, 1, 4.0, 4.0, waits=1.0)
        steps(run, 2, 12.4, 4.0, waits=1.0)
    text = headline(Analysis(open_run(tmp_path)))
    reason = "whose forward pass takes 3.1x as long as the other workers'"
    assert text == f"28% of worker time is waiting for rank 2, {reason}."


def test_busy_server_is_named_with_its_activity(tmp_path: Path) -> None:
    with HandMade(tmp_path, 3, roles=["worker", "worker", "server"]) as run:
        run[2].phase(0.0, 0, "server", "parameter_server (async)")
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "parameter_server (async)")
            run[rank].span("forward", 1.0, 3.0, 0)
            run[rank].span("recv", 3.0, 11.0, 0, bytes=8, peer=2, id=rank)
            run[rank].done(11.0, 0)
        run[2].span("update", 3.0, 10.0, 0)
        run[2].span("send", 10.0, 10.1, 0, bytes=8, peer=0, id=0)
        run[2].span("send", 10.1, 10.2, 0, bytes=8, peer=1, id=1)
    text = headline(Analysis(open_run(tmp_path)))
    reason = "which meanwhile is mostly updating parameters"
    assert text == f"70% of worker time is waiting for rank 2, the server, {reason}."


def test_moving_data_is_named_when_it_dominates(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 5.0, 0)
            run[rank].span("reduce", 5.0, 11.0, 0, bytes=8, id=3)
            run[rank].done(11.0, 0)
    text = headline(Analysis(open_run(tmp_path)))
    assert text == "40% of worker time is computation, 60% moving data; no rank holds the others up."


def test_bytes_of_a_ring_are_counted_once(tmp_path: Path) -> None:
    """2 (W - 1) / W of the buffer per rank (Rabenseifner's bound), plus a few bytes."""
    strategy = {"name": "all_reduce", "exchange": "message", "algorithm": "ring"}
    job = make_job(tmp_path / "runs", strategy=strategy, train={"steps": 8, "batch_size": 2})
    analysis = Analysis(train_traced(tmp_path / "run", job, 4, compute=jitter(sigma=0.0)))
    parameters = 7 * 13 + 13 + 13 * 5 + 5 + 5 * 3 + 3
    step = 2 * 3 * 4 * parameters
    assert 7 * step <= analysis.traffic["bytes"].sum() <= 8 * 1.5 * step
    clock = analysis.convergence["bytes"].tolist()  # on a free network messages coincide with the ends of the phase
    assert step <= (clock[6] - clock[1]) / 5 <= 1.5 * step
