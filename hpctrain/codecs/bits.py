"""Flags as bits, eight in a byte, the first in the highest: NumPy's order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from hpctrain.replica.tensors import as_array, as_tensor


def pack_bits(flags: Tensor) -> Tensor:
    """Of bool, (..., n): the bytes, uint8, (..., n / 8), rounded up. On the CPU NumPy's are twice as fast as torch."""
    if flags.device.type == "cpu":
        return as_tensor(np.packbits(as_array(flags.view(torch.uint8)), axis=-1))
    return packed(flags)


def pack_signs(values: Tensor) -> Tensor:
    """`pack_bits` of their sign bits. On the CPU NumPy's test is twice as fast as torch's, too."""
    if values.device.type == "cpu":
        return as_tensor(np.packbits(np.signbit(as_array(values)), axis=-1))
    return packed(torch.signbit(values))


def unpack_bits(written: Tensor) -> Tensor:
    """The flags of bytes, (..., n): bool, (..., 8 n)."""
    if written.device.type == "cpu":
        return as_tensor(np.unpackbits(as_array(written.contiguous()), axis=-1)).view(torch.bool)
    return unpacked(written)


def packed(flags: Tensor) -> Tensor:
    """`pack_bits` by torch, on any device."""
    eights = pad(flags.to(torch.uint8), (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights << _places(flags)).sum(-1, dtype=torch.uint8)


def unpacked(written: Tensor) -> Tensor:
    """`unpack_bits` by torch, on any device."""
    return ((written.unsqueeze(-1) >> _places(written)) & 1).bool().flatten(-2)


def _places(like: Tensor) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=like.device)
