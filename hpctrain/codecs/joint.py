"""Codecs that sum whole parameters by all-reduces of their own: what they need besides what every codec does."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpctrain.codecs.base import Addend, Codec
from hpctrain.replica.layout import Slot, Stretch, joined
from hpctrain.replica.tensors import as_tensor

if TYPE_CHECKING:
    from hpctrain.comm.base import Buffer, Communicator


class JointAddend(Addend):
    """A stretch of whole parameters.

    `slots`, `memory`: the parameters, with their places in `values`, and what the codec keeps of each
    (`JointCodec.memory`). `number`: how many sums of this stretch came before, also in the run that this one resumes.
    `comms`: one communicator per stage. All-reduces of one communicator must start in the same order on all ranks,
    which is true of those of one stage only.
    """

    def __init__(
        self,
        comms: Sequence[Communicator],
        values: Tensor,
        rest: Tensor | None,
        slots: Sequence[Slot],
        memory: Sequence[Tensor],
        number: int = 0,
    ) -> None:
        super().__init__(comms[0], values, rest)
        self.comms, self.slots, self.memory, self.number = comms, slots, memory, number


class JointCodec(Codec):
    """Sums JointAddends. Such a codec has no message for values alone, so servers cannot take it."""

    @abstractmethod
    def memory(self, slot: Slot, dtype: torch.dtype) -> Tensor:
        """What the codec knows of a parameter before its first sum: flat, the same on all ranks. `reduce` may change
        it in place, on all ranks alike; it is in checkpoints. `dtype`: of the parameter."""


class WholeParameters:
    """The parameters in `values`, of which a JointCodec sums some at a time. `slots`: their places in `values`. The
    constructor is collective.

    `memory`: the codec's, of all parameters.
    """

    def __init__(self, comm: Communicator, codec: JointCodec, values: Tensor, slots: Sequence[Slot]) -> None:
        later = [comm.split(0, comm.rank) for _ in range(codec.stages - 1)]
        self._comms = [comm, *(each.patient() for each in later if each is not None)]
        self._values, self._slots = values, slots
        known = [codec.memory(slot, values.dtype) for slot in slots]
        self.memory = torch.cat(known).to(values.device) if known else values.new_empty(0)
        self._memories = self.memory.split([each.numel() for each in known])
        self._addends: list[tuple[JointAddend, list[int]]] = []  # with the indices of its parameters
        self._before = [0] * len(slots)

    @property
    def numbers(self) -> list[int]:
        """How many sums there were of each parameter."""
        found = list(self._before)
        for addend, inside in self._addends:
            for at in inside:
                found[at] = addend.number
        return found

    def load(self, memory: Buffer, numbers: list[int]) -> None:
        """Continue with `memory` and `numbers` of an earlier run, before the first sum; or without, if a resumed run
        changes its codec or the rank, so that the memory is of another length."""
        if memory.size == self.memory.numel() and len(numbers) == len(self._slots):
            self.memory.copy_(as_tensor(memory))
            self._before = list(numbers)

    def pieces(self, low: int, high: int, size: int) -> Iterator[Stretch]:
        """Cut [low, high), which begins and ends with a parameter, between parameters; most have `size` elements or
        more."""
        cuts = [slot.offset for slot in self._slots if low < slot.offset < high]
        return joined(pairwise([low, *cuts, high]), size)

    def addend(self, piece: Stretch, rest: Tensor | None) -> JointAddend:
        """The parameters of a piece."""
        low, high = piece
        inside = [at for at, slot in enumerate(self._slots) if low <= slot.offset and slot.offset + slot.size <= high]
        slots = [self._slots[at].moved(-low) for at in inside]
        memories = [self._memories[at] for at in inside]
        number = self._before[inside[0]] if inside else 0  # the same for all: they have always been summed together
        made = JointAddend(self._comms, self._values[low:high], rest, slots, memories, number)
        self._addends.append((made, inside))
        return made

    def free(self) -> None:
        """Free the communicators of later stages. Collective."""
        self._addends = []
        for comm in self._comms[1:]:
            comm.free()
