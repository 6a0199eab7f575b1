"""A worker's steps, taken without a session."""

from __future__ import annotations

from pathlib import Path

import torch

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.replica.coupling import Coupling
from hpctrain.run.phase import split_by_role, updating
from hpctrain.run.prepare import Prepared, prepare
from hpctrain.run.trainer import Trainer
from hpctrain.strategies.base import Outcome
from hpctrain.strategies.phase import Dealing, Members, Phase
from tests import helpers


def trainer_of(prepared: Prepared, comm: Communicator, coupling: Coupling) -> Trainer:
    """Of the job's first phase. Collective."""
    strategy, roles = prepared.strategy(0), prepared.roles[0]
    everybody, workers = split_by_role(comm, roles)
    prepared.replica.place(everybody, "node")
    phase = Phase(
        0,
        Members(everybody, workers, roles, placement="node"),
        prepared.replica,
        updating(prepared.optimizer, prepared.replica.layout),
        Dealing(prepared.batch, epoch=prepared.order.length),
        prepared.conductor(0, 0, lambda event: None),
    )
    strategy.join(phase)
    loader = prepared.loader(0, 0, workers)
    return Trainer(phase, strategy, loader, prepared.job.train.batch_size, prepared.move, print, coupling)


class HooksCalled(Coupling):
    """Records the hooks that are called."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def before(self, counts: bool) -> None:
        self.called.append(f"before {counts}")

    def backward(self, loss: torch.Tensor) -> None:
        self.called.append("backward")
        loss.backward()


def outcomes(comm: Communicator, folder: Path) -> tuple[list[list[Outcome | None]], list[str]]:
    """For two steps: what `step` returned (`finish` if the worker had no batch), and the hooks called. 13 samples: 12
    in
    the first round, 1 in the second."""
    data = {"name": "tests.helpers:points", "samples": 13, "shuffle": False}
    job = helpers.make_job(folder, data=data, train={"batch_size": 3, "accumulate": 2, "epochs": 2})
    coupling, prepared = HooksCalled(), prepare(job, comm)
    trainer = trainer_of(prepared, comm, coupling)
    found: list[list[Outcome | None]] = []
    for _ in range(2):
        found.append([])
        for batch in trainer.batches():
            found[-1].append(trainer.step(prepared.loss(prepared.model(batch.inputs), batch.targets)))
        if not found[-1]:
            found[-1].append(trainer.finish())
    trainer.close()
    return found, coupling.called


def test_step_returns_the_outcome_after_the_rounds_last_batch(tmp_path: Path) -> None:
    """A worker with an empty share of the round gets the same outcome."""
    ranks = World(2).run(lambda comm: outcomes(comm, tmp_path))
    for (first, second), _ in ranks:
        before, after = first
        assert before is None
        assert after is not None
        assert (after.cursor, after.samples) == (12, 12)
        [last] = second
        assert last is not None
        assert (last.cursor, last.samples) == (13, 1)
    assert ranks[0][0][1][0] == ranks[1][0][1][0]
    assert sorted(len(called) for _, called in ranks) == [4, 6]  # one had no batch in the second round
    assert ranks[0][1][:2] == ["before True", "backward"]
