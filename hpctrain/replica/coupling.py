"""What couples the models of all workers within a step: the hooks that a worker's loop calls around micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from hpctrain.comm.base import Communicator


class Coupling:
    """Nothing: each worker's model computes by itself. Base class of what couples them, such as `BatchNorms`.

    `waits_in_forward`: whether the workers wait for each other in a forward pass.
    """

    waits_in_forward: ClassVar[bool] = False

    def join(self, workers: Communicator) -> None:
        """A phase begins, with these workers. Collective over them."""

    def idle(self, bounds: Sequence[int], size: int, own: int) -> int:
        """How many micro-batches this worker must run that count nothing, besides the `own` of its share of the round.

        `bounds`: where the workers' shares begin, and the last one ends; `size`: samples of a micro-batch, at most.
        """
        return 0

    def before(self, counts: bool) -> None:
        """A micro-batch comes next. `counts`: whether it belongs to this worker's share of the round."""

    def backward(self, loss: Tensor) -> None:
        """Run `loss.backward()`; `loss` is a scalar."""
        loss.backward()

    def leave(self) -> None:
        """The phase has ended. Collective over its workers."""

    def restore(self) -> None:
        """The run has ended: the model is to be as it was given. Not collective."""
