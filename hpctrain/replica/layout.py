"""The position of each parameter in an arena, and where arenas may be cut."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain.comm.base import BFLOAT16
from hpctrain.errors import ModelError

ALIGNMENT = 64  # bytes; every parameter starts on a cache line, which suits vector units and BLAS

NUMPY_DTYPES: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.bfloat16: BFLOAT16,
    torch.float16: np.dtype(np.float16),
    torch.uint8: np.dtype(np.uint8),  # of messages only
}

ParameterGroups = Sequence[dict[str, Any]]
"""As accepted by torch.optim: dictionaries with "params" and options."""

Stretch = tuple[int, int]
"""The elements [low, high) of an arena or of a part of one."""


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the arena, in elements."""

    name: str
    shape: tuple[int, ...]
    offset: int
    size: int

    def moved(self, by: int) -> Slot:
        """The same parameter `by` elements further on."""
        return replace(self, offset=self.offset + by)


@dataclass(frozen=True)
class Group:
    """A stretch [low, high) of the arena whose parameters share optimizer options."""

    low: int
    high: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """The position of each parameter in the arena. The same on all ranks of a run."""

    slots: tuple[Slot, ...]
    groups: tuple[Group, ...]
    length: int
    dtype: np.dtype[Any]

    @property
    def cuts(self) -> list[int]:
        """Where the arena may be cut without splitting a parameter, including both ends."""
        return [slot.offset for slot in self.slots] + [self.length]

    @property
    def parameters(self) -> int:
        """The number of parameter elements, without padding."""
        return sum(slot.size for slot in self.slots)

    def fingerprint(self) -> str:
        """A hash of names, shapes, the starts of parameter groups, and dtype: equal only for the same model."""
        places = [(slot.name, slot.shape) for slot in self.slots], [group.low for group in self.groups]
        text = repr(places) + str(self.dtype)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_not_finite(self, flat: torch.Tensor, low: int = 0) -> int:
        """1 + the index of the first parameter with an element that is not finite; 0 if there is none.

        `flat` is the arena's stretch from `low` on. Padding belongs to the parameter before it.
        """
        bad = (~torch.isfinite(flat)).nonzero()
        if not len(bad):
            return 0
        return int(np.searchsorted([slot.offset for slot in self.slots], low + int(bad[0]), side="right"))

    def slots_in(self, low: int, high: int) -> list[Slot]:
        """The parameters that lie entirely in [low, high)."""
        return [slot for slot in self.slots if low <= slot.offset and slot.offset + slot.size <= high]


def lay_out(named: dict[str, nn.Parameter], groups: ParameterGroups | None = None) -> tuple[Layout, list[nn.Parameter]]:
    """The layout of these parameters, and the parameters in its order. Raises ModelError; see `Replica`."""
    dtypes = {p.dtype for p in named.values()}
    if len(dtypes) > 1 or not (dtype := dtypes.pop()).is_floating_point or dtype not in NUMPY_DTYPES:
        raise ModelError(
            "trainable parameters must be of one dtype (float32, float64, bfloat16 or float16); "
            f"found {', '.join(sorted({str(p.dtype) for p in named.values()}))}"
        )
    names = {id(p): name for name, p in named.items()}
    unit = ALIGNMENT // NUMPY_DTYPES[dtype].itemsize
    parameters: list[nn.Parameter] = []
    slots: list[Slot] = []
    bounds: list[Group] = []
    offset = 0
    for group in _checked_groups(named, groups):
        low = offset
        for parameter in group["params"]:
            slots.append(Slot(names[id(parameter)], tuple(parameter.shape), offset, parameter.numel()))
            parameters.append(parameter)
            offset += -(-parameter.numel() // unit) * unit
        options = {key: value for key, value in group.items() if key != "params"}
        bounds.append(Group(low, offset, options))
    return Layout(tuple(slots), tuple(bounds), offset, NUMPY_DTYPES[dtype]), parameters


def _checked_groups(named: dict[str, nn.Parameter], groups: ParameterGroups | None) -> list[dict[str, Any]]:
    """The user's groups, with only their trainable parameters; each parameter must be in exactly one group."""
    if groups is None:
        return [{"params": list(named.values())}]
    if isinstance(groups, (str, bytes, dict)) or not isinstance(groups, Iterable):
        raise ModelError(f"optimizer.groups returned a {type(groups).__name__}; expected a list of dictionaries")
    names = {id(p): name for name, p in named.items()}
    chosen = [_trainable(group, index, names) for index, group in enumerate(groups)]
    times = Counter(id(p) for group in chosen for p in group["params"])
    for ident, name in names.items():
        if times[ident] != 1:
            raise ModelError(
                f"optimizer.groups: parameter {name} is listed {times[ident]} times; every trainable parameter must be "
                "in exactly one group (freeze it with requires_grad = False to leave it out)"
            )
    return [group for group in chosen if group["params"]]


def _trainable(group: Any, index: int, names: dict[int, str]) -> dict[str, Any]:
    """A group with a list of its trainable parameters; like torch, accepts one tensor, and (name, tensor) pairs."""
    if not isinstance(group, dict) or "params" not in group:
        raise ModelError(f"optimizer.groups: group {index} is not a dictionary with params and options")
    params = group["params"]
    listed = [params] if isinstance(params, torch.Tensor) else list(params)
    tensors = [p[1] if isinstance(p, tuple) and len(p) == 2 else p for p in listed]
    for tensor in tensors:
        if not isinstance(tensor, torch.Tensor):
            raise ModelError(f"optimizer.groups: group {index} lists a {type(tensor).__name__}, not a parameter")
        if tensor.requires_grad and id(tensor) not in names:
            raise ModelError(
                f"optimizer.groups: group {index} lists a tensor of shape {tuple(tensor.shape)} that is not a "
                "parameter of the model"
            )
    return {**group, "params": [p for p in tensors if id(p) in names]}


def stretches_of(length: int, size: int) -> Iterator[Stretch]:
    """Cut [0, length) into stretches of at most `size` elements (at least 1)."""
    size = max(1, size)
    return ((low, min(low + size, length)) for low in range(0, length, size))


def joined(stretches: Iterable[Stretch], size: int) -> Iterator[Stretch]:
    """Join each stretch to the next while that begins where it ends and it has fewer than `size` elements."""
    low = high = 0
    for first, last in stretches:
        if first != high or low == high:
            if low < high:
                yield low, high
            low = first
        high = last
        if high - low >= size:
            yield low, high
            low = high
    if low < high:
        yield low, high


def slice_bounds(layout: Layout, parts: int, elementwise: bool, weights: Sequence[int] | None = None) -> list[int]:
    """Cut the arena into `parts` stretches of nearly equal length, or in proportion to `weights`: on cache lines, or
    between parameters if not elementwise.

    Stretches may be empty if there are more parts than cache lines (or parameters).
    """
    cuts: Sequence[int] = layout.cuts
    *before, total = accumulate(weights or [1] * parts, initial=0)
    if elementwise:
        unit = ALIGNMENT // layout.dtype.itemsize
        return [layout.length // unit * weight // total * unit for weight in before] + [layout.length]
    bounds = [0]
    for weight in before[1:]:
        ideal = layout.length * weight // total
        bounds.append(max(bounds[-1], min(cuts, key=lambda cut: abs(cut - ideal))))
    return [*bounds, layout.length]
