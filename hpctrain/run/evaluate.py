"""Loss and metric of a model on a data set, computed by all workers together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.data.generators import Generators
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import make_order
from hpctrain.errors import DataError, HpctrainError
from hpctrain.models.losses import weigh
from hpctrain.models.metrics import Tally, mean

Loss = Callable[..., Tensor]
Metric = Callable[..., Any]


class Evaluation(NamedTuple):
    """Means over a data set. `entries`: of a metric that returns a dictionary, whose first `metric` is; else empty."""

    loss: float
    metric: float
    entries: dict[str, float]

    def text(self, split: str, metric_name: str) -> list[str]:
        """For people: "test loss 0.1234", "test accuracy 0.9876"."""
        named = self.entries or {metric_name: self.metric}
        return [f"{split} {name} {value:.4f}" for name, value in {"loss": self.loss, **named}.items()]

    def plain(self) -> dict[str, float]:
        """By the names of columns: loss, metric, and metric.NAME of each entry."""
        entries = {f"metric.{name}": value for name, value in self.entries.items()}
        return {"loss": self.loss, "metric": self.metric, **entries}


@contextmanager
def explained(batch: Batch) -> Iterator[None]:
    """Where a model or loss fails inside on samples that are not pairs: DataError, which says how to give them."""
    try:
        yield
    except HpctrainError:
        raise
    except Exception as error:
        if batch.targets is not None or not batch.size:
            raise
        kind = f"{len(batch.inputs)} items each" if isinstance(batch.inputs, (list, tuple)) else "one item each"
        raise DataError(
            f"the data set's samples are of {kind}, not pairs (input, target), so the model was called with all of a "
            f"sample and the loss with targets None, which raised {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no message'}; return ((x, mask), y) for two inputs, or, "
            "to train, write a loop of your own (hpctrain.session)"
        ) from error


def evaluate(
    model: nn.Module,
    dataset: Any,
    loss: Loss,
    metric: Metric,
    comm: Communicator,
    batch_size: int,
    move: Callable[[Batch], Batch],
    precision: Callable[[], AbstractContextManager[Any]],
    metric_name: str = "metric",
) -> Evaluation:
    """Loss and metric over `dataset`, each worker computing its share. Collective over `comm`.

    Samples that draw from global generators are the same in every evaluation, and in every run. Leaves the model's
    mode, its gradients and the states of Python's, NumPy's and torch's generators as they were. `metric_name`: for
    messages.
    """
    order = make_order(dataset, shuffle=False)
    losses, tally = np.zeros(2, np.float64), Tally(metric_name)
    modes = [(module, module.training) for module in model.modules()]
    random = Generators.now()
    model.eval()
    loader = Loader(dataset, order, threads=0, workers=comm)
    try:
        with torch.no_grad():
            for start, stop in _share(loader, order, comm, batch_size):
                batch = move(loader.take(start, stop))
                with explained(batch):
                    with precision():
                        outputs = model(batch.inputs)
                        weighed = weigh(loss(outputs, batch.targets), batch.size)
                    tally.add(metric(outputs, batch.targets), batch.size)
                losses += [weighed.mean * weighed.weight, weighed.weight]
    finally:
        loader.close()
        for module, training in modes:  # not all alike where a user keeps some layers in evaluation mode
            module.training = training
        random.restore()
    sums = np.array([*losses, *tally.first, tally.named], np.float64)
    comm.all_reduce(sums)
    entries = tally.entries(comm) if sums[4] else {}  # a rank that had no batch does not know that there are some
    return Evaluation(mean(sums[0], sums[1]), mean(sums[2], sums[3]), entries)


def _share(loader: Loader, order: Order, comm: Communicator, batch_size: int) -> Iterator[tuple[int, int]]:
    """This worker's batches of one pass: a stretch of its own; of a stream that does not know its length, in turn."""
    if order.length is not None:
        low, high = order.length * comm.rank // comm.size, order.length * (comm.rank + 1) // comm.size
        for start in range(low, high, batch_size):
            yield start, min(high, start + batch_size)
        return
    cursor = 0
    while cursor < order.epoch_end(0):  # far away, until its end was seen
        bounds = loader.bounds(cursor, batch_size * comm.size, comm.size)
        if bounds[comm.rank] < bounds[comm.rank + 1]:
            yield bounds[comm.rank], bounds[comm.rank + 1]
        cursor = bounds[-1]
