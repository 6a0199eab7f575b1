"""shard_sizes = "bandwidth": servers own shards in proportion to the bandwidth of their links."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork, Network
from hpctrain.conformance import Subject
from hpctrain.errors import JobError
from hpctrain.job import Job
from hpctrain.run.api import Result
from hpctrain.trace.events import ShardsSized
from hpctrain.trace.files import event_of
from tests import helpers

NODES = (0, 1, 2, 3)  # ranks 2 and 3 are the servers
SLOW = 3
BANDWIDTH: dict[str, Any] = {"shard_sizes": "bandwidth"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@dataclass
class UnequalLinks(LinkNetwork):
    """The link of node SLOW has a fourth of the others' bandwidth."""

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        usual = self.bandwidth
        self.bandwidth = usual / (4 if SLOW in (source, dest) else 1)
        try:
            return super().transfer(source, dest, nbytes, start)
        finally:
            self.bandwidth = usual


def broad() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 2000), nn.Tanh(), nn.Linear(2000, 3))


MOMENTUM = {"name": "SGD", "lr": 0.05, "momentum": 0.9}


def served_job(
    folder: Path, optimizer: dict[str, Any] = MOMENTUM, train: dict[str, Any] | None = None, **keys: Any
) -> Job:
    return helpers.make_job(
        folder,
        model="tests.unit.test_bandwidth:broad",
        optimizer=optimizer,
        strategy={"name": "parameter_server", "mode": "sync", "servers": 2, "chunk_mb": 0.01, **keys},
        train={"steps": 12, "precision": "float64", **(train or {})},
    )


def timed(comm: Communicator, job: Job, resume: Path | None = None) -> tuple[Result, float]:
    """The result, and the seconds of virtual time that training took."""
    result = helpers.quiet_train(comm, job, resume=resume)
    return result, result.phases[0].seconds


def run(job: Job, network: Network, resume: Path | None = None) -> tuple[Result, float, list[list[ShardsSized]]]:
    """Rank 0's result and seconds, and the decisions in each rank's trace."""
    results, traces = helpers.traced(4, partial(timed, job=job, resume=resume), nodes=NODES, network=network)
    events = [[event_of(row["kind"], row["json"]) for row in trace["events"]] for trace in traces]
    return *results[0], [[event for event in own if isinstance(event, ShardsSized)] for own in events]


def slow_links() -> UnequalLinks:
    return UnequalLinks(bandwidth=1e7)


def test_the_server_behind_a_slow_link_owns_less_and_training_is_faster(tmp_path: Path):
    even, seconds, _ = run(served_job(tmp_path), slow_links())
    fair, fewer, decisions = run(served_job(tmp_path, **BANDWIDTH), slow_links())
    assert seconds > 1.4 * fewer
    assert helpers.vector(fair.model).tobytes() == helpers.vector(even.model).tobytes()
    [decision] = decisions[2]
    assert decisions[0] == decisions[1] == decisions[3] == []
    first, second = map(int, decision.percent.split())
    assert first + second == 200 and 110 < first <= 175 and decision.slowest == SLOW
    assert decision.most / decision.least == pytest.approx(first / second, rel=0.1)
    assert str(decision).startswith(f"percent of an equal shard {first} {second}: rank 3 takes ")


@pytest.mark.parametrize("network", [LinkNetwork(bandwidth=1e7), FreeNetwork()])
def test_shards_stay_equal_where_links_are(tmp_path: Path, network: Network):
    _, _, decisions = run(served_job(tmp_path, **BANDWIDTH), network)
    assert decisions == [[]] * 4


def test_a_run_resumes_with_shards_of_other_sizes(tmp_path: Path):
    """As many bits as before: what an element becomes does not depend on its server."""
    job = served_job(tmp_path, train={"checkpoint_every": {"steps": 5}, "keep_checkpoints": 9}, **BANDWIDTH)
    whole, _, _ = run(job, slow_links())
    helpers.forget_after(whole.folder, 0)
    again, _, decisions = run(job, LinkNetwork(bandwidth=1e7), whole.folder)
    assert decisions == [[]] * 4
    assert helpers.vector(again.model).tobytes() == helpers.vector(whole.model).tobytes()


@pytest.mark.parametrize("keys", [{"mode": "async"}, {"colocated": True}])
def test_it_works_in_every_arrangement(tmp_path: Path, keys: dict[str, Any]):
    """Also with an optimizer that needs whole parameters."""
    for optimizer in (MOMENTUM, {"name": "Adafactor", "lr": 0.01}):
        job = served_job(tmp_path, optimizer, **{**keys, **BANDWIDTH})
        result, _, decisions = run(job, slow_links())
        assert torch.isfinite(torch.from_numpy(helpers.vector(result.model))).all()
        assert any(decisions)


def test_mistakes_are_refused():
    with pytest.raises(JobError, match=r'strategy.shard_sizes = "speed".*"equal".*"bandwidth"'):
        served_job(Path("unused"), shard_sizes="speed")
    with pytest.raises(JobError, match=r"shard_sizes.* with servers = 1, where it has no effect"):
        served_job(Path("unused"), **{"servers": 1, **BANDWIDTH})
    options = {"mode": "sync", "servers": 2}
    assert Subject("parameter_server", options).strategy().deterministic
    assert not Subject("parameter_server", {**options, **BANDWIDTH}).strategy().deterministic
