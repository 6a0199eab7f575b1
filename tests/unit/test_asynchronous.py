"""Asynchronous and bounded parameter servers over virtual ranks: results, times and samples."""

from __future__ import annotations

import csv
import hashlib
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.errors import NanError
from hpctrain.run.api import Result
from hpctrain.trace.schema import OUTCOME_CODES
from tests import helpers
from tests.helpers import MILLISECOND, jitter, served
from tests.marks import mostly_slow, slow

SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.01}
# Servers: options, and the number of dedicated servers.
SERVERS: dict[str, tuple[helpers.Tables, int]] = {
    "one": ({"servers": 1}, 1),
    "two": ({"servers": 2}, 2),
    "beside": ({"servers": 2, "colocated": True}, 0),
}
QUEUES = ["shared", "static"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# -- what is computed --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", mostly_slow(helpers.RECIPES, list(helpers.RECIPES)[-1:]))
@pytest.mark.parametrize(
    ("size", "strategy"),
    [
        (2, served()),
        (3, served(servers=2)),
        (1, served(colocated=True)),
        (2, served("bounded", bound=0)),
    ],
)
def test_one_worker_equals_one_process(tmp_path: Path, size: int, strategy: helpers.Tables, recipe: str):
    optimizer, keys = helpers.RECIPES[recipe]
    job = helpers.make_job(
        tmp_path, optimizer=optimizer, strategy=strategy,
        train={"steps": helpers.STEPS, "batch_size": 6, **keys, "precision": "float64"},
    )  # fmt: skip
    wanted = helpers.plain(job, 1)
    for result in World(size).run(lambda comm: helpers.quiet_train(comm, job)):
        assert helpers.difference(helpers.vector(result.model), wanted) < 1e-10


def replayed(folder: Path, size: int, optimizer: helpers.Tables, strategy: helpers.Tables, **tables: Any) -> None:
    """Several workers' updates equal those of one process with the same gradients, staleness and order."""
    train_keys = {"epochs": 3, "batch_size": 6, "precision": "float64", **tables.pop("train", {})}
    job = helpers.make_job(folder, optimizer=optimizer, strategy=strategy, train=train_keys, **tables)
    recording = helpers.record(size, job, compute=jitter(3))
    replay = helpers.Replay(recording)
    assert replay.cursor == 3 * helpers.SAMPLES
    assert max(max(own, default=0) for own in recording.staleness()) > 2
    for result in recording.results:
        assert helpers.difference(helpers.vector(result.model), replay.vector) < 1e-10


UPDATES = list(product(SERVERS, ["auto", "workers", "staleness", "none"]))


@pytest.mark.parametrize(("servers", "divisor"), mostly_slow(UPDATES, UPDATES[::5] + UPDATES[-1:]))
@pytest.mark.parametrize("optimizer", [{**SGD, "nesterov": True}, slow(ADAM)], ids=["SGD", "Adam"])
def test_updates_match_one_process(tmp_path: Path, optimizer: helpers.Tables, servers: str, divisor: str):
    keys, alone = SERVERS[servers]
    replayed(tmp_path, 4 + alone, optimizer, served(lr_per_update=divisor, **keys))


@pytest.mark.parametrize(
    ("keys", "train_keys"),
    [
        ({"momentum_correction": True}, {}),
        ({"delay_compensation": "constant", "delay_lambda": 0.5}, {}),
        ({"delay_compensation": "adaptive", "delay_lambda": 0.5}, {"accumulate": 2, "batch_size": 3}),
        ({}, {"clip_norm": 0.05}),
        ({"clip_pushes": 1.1}, {}),
        ({"mode": "bounded", "bound": 2}, {"accumulate": 2, "batch_size": 3}),
    ],
)
@pytest.mark.parametrize("optimizer", [SGD, slow(ADAM)], ids=["SGD", "Adam"])
def test_corrected_updates_match_one_process(
    tmp_path: Path, optimizer: helpers.Tables, keys: helpers.Tables, train_keys: helpers.Tables
):
    replayed(tmp_path, 6, optimizer, served(servers=2, **keys), train=train_keys)


def test_updates_with_a_learning_rate_schedule_match_one_process(tmp_path: Path):
    replayed(tmp_path, 5, {**SGD, "schedule": "linear"}, served(), data={"queue": "static"})


def test_non_elementwise_optimizer_gets_whole_parameters(tmp_path: Path):
    replayed(tmp_path, 6, {"name": "Adafactor", "lr": 0.01}, served(servers=3))


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_more_servers_than_the_model_has_cache_lines(tmp_path: Path, mode: str):
    """Some shards are empty, including the coordinator's."""
    strategy = served(mode, servers=6, colocated=True)
    replayed(
        tmp_path, 6, ADAM, strategy, model="tests.unit.test_parameter_server:line",
        train={"clip_norm": 0.1, "batch_size": 3},
    )  # fmt: skip


# -- determinism -------------------------------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_staleness_and_the_same_bits(tmp_path: Path):
    job = helpers.make_job(tmp_path, strategy=served(servers=2), train={"epochs": 3})
    first, same, other = (helpers.record(6, job, compute=jitter(seed)) for seed in (1, 1, 2))
    assert first.staleness() == same.staleness()
    assert first.updates(0) == same.updates(0)
    assert (helpers.vector(first.results[0].model) == helpers.vector(same.results[0].model)).all()
    assert first.staleness() != other.staleness()
    assert (helpers.vector(first.results[0].model) != helpers.vector(other.results[0].model)).any()


# -- time --------------------------------------------------------------------------------------------------------
def _one_three_times_slower(rank: int, kind: str, nbytes: int, flops: float) -> int:
    if kind != "forward":
        return 0
    return 30 * MILLISECOND if rank == 1 else 10 * MILLISECOND


def virtual_time(folder: Path, size: int, strategy: helpers.Tables, **tables: Any) -> int:
    """The virtual time of an epoch on a free network, in nanoseconds."""
    world = World(size, compute=_one_three_times_slower)
    job = helpers.make_job(
        folder, data={"name": "tests.helpers:points", "samples": 1280}, strategy=strategy,
        train={"epochs": 1, "batch_size": 8}, **tables,
    )  # fmt: skip
    world.run(lambda comm: helpers.quiet_train(comm, job))
    return world.time


def test_slow_worker_does_not_delay_the_others(tmp_path: Path):
    """Three workers and a third of one take 0.4 of the lockstep time of 4 * 40 / 4 * 30 ms at best."""
    lockstep = virtual_time(tmp_path, 4, {"name": "all_reduce"})
    assert lockstep == 40 * 30 * MILLISECOND
    assert virtual_time(tmp_path, 5, served()) <= 0.45 * lockstep


@pytest.mark.parametrize("bound", [0, slow(1), 3, slow(10)])
def test_bounded_mode_is_never_slower_than_lockstep(tmp_path: Path, bound: int):
    lockstep = virtual_time(tmp_path, 4, {"name": "all_reduce"})
    assert virtual_time(tmp_path, 5, served("bounded", bound=bound)) <= lockstep


def test_no_worker_starves_when_the_server_is_the_bottleneck(tmp_path: Path):
    """Updates take longest: each worker still has its turn, and staleness stays near the number of workers."""

    def compute(rank: int, kind: str, nbytes: int, flops: float) -> int:
        return {"update": 10, "forward": 1}.get(kind, 0) * MILLISECOND

    job = helpers.make_job(tmp_path, strategy=served(), train={"epochs": 4, "batch_size": 2})
    recording = helpers.record(6, job, compute=compute)
    steps = [len(rows) for rows in recording.steps[:5]]
    assert max(steps) <= 1.2 * min(steps)
    assert max(max(own, default=0) for own in recording.staleness()) <= 8


# -- the bound ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bound", [0, slow(1), 3])
def test_bounded_mode_never_exceeds_its_bound(tmp_path: Path, bound: int):
    """From the workers' view; test_coordinator.py tests more bounds, orders and queues."""
    job = helpers.make_job(
        tmp_path, strategy=served("bounded", bound=bound, servers=2), train={"epochs": 3, "batch_size": 3}
    )
    recording = helpers.record(6, job, compute=jitter(0, 1.0, {1: 4.0}))
    assert max(helpers.leads(recording)) == bound  # and the bound is reached


def test_without_a_bound_the_fastest_worker_runs_ahead(tmp_path: Path):
    job = helpers.make_job(tmp_path, strategy=served(servers=2), train={"epochs": 3, "batch_size": 3})
    recording = helpers.record(6, job, compute=jitter(1, 1.0, {1: 4.0}))
    assert max(helpers.leads(recording)) > 5


# -- samples -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("servers", list(SERVERS))
def test_every_sample_once_per_epoch(tmp_path: Path, servers: str, queue: str):
    strategy = served(**SERVERS[servers][0])
    World(4, compute=jitter()).run(
        lambda comm: helpers.every_sample_once(comm, tmp_path, strategy=strategy, data_keys={"queue": queue})
    )


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("ahead", [0, 3])
def test_every_sample_once_when_workers_get_several_stretches(tmp_path: Path, queue: str, ahead: int):
    data_keys = {"queue": queue, "threads": max(1, ahead), "prefetch": ahead}
    keys: Any = {"strategy": served("bounded", bound=2), "train": {"accumulate": 2, "batch_size": 2}}
    World(5, compute=jitter()).run(
        lambda comm: helpers.every_sample_once(comm, tmp_path, data_keys=data_keys, **keys)
    )


@pytest.mark.parametrize("queue", QUEUES)
def test_fewer_stretches_than_workers(tmp_path: Path, queue: str):
    World(7, compute=jitter()).run(
        lambda comm: helpers.every_sample_once(
            comm, tmp_path, samples=5, strategy=served(), data_keys={"queue": queue}, train={"batch_size": 2}
        )
    )


def test_data_set_of_a_single_sample(tmp_path: Path):
    World(4).run(lambda comm: helpers.every_sample_once(comm, tmp_path, samples=1, strategy=served()))


# -- pulls -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "strategy"),
    [
        slow(6, served(servers=2)),
        (4, served(servers=4, colocated=True)),
        slow(6, served(servers=2, delay_compensation="constant")),
        (6, served("bounded", bound=1, servers=2)),
        (3, served(chunk_mb=0.01)),  # 25 chunks, and servers apart from the workers: pushes are applied on arrival
        (3, served(chunk_mb=0.01, codec="bfloat16")),
    ],
)
def test_no_pull_is_torn(tmp_path: Path, size: int, strategy: helpers.Tables):
    """Pulls are in transit during updates: three nodes, with links that take as long as a step."""
    counts = World(size, nodes=[rank % 3 for rank in range(size)], network=LinkNetwork(), compute=jitter()).run(
        lambda comm: helpers.whole_pulls(comm, tmp_path, strategy, pulls=300)
    )
    assert sum(counts) >= 300


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_between_nodes_a_pull_begins_before_its_push_has_ended(tmp_path: Path, mode: str):
    """On a link that takes much longer than the computation. 16 bits halve the time once more, but for the last pull,
    which is exact."""

    def seconds(**options: Any) -> float:
        job = helpers.make_job(
            tmp_path, model=helpers.Flat, loss="tests.helpers:total", metric="tests.helpers:no_metric",
            optimizer={"name": "SGD", "lr": 0.001}, strategy=served(mode, **options),
            train={"steps": 20, "batch_size": 1, "evaluate_every": {"epochs": 100}},
        )  # fmt: skip
        world = World(2, nodes=(0, 1), network=LinkNetwork(bandwidth=1e6))
        result: Result = world.run(lambda comm: helpers.quiet_train(comm, job))[0]
        return result.phases[0].seconds

    whole, chunked = seconds(chunk_mb=100), seconds(chunk_mb=0.01)
    rounded = seconds(chunk_mb=0.01, codec="bfloat16")
    assert whole > 20 * 2 * 0.25
    assert chunked < 0.6 * whole
    assert rounded < 0.6 * chunked


