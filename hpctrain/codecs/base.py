"""The contract of a codec, and the stretches that it sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hpctrain.replica.layout import NUMPY_DTYPES
from hpctrain.replica.tensors import as_tensor

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator, Request


class Addend:
    """A stretch of an arena that is summed over the ranks of `comm`, which all have one of the same length.

    `values`: the stretch, flat; a codec leaves the sum there. An addend lives as long as its arena, so a codec
    allocates what it needs once (`scratch`).
    """

    def __init__(self, comm: Communicator, values: Tensor) -> None:
        self.comm, self.values = comm, values
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, length: int, dtype: torch.dtype) -> Tensor:
        """Memory of this addend for that purpose, which messages can be sent from; kept for the next time."""
        if name not in self._scratch:
            self._scratch[name] = as_tensor(self.comm.arena(length, NUMPY_DTYPES[dtype]).mine)
        return self._scratch[name]


class Codec(ABC):
    """How values are written on the wire while ranks sum them.

    `stages`: how often `reduce` yields at most.
    """

    stages: ClassVar[int]

    @abstractmethod
    def reduce(self, addend: Addend) -> Iterator[list[Request]]:
        """Sum the addend over its ranks, in place; all of them end with the same bits.

        In each stage it starts messages and yields what must be over before the next stage. It never waits itself, so
        that several sums can be under way; all ranks must start each stage in the same order of sums.
        """
