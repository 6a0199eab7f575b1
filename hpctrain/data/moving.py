"""Moves batches to the model's device, and casts them to dtypes that the model can compute with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

Casts = Mapping[torch.dtype, torch.dtype]

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}  # torch barely supports it
_NARROW = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


@cache
def casts(precision: torch.dtype) -> tuple[Casts, Casts]:
    """The casts of inputs and of targets for a model that computes in `precision`.

    Inputs: floating-point and complex dtypes become the precision; integers are kept, except that unsigned ones of 16
    bits and more become signed. Targets: integers become int64, as torch's losses expect of classes. Floating-point
    targets become float64 if that is the precision; otherwise float64 becomes float32, and so do shorter dtypes in a
    float32 job.
    """
    inputs = dict.fromkeys(_FLOATING, precision) | _WIDER
    if precision in _COMPLEX:
        inputs |= dict.fromkeys(_COMPLEX.values(), _COMPLEX[precision])
    exact = precision if precision in _COMPLEX else torch.float32
    targets = dict.fromkeys(_NARROW, torch.int64) | {torch.float64: exact}
    if precision in _COMPLEX:
        targets |= dict.fromkeys(_FLOATING, exact)
    return inputs, targets


def move(value: Any, device: torch.device, casts: Casts) -> Any:
    """All tensors in `value`, nested mappings, tuples and lists, cast and moved to the device; other values unchanged.

    Containers keep their types; a container in which nothing changes is returned itself.
    """
    if isinstance(value, Tensor):
        return _move_tensor(value, device, casts)
    if isinstance(value, Mapping):
        parts = {key: move(part, device, casts) for key, part in value.items()}
        return value if all(parts[key] is value[key] for key in parts) else _mapping_like(value, parts)
    if isinstance(value, (tuple, list)):
        moved = [move(part, device, casts) for part in value]
        if all(new is old for new, old in zip(moved, value, strict=True)):
            return value
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def _move_tensor(tensor: Tensor, device: torch.device, casts: Casts) -> Tensor:
    dtype = casts.get(tensor.dtype, tensor.dtype)
    if dtype is tensor.dtype and tensor.device == device:
        return tensor
    return tensor.to(device=device, dtype=dtype, non_blocking=True)


def _mapping_like(value: Mapping[Any, Any], parts: dict[Any, Any]) -> Any:
    """`parts` in a mapping of the same type; in a dictionary if that cannot be constructed."""
    if type(value) is dict:
        return parts
    try:
        made: Any = copy.copy(value)
        made.update(parts)
    except (TypeError, AttributeError):
        try:
            return type(value)(parts)  # type: ignore[call-arg]
        except TypeError:
            return parts
    return made
