"""Data sets in memory, and how a data set provides a whole batch with one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}

Gather = Callable[[NDArray[np.int64]], Sequence[Any]]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images stored as bytes, a quarter of their float32 size, and scaled when fetched: (pixel / 255 - mean) / std.

    `images` (n, channels, height, width) uint8, `targets` (n,) int64. Items and batches are float32.
    """

    def __init__(self, images: Tensor, targets: Tensor, mean: float = 0.0, std: float = 1.0) -> None:
        self.images = images
        self.targets = targets
        self._scale = 1.0 / (255.0 * std)
        self._shift = -mean / std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._scaled(self.images[index]), self.targets[index]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `indices` (int64, one-dimensional): (inputs float32, targets int64)."""
        return self._scaled(self.images.index_select(0, indices)), self.targets.index_select(0, indices)

    def _scaled(self, pixels: Tensor) -> Tensor:
        return pixels.to(torch.float32).mul_(self._scale).add_(self._shift)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a sequence that follow each other. `codes` (length,) uint8. Sample i has the `size` codes from place
    i * size on, and as targets the same one place later, each (size,) int64."""

    def __init__(self, codes: Tensor, size: int) -> None:
        self._windows = codes.unfold(0, size + 1, size) if len(codes) > size else codes.new_empty(0, size + 1)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self._windows[index].long()
        return window[:-1], window[1:]

    def gather(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `indices` (int64, one-dimensional): inputs and targets, each (n, size) int64."""
        windows = self._windows[indices].long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def unwrap(dataset: Any) -> tuple[Any, NDArray[np.int64] | None]:
    """(the data set inside any nesting of `Subset`, the indices of its selected samples; None: all, in order)."""
    picked = None
    while type(dataset) is Subset:  # a subclass may fetch differently
        inner = np.asarray(dataset.indices, dtype=np.int64)
        picked = inner if picked is None else inner[picked]
        dataset = dataset.dataset
    return dataset, picked


def gatherer(base: Any) -> Gather | None:
    """A function that returns a collated batch of an unwrapped data set in one call; None if not available.

    It is available for a `TensorDataset`, or a torch data set with a method `gather(indices: int64 Tensor) -> (inputs,
    targets)`.
    """
    if type(base) is TensorDataset:
        tensors = base.tensors
        return lambda indices: [_select(t, torch.from_numpy(indices)) for t in tensors]
    gather = getattr(base, "gather", None)
    if isinstance(base, Dataset) and callable(gather):
        return lambda indices: gather(torch.from_numpy(indices))
    return None


def _select(tensor: Tensor, indices: Tensor) -> Tensor:
    signed = _SIGNED.get(tensor.dtype)  # torch cannot index these
    return tensor.index_select(0, indices) if signed is None else tensor.view(signed)[indices].view(tensor.dtype)


def only_indexed(base: Any) -> bool:
    """Whether an unwrapped data set is known to run no user code when its samples are fetched."""
    return type(base) in (TensorDataset, Images, Windows, list)


def known_targets(dataset: Any) -> NDArray[np.int64] | None:
    """The classes of all samples, if known without fetching the samples: int64 (n,), else None.

    Uses the second tensor of a `TensorDataset`, or the attributes `targets` and `labels`, as in torchvision; integers,
    one per sample.
    """
    base, picked = unwrap(dataset)
    if type(base) is TensorDataset:
        found = base.tensors[1] if len(base.tensors) == 2 else None
    else:
        found = getattr(base, "targets", getattr(base, "labels", None))
    try:
        targets = np.asarray(found)
    except Exception:  # a user's attribute of that name may be anything; it is not a list of classes
        return None
    if targets.ndim != 1 or targets.dtype.kind not in "iu" or len(targets) != len(base):
        return None
    return (targets if picked is None else targets[picked]).astype(np.int64)
