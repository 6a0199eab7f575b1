"""The parts of a run whose costs alone count: a model without memory, and batches without samples."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.splits import Splits
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.replica.state import Own, State
from hpctrain.run.keeper import Keeper
from hpctrain.run.prepare import Measurable, Prepared, prepare
from hpctrain.run.untrained import Untrained
from hpctrain.strategies.phase import Phase

META = torch.device("meta")


class SizeLoader(Loader):
    """Deals out batches that have a size and nothing else."""

    def take(self, start: int, stop: int) -> Batch:
        return Batch(None, None, stop - start)

    def request(self, start: int, stop: int) -> None:
        return None


class NothingUntrained(Untrained):
    """As if the model had neither frozen parameters nor buffers: who has their values does not matter."""

    def frozen(self) -> dict[str, Tensor]:
        return {}

    def buffers(self) -> dict[str, Tensor]:
        return {}

    def _all_buffers(self) -> dict[str, Tensor]:
        return {}


class PhantomPrepared(Prepared):
    """See the module."""

    def move(self, batch: Batch) -> Batch:
        return batch

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def loader(self, phase: int, threads: int | None = None, workers: Communicator | None = None) -> Loader:
        return SizeLoader(self.splits.train, self.order, threads=0, workers=workers)


class PhantomKeeper(Keeper):
    """Keeps nothing: there is nothing to keep."""

    def save(self, phase: Phase, state: State | None, own_state: Own, account: dict[str, Any], cursor: int) -> None:
        return None

    def settle_model(self, phase: Phase) -> None:
        return None

    def check_model(self) -> list[str]:
        return []

    def save_model(self) -> None:
        return None


class PhantomParts:
    """Builds the parts of a run for many virtual ranks from one model and the length of one data set."""

    def __init__(self, parts: Measurable, judged: bool) -> None:
        """`parts`: real ones, of which shapes and lengths are taken. `judged`: whether there is something to evaluate:
        what evaluations during training take."""
        model = copy.deepcopy(parts.model).to(META)
        splits = Splits(_sized(parts.splits.train))
        if judged and parts.splits.validation is not None:
            splits.validation = _sized(parts.splits.validation)
        elif judged and parts.splits.test is not None:
            splits.test = _sized(parts.splits.test)
        self._parts = Measurable(parts.job, META, splits, model, parts.loss, parts.metric, parts.evaluation)

    def build(self, job: Job, comm: Communicator) -> Prepared:
        """As `prepare`."""
        known = self._parts
        own = replace(known, job=job, device=META, model=copy.deepcopy(known.model))
        made = prepare(job, comm, own)
        values = {each.name: getattr(made, each.name) for each in fields(made)}
        return PhantomPrepared(**{**values, "untrained": NothingUntrained(own.model)})


def _sized(dataset: Any) -> TensorDataset:
    """A data set of the same length. Raises ClusterError if it has none."""
    try:
        return TensorDataset(torch.empty(len(dataset), 0))
    except TypeError:
        raise ClusterError(
            "the data set is a stream without a length (__len__), so how long costs go on is not known; simulate it "
            "with --learn, which reads it"
        ) from None


def phantom_loss(value: float) -> Tensor:
    """A loss that depends on no parameter but can be differentiated."""
    return torch.zeros((), requires_grad=True) + value
