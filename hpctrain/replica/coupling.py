"""Couples the models of all workers within a step: the hooks that a worker's loop calls around micro-batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from hpctrain.comm.base import Communicator


class Coupling:
    """No coupling: each worker's model computes alone. Base class of couplings such as `BatchNorms`.

    `waits_in_forward`: whether the workers wait for each other in a forward pass. `waited`: nanoseconds that this one
    has spent on that so far.
    """

    waits_in_forward: ClassVar[bool] = False
    waited: int = 0

    def join(self, workers: Communicator) -> None:
        """Called when a phase with these workers begins. Collective over them."""

    def idle(self, batches: Iterable[int], own: int) -> int:
        """The number of micro-batches that do not count, which this worker must run after the `own` ones of its share.
        `batches`: how many each worker's share has, counted as they are asked for.
        """
        return 0

    def before(self, counts: bool) -> None:
        """Called before a micro-batch. `counts`: whether it belongs to this worker's share of the round."""

    def backward(self, loss: Tensor) -> None:
        """Run `loss.backward()`; `loss` is a scalar."""
        loss.backward()

    def leave(self) -> None:
        """Called when the phase has ended. Collective over its workers."""

    def restore(self) -> None:
        """Called when the run has ended: restore the model as it was given. Not collective."""