# -- evaluation --------------------------------------------------------------------------------------------------
class Watched(nn.Sequential):
    """`helpers.net`, recording its parameters at each evaluation."""

    def __init__(self) -> None:
        super().__init__(*helpers.net().children())
        self.seen: list[str] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            self.seen.append(hashlib.sha256(helpers.vector(self).tobytes()).hexdigest())
        return super().forward(inputs)


def _evaluated_at(folder: Path) -> list[int]:
    with open(folder / "metrics.csv") as file:
        return [int(row["samples"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize("servers", mostly_slow(SERVERS, list(SERVERS)[:1]))
def test_evaluation_uses_one_snapshot_at_an_exact_sample(tmp_path: Path, servers: str, mode: str, queue: str):
    keys, alone = SERVERS[servers]
    job = helpers.make_job(
        tmp_path, model=Watched, data={"name": (helpers.points(), helpers.points(20)), "queue": queue},
        strategy=served(mode, **keys), train={"epochs": 4, "evaluate_batch": 20},
    )  # fmt: skip
    results = World(3 + alone, compute=jitter()).run(lambda comm: helpers.quiet_train(comm, job))
    watched: list[Any] = [result.model for result in results]
    seen = [model.seen for model in watched if model.seen]
    assert len(seen) == 3
    assert all(own == seen[0] for own in seen)
    assert len(set(seen[0])) == 4
    assert _evaluated_at(results[0].folder) == [helpers.SAMPLES * epoch for epoch in (1, 2, 3, 4)]


def test_cost_of_evaluations_is_reported_separately(tmp_path: Path):
    def run(milliseconds: int) -> tuple[World, Result]:
        def compute(rank: int, kind: str, nbytes: int, flops: float) -> int:
            cost = {"forward": 30 if rank == 1 else 10, "evaluate": milliseconds}
            return cost.get(kind, 0) * MILLISECOND

        world = World(4, compute=compute)
        job = helpers.make_job(
            tmp_path, data=(helpers.points(), helpers.points(20)), strategy=served(), train={"epochs": 4}
        )
        return world, world.run(lambda comm: helpers.quiet_train(comm, job))[0]

    (_, quick), (world, slow) = run(0), run(500)
    assert slow.phases[0].seconds == pytest.approx(quick.phases[0].seconds, abs=1e-6)
    assert slow.phases[0].pauses == pytest.approx(quick.phases[0].pauses + 3 * 0.5, abs=1e-6)  # the last is after it
    assert world.time / 1e9 == pytest.approx(slow.phases[0].seconds + slow.phases[0].pauses + 0.5, abs=0.05)


# -- what is not finite ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize("servers", list(SERVERS))
def test_non_finite_loss_is_reported_on_every_rank(tmp_path: Path, servers: str, mode: str):
    messages = World(5, compute=jitter()).run(
        lambda comm: helpers.nan_error(comm, tmp_path, served(mode, **SERVERS[servers][0]))
    )
    assert len(set(messages)) == 1
    assert "loss is nan on rank " in messages[0]


@pytest.mark.parametrize("slow", [0, 1, 2])
@pytest.mark.parametrize("servers", list(SERVERS))
def test_nan_loss_ends_waiting_workers(tmp_path: Path, servers: str, slow: int):
    """The last stretch of an epoch is bad, and all other workers are held until it is done."""
    data = {"name": "tests.helpers:points", "samples": 36, "bad": 6 * slow, "shuffle": False, "queue": "static"}
    job = helpers.make_job(tmp_path, data=data, strategy=served(**SERVERS[servers][0]), train={"epochs": 2})
    messages: list[str] = []

    def body(comm: Communicator) -> None:
        with pytest.raises(NanError) as caught:
            helpers.quiet_train(comm, job)
        assert caught.value.everywhere
        messages.append(str(caught.value))

    World(5, compute=jitter(1, 0.1, {slow: 30.0})).run(body)
    assert len(messages) == 5
    assert len(set(messages)) == 1
    assert f"loss is nan on rank {slow}" in messages[0]


@pytest.mark.parametrize("servers", list(SERVERS))
def test_nan_skip_leaves_the_update_out(tmp_path: Path, servers: str):
    """Only that update is left out: versions count the other updates."""
    data = {"name": "tests.helpers:points", "bad": 12, "shuffle": False}
    keys, alone = SERVERS[servers]
    job = helpers.make_job(
        tmp_path, data=data, strategy=served(**keys), train={"epochs": 3, "nan": "skip", "precision": "float64"}
    )
    recording = helpers.record(4 + alone, job, compute=jitter())
    outcomes = np.concatenate([rows["outcome"] for rows in recording.steps]).tolist()
    assert outcomes.count(OUTCOME_CODES["skipped"]) == 3  # one in each epoch
    assert outcomes.count(OUTCOME_CODES["applied"]) == len(recording.updates(0))
    replay = helpers.Replay(recording)
    vectors = [helpers.vector(result.model) for result in recording.results]
    assert all((vector == vectors[0]).all() for vector in vectors)
    assert helpers.difference(vectors[0], replay.vector) < 1e-10
