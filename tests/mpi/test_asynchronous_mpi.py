"""Asynchronous training on real ranks: the test bodies for virtual ranks, and tests that need real concurrency."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.comm.base import Communicator
from tests import helpers, helpers_mpi
from tests.conftest import Mpirun
from tests.helpers import served
from tests.helpers_mpi import Join

mpi_only = pytest.mark.mpi
ROOT = Path(__file__).resolve().parents[2]
AR = {"name": "all_reduce"}
QUEUES = ["shared", "static"]
PULLS = """
import sys
import torch
from hpctrain.comm.mpi.communicator import world
from tests import helpers

torch.set_num_threads(1)
comm = world()
servers, colocated = int(sys.argv[2]), sys.argv[3] == "beside"
counts = helpers.whole_pulls(comm, sys.argv[1], helpers.served(servers=servers, colocated=colocated), pulls=5000)
total = sum(comm.gather_json(counts))
if comm.rank == 0:
    print(total, "pulls")
"""


def _alone(comm: Communicator, mode: str = "async") -> helpers.Tables:
    """One worker; all other ranks are servers."""
    return served(mode, servers=comm.size - 1) if comm.size > 1 else served(mode, colocated=True)


def _dedicated(comm: Communicator, **keys: object) -> helpers.Tables:
    if comm.size < 3:
        pytest.skip("needs 3 ranks")
    return served(servers=2 if comm.size > 4 else 1, **keys)  # type: ignore[arg-type]


def _beside(comm: Communicator, **keys: object) -> helpers.Tables:
    return served(servers=min(2, comm.size), colocated=True, **keys)  # type: ignore[arg-type]


SERVED = [_dedicated, _beside]


def _there_and_back(comm: Communicator, server) -> list[helpers.Tables]:
    return [
        {"strategy": AR, "until": {"rule": "after", "samples": 20}},
        {"strategy": server(comm), "until": {"rule": "after", "samples": 31}},
        {"strategy": AR},
    ]


@mpi_only
@pytest.mark.parametrize("recipe", ["momentum", "all"])
@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_one_worker_equals_one_process(join: Join, folder: Path, mode: str, recipe: str) -> None:
    comm = join()
    optimizer, keys = helpers.RECIPES[recipe]
    job = helpers.make_job(
        folder, optimizer=optimizer, strategy=_alone(comm, mode),
        train={"steps": helpers.STEPS, "batch_size": 6, **keys, "precision": "float64"},
    )  # fmt: skip
    found = helpers.vector(helpers.quiet_train(comm, job).model)
    assert helpers.difference(found, helpers.plain(job, 1)) < 1e-10


@mpi_only
@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("server", SERVED)
def test_every_sample_once_per_epoch(join: Join, folder: Path, server, queue: str) -> None:
    comm = join()
    keys = {"queue": queue, "threads": 0}
    helpers.every_sample_once(comm, folder, strategy=server(comm), data_keys=keys)


@mpi_only
@pytest.mark.parametrize("queue", QUEUES)
def test_every_sample_once_with_prefetching_threads(join: Join, folder: Path, queue: str) -> None:
    comm = join()
    keys = {"queue": queue, "threads": 3, "prefetch": 3}
    helpers.every_sample_once(
        comm, folder, strategy=_dedicated(comm), data_keys=keys, train={"accumulate": 2, "batch_size": 2}
    )


@mpi_only
@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("server", SERVED)
def test_every_sample_once_across_switches_in_mid_epoch(join: Join, folder: Path, server, queue: str) -> None:
    comm = join()
    helpers.every_sample_once(comm, folder, epochs=4, phases=_there_and_back(comm, server), data_keys={"queue": queue})


@mpi_only
@pytest.mark.parametrize("server", SERVED)
def test_all_ranks_end_with_equal_parameters(join: Join, folder: Path, server) -> None:
    """Every phase begins with rank 0's parameters on all ranks; after the last one the servers have them too."""
    comm = join()
    job = helpers.make_job(folder, phases=_there_and_back(comm, server), train={"epochs": 2, "batch_size": 3})
    begun = helpers.beginnings(comm, job)
    for phase in ("0", "1", "2"):
        vectors = [own[phase] for own in comm.gather_json(begun) if phase in own]
        assert vectors
        assert all(vector == vectors[0] for vector in vectors)


@mpi_only
@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("queue", QUEUES)
def test_bounded_mode_never_exceeds_its_bound(join: Join, folder: Path, queue: str, bound: int) -> None:
    comm = join(traced=True)
    strategy = _dedicated(comm, mode="bounded", bound=bound)
    job = helpers.make_job(
        folder, strategy=strategy, data={"queue": queue}, debug={"slow": {1: 20}},
        train={"epochs": 2, "batch_size": 3},
    )  # fmt: skip
    assert max(helpers.leads(helpers_mpi.record(comm, job))) <= bound


@mpi_only
@pytest.mark.parametrize("server", SERVED)
def test_no_pull_is_torn(join: Join, folder: Path, server) -> None:
    comm = join()
    helpers.whole_pulls(comm, folder, server(comm), pulls=256)


@mpi_only
@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_resumed_run_has_the_same_bits(join: Join, folder: Path, optimizer: str, mode: str) -> None:
    """With one worker there is only one order of updates."""
    comm = join()
    keys = {"name": optimizer, "lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    helpers.resumed_bits(comm, folder, _alone(comm, mode), keys)


@mpi_only
@pytest.mark.parametrize("queue", QUEUES)
def test_resumed_run_of_several_workers_continues_where_it_was(join: Join, folder: Path, queue: str) -> None:
    comm = join()
    job = helpers.make_job(
        folder, phases=_there_and_back(comm, _beside), data={"queue": queue},
        train={"epochs": 1, "batch_size": 3, "checkpoint_every": {"samples": 25}, "keep_checkpoints": 9},
    )  # fmt: skip
    whole = helpers.quiet_train(comm, job)
    for index in (2, 1, 0):
        comm.barrier()
        if comm.rank == 0:
            helpers.forget_after(whole.folder, index)
        comm.barrier()
        again = helpers.quiet_train(comm, job, resume=whole.folder)
        assert [summary.samples for summary in again.phases] == [summary.samples for summary in whole.phases]
        assert [summary.steps for summary in again.phases] == [summary.steps for summary in whole.phases]


@mpi_only
@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize("server", SERVED)
def test_non_finite_loss_is_reported_on_every_rank(join: Join, folder: Path, server, mode: str) -> None:
    comm = join()
    messages = comm.gather_json(helpers.nan_error(comm, folder, server(comm, mode=mode)))
    assert len(set(messages)) == 1
    assert "loss is nan on rank " in messages[0]


@mpi_only
@pytest.mark.parametrize("server", SERVED)
def test_nan_skip_leaves_the_update_out(join: Join, folder: Path, server) -> None:
    comm = join()
    helpers.nan_skipped(comm, folder, server(comm))


# -- tests that start ranks themselves ---------------------------------------------------------------------------
@pytest.mark.any_mpi
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "servers", "where"), [(5, 2, "alone"), (4, 4, "beside")])
def test_none_of_many_pulls_is_torn(mpirun: Mpirun, tmp_path: Path, ranks: int, servers: int, where: str) -> None:
    ended = mpirun(ranks, PULLS, str(tmp_path), str(servers), where, timeout=100)
    assert int(ended.out.split()[0]) >= 5000
