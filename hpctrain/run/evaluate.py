"""Loss and metric of a model on a data set, computed by all workers together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.data.generators import Generators
from hpctrain.data.loader import Batch, Collate, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import make_order
from hpctrain.errors import HpctrainError, ModelError
from hpctrain.filenames import MOST_EXAMPLES
from hpctrain.models.examples import plain
from hpctrain.models.forward import Forward
from hpctrain.models.losses import weigh
from hpctrain.models.measures import Measure, mean
from hpctrain.models.packing import Packed, collect, pack
from hpctrain.run.agreement import agreed
from hpctrain.text import did_you_mean

Loss = Callable[..., Tensor]
OWN_NAMES = frozenset({"loss", "metric"})  # what every evaluation has
Precision = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Evaluation:
    """The result on a data set. `loss`: None if the model should return it but does not in evaluation mode. `metric`:
    the monitored value. `entries`: all values by name, if there are several, otherwise empty. `examples`: samples to
    show, on rank 0, as plain values."""

    loss: float | None
    metric: float
    entries: dict[str, float]
    examples: Sequence[dict[str, Any]] = ()

    def text(self, split: str, metric_name: str) -> list[str]:
        """For people: "test loss 0.1234", "test accuracy 0.9876"."""
        named = {**self._known_loss, **(self.entries or {metric_name: self.metric})}
        return [f"{split} {name} {value:.4f}" for name, value in named.items()]

    def plain(self) -> dict[str, float]:
        """The values by column name: loss (if there is one), metric, and metric.NAME for each entry."""
        entries = {f"metric.{name}": value for name, value in self.entries.items()}
        return {**self._known_loss, "metric": self.metric, **entries}

    def named(self, name: str) -> float | None:
        """The value of that name: "metric", "loss", or an entry; None if there is none."""
        return {**self.entries, **self._known_loss, "metric": self.metric}.get(name)

    @property
    def names(self) -> list[str]:
        """What `named` knows."""
        return ["metric", *self._known_loss, *self.entries]

    @property
    def _known_loss(self) -> dict[str, float]:
        return {} if self.loss is None else {"loss": self.loss}


class Judge(ABC):
    """What an evaluation computes of each batch. `metric`: accumulates it."""

    def __init__(self, model: nn.Module, metric: Measure, precision: Precision) -> None:
        self.model, self.precision = model, precision
        self.fed = _Fed(metric)

    def start(self) -> None:
        """An evaluation begins."""
        self.fed.start()

    @abstractmethod
    def take(self, batch: Batch) -> None:
        """Add one of this rank's batches, on the device of the model."""

    @abstractmethod
    def found(self, comm: Communicator) -> tuple[float | None, float | dict[str, float]]:
        """(loss or None, the metric's value) over the batches of all ranks. Collective."""


class StandardJudge(Judge):
    """The job's loss, and its metric of the model's outputs."""

    def __init__(self, model: nn.Module, loss: Loss, metric: Measure, precision: Precision) -> None:
        super().__init__(model, metric, precision)
        self._forward = Forward(model, loss)
        self._losses = np.zeros(3, np.float64)  # sum and weight, and the number of batches without a loss

    def start(self) -> None:
        super().start()
        self._losses[:] = 0.0

    def take(self, batch: Batch) -> None:
        with self._forward.explained(batch):
            with self.precision():
                outputs = self._forward.outputs(batch)
                self._losses += _terms(self._forward.found_loss(outputs, batch), batch.size)
            self.fed.update(outputs, batch.reference, batch.size)

    def found(self, comm: Communicator) -> tuple[float | None, float | dict[str, float]]:
        value = self.fed.value(comm)
        if taken := sorted(OWN_NAMES & set(value if isinstance(value, dict) else ())):
            raise _everywhere(
                f'{self.fed.title} gives a value of the name "{taken[0]}", which every evaluation has; give it another '
                "name"
            )
        comm.all_reduce(self._losses)
        return None if self._losses[2] else mean(self._losses[0], self._losses[1]), value


class OwnJudge(Judge):
    """An evaluation of the user's own, which gets the model and each batch; its entry "loss" is the loss."""

    def take(self, batch: Batch) -> None:
        with self.precision():
            self.fed.update(self.model, batch, batch.size)

    def found(self, comm: Communicator) -> tuple[float | None, float | dict[str, float]]:
        value = self.fed.value(comm)
        if not isinstance(value, dict) or not (set(value) - {"loss"}):
            raise _everywhere(f"{self.fed.title} must give a dictionary of numbers by name, one besides the loss")
        if "metric" in value:
            raise _everywhere(f'{self.fed.title} gives a value of the name "metric"; give it another name')
        return value.pop("loss", None), value


