"""16 bits on the wire: half the bytes of float32."""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.codecs.wire import WireCodec, add_wide, wide_dtype
from hpctrain.replica.blocks import blocks

HEADER = 4  # elements of a float16 message, whose 8 bytes are its scale
EXPONENT = 15  # float16 ends at 65,504, just below 2^16


class BFloat16(WireCodec):
    """bfloat16: the range of float32 and 8 bits of precision; rounds to the nearest."""

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        return values.numel(), torch.bfloat16

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        if rest is None:
            message.copy_(values)
            return
        wide = wide_dtype(values)
        for block in blocks(values):
            message[block].copy_(values[block])
            rest[block].copy_(values[block].to(wide) - message[block].to(wide))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        if add:
            add_wide(message, into)
        else:
            into.copy_(message)


class Float16(WireCodec):
    """float16: 11 bits of precision, but a small range. Each message therefore has a scale, a power of two, that brings
    its largest value to between 2^14 and 2^15; what is smaller than 2^-40 times that value becomes 0."""

    def shape(self, values: Tensor) -> tuple[int, torch.dtype]:
        return HEADER + values.numel(), torch.float16

    def encode(self, values: Tensor, message: Tensor, rest: Tensor | None = None) -> None:
        scale = _scale(values)
        message[:HEADER].view(torch.float64).copy_(1.0 / scale)
        wide = wide_dtype(values)
        rounded, factor, inverse = message[HEADER:], scale.to(wide), (1.0 / scale).to(wide)
        for block in blocks(values):
            given = values[block].to(wide)
            rounded[block].copy_(given * factor)
            if rest is not None:
                rest[block].copy_(given - rounded[block].to(wide).mul_(inverse))

    def decode(self, message: Tensor, into: Tensor, add: bool = False) -> None:
        wide = wide_dtype(into)
        scale, rounded = message[:HEADER].view(torch.float64)[0].to(wide), message[HEADER:]
        if add:
            add_wide(rounded, into, scale)
        else:
            for block in blocks(into):
                into[block].copy_(rounded[block].to(wide).mul_(scale))


def _scale(values: Tensor) -> Tensor:
    """A scale for these values, float64; 1 if the largest is 0 or not finite."""
    if not values.numel():
        return torch.ones((), dtype=torch.float64, device=values.device)
    low, high = torch.aminmax(values)
    largest = torch.maximum(-low, high).double()
    exponent = torch.frexp(largest).exponent.clamp(min=EXPONENT - 96)  # float32 holds 2^96 and 2^-96
    scale = torch.exp2((EXPONENT - exponent).double())
    return torch.where((largest > 0) & torch.isfinite(largest), scale, torch.ones_like(scale))
