"""Gathers named tensors, arrays and numbers of all ranks on rank 0: as bytes with dtypes and shapes, never pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpctrain.comm.base import Communicator, Tag
from hpctrain.data.collate import tensor_of
from hpctrain.errors import ModelError

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Packed:
    """`head`: [name, kind, value of a number, or the [dtype, shape] of each tensor], as plain values; `data`: the
    concatenated bytes of all tensors."""

    head: list[list[Any]]
    data: Bytes


def pack(values: Mapping[str, Any], what: str) -> Packed:
    """Pack numbers, tensors on any device, arrays, and lists of tensors or arrays. Raises ModelError for other values;
    `what` begins the error message."""
    head: list[list[Any]] = []
    tensors: list[Tensor] = []
    for name, value in values.items():
        plain = value.item() if isinstance(value, np.generic) else value
        if isinstance(plain, (bool, int, float)):
            head.append([name, "number", plain])
            continue
        kind, parts = _parts(plain, f"{what} under {name}")
        head.append([name, kind, [[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts]])
        tensors += parts
    return Packed(head, np.concatenate([np.zeros(0, np.uint8), *map(_bytes, tensors)]))


def unpack(packed: Packed) -> dict[str, Any]:
    """The values given to `pack`: numbers as Python numbers, tensors on the CPU; lists keep tensors or arrays."""
    values: dict[str, Any] = {}
    place = 0
    for name, kind, given in packed.head:
        if kind == "number":
            values[name] = given
            continue
        found: list[Any] = []
        for dtype, shape in given:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            into = _bytes(tensor)
            into[:] = packed.data[place : place + into.size]
            place += into.size
            found.append(tensor)
        if kind.endswith("array"):
            found = [part.numpy() for part in found]
        values[name] = found if kind.startswith("list") else found[0]
    return values


def collect(comm: Communicator, own: Packed) -> list[dict[str, Any]]:
    """The values of all ranks, in rank order, on rank 0; an empty list on the others. Collective."""
    heads = comm.gather_json([own.head, own.data.size])
    if comm.rank:
        if own.data.size:
            comm.send(own.data, 0, Tag.STATE)
        return []
    every = [unpack(own)]
    for rank, (head, size) in enumerate(heads[1:], start=1):
        data = np.empty(size, np.uint8)
        if size:
            comm.recv(data, rank, Tag.STATE)
        every.append(unpack(Packed(head, data)))
    return every


def _bytes(tensor: Tensor) -> Bytes:
    """The memory of a contiguous tensor on the CPU."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    data: Bytes = tensor.view(-1).view(torch.uint8).numpy()
    return data


def _parts(value: Any, what: str) -> tuple[str, list[Tensor]]:
    """(kind, contiguous tensors on the CPU)."""
    listed = isinstance(value, (list, tuple))
    parts = list(value) if listed else [value]
    arrays = bool(parts) and all(isinstance(part, np.ndarray) and part.dtype.kind in "fiubc" for part in parts)
    if not arrays and not all(isinstance(part, Tensor) for part in parts):
        other = next(part for part in parts if not isinstance(part, Tensor))
        found = f"list with a {type(other).__name__}" if listed else type(other).__name__
        raise ModelError(f"{what} a {found}; it may be a number, a tensor, an array, or a list of tensors or arrays")
    tensors = [tensor_of(part) for part in parts] if arrays else [part.detach().cpu() for part in parts]
    kind = f"{'list of ' if listed else ''}{'array' if arrays else 'tensor'}"
    # copied because torch considers a single element contiguous whatever its stride, but then cannot view it as bytes
    return kind, [part.clone(memory_format=torch.contiguous_format) for part in tensors]
