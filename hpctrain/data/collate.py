"""Collates samples into a batch: like torch's `default_collate`, but keeps tuples and accepts all arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data._utils.collate import collate as torch_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from hpctrain.errors import DataError

ADVICE = "a sample is a tensor, array, number or string, or a tuple, list or dictionary of these"


def collate(items: Sequence[Any], indices: NDArray[np.int64]) -> Any:
    """Collate the samples `items`, with these indices in the data set, into the same structure of tensors (n, ...).

    Named tuples and mappings keep their type. Raises DataError, naming the sample, if the samples cannot be collated.
    """
    try:
        return torch_collate(list(items), collate_fn_map=_KINDS)
    except (TypeError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise DataError(_misfit(items, indices) or f"the samples cannot be batched ({error}); {ADVICE}") from error


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor over the same memory; a copy if torch cannot use it: read-only, negative strides, foreign byte order."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if array.dtype == np.longdouble:
        array = array.astype(np.float64)
    fits = all(stride >= 0 and stride % array.itemsize == 0 for stride in array.strides)
    return torch.from_numpy(array if fits and array.flags.writeable else array.copy())


def _arrays(batch: Sequence[NDArray[Any]], *, collate_fn_map: Any = None) -> Any:
    return torch_collate([tensor_of(array) for array in batch], collate_fn_map=collate_fn_map)


def _tuples(batch: Sequence[tuple[Any, ...]], *, collate_fn_map: Any = None) -> Any:
    """Collates tuples into a tuple; torch would make a list."""
    parts = [torch_collate(part, collate_fn_map=collate_fn_map) for part in zip(*batch, strict=True)]
    return type(batch[0])(*parts) if hasattr(batch[0], "_fields") else tuple(parts)


_KINDS: dict[Any, Callable[..., Any]] = {**default_collate_fn_map, np.ndarray: _arrays, tuple: _tuples}


# -- what is wrong with them -------------------------------------------------------------------------------------
def _misfit(items: Sequence[Any], indices: NDArray[np.int64]) -> str | None:
    for item, index in zip(items, indices.tolist(), strict=True):
        sample = f"sample {index} of the data set cannot be put into a batch"
        if (fault := _unfit(item)) is not None:
            return f"{sample}: {fault}; {ADVICE}"
        if (fault := _unlike(item, items[0])) is not None:
            return f"{sample} with sample {int(indices[0])}: {fault}; all samples must be alike"
    return None


def _unfit(value: Any, place: str = "it") -> str | None:
    """Why this value cannot be in any batch; None if it can."""
    if isinstance(value, np.ndarray) and value.dtype.kind not in "fiubc":
        return f"{place} is an array of dtype {value.dtype}"
    if isinstance(value, (Tensor, np.ndarray, Number, np.bool_, str, bytes)):
        return None
    if isinstance(value, (Mapping, tuple, list)):
        parts = (_unfit(part, f"{_place(place)}[{key!r}]") for key, part in _parts(value))
        return next((fault for fault in parts if fault is not None), None)
    return f"{place} is of type {type(value).__name__}"


def _unlike(value: Any, other: Any, place: str = "it") -> str | None:
    """How the value differs from that of the batch's first sample; None if it does not."""
    if isinstance(value, (Tensor, np.ndarray)) and isinstance(other, (Tensor, np.ndarray)):
        if tuple(value.shape) == tuple(other.shape):
            return None
        return f"{place} has shape {tuple(value.shape)}, but there it has {tuple(other.shape)}"
    if isinstance(value, (Mapping, tuple, list)) and type(value) is type(other):
        own, others = dict(_parts(value)), dict(_parts(other))
        if own.keys() != others.keys():
            return f"{place} has the parts {list(own)}, but there it has {list(others)}"
        parts = (_unlike(own[key], others[key], f"{_place(place)}[{key!r}]") for key in own)
        return next((fault for fault in parts if fault is not None), None)
    if isinstance(value, type(other)) or isinstance(other, type(value)):
        return None
    return f"{place} is of type {type(value).__name__}, but there it is of type {type(other).__name__}"


def _parts(value: Any) -> list[tuple[Any, Any]]:
    return list(value.items() if isinstance(value, Mapping) else enumerate(value))


def _place(place: str) -> str:
    return "its part " if place == "it" else place
