"""The largest frequencies of each block (DeMo: Peng, Quesnelle and Kingma 2024, algorithm 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from hpctrain.codecs.sparse import FullValues, SparseCodec, largest
from hpctrain.codecs.wire import wide_dtype
from hpctrain.replica.blocks import all_finite, row_blocks

SIDE, TOP = 64, 32


class LargestFrequencies(SparseCodec):
    """Each block of `unit` = side x side elements is taken to its discrete cosine transform (DCT-II, orthonormal, in
    both directions); the `top` largest coefficients are sent, with their places. A shorter last block has a smaller
    side, and is filled up with zeros.

    Of DeMo this is the compression. With `Feedback(decay)` what is left out is DeMo's momentum: it decays, gradients
    are added, and what has been sent is subtracted. The third part, to apply the sign of the sum, is an optimizer,
    SignSGD. DeMo's blocks are tiles of each parameter; these are consecutive elements of the arena.

    Ranks decode to the same bits if their matrix products round alike: on one kind of CPU.
    """

    def __init__(self, side: int = SIDE, top: int = TOP) -> None:
        super().__init__(side * side, FullValues())
        self._top = top

    def count(self, width: int) -> int:
        return min(self._top, width)

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        wide = wide_dtype(values)
        for elements, rows in row_blocks(values, self.unit):
            given = values[elements].to(wide).view(rows.stop - rows.start, -1)
            width = given.shape[1]
            basis = _cosines(_side(width), values)
            frequencies = _both_ways(pad(given, (0, len(basis) ** 2 - width)), basis.T)
            places = largest(frequencies.abs(), self.count(width))
            chosen = frequencies.gather(1, places)
            written = self.records.write(message[self.where(rows, width, values)], chosen, places)
            if rest is not None:
                found = self._blocks(written, places, basis)[:, :width]
                left = given - found
                if not all_finite(written):
                    left = torch.where(found.isfinite().all(1, keepdim=True), left, given)
                rest[elements].copy_(left.reshape(-1))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        for elements, rows in row_blocks(into, self.unit):
            width, chunks = min(self.unit, elements.stop - elements.start), rows.stop - rows.start
            basis = _cosines(_side(width), into)
            records = message[self.where(rows, width, into)]
            written, places = self.records.read(records, chunks, self.count(width), basis.dtype)
            found = self._blocks(written, places, basis)[:, :width].reshape(-1)
            if add:
                into[elements].add_(found)
            else:
                into[elements].copy_(found)

    def _blocks(self, written: Tensor, places: Tensor, basis: Tensor) -> Tensor:
        """The blocks that have these frequencies only, (rows, side x side)."""
        frequencies = torch.zeros(len(written), len(basis) ** 2, dtype=basis.dtype, device=basis.device)
        return _both_ways(frequencies.scatter_(1, places, written), basis)


def _side(width: int) -> int:
    """The side of the smallest square that holds `width` elements."""
    return math.isqrt(max(0, width - 1)) + 1


def _cosines(side: int, like: Tensor) -> Tensor:
    """The orthonormal basis of the DCT-II, (frequency, place)."""
    numbers = torch.arange(side, dtype=torch.float64, device=like.device)
    basis = torch.cos(numbers.view(-1, 1) * (numbers + 0.5) * (math.pi / side)) * math.sqrt(2 / side)
    basis[0] *= math.sqrt(0.5)
    return basis.to(wide_dtype(like))


def _both_ways(blocks: Tensor, matrix: Tensor) -> Tensor:
    """X @ matrix along both directions of each block, (rows, side x side). The result is transposed; twice: it is not.
    """
    side = len(matrix)
    once = (blocks.view(-1, side) @ matrix).view(-1, side, side)
    return (once.transpose(1, 2).reshape(-1, side) @ matrix).view(len(blocks), -1)
