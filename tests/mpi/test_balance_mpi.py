"""balance = "throughput" on real ranks, where one computes more for each sample than the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import pytest
import torch

from hpctrain.comm.base import Communicator
from hpctrain.conformance.task import Vector
from hpctrain.run.api import session
from hpctrain.run.folder import Narrator
from hpctrain.trace.events import SharesChanged
from hpctrain.trace.files import event_of
from tests import helpers
from tests.helpers_mpi import Join

mpi_only = pytest.mark.mpi
SLOWED = 1  # does four times the work
ROUNDS = 48


def shares(comm: Communicator, folder: Path, strategy: helpers.Tables) -> tuple[list[list[int]], Vector]:
    """The samples that each rank computed in each step, and the final parameters. Collective."""
    job = helpers.make_job(
        folder,
        data={"name": "tests.helpers:points", "samples": 1003},
        strategy={**strategy, "balance": "throughput"},
        train={"steps": ROUNDS, "batch_size": 16, "precision": "float64"},
    )
    work, taken = torch.randn(128, 128), [0] * (4 * ROUNDS)
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            for _ in range(batch.size * (8 if comm.rank == SLOWED else 2)):
                work @ work
            taken[running.totals.step] += batch.size
            running.step(running.loss(running.model(batch.inputs), batch.targets))
    return comm.gather_json(taken), helpers.vector(running.result.model)


def moved(loads: Sequence[float]) -> bool:
    """Whether the slow worker has clearly less to do than most others. (Where there are more ranks than cores, others
    are slow, too, now and then.)"""
    return loads[SLOWED] < 0.9 * median(own for rank, own in enumerate(loads) if rank != SLOWED)


def decided(comm: Communicator) -> list[SharesChanged]:
    """The decisions in this rank's trace."""
    events = [event_of(row["kind"], row["json"]) for row in comm.recorder.drain()["events"]]
    return [event for event in events if isinstance(event, SharesChanged)]


@mpi_only
@pytest.mark.parametrize("exchange", ["shared", "message"])
def test_batches_move_from_a_slow_worker_to_others(join: Join, folder: Path, exchange: str) -> None:
    comm = join(traced=True)
    if comm.size < 2:
        pytest.skip("needs 2 ranks")
    comm.recorder.drain()
    table, found = shares(comm, folder, {"name": "all_reduce", "exchange": exchange})
    late = [sum(own[ROUNDS // 2 : ROUNDS]) / (ROUNDS // 2) for own in table]
    assert moved(late), late
    job = helpers.make_job(folder, train={"steps": ROUNDS, "batch_size": 16, "precision": "float64"})
    assert helpers.difference(found, helpers.plain(job, comm.size, data=helpers.points(1003))) < 1e-10
    mine = [str(event) for event in decided(comm)]
    every = comm.gather_json(mine)
    assert mine and all(own == mine for own in every), "the ranks decided differently"


@mpi_only
def test_batches_move_with_a_parameter_server(join: Join, folder: Path) -> None:
    comm = join(traced=True)
    if comm.size < 2:
        pytest.skip("needs 2 ranks")
    table, found = shares(comm, folder, {"name": "parameter_server", "mode": "sync", "colocated": True})
    late = [sum(own[ROUNDS // 2 : ROUNDS]) / (ROUNDS // 2) for own in table]
    assert moved(late), late
    job = helpers.make_job(folder, train={"steps": ROUNDS, "batch_size": 16, "precision": "float64"})
    assert helpers.difference(found, helpers.plain(job, comm.size, data=helpers.points(1003))) < 1e-10


@mpi_only
def test_shards_are_sized_by_links_between_nodes(join: Join, folder: Path) -> None:
    """Every rank as if on a node of its own: each server is measured, and training is exact whatever is found."""
    comm = join(ranks_per_node=1, traced=True)
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    strategy = {"name": "parameter_server", "mode": "sync", "servers": 2, "shard_sizes": "bandwidth"}
    job = helpers.make_job(folder, strategy=strategy, train={"steps": 12, "precision": "float64"})
    found = helpers.vector(helpers.quiet_train(comm, job).model)
    assert helpers.difference(found, helpers.plain(job, comm.size - 2)) < 1e-10


@mpi_only
def test_a_slow_worker_takes_fewer_local_steps(join: Join, folder: Path) -> None:
    comm = join(traced=True)
    if comm.size < 2:
        pytest.skip("needs 2 ranks")
    table, _ = shares(comm, folder, {"name": "local_sgd", "every": 6})
    steps = [sum(count > 0 for count in own) for own in table]
    assert moved(steps), steps
