"""Broken strategies are detected, each by the check of what it breaks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from hpctrain.conformance import CHECKS, Subject, over_virtual_ranks
from hpctrain.options import Options
from hpctrain.replica.state import Own
from hpctrain.strategies.base import Outcome
from hpctrain.strategies.local_sgd import LocalSGD
from hpctrain.strategies.round import Round, RoundStrategy, Step

NODES = (0, 0, 1, 1)


class NoOptions(Options):
    """None."""


class ByHand(RoundStrategy):
    """Updates the parameters itself instead of with the job's optimizer."""

    Options = NoOptions
    exact = True

    def apply(self, round: Round) -> None:
        self.phase.replica.values.sub_(self.exchange.reduce(round.divisor), alpha=0.1)


class Unweighted(RoundStrategy):
    """Divides by the number of workers, ignoring their samples."""

    Options = NoOptions
    exact = True

    def apply(self, round: Round) -> None:
        self.optimize(self.exchange.reduce(self.comm.size), round)


class Alone(RoundStrategy):
    """Exchanges nothing."""

    Options = NoOptions

    def apply(self, round: Round) -> None:
        self.optimize(self.phase.replica.gradient, round)


class Forgetful(LocalSGD):
    """Does not save the worker's own state."""

    def own(self) -> Own:
        return Own()


class Talkative(LocalSGD):
    """Sends messages within a round."""

    def local(self, step: Step) -> None:
        super().local(step)
        self.comm.all_reduce(np.zeros(1))


class Swapping(RoundStrategy):
    """Evaluates other parameters than it trains, and does not put those back."""

    Options = NoOptions
    exact = True

    def apply(self, round: Round) -> None:
        self.optimize(self.exchange.reduce(round.divisor), round)

    @contextmanager
    def settled(self) -> Iterator[None]:
        self.phase.replica.values.mul_(0.99)
        yield


class Waiting(Swapping):
    """Waits on rank 0 for ranks that have left."""

    def drain(self) -> None:
        if self.comm.rank == 0:
            self.comm.barrier()


class Skipping(Alone):
    """Skips a sample once."""

    def step(self, samples: int, loss: float) -> Outcome:
        outcome = super().step(samples, loss)
        if self.phase.cursor == 12:
            self.phase.cursor += 1
        return outcome


class Unheeding(Swapping):
    """Skips steps that overflow, but does not say so."""

    def step(self, samples: int, loss: float) -> Outcome:
        return super().step(samples, loss)._replace(overflow=False)


BROKEN = [
    (ByHand, "equals one process", "with SGD it differs by"),
    (ByHand, "honours train.clip_norm", "train.clip_norm has no effect"),
    (ByHand, "honours optimizer.schedule", "optimizer.schedule has no effect"),
    (ByHand, "hands over the optimizer's state", "differs by .* from one process"),
    (Unweighted, "equals one process when workers' shares differ", "with ignored targets it differs by"),
    (Alone, "supports optimizers that need whole parameters", "the ranks end with different parameters"),
    (Skipping, "uses every sample once", "samples of an epoch were skipped or repeated"),
    (Unheeding, "skips steps that overflow under the loss scale", "the loss scale does not fall after an overflow"),
    (Swapping, "is not changed by evaluations and checkpoints", "evaluations or checkpoints change the parameters"),
    (Waiting, "lets all workers leave together", "DeadlockError"),
    (Forgetful, "resumes bit for bit", "with SGD a resumed run ends with different parameters"),
    (Talkative, "exchanges nothing within a round", "it communicates within rounds: recv"),
]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize(("kind", "check", "says"), BROKEN)
def test_each_broken_promise_is_found(
    tmp_path: Path, kind: type[RoundStrategy], check: str, says: str
) -> None:
    subject = Subject(f"{__name__}:{kind.__name__}", dict(kind.tested_with[-1]))
    [wanted] = [each for each in CHECKS if each.name == check]
    verdict = over_virtual_ranks(subject, wanted, NODES, tmp_path)
    assert verdict.broken is not None
    assert re.search(says, verdict.broken), verdict.broken