def evaluate(
    judge: Judge,
    dataset: Any,
    comm: Communicator,
    batch_size: int,
    move: Callable[[Batch], Batch],
    collate: Collate | None = None,
    monitor: str | None = None,
) -> Evaluation:
    """Let `judge` see all of `dataset`, each worker its share. Collective over `comm`.

    `collate`: makes batches, as in training. `monitor`: the name of the value that is the metric; None: the first one.
    Samples that draw from global generators are the same in every evaluation and every run. The model's mode, its
    gradients and the states of Python's, NumPy's and torch's generators are left unchanged. If the metric fails on a
    rank, all ranks raise its ModelError.
    """
    order = make_order(dataset, shuffle=False)
    modes = [(module, module.training) for module in judge.model.modules()]
    random = Generators.now()
    judge.model.eval()
    loader = Loader(dataset, order, threads=0, workers=comm, collate=collate)
    try:
        with torch.no_grad():
            judge.start()
            for start, stop in _share(loader, order, comm, batch_size):
                judge.take(move(loader.take(start, stop)))
            loss, value = judge.found(comm)
    finally:
        loader.close()
        for module, training in modes:  # modes differ if a user keeps some layers in evaluation mode
            module.training = training
        random.restore()
    return _evaluation(loss, value, monitor, judge.fed)


def _evaluation(loss: float | None, value: float | dict[str, float], monitor: str | None, fed: _Fed) -> Evaluation:
    entries = value if isinstance(value, dict) else {}
    first = next(iter(entries.values())) if isinstance(value, dict) else value
    found = Evaluation(loss, first, entries, fed.examples)
    if monitor is None:
        return found
    chosen = found.named(monitor)
    if chosen is None:
        raise _everywhere(
            f"metric.monitor = {monitor!r}{did_you_mean(monitor, found.names)}: the evaluation gives "
            f"{', '.join(found.names)}"
        )
    return replace(found, metric=chosen)


def _everywhere(text: str) -> ModelError:
    """An error that all workers raise alike."""
    error = ModelError(text)
    error.everywhere = True
    return error


def _terms(loss: Any, samples: int) -> list[float]:
    if loss is None:
        return [0.0, 0.0, 1.0]
    weighed = weigh(loss, samples)
    return [weighed.total, weighed.weight, 0.0]


class _Fed:
    """A metric fed with this rank's batches. After a failure it ignores further batches, but the rank continues: it
    meets the others in `value`, where all raise the error. `examples`: what the metric shows, on rank 0."""

    def __init__(self, metric: Measure) -> None:
        self._metric, self.title = metric, metric.title
        self._failure: HpctrainError | None = None
        self.examples: Sequence[dict[str, Any]] = ()

    def start(self) -> None:
        self._failure, self.examples = None, ()
        self._try(self._metric.start)

    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        self._try(lambda: self._metric.update(outputs, targets, samples))

    def value(self, comm: Communicator) -> float | dict[str, float]:
        """The value over all ranks' batches. Rank 0 merges and computes, the others get its result. Collective."""
        states = collect(comm, agreed(comm, self._state))
        found = agreed(comm, lambda: self._merged(states) if comm.rank == 0 else None)
        value: float | dict[str, float] = comm.broadcast_json(found)
        return value

    def _state(self) -> Packed:
        if self._failure is not None:
            raise self._failure
        return pack(self._metric.state(), f"{self.title}: state() has")

    def _merged(self, states: list[dict[str, Any]]) -> float | dict[str, float]:
        self.examples = [plain(each) for each in self._metric.examples()[:MOST_EXAMPLES]]
        self._metric.merge(states)
        return self._metric.value()

    def _try(self, what: Callable[[], None]) -> None:
        if self._failure is None:
            try:
                what()
            except HpctrainError as error:
                self._failure = error


def own_part(samples: int, worker: int, workers: int) -> tuple[int, int]:
    """The stretch of a data set of known length that one of several workers evaluates."""
    return samples * worker // workers, samples * (worker + 1) // workers


def _share(loader: Loader, order: Order, comm: Communicator, batch_size: int) -> Iterator[tuple[int, int]]:
    """This worker's batches of one pass: a contiguous stretch; for a stream of unknown length, batches in turn."""
    if order.length is not None:
        low, high = own_part(order.length, comm.rank, comm.size)
        for start in range(low, high, batch_size):
            yield start, min(high, start + batch_size)
        return
    cursor = 0
    while cursor < order.epoch_end(0):  # far away until the end has been seen
        bounds = loader.bounds(cursor, batch_size * comm.size, comm.size)
        if bounds[comm.rank] < bounds[comm.rank + 1]:
            yield bounds[comm.rank], bounds[comm.rank + 1]
        cursor = bounds[-1]
