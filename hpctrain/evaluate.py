"""Loss and metric of a model on a data set, computed by all workers together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.data.generators import Generators
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import make_order

Loss = Callable[..., Tensor]
Metric = Callable[..., Any]


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of rows of `outputs` (n, classes) whose largest entry is at `targets` (n,), as a scalar."""
    return (outputs.argmax(dim=-1) == targets).double().mean()


def evaluate(
    model: nn.Module,
    dataset: Any,
    loss: Loss,
    metric: Metric,
    comm: Communicator,
    batch_size: int,
    move: Callable[[Batch], Batch],
    precision: Callable[[], AbstractContextManager[Any]],
) -> tuple[float, float]:
    """(mean loss, mean metric) over `dataset`, each worker computing its share. Collective over `comm`.

    Samples that draw from global generators are the same in every evaluation, and in every run. Leaves the model's
    mode, its gradients and the states of Python's, NumPy's and torch's generators as they were.
    """
    order = make_order(dataset, shuffle=False)
    sums = np.zeros(3, np.float64)
    modes = [(module, module.training) for module in model.modules()]
    random = Generators.now()
    model.eval()
    loader = Loader(dataset, order, threads=0)
    try:
        with torch.no_grad():
            for start, stop in _share(loader, order, comm, batch_size):
                batch = move(loader.take(start, stop))
                with precision():
                    outputs = model(batch.inputs)
                    value = loss(outputs, batch.targets)
                measured = metric(outputs, batch.targets)
                sums += batch.size * np.array([float(value), float(measured), 1.0])
    finally:
        loader.close()
        for module, training in modes:  # not all alike where a user keeps some layers in evaluation mode
            module.training = training
        random.restore()
    comm.all_reduce(sums)
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


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
