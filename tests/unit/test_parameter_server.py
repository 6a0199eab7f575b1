"""The synchronous parameter server over virtual ranks: equal to one process; backup workers; non-finite losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import KIND_CODES, OUTCOME_CODES
from tests import helpers
from tests.marks import slow

SERVED = ["server", "servers", "colocated", "all_serve"]
MS = 1_000_000


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _strategy(agree: str, size: int) -> helpers.Tables:
    strategy, _ = helpers.SYNCHRONOUS[agree]
    return {**strategy, "servers": size} if strategy["servers"] == -1 else strategy


@pytest.mark.parametrize("agree", SERVED)
def test_sgd_equals_one_process_in_float32(tmp_path: Path, agree: str):
    found = World(4).run(lambda comm: helpers.equivalence(comm, tmp_path, agree, "momentum", "float32"))
    assert max(found) < 1e-5


@pytest.mark.parametrize(
    ("agree", "size"), [("server", 2), slow("servers", 3), ("servers", 7), ("all_serve", 1), slow("all_serve", 9)]
)
def test_any_number_of_ranks(tmp_path: Path, agree: str, size: int):
    found = World(size, nodes=[r // 2 for r in range(size)]).run(
        lambda comm: helpers.equivalence(comm, tmp_path, agree, "all", "float64")
    )
    assert max(found) < 1e-10


def test_more_servers_than_the_model_has_cache_lines(tmp_path: Path):
    """Some shards are empty, including the coordinator's; clipping still involves all."""
    def run(size: int, **strategy) -> list[np.ndarray]:
        job = helpers.make_job(
            tmp_path,
            model="tests.unit.test_parameter_server:line",
            optimizer={"name": "Adam", "lr": 0.01},
            train={"steps": 9, "batch_size": 12 // size, "precision": "float64", "clip_norm": 0.01},
            strategy=strategy,
        )
        return World(size).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))

    served = run(6, name="parameter_server", mode="sync", servers=6, colocated=True)
    assert helpers.difference(served[2], run(1, name="all_reduce")[0]) < 1e-10


def line() -> torch.nn.Module:
    """21 weights and 3 biases: four cache lines in float64, three in float32."""
    return torch.nn.Linear(7, 3)


def test_non_elementwise_optimizer_gets_whole_parameters(tmp_path: Path):
    def run(size: int, batch: int, **strategy) -> np.ndarray:
        job = helpers.make_job(
            tmp_path,
            optimizer={"name": "Adafactor", "lr": 0.01},
            train={"steps": 9, "batch_size": batch, "precision": "float64"},
            strategy=strategy,
        )
        return World(size).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]

    served = run(5, 6, name="parameter_server", mode="sync", servers=2)
    assert helpers.difference(served, run(1, 18, name="all_reduce")) < 1e-9


