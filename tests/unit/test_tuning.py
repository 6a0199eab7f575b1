"""Options that a run on several nodes measures when it begins: kept in its job file, and taken by its continuation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.job import Job
from hpctrain.strategies import all_reduce
from hpctrain.strategies.tuning import USUAL, best_bucket_mb
from tests import helpers


def test_bucket_size_suits_the_network():
    """On a fast network with a high latency, only large buckets are near full speed."""

    def best(latency: int, bandwidth: float) -> float:
        world = World(4, nodes=(0, 0, 1, 1), network=LinkNetwork(latency, bandwidth))
        found = world.run(best_bucket_mb)
        assert len(set(found)) == 1
        return found[0]

    assert best(1000, 1e7) < best(1_000_000, 1e10)
    assert World(2, nodes=(0, 1), network=FreeNetwork()).run(best_bucket_mb) == [USUAL] * 2


def _train(
    folder: Path, nodes: tuple[int, ...], resume: Path | None = None, exchange: str = "auto", **train: Any
) -> tuple[Path, Any]:
    first, then = {"name": "all_reduce", "exchange": exchange}, {"name": "local_sgd"}
    strategy = {"name": "switch", "first": first, "then": then, "until": {"rule": "after", "steps": 2}}
    job = helpers.make_job(folder, train={"steps": 4, **train}, strategy=strategy)
    results = World(len(nodes), nodes=nodes).run(lambda comm: helpers.quiet_train(comm, job, resume=resume))
    run = results[0].folder
    return run, Job.load(run / "job.toml").schedule[0].strategy.options.bucket_mb


def test_measured_size_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(all_reduce, "best_bucket_mb", lambda comm: 0.125)
    run, size = _train(tmp_path, (0, 1), checkpoint_every={"steps": 1})
    assert size == 0.125
    assert "bucket_mb = 0.125" in (run / "job.toml").read_text()
    (run / "model.safetensors").unlink()
    monkeypatch.setattr(all_reduce, "best_bucket_mb", lambda comm: pytest.fail("measured again"))
    again, size = _train(tmp_path, (0, 1), run, checkpoint_every={"steps": 1})
    assert again == run
    assert size == 0.125


@pytest.mark.parametrize(("nodes", "exchange"), [((0, 0), "auto"), ((0, 1), "message"), ((0, 0, 1), "shared")])
def test_nothing_is_measured_where_there_are_no_buckets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: tuple[int, ...], exchange: str
):
    monkeypatch.setattr(all_reduce, "best_bucket_mb", lambda comm: pytest.fail("measured"))
    _, size = _train(tmp_path, nodes, exchange=exchange)
    assert size == "auto"
