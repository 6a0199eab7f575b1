"""Converts between torch tensors and arrays over the same memory."""

from __future__ import annotations

import numpy as np
import torch

from hpctrain.comm.base import BFLOAT16, Buffer


def as_tensor(array: Buffer) -> torch.Tensor:
    """A torch tensor over the same memory as a NumPy array, or (by DLPack) as a CuPy array."""
    bits = array.view(np.int16) if array.dtype == BFLOAT16 else array
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.utils.dlpack.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def as_array(tensor: torch.Tensor) -> Buffer:
    """The NumPy array (CuPy on a GPU) over the same memory. The tensor must be contiguous."""
    bits = tensor.detach()
    if bits.dtype == torch.bfloat16:
        bits = bits.view(torch.int16)
    if bits.device.type == "cpu":
        array = bits.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(bits)
    return array.view(BFLOAT16) if tensor.dtype == torch.bfloat16 else array