@pytest.mark.parametrize("optimizer", ["SGD", slow("Adam")])
@pytest.mark.parametrize("agree", ["servers", slow("all_serve")])
def test_resumed_run_has_the_same_bits(tmp_path: Path, agree: str, optimizer: str):
    keys = {"name": optimizer, "lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    World(4).run(lambda comm: helpers.resumed_bits(comm, tmp_path, _strategy(agree, 4), keys))


@pytest.mark.parametrize("agree", SERVED)
def test_non_finite_loss_is_reported_on_every_rank(tmp_path: Path, agree: str):
    messages = World(5).run(lambda comm: helpers.nan_error(comm, tmp_path, _strategy(agree, 5)))
    assert len(set(messages)) == 1
    assert "loss is nan on rank " in messages[0]
    assert "in step " in messages[0]


# -- backup workers ----------------------------------------------------------------------------------------------
def _slow(rank: int, kind: str, nbytes: int, flops: float) -> int:
    """Rank 1 computes for 7 ms, the other ranks for 2."""
    if kind == "backward":
        return 7 * MS if rank == 1 else 2 * MS
    return 0


def _backup_job(folder: Path, **train) -> Job:
    return helpers.make_job(
        folder,
        strategy={"name": "parameter_server", "mode": "sync", "servers": 1, "backup_workers": 1},
        train={"epochs": 6, "batch_size": 6, **train},
    )


@pytest.mark.parametrize("every", [{"epochs": 1}, {"steps": 1}])
def test_late_gradients_are_dropped_and_counted(tmp_path: Path, every: dict[str, int]):
    recorders = [Recorder() for _ in range(4)]
    job = _backup_job(tmp_path, evaluate_every=every, checkpoint_every={"steps": 5})
    results = World(4, compute=_slow, recorders=recorders).run(lambda comm: helpers.quiet_train(comm, job))
    outcomes = [recorder.drain()["steps"]["outcome"] for recorder in recorders]
    dropped = [int((codes == OUTCOME_CODES["dropped"]).sum()) for codes in outcomes]
    assert dropped[1] > 0
    assert dropped[0] == dropped[2] == dropped[3] == 0
    assert results[0].phases[0].dropped == dropped[1]
    assert results[0].samples == 6 * helpers.SAMPLES
    vectors = [helpers.vector(result.model) for result in results]
    assert all((vector == vectors[0]).all() for vector in vectors)


def test_coordinator_without_a_shard_counts_dropped_gradients_too(tmp_path: Path):
    strategy = {"name": "parameter_server", "mode": "sync", "servers": 6, "colocated": True, "backup_workers": 1}
    job = _backup_job(tmp_path).override(["model.name=tests.unit.test_parameter_server:line"])
    job = job.override([f"strategy.{key}={str(value).lower()}" for key, value in strategy.items()])
    results = World(6, compute=_slow).run(lambda comm: helpers.quiet_train(comm, job))
    assert results[0].phases[0].dropped > 0


def test_run_does_not_wait_for_the_slowest(tmp_path: Path):
    def seconds(backup: int) -> int:
        world = World(4, compute=_slow)
        job = _backup_job(tmp_path).override([f"strategy.backup_workers={backup}"])
        world.run(lambda comm: helpers.quiet_train(comm, job))
        return world.time

    assert seconds(1) < 0.5 * seconds(0)


def test_at_least_one_worker_is_waited_for(tmp_path: Path):
    job = _backup_job(tmp_path).override(["strategy.backup_workers=3"])
    with pytest.raises(ClusterError, match=r"strategy.backup_workers = 3: at least one of 3 workers"):
        World(4).run(lambda comm: helpers.quiet_train(comm, job))
    assert not list(tmp_path.iterdir())


def test_late_non_finite_loss_is_ignored(tmp_path: Path):
    job = _backup_job(tmp_path).override(["data.bad=7", "data.shuffle=false", "train.nan=skip"])
    results = World(4, compute=_slow).run(lambda comm: helpers.quiet_train(comm, job))
    assert np.isfinite(helpers.vector(results[0].model)).all()


# -- how gradients and parameters travel --------------------------------------------------------------------------
def _sent(folder: Path, nodes: tuple[int, ...], mode: str, **tables: helpers.Tables) -> int:
    """Bytes of all messages between workers and servers: 20 steps in all, of a model of 110,092 bytes."""
    job = helpers.make_job(
        folder,
        model={"name": "mlp", "inputs": 7, "outputs": 3, "hidden": [160, 160]},
        data={"name": "tests.helpers:points", "samples": 400},
        strategy={"name": "parameter_server", "mode": mode},
        train={"steps": 10, "batch_size": 6},
        **tables,
    )
    _, traces = helpers.traced(3, lambda comm: helpers.quiet_train(comm, job), nodes=nodes)
    spans = np.concatenate([trace["spans"] for trace in traces])
    messages = spans[(spans["kind"] == KIND_CODES["send"]) & (spans["id"] >= 0) & (spans["peer"] >= 0)]
    return int(messages["bytes"].sum())


@pytest.mark.parametrize("mode", ["sync", "async", "bounded"])
def test_no_gradient_and_no_parameter_is_sent_within_a_node(tmp_path: Path, mode: str):
    """But between nodes, and where memory is not shared, both are: at least 20 pushes and 20 pulls."""
    model = 110_092
    assert _sent(tmp_path, (0, 0, 0), mode) < 5 * model, "the state moves at the start and at the end"
    assert _sent(tmp_path, (0, 1, 2), mode) > 40 * model
    assert _sent(tmp_path, (0, 0, 0), mode, communicator={"shared": False}) > 40 * model
