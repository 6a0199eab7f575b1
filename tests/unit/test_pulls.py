"""Pulls of differences: what workers compute on, what travels, resumed runs, and memory that does not suffice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hpctrain.cluster import Roles
from hpctrain.comm.base import Communicator, Tag
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError, JobError
from hpctrain.job import Job
from hpctrain.strategies.parameter_server.pulls import DifferenceLink, DifferenceRoute, kept_bytes
from tests import helpers
from tests.marks import mostly_slow

TOPK: dict[str, Any] = {"name": "topk", "keep": 0.1, "block": 64}
SERVED: dict[str, Any] = {"name": "parameter_server", "mode": "sync", "chunk_mb": 0.0005, "pull": TOPK}
NODES = (0, 1, 2)  # two workers and a server


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _job(folder: Path, strategy: dict[str, Any], **train: Any) -> Job:
    keys = {"steps": 8, "batch_size": 3, **train}
    return helpers.make_job(folder, strategy=strategy, train=keys, optimizer={"name": "SGD", "lr": 0.1})


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_workers_hold_what_servers_think_they_hold(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch):
    """To the bit, although messages leave out most of every difference."""
    ends: dict[tuple[str, int], np.ndarray] = {}
    route, link = DifferenceRoute.pulled, DifferenceLink.finish

    def pulled(self: Any) -> None:
        route(self)
        ends["worker", self._comm.rank] = torch.cat(list(self._received)).numpy().copy()

    def finish(self: Any) -> None:
        link(self)
        ends["server", self._worker] = torch.cat(list(self.read)).numpy().copy()

    monkeypatch.setattr(DifferenceRoute, "pulled", pulled)
    monkeypatch.setattr(DifferenceLink, "finish", finish)
    job = _job(tmp_path, {**SERVED, "mode": mode}, steps=20)
    found = World(3, nodes=NODES).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
    for worker in (0, 1):
        np.testing.assert_array_equal(ends["worker", worker], ends["server", worker])
        np.testing.assert_array_equal(found[worker], found[0])  # the end of a run is exact
    missing = np.setdiff1d(found[0], ends["worker", 0])
    assert len(missing) > 0.5 * len(found[0]), "so that the test tests something"


@pytest.mark.parametrize(
    ("pull", "nodes"),
    mostly_slow(
        [(pull, nodes) for pull in (TOPK, "int8", "sign") for nodes in (NODES, (0, 0, 1, 1))],
        [(TOPK, NODES), ("int8", (0, 0, 1, 1))],
    ),
    ids=str,
)
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, pull: Any, nodes: tuple[int, ...], monkeypatch: Any):
    """Evaluations and checkpoints change nothing; without what had been received, the run would end otherwise."""
    often = {"checkpoint_every": {"steps": 4}, "keep_checkpoints": 9, "evaluate_every": {"steps": 3}}
    strategy = {**SERVED, "pull": pull, "codec": "int8"}

    def body(comm: Communicator) -> tuple[bool, bool]:
        plain = helpers.vector(helpers.quiet_train(comm, _job(tmp_path, strategy)).model)
        job = _job(tmp_path, strategy, **often)
        whole = helpers.quiet_train(comm, job)
        watched = helpers.vector(whole.model)
        if comm.rank == 0:
            helpers.forget_after(whole.folder, 0)
        comm.barrier()
        again = helpers.vector(helpers.quiet_train(comm, job, resume=whole.folder).model)
        return bool((plain == watched).all()), bool((again == watched).all())

    assert all(each == (True, True) for each in World(len(nodes), nodes=nodes).run(body))
    monkeypatch.setattr("hpctrain.strategies.parameter_server.worker.ParameterServer.load_own", lambda self, own: None)
    assert any(not same for _, same in World(len(nodes), nodes=nodes).run(body))


def test_pulls_are_as_short_as_the_codec_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """But for exact ones, which come besides, and the model that a worker's first push brings."""
    sent: dict[tuple[int, int], list[int]] = {}
    start = VirtualCommunicator.start_send

    def noted(self: Any, buffer: Any, dest: int, tag: int) -> Any:
        sent.setdefault((self.rank, tag), []).append(buffer.nbytes)
        return start(self, buffer, dest, tag)

    monkeypatch.setattr(VirtualCommunicator, "start_send", noted)
    strategy = {**SERVED, "chunk_mb": 1.0}
    job = _job(tmp_path, strategy, steps=6)
    World(3, nodes=NODES).run(lambda comm: helpers.quiet_train(comm, job).model)
    pushed = sent[0, Tag.PUSH]
    model = pushed[0]
    assert pushed == [model] * 7
    elements = model // 4
    short = (elements // 64 * 6 + (max(1, round(0.1 * (elements % 64))) if elements % 64 else 0)) * 6
    assert sorted(sent[2, Tag.PULL]) == sorted([short] * 12 + [model] * 2)  # at the end of the run: exact besides


def test_memory_that_does_not_suffice_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    free = SimpleNamespace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(ClusterError, match=r"strategy\.pull: to send differences.* take \S+ GiB, but 9\.31e-07 GiB"):
        World(3, nodes=NODES).run(lambda comm: helpers.quiet_train(comm, _job(tmp_path, SERVED)))
    free.available = 2**40
    World(3, nodes=NODES).run(lambda comm: helpers.quiet_train(comm, _job(tmp_path, SERVED)))


def test_what_is_kept_is_counted_by_node():
    """Two servers own 600 and 400 elements; one worker is on each one's node, one elsewhere."""
    roles = Roles(workers=(1, 3, 4), servers=(0, 2))
    nodes, bounds = (0, 0, 1, 1, 2), (0, 600, 1000)
    assert kept_bytes(nodes, 0, roles, True, bounds, 4) == 4 * (2 * 600 + 400)
    assert kept_bytes(nodes, 1, roles, True, bounds, 4) == 4 * (2 * 400 + 600)
    assert kept_bytes(nodes, 2, roles, True, bounds, 4) == 4 * 1000
    assert kept_bytes(nodes, 0, roles, False, bounds, 4) == 4 * (3 * 600 + 1000)


MISTAKES = [
    ("powersgd", 'has pull = "powersgd", which sums over workers only, not at a server; use "none", "bfloat16"'),
    ({"name": "topk", "momentum": 0.9}, "has pull.momentum, which is for workers that agree in rounds"),
    ({"name": "sign", "majority": True}, "has pull.majority, a vote on sums between workers; leave majority out"),
    ({"name": "topk", "decay": 0.9}, "has pull.decay, but what a pull leaves out is in the next difference"),
    ("int9", 'strategy.pull = "int9": must be one of "none", "bfloat16"'),
    (3, "strategy.pull = 3: must be the name of a codec, or a table such as"),
]


@pytest.mark.parametrize(("pull", "sentence"), MISTAKES, ids=str)
def test_every_mistake_is_one_message(pull: Any, sentence: str):
    with pytest.raises(JobError) as caught:
        Job(strategy={"name": "parameter_server", "pull": pull})
    [line] = str(caught.value).splitlines()
    assert sentence in line


def test_pulls_may_be_exact_or_rounded_whatever_pushes_are(tmp_path: Path):
    """With exact pulls and pushes as they are, nothing is lost."""

    def trained(**keys: Any) -> np.ndarray:
        job = _job(tmp_path, {**{key: SERVED[key] for key in SERVED if key != "pull"}, **keys})
        return World(3, nodes=NODES).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]

    plain = trained()
    assert (trained(pull="none") == plain).all()
    assert not (trained(pull="bfloat16") == plain).all()
    assert (trained(codec="bfloat16") == trained(codec="bfloat16", pull="bfloat16")).all()
    assert not (trained(codec="bfloat16") == trained(codec="bfloat16", pull="none")).all()
