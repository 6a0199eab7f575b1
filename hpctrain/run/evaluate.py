"""Loss and metric of a model on a data set, computed by all workers together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.data.generators import Generators
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import make_order
from hpctrain.errors import HpctrainError
from hpctrain.models.forward import Forward
from hpctrain.models.losses import weigh
from hpctrain.models.measures import Measure, mean
from hpctrain.models.packing import Packed, collect, pack
from hpctrain.run.agreement import agreed

Loss = Callable[..., Tensor]


class Evaluation(NamedTuple):
    """The result on a data set. `loss`: None if the model should return it but does not in evaluation mode. `entries`:
    the values of a metric that returns a dictionary, otherwise empty; `metric` is then the first of them."""

    loss: float | None
    metric: float
    entries: dict[str, float]

    def text(self, split: str, metric_name: str) -> list[str]:
        """For people: "test loss 0.1234", "test accuracy 0.9876"."""
        named = {**self._known_loss, **(self.entries or {metric_name: self.metric})}
        return [f"{split} {name} {value:.4f}" for name, value in named.items()]

    def plain(self) -> dict[str, float]:
        """The values by column name: loss (if there is one), metric, and metric.NAME for each entry."""
        entries = {f"metric.{name}": value for name, value in self.entries.items()}
        return {**self._known_loss, "metric": self.metric, **entries}

    @property
    def _known_loss(self) -> dict[str, float]:
        return {} if self.loss is None else {"loss": self.loss}


def evaluate(
    model: nn.Module,
    dataset: Any,
    loss: Loss,
    metric: Measure,
    comm: Communicator,
    batch_size: int,
    move: Callable[[Batch], Batch],
    precision: Callable[[], AbstractContextManager[Any]],
) -> Evaluation:
    """Compute loss and metric over `dataset`, each worker its share. Collective over `comm`.

    Samples that draw from global generators are the same in every evaluation and every run. The model's mode, its
    gradients and the states of Python's, NumPy's and torch's generators are left unchanged. If the metric fails on a
    rank, all ranks raise its ModelError.
    """
    order = make_order(dataset, shuffle=False)
    losses = np.zeros(3, np.float64)  # sum and weight of the losses, and the number of batches without one
    fed, forward = _Fed(metric), Forward(model, loss)
    modes = [(module, module.training) for module in model.modules()]
    random = Generators.now()
    model.eval()
    loader = Loader(dataset, order, threads=0, workers=comm)
    try:
        with torch.no_grad():
            for start, stop in _share(loader, order, comm, batch_size):
                batch = move(loader.take(start, stop))
                with forward.explained(batch):
                    with precision():
                        outputs = forward.outputs(batch)
                        losses += _terms(forward.found_loss(outputs, batch), batch.size)
                    fed.update(outputs, batch)
            value = fed.value(comm)
    finally:
        loader.close()
        for module, training in modes:  # modes differ if a user keeps some layers in evaluation mode
            module.training = training
        random.restore()
    comm.all_reduce(losses)
    entries = value if isinstance(value, dict) else {}
    mean_loss = None if losses[2] else mean(losses[0], losses[1])
    return Evaluation(mean_loss, next(iter(entries.values())) if isinstance(value, dict) else value, entries)


def _terms(loss: Any, samples: int) -> list[float]:
    if loss is None:
        return [0.0, 0.0, 1.0]
    weighed = weigh(loss, samples)
    return [weighed.mean * weighed.weight, weighed.weight, 0.0]


class _Fed:
    """A metric fed with this rank's batches. After a failure it ignores further batches, but the rank continues: it
    meets the others in `value`, where all raise the error."""

    def __init__(self, metric: Measure) -> None:
        self._metric = metric
        self._failure: HpctrainError | None = None
        self._try(metric.start)

    def update(self, outputs: Any, batch: Batch) -> None:
        self._try(lambda: self._metric.update(outputs, batch.reference, batch.size))

    def value(self, comm: Communicator) -> float | dict[str, float]:
        """The value over all ranks' batches. Rank 0 merges and computes, the others get its result. Collective."""
        states = collect(comm, agreed(comm, self._state))
        found = agreed(comm, lambda: self._merged(states) if comm.rank == 0 else None)
        value: float | dict[str, float] = comm.broadcast_json(found)
        return value

    def _state(self) -> Packed:
        if self._failure is not None:
            raise self._failure
        return pack(self._metric.state(), f'metric "{self._metric.name}": state() has')

    def _merged(self, states: list[dict[str, Any]]) -> float | dict[str, float]:
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
