"""Leaving the training loop early: on all ranks, which ends the run, or on one rank, which ends the job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, LeftError, NanError
from hpctrain.job import Job
from hpctrain.run.api import Session, session
from hpctrain.run.folder import Narrator
from tests import helpers

QUIET = Narrator(enabled=False)
AR = {"name": "all_reduce"}
STRATEGIES: dict[str, helpers.Tables] = {
    "shared": AR,
    "overlap": helpers.SYNCHRONOUS["overlap"][0],
    "server": helpers.served("sync"),
    "servers": helpers.served("sync", servers=2),
    "colocated": helpers.served("sync", servers=2, colocated=True),
    "backup": helpers.served("sync", servers=1, colocated=True, backup_workers=1),
    "async": helpers.served("async"),
    "async, colocated": helpers.served("async", servers=3, colocated=True),
    "bounded": helpers.served("bounded", bound=0, servers=2),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def loop(running: Session, job: Job, leaves: Callable[[int], bool]) -> int:
    """Steps taken until `leaves(steps)`."""
    steps = 0
    for batch in running.batches():
        if leaves(steps):
            break
        running.step(running.loss(running.model(batch.inputs), batch.targets))
        steps += 1
    return steps


def left_by(size: int, job: Job, leaves: Callable[[int, int], bool], **world: Any) -> list[tuple[int, Session]]:
    """All ranks' (steps, session) after leaving the loop when `leaves(rank, steps)` is true."""

    def body(comm: Communicator) -> tuple[int, Session]:
        with session(job, comm, out=QUIET) as running:
            steps = loop(running, job, lambda steps: leaves(comm.rank, steps))
        return steps, running

    return World(size, **world).run(body)


# -- together ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", list(STRATEGIES))
def test_ranks_that_leave_together_end_the_run(tmp_path: Path, what: str):
    """Even at different times; code after the session runs on all ranks."""
    job = helpers.make_job(tmp_path, strategy=STRATEGIES[what])
    ended = left_by(4, job, lambda rank, steps: steps == 3, compute=helpers.jitter())
    workers = [(steps, running) for steps, running in ended if steps]
    assert [steps for steps, _ in workers] == [3] * len(workers)
    for _, running in workers:
        with pytest.raises(HpctrainError, match=r"not run to the end \(left at sample \d+\)"):
            _ = running.result
        assert (helpers.vector(running.model) == helpers.vector(workers[0][1].model)).all()
    assert not (workers[0][1].folder / "model.safetensors").exists()


def test_leaving_in_the_middle_of_a_round_and_in_a_later_phase(tmp_path: Path):
    phases = [
        {"strategy": helpers.served("async"), "until": {"rule": "after", "samples": 40}},
        {"strategy": {**AR, "exchange": "message", "overlap": True}},
    ]
    job = helpers.make_job(tmp_path, phases=phases, train={"accumulate": 2})

    def body(comm: Communicator) -> int:
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                loss = running.loss(running.model(batch.inputs), batch.targets)
                running.step(loss)
                if running.totals.phase == 1:
                    break
        return running.totals.phase

    assert World(3).run(body) == [1, 1, 1]


@pytest.mark.parametrize("strategy", [AR, helpers.served("async")])
def test_leaving_after_the_last_step_counts_as_a_normal_end(tmp_path: Path, strategy: helpers.Tables):
    """After the run's last step only the end of the run follows."""
    job = helpers.make_job(tmp_path, strategy=strategy, train={"steps": 3})

    def body(comm: Communicator) -> Session:
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                running.step(running.loss(running.model(batch.inputs), batch.targets))
                if running.totals.cursor == running.prepared.total:
                    break
        return running

    for running in World(3).run(body):
        assert running.result.samples == running.prepared.total


@pytest.mark.parametrize("strategy", [AR, helpers.served("sync")])
def test_leaving_together_after_the_last_step_of_a_phase(tmp_path: Path, strategy: helpers.Tables):
    phases = [{"strategy": AR, "until": {"rule": "after", "steps": 2}}, {"strategy": strategy}]
    job = helpers.make_job(tmp_path, phases=phases)

    def body(comm: Communicator, lone: bool) -> Session:
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                running.step(running.loss(running.model(batch.inputs), batch.targets))
                if running.totals.step == 2 and (comm.rank == 1 or not lone):
                    break
        return running

    for running in World(3).run(lambda comm: body(comm, False)):
        with pytest.raises(HpctrainError, match="left at sample 36"):
            _ = running.result
    with pytest.raises(LeftError, match=r"^rank 1 left the training loop at step 2 while"):
        World(3).run(lambda comm: body(comm, True))


def test_sys_exit_on_all_ranks_in_one_step_passes_through(tmp_path: Path):
    job = helpers.make_job(tmp_path, strategy=helpers.served("sync", colocated=True))
    codes = []

    def body(comm: Communicator) -> None:
        with pytest.raises(SystemExit) as caught, session(job, comm, out=QUIET) as running:
            loop(running, job, lambda steps: steps == 2 and sys.exit(7))
        codes.append(caught.value.code)

    World(3).run(body)
    assert codes == [7] * 3


def test_no_rank_enters_the_loop(tmp_path: Path):
    def body(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path, strategy=helpers.served()), comm, out=QUIET):
            pass

    World(3).run(body)


