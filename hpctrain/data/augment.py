"""Augmentations: functions of one sample and a generator that is seeded for it (see `loader`).

A sample is a tensor, or a mapping, which is passed whole; `boxes` has those that also move boxes. Images are (channels,
height, width) tensors of any dtype; the result is a new tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hpctrain.data.boxes import crop_boxes, flip_boxes, turn_boxes
from hpctrain.errors import DataError
from hpctrain.job.registry import resolve

Augmentation = Callable[[Any, torch.Generator], Any]


def augmentations(names: Sequence[str]) -> list[Augmentation]:
    """The functions that `data.augment` names. Raises JobError for an unknown name."""
    return [resolve("augmentation", name) for name in names]


def shift(sample: Tensor, generator: torch.Generator, pixels: int = 1) -> Tensor:
    """Shift the image by up to `pixels` in each direction; pixels from outside the image are 0."""
    _check_tensor("shift", sample)
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
    _check_tensor("flip", sample)
    return sample.flip(-1) if torch.rand((), generator=generator).item() < 0.5 else sample.clone()


def light(sample: Any, generator: torch.Generator, most: float = 0.2) -> Any:
    """Change contrast, brightness and the balance of colours, each by up to `most`, as under another lamp. The image,
    with values from 0 to 1, is the sample itself or its part `image`; values stay in that range."""
    if isinstance(sample, Mapping) and "image" in sample:
        return {**sample, "image": light(sample["image"], generator, most)}
    _check_tensor("light", sample)
    draws = 1 + most * (2 * torch.rand(2 + len(sample), generator=generator) - 1)
    middle = sample.mean()
    colours = draws[1] * draws[2:].sqrt()
    return ((sample - middle) * draws[0] + middle).mul_(colours[:, None, None].to(sample)).clamp_(0, 1)


def draws_only_from_its_own(function: Augmentation) -> bool:
    """Whether an augmentation is known to draw only from the generator that it is given."""
    return function in (shift, flip, light, flip_boxes, turn_boxes, crop_boxes)


def _check_tensor(name: str, sample: Any) -> None:
    if not isinstance(sample, Tensor):
        given = f"mappings with the keys {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else type(sample)
        raise DataError(
            f"data.augment: {name} takes tensors, but the samples are {given}; for pictures with boxes use flip_boxes "
            "and crop_boxes, otherwise a function of your own"
        )


def _overlap(move: int, length: int) -> tuple[slice, slice]:
    """(destination, source) of the pixels along an axis of `length`."""
    return slice(max(move, 0), max(length + min(move, 0), 0)), slice(max(-move, 0), max(length - max(move, 0), 0))
