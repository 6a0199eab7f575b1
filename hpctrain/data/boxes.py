"""Augmentations of pictures with boxes: they move both.

A sample is a mapping with `image` (channels, height, width), `boxes` (most, 4), left, top, right and bottom in pixels,
and `labels` (most,), -1 where there is no box; its other keys stay as they are. The result is a new mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpctrain.errors import DataError

NO_LABEL = -1  # of rows that pad a sample's boxes
Sample = Mapping[str, Any]


def flip_boxes(sample: Sample, generator: torch.Generator) -> Sample:
    """Mirror picture and boxes along each axis with probability 1/2. Raises DataError for a sample without boxes."""
    image, boxes, labels = _parts("flip_boxes", sample)
    across, down = (torch.rand(2, generator=generator) < 0.5).tolist()
    for mirrored, axis, length in ((across, 0, image.shape[-1]), (down, 1, image.shape[-2])):
        if mirrored:
            image = image.flip(-1 - axis)
            low, high = length - boxes[:, axis + 2], length - boxes[:, axis]
            boxes = boxes.clone()
            boxes[:, axis], boxes[:, axis + 2] = low, high
    return {**sample, "image": image, "boxes": _blank(boxes, labels)}


def turn_boxes(sample: Sample, generator: torch.Generator) -> Sample:
    """Exchange rows and columns with probability 1/2; with `flip_boxes` before or after it, all turns by 90 degrees
    and mirror images are equally likely. Raises DataError for a picture that is not square."""
    image, boxes, _ = _parts("turn_boxes", sample)
    if image.shape[-1] != image.shape[-2]:
        raise DataError(f"turn_boxes takes square pictures, not {tuple(image.shape)}; leave it out of data.augment")
    if torch.rand((), generator=generator).item() < 0.5:
        return sample
    return {**sample, "image": image.transpose(-1, -2).contiguous(), "boxes": boxes[:, [1, 0, 3, 2]]}


def crop_boxes(
    sample: Sample, generator: torch.Generator, share: float = 0.75, zoom: float = 1.3, visible: float = 0.4
) -> Sample:
    """Cut a window out of the picture, and scale it to `share` of the picture's sides.

    Objects become larger by a factor from 1 / `zoom` to `zoom`. The window is among the boxes, so it has few borders
    that only pad the picture. A box is cut off at its borders, and left out if less than the share `visible` remains.
    Raises DataError for a sample without boxes.
    """
    image, boxes, labels = _parts("crop_boxes", sample)
    draws = torch.rand(3, generator=generator).tolist()
    factor = max(zoom ** (2 * draws[0] - 1), share)
    frame = image.shape[-1], image.shape[-2]
    (wide, high), (width, height) = ([round(share * length / by) for length in frame] for by in (factor, 1))
    there = boxes[labels >= 0]
    left = _place(there[:, 0::2], wide, frame[0], draws[1])
    top = _place(there[:, 1::2], high, frame[1], draws[2])
    window = image[None, :, top : top + high, left : left + wide]
    scaled = functional.interpolate(window, (height, width), mode="bilinear", align_corners=False)[0]
    moved = (boxes - torch.tensor([left, top] * 2)) * torch.tensor([width / wide, height / high] * 2)
    cut = torch.minimum(moved.clamp(min=0), torch.tensor([width, height] * 2))
    labels = torch.where(_area(cut) >= visible * _area(moved), labels, NO_LABEL)
    return {**sample, "image": scaled, "boxes": _blank(cut, labels), "labels": labels}


def _place(ends: Tensor, side: int, length: int, draw: float) -> int:
    """Where a window of `side` pixels begins on an axis of `length`: it has all boxes, or lies where boxes are. `ends`
    (n, 2): of the boxes on that axis; `draw`: from 0 to 1."""
    low, high = (float(ends.min()), float(ends.max())) if len(ends) else (0.0, float(length))
    first, last = sorted((low, high - side))
    return min(max(round(first + draw * (last - first)), 0), length - side)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _blank(boxes: Tensor, labels: Tensor) -> Tensor:
    """The boxes, with zeros where there is none."""
    return boxes * (labels >= 0)[:, None]


def _parts(name: str, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(sample, Mapping) or any(key not in sample for key in ("image", "boxes", "labels")):
        given = f"the keys {', '.join(map(str, sample))}" if isinstance(sample, Mapping) else type(sample).__name__
        raise DataError(
            f"data.augment: {name} takes samples that are mappings with image, boxes and labels, such as those of "
            f"`hpctrain ingest voc`, but was given {given}; leave it out"
        )
    return sample["image"], sample["boxes"], sample["labels"]
