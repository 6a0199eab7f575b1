"""Augmentations: functions of one sample and a generator that is seeded for it (see `loader`).

Images are (channels, height, width) tensors of any dtype; the result is a new tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hpctrain.job.registry import resolve

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def augmentations(names: Sequence[str]) -> list[Augmentation]:
    """The functions that `data.augment` names. Raises JobError for an unknown name."""
    return [resolve("augmentation", name) for name in names]


def shift(sample: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Shift the image by up to `pixels` in each direction; pixels from outside the image are 0."""
    down, right = torch.randint(-pixels, pixels + 1, (2,), generator=generator).tolist()
    if down == right == 0:
        return sample.clone()
    height, width = sample.shape[-2:]
    moved = torch.zeros_like(sample)
    (to_rows, from_rows), (to_columns, from_columns) = _overlap(down, height), _overlap(right, width)
    moved[..., to_rows, to_columns] = sample[..., from_rows, from_columns]
    return moved


def flip(sample: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror the image horizontally with probability 1/2."""
    return sample.flip(-1) if torch.rand((), generator=generator).item() < 0.5 else sample.clone()


def draws_only_from_its_own(function: Augmentation) -> bool:
    """Whether an augmentation is known to draw only from the generator that it is given."""
    return function in (shift, flip)


def _overlap(move: int, length: int) -> tuple[slice, slice]:
    """(destination, source) of the pixels along an axis of `length`."""
    return slice(max(move, 0), max(length + min(move, 0), 0)), slice(max(-move, 0), max(length - max(move, 0), 0))