# -- alone -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what", list(STRATEGIES))
def test_rank_leaving_alone_is_named(tmp_path: Path, what: str):
    job = helpers.make_job(tmp_path, strategy=STRATEGIES[what])
    with pytest.raises(LeftError, match=r"^rank 1 left .* at step 3 while .*\(break or return\)$") as one:
        left_by(4, job, lambda rank, steps: rank == 1 and steps == 3)
    assert one.value.status == 1


@pytest.mark.parametrize("what", ["async", "bounded", "backup"])
def test_nan_on_another_rank_after_leaving_ends_all(tmp_path: Path, what: str):
    """The rank that left waits for a reply, which must arrive."""
    job = helpers.make_job(tmp_path, strategy=STRATEGIES[what])
    errors = []

    def body(comm: Communicator) -> None:
        with pytest.raises(NanError) as caught, session(job, comm, out=QUIET) as running:
            for step, batch in enumerate(running.batches()):
                if comm.rank == 0 and step == 1:
                    break
                loss = running.loss(running.model(batch.inputs), batch.targets)
                running.step(loss * float("nan") if comm.rank == 1 and step == 2 else loss)
        errors.append(str(caught.value))

    World(5, compute=helpers.jitter(1, 0.1, {1: 2.0})).run(body)
    assert len(errors) == 5
    assert len(set(errors)) == 1


def test_two_leaving_ranks_are_both_named(tmp_path: Path):
    with pytest.raises(LeftError, match="^ranks 0, 2 left"):
        left_by(3, helpers.make_job(tmp_path), lambda rank, steps: rank != 1 and steps == 3)


def test_worker_or_server_that_never_enters_the_loop(tmp_path: Path):
    job = helpers.make_job(tmp_path, strategy=helpers.served())

    def body(comm: Communicator, idle: int) -> None:
        with session(job, comm, out=QUIET) as running:
            if comm.rank != idle:
                loop(running, job, lambda steps: False)

    for idle in (1, 2):
        with pytest.raises(LeftError, match=f"^rank {idle} left the training loop before its first step"):
            World(3).run(partial(body, idle=idle))


class Quitting(Dataset[Any]):
    """Ends the program at sample 20, on rank 1 of two without shuffling."""

    def __init__(self, samples: int = 60) -> None:
        self.samples = samples
        self.points = helpers.points(samples)

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        if index == 20:
            sys.exit("cannot read sample 20")
        return self.points[index]


def quitting_net() -> Any:
    sys.exit(3)


def quitting_metric(outputs: Any, targets: Any) -> float:
    sys.exit()


QUITS: dict[str, tuple[helpers.Tables, str, int]] = {
    "the data": (
        {"data": {"name": Quitting(), "shuffle": False}},
        r"rank 1 left the training loop at step 1 while .*\(sys.exit\('cannot read sample 20'\)\)",
        1,
    ),
    "the data, asynchronous": (
        {"data": {"name": Quitting(), "shuffle": False, "queue": "static"}, "strategy": helpers.served(colocated=True)},
        r"rank 1 left the training loop at step 1 while .*\(sys.exit\('cannot read sample 20'\)\)",
        1,
    ),
    "the model": ({"model": {"name": "tests.unit.test_leaving:quitting_net"}}, r"sys.exit\(3\) was called before", 3),
    "the metric": (
        {
            "metric": "tests.unit.test_leaving:quitting_metric",
            "data": (helpers.points(), helpers.points(9)),
            "train": {"evaluate_every": {"steps": 2}},
        },
        r"rank . left the training loop in step 2, where the others wait .*\(sys.exit\(\)\)",
        1,
    ),
}


@pytest.mark.parametrize("what", list(QUITS))
def test_sys_exit_in_objects_the_job_names(tmp_path: Path, what: str):
    tables, words, status = QUITS[what]
    with pytest.raises(LeftError, match=words) as caught:
        World(2).run(lambda comm: helpers.quiet_train(comm, helpers.make_job(tmp_path, **tables)))
    assert caught.value.status == status


@pytest.mark.parametrize("lone", [False, True])
def test_leaving_with_batch_norm_over_all_workers(tmp_path: Path, lone: bool):
    """Remaining ranks wait in their forward pass, where they cannot be asked."""
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures",
        train={"sync_batchnorm": True, "batch_size": 6},
    )  # fmt: skip
    if lone:
        with pytest.raises(LeftError, match="^rank 1 left the training loop at step 3"):
            left_by(3, job, lambda rank, steps: rank == 1 and steps == 3)
    else:
        assert [steps for steps, _ in left_by(3, job, lambda rank, steps: steps == 3)] == [3, 3, 3]


def test_single_rank_run_may_leave_anywhere(tmp_path: Path):
    job = helpers.make_job(tmp_path, **QUITS["the metric"][0])
    with pytest.raises(SystemExit):
        World(1).run(lambda comm: helpers.quiet_train(comm, job))
    assert left_by(1, job, lambda rank, steps: steps == 1)[0][0] == 1


def test_keyboard_interrupt_raised_by_the_program(tmp_path: Path):
    def body(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            for _ in running.batches():
                raise KeyboardInterrupt

    with pytest.raises(LeftError, match=r"\(KeyboardInterrupt\)") as caught:
        World(2).run(body)
    assert caught.value.status == 130
