"""Loss and metric of a model on a data set, computed by all workers together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order

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

    Leaves the model's mode, gradients and torch's random state as they were.
    """
    length = len(dataset)
    start, stop = length * comm.rank // comm.size, length * (comm.rank + 1) // comm.size
    sums = np.zeros(3, np.float64)
    training = model.training
    random = torch.get_rng_state()
    model.eval()
    loader = Loader(dataset, Order(length, 0, shuffle=False), threads=0)
    try:
        with torch.no_grad():
            for first in range(start, stop, batch_size):
                batch = move(loader.take(first, min(stop, first + batch_size)))
                with precision():
                    outputs = model(batch.inputs)
                    value = loss(outputs, batch.targets)
                measured = metric(outputs, batch.targets)
                sums += batch.size * np.array([float(value), float(measured), 1.0])
    finally:
        loader.close()
        model.train(training)
        torch.set_rng_state(random)
    comm.all_reduce(sums)
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])
