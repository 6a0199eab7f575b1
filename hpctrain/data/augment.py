"""Augmentations: functions of one sample and a generator that is seeded for it (see `loader`).

Images are (channels, height, width) tensors of any dtype; what comes out is a new tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpctrain.job.registry import resolve

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def augmentations(names: Sequence[str]) -> list[Augmentation]:
    """The functions that `data.augment` names. Raises JobError for a name that stands for nothing."""
    return [resolve("augmentation", name) for name in names]


def shift(sample: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Move the image by up to `pixels` in each direction; what comes in from outside is 0."""
    down, right = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    if down == right == 0:
        return sample.clone()
    height, width = sample.shape[-2:]
    moved = torch.zeros_like(sample)
    (to_rows, from_rows), (to_columns, from_columns) = _overlap(down, height), _overlap(right, width)
    moved[..., to_rows, to_columns] = sample[..., from_rows, from_columns]
    return moved


def flip(sample: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror the image left to right, in half of the cases."""
    return sample.flip(-1) if torch.rand((), generator=generator).item() < 0.5 else sample.clone()


def draws_only_from_its_own(function: Augmentation) -> bool:
    """Whether an augmentation is known to draw from the generator that it gets, and from no other."""
    return function in (shift, flip)


def _overlap(move: int, length: int) -> tuple[slice, slice]:
    """(where pixels go, where they come from) along an axis of `length`."""
    return slice(max(move, 0), max(length + min(move, 0), 0)), slice(max(-move, 0), max(length - max(move, 0), 0))
