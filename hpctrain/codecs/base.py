"""The contract of a codec, and the stretches that it sums."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from hpctrain.replica.layout import NUMPY_DTYPES, Slot
from hpctrain.replica.tensors import as_tensor

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator, Request


class Addend:
    """A stretch of an arena that is summed over the ranks of `comm`, which all have one of the same length.

    `values`: the stretch, flat; a codec leaves the sum there. `rest`: what this rank's messages have left out so far,
    if the codec remembers, and `kept`: what its feedback keeps besides. These are in units of earlier values; `carry`
    times them is in units of the next. `begun`: whether they are of earlier sums. An addend lives as long as its arena,
    so a codec allocates what it needs once (`scratch`).
    """

    carry: float = 1.0

    def __init__(
        self,
        comm: Communicator,
        values: Tensor,
        rest: Tensor | None = None,
        kept: Mapping[str, Tensor] | None = None,
        begun: bool = False,
    ) -> None:
        self.comm, self.values, self.rest, self.kept, self.begun = comm, values, rest, kept or {}, begun
        self._scratch: dict[str, Tensor] = {}
        self._codec: Codec | None = None

    def scratch(self, name: str, length: int, dtype: torch.dtype) -> Tensor:
        """Memory of this addend for that purpose, which messages can be sent from; kept for the next time, if that has
        the same length."""
        if name not in self._scratch or self._scratch[name].numel() != length:
            self._scratch[name] = as_tensor(self.comm.arena(length, NUMPY_DTYPES[dtype]).mine)
        return self._scratch[name]

    def own(self, codec: Codec) -> Codec:
        """The codec with this addend's own random numbers: they do not depend on which sum is ahead of which."""
        if self._codec is None:
            self._codec = codec.seeded(self.comm.members[self.comm.rank], int(self.values.storage_offset()))
        return self._codec


class Codec(ABC):
    """How values are written on the wire while ranks sum them.

    `stages`: how often `reduce` yields at most. `remembers`: whether what a message leaves out must be added to the
    next values (error feedback: Seide et al. 2014; Karimireddy et al. 2019): the codec is biased, and training would
    not converge without it. `unit`: stretches are best cut at multiples of this many elements.
    """

    stages: ClassVar[int]
    remembers: ClassVar[bool] = False
    unit: int = 1

    @property
    def position(self) -> int:
        """Where the run is (its cursor, or the version of what is encoded): random numbers follow from the seed, the
        place, the position and the number of messages since it changed. So whoever sets it needs no state to go on
        with the same numbers, and two ranks can draw the same ones. Not negative."""
        return 0

    @position.setter  # noqa: B027 (most draw no random numbers)
    def position(self, position: int) -> None:
        pass

    def seeded(self, *place: int) -> Self:
        """A codec like this one with random numbers for another place (rank, stretch), which stays at the position of
        this one; itself if it draws none."""
        return self

    def unfit(self, slots: Sequence[Slot]) -> str | None:
        """Why the codec is of no use for a model with these parameters, in words that follow its name; None if it is of
        use."""
        return None

    @abstractmethod
    def reduce(self, addend: Addend) -> Iterator[list[Request]]:
        """Sum the addend over its ranks, in place; all of them end with the same bits.

        In each stage it starts messages and yields what must be over before the next stage. It never waits itself, so
        that several sums can be under way; all ranks must start each stage in the same order of sums.
        """
