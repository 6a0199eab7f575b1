"""1 bit on the wire: the sign, and a scale for each block (EF-signSGD: Karimireddy et al. 2019, algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpctrain.codecs.bits import pack_signs
from hpctrain.codecs.wire import WireCodec, typed, wide_dtype
from hpctrain.replica.blocks import all_finite, row_blocks

SIGNS = 4096  # elements per scale, a multiple of 8


class Sign(WireCodec):
    """Each element becomes plus or minus the mean magnitude of its block of `unit` elements. 0 counts as its sign bit.

    A message begins with a scale for each block (float32; float64 for float64 values), then come the sign bits, eight
    in a byte.
    """

    remembers = True

    def __init__(self, block: int = SIGNS) -> None:
        self.unit = block

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        length = values.numel()
        return -(-length // self.unit) * wide_dtype(values).itemsize + -(-length // 8), torch.uint8

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        wide = wide_dtype(values)
        scales, bits = self._parts(message, values)
        for elements, rows in row_blocks(values, self.unit):
            given = values[elements].to(wide).view(rows.stop - rows.start, -1)
            scale = given.abs().mul_(1 / given.shape[1]).sum(1, keepdim=True)  # divided first: a sum may overflow
            scales[rows].copy_(scale.view(-1))
            bits[_bytes(elements)].copy_(pack_signs(given.view(-1)))
            if rest is not None:
                left = given - torch.copysign(scale, given)
                if not all_finite(scale):
                    left = torch.where(scale.isfinite(), left, given)
                rest[elements].copy_(left.view(-1))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        wide, signs = wide_dtype(into), _signs(into)
        scales, bits = self._parts(message, into)
        for elements, rows in row_blocks(into, self.unit):
            found = _elements(signs, bits, elements).view(rows.stop - rows.start, -1)
            found = found.mul_(scales[rows].to(wide).view(-1, 1)).view(-1)
            if add:
                into[elements].add_(found)
            else:
                into[elements].copy_(found)

    def _parts(self, message: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The message's scales and its bits."""
        wide = wide_dtype(values)
        end = -(-values.numel() // self.unit) * wide.itemsize
        return typed(message[:end], wide), message[end:]


class MajoritySign(Sign):
    """Ranks vote (Bernstein et al. 2019): each element of a sum has the sign of most ranks, and the sum of all scales
    as its magnitude; 0 if they are undecided."""

    def total(self, messages: Sequence[Tensor], into: Tensor) -> None:
        signs, parts = _signs(into), [self._parts(message, into) for message in messages]
        for elements, rows in row_blocks(into, self.unit):
            scale = torch.stack([scales[rows] for scales, _ in parts]).sum(0)
            votes = _elements(signs, parts[0][1], elements)
            for _, bits in parts[1:]:
                votes.add_(_elements(signs, bits, elements))
            votes.sign_()
            into[elements].copy_(votes.view(rows.stop - rows.start, -1).mul_(scale.view(-1, 1)).view(-1))


def _bytes(elements: slice) -> slice:
    """Where the bits of these elements are; the first is a multiple of 8."""
    return slice(elements.start // 8, -(-elements.stop // 8))


def _signs(like: Tensor) -> Tensor:
    """(256, 8): the signs that each byte stands for, the first element in its highest bit."""
    byte = torch.arange(256, device=like.device).view(-1, 1)
    bits = (byte >> torch.arange(7, -1, -1, device=like.device)) & 1
    return (1 - 2 * bits).to(wide_dtype(like))


def _elements(signs: Tensor, bits: Tensor, elements: slice) -> Tensor:
    """The signs of these elements, flat, in new memory."""
    found = signs.index_select(0, bits[_bytes(elements)].to(torch.int32))
    return found.view(-1)[: elements.stop - elements.start]
