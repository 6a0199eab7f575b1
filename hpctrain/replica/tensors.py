"""Converts between torch tensors and arrays over the same memory."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch

from hpctrain.comm.base import BFLOAT16, Buffer
from hpctrain.comm.phantom import Phantom


def as_tensor(array: Buffer) -> torch.Tensor:
    """A torch tensor over the same memory as a NumPy array, or (by DLPack) as a CuPy array. A Phantom becomes a tensor
    on torch's device "meta", which has no memory, either."""
    if isinstance(array, Phantom):
        return torch.empty(array.size, dtype=_torch_dtype(array.dtype), device="meta")
    bits = array.view(np.int16) if array.dtype == BFLOAT16 else array
    tensor = torch.from_numpy(bits) if isinstance(bits, np.ndarray) else torch.utils.dlpack.from_dlpack(bits)
    return tensor.view(torch.bfloat16) if array.dtype == BFLOAT16 else tensor


def as_array(tensor: torch.Tensor) -> Buffer:
    """The NumPy array (CuPy on a GPU) over the same memory, or a Phantom. The tensor must be contiguous."""
    if tensor.is_meta:
        return Phantom(tensor.numel(), _numpy_dtype(tensor.dtype))
    bits = tensor.detach()
    if bits.dtype == torch.bfloat16:
        bits = bits.view(torch.int16)
    if bits.device.type == "cpu":
        array = bits.numpy()
    else:
        import cupy

        array = cupy.from_dlpack(bits)
    return array.view(BFLOAT16) if tensor.dtype == torch.bfloat16 else array


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the host's memory; the tensor itself if it is there, or has no memory."""
    return tensor if tensor.is_meta else tensor.cpu()


@cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.bfloat16 if dtype == BFLOAT16 else torch.from_numpy(np.empty(0, dtype)).dtype


@cache
def _numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    return BFLOAT16 if dtype == torch.bfloat16 else torch.empty(0, dtype=dtype).numpy().dtype
