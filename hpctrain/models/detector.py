"""A small one-stage detector: objects as points (CenterNet: Zhou, Wang and Kraehenbuehl 2019).

Each cell of 4 by 4 pixels has a score for each class, which is high where the centre of an object lies, and the size
and the exact centre of the box there. Peaks of the scores are the detections; boxes are not compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.errors import ModelError
from hpctrain.models.arguments import whole

STRIDE = 4  # pixels per cell, along both axes
COARSEST = 16  # pixels per cell where the net sees most; the sides of a picture are multiples of it
GROUPS = 8  # of channels that are normalised together (Wu and He 2018)
RARE = 0.1  # the score of all cells before training, as most have no object (Lin et al. 2017)
SPREAD = 0.54  # how far around a centre a cell counts as near it, as a share of the box (TTFNet: Liu et al. 2020)
MOST = 100  # detections per picture
MEAN, STD = 0.5, 0.25  # roughly, of pixels from 0 to 1


class Found(NamedTuple):
    """What the net says of each cell: `scores` (n, classes, rows, columns), as logits; `shapes` (n, 4, rows, columns):
    the centre's x and y within the cell, from 0 to 1, and the logarithms of width and height in cells."""

    scores: Tensor
    shapes: Tensor


class Residual(nn.Module):
    """Two 3 by 3 convolutions, added to the input (He et al. 2016): (n, width, rows, columns) -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_normed(width, width), nn.ReLU(), *_normed(width, width))

    def forward(self, maps: Tensor) -> Tensor:
        """The block's output; see the class for shapes."""
        summed: Tensor = maps + self.layers(maps)
        return summed.relu()


class Detector(nn.Module):
    """Finds boxes of `classes` classes in pictures. Group norm, so that N workers compute the same as one.

    Training: `image` (n, 3, height, width) from 0 to 1, both sides multiples of 16; `boxes` (n, most, 4): left, top,
    right, bottom in pixels; `labels` (n, most) int64, negative where there is no further box. Returns {"loss": (sum,
    weight)}; the weight is the number of boxes and pictures. Further keys of a sample are accepted and not used.

    In evaluation mode also, for each picture, the 100 (MOST) best detections, the best first: `boxes` (n, 100, 4),
    `scores` (n, 100) from 0 to 1, `labels` (n, 100); and no loss if there are no `boxes`.
    """

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.classes = classes
        half, widths = width // 2, (width, 2 * width, 3 * width)  # at 4, 8 and 16 pixels per cell
        self.stem = nn.Sequential(*_normed(3, half, 2), nn.ReLU(), *_normed(half, width, 2), nn.ReLU())
        down = [nn.Sequential(Residual(width))]
        for before, after in pairwise(widths):
            down.append(nn.Sequential(*_normed(before, after, 2), nn.ReLU(), Residual(after)))
        self.down = nn.ModuleList(down)
        self.across = nn.ModuleList(nn.Conv2d(each, 2 * width, 1) for each in widths)
        self.head = nn.Sequential(*_normed(2 * width, 2 * width), nn.ReLU())
        self.scores, self.shapes = nn.Conv2d(2 * width, classes, 1), nn.Conv2d(2 * width, 4, 1)
        assert self.scores.bias is not None
        nn.init.constant_(self.scores.bias, -math.log(1 / RARE - 1))

    def forward(
        self, image: Tensor, boxes: Tensor | None = None, labels: Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        """Losses, detections or both; see the class for shapes. Raises ModelError for pictures or labels that do not
        fit."""
        found = self._found(image)
        result: dict[str, Any] = {}
        if boxes is not None and labels is not None:
            self._check(labels)
            result["loss"] = detection_loss(found, boxes, labels)
        elif self.training:
            raise ModelError("the detector trains on samples with boxes and labels; `hpctrain ingest voc` makes them")
        return result if self.training else result | detections(found)

    def _found(self, image: Tensor) -> Found:
        if image.dim() != 4 or image.shape[1] != 3 or image.shape[2] % COARSEST or image.shape[3] % COARSEST:
            raise ModelError(
                f"the detector takes pictures (n, 3, height, width) with sides that are multiples of {COARSEST}, not "
                f"{tuple(image.shape)}; choose such a size for `hpctrain ingest` (--size), of 64 with crop_boxes"
            )
        maps, levels = self.stem((image - MEAN) / STD), list[Tensor]()
        for stage, across in zip(self.down, self.across, strict=True):
            maps = stage(maps)
            levels.append(across(maps))
        summed = levels.pop()
        while levels:  # from coarse to fine (feature pyramid: Lin et al. 2017)
            summed = functional.interpolate(summed, scale_factor=2.0, mode="nearest") + levels.pop()
        head = self.head(summed.relu())
        exact = image.dtype if image.dtype == torch.float64 else torch.float32  # 16 bits are too few for pixels
        return Found(self.scores(head).to(exact), self.shapes(head).to(exact))

    def _check(self, labels: Tensor) -> None:
        if labels.numel() and int(labels.max()) >= self.classes:
            raise ModelError(
                f"model.classes = {self.classes}, but a box has the class {int(labels.max())}; set model.classes to "
                "the number of classes in the data set"
            )


def detector(classes: int = 3, width: int = 32) -> nn.Module:
    """(n, 3, height, width) from 0 to 1 -> losses or detections: see `Detector`; 0.39 million parameters with the
    defaults.

    `width`: maps at 4 pixels per cell, a multiple of 16. Raises ModelError.
    """
    if whole("width", width) % (2 * GROUPS):
        raise ModelError(f"model.width = {width!r}: expected a multiple of {2 * GROUPS}")
    return Detector(whole("classes", classes), width)


def detection_loss(found: Found, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, weight): the focal loss of the scores and the L1 losses of centres and sizes, summed over all pictures; the
    number of boxes and of pictures, so that a batch without boxes has a weight. `boxes` (n, most, 4) in pixels,
    `labels` (n, most), negative where there is no box."""
    there = labels >= 0
    boxes = boxes / STRIDE
    centres, sizes = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    limit = torch.tensor(found.scores.shape[:1:-1], device=boxes.device) - 1  # the last column and row
    cells = torch.minimum(centres.floor().clamp(min=0), limit)
    heat = heat_map(found.scores, cells, sizes, labels, there)
    picture, which = there.nonzero(as_tuple=True)
    column, row = cells[picture, which].long().unbind(1)
    offsets = (centres - cells)[picture, which]
    wanted = torch.cat([offsets, sizes[picture, which].clamp(min=1 / STRIDE).log()], 1)
    shape_loss = (found.shapes[picture, :, row, column] - wanted).abs().sum()
    return focal_loss(found.scores, heat) + shape_loss, there.sum() + len(boxes)


def heat_map(like: Tensor, cells: Tensor, sizes: Tensor, labels: Tensor, there: Tensor) -> Tensor:
    """1 in the cells with the centre of an object of that class, less around them, 0 far away: the maximum of one
    Gaussian per object, as wide and high as its box. Of the shape (n, classes, rows, columns) of `like`."""
    rows, columns = like.shape[2:]
    sigma = (SPREAD * sizes + 1) / 6
    along = []
    for axis, length in enumerate((columns, rows)):
        places = torch.arange(length, device=like.device)
        away = (places - cells[..., axis, None]) / sigma[..., axis, None]
        along.append(torch.exp(-away.square() / 2))
    bumps = along[1][..., :, None] * along[0][..., None, :] * there[..., None, None]
    index = labels.clamp(min=0)[..., None, None].expand_as(bumps)
    return torch.zeros_like(like).scatter_reduce(1, index, bumps.to(like.dtype), "amax")


def focal_loss(scores: Tensor, heat: Tensor) -> Tensor:
    """Zhou et al. 2019, equation 1, not divided by the number of objects: cross entropy, less of it where a cell is
    right already (the power 2), and where a centre is near (the power 4). `scores`: logits of the shape of `heat`."""
    is_there, is_not = functional.logsigmoid(scores), functional.logsigmoid(-scores)
    chance = scores.sigmoid()
    centre = heat == 1
    kept = torch.where(centre, (1 - chance).square() * is_there, (1 - heat).pow(4) * chance.square() * is_not)
    return -kept.sum()


def detections(found: Found, most: int = MOST) -> dict[str, Tensor]:
    """The `most` highest peaks of each picture: `boxes` (n, most, 4) in pixels, inside the picture, `scores` and
    `labels` (n, most). A peak is a cell that has the highest score of a class among the 3 by 3 around it. If there are
    fewer peaks than `most`, rows with the score 0 follow, which are no detections; if there are fewer cells, as many
    rows as cells."""
    chances = found.scores.sigmoid()
    rows, columns = chances.shape[2:]
    peaks = chances * (functional.max_pool2d(chances, 3, 1, 1) == chances)
    scores, places = peaks.flatten(1).topk(min(most, peaks[0].numel()))
    labels, cells = places // (rows * columns), places % (rows * columns)
    shapes = found.shapes.flatten(2).gather(2, cells[:, None].expand(-1, 4, -1)).transpose(1, 2)
    centres = torch.stack([cells % columns, cells // columns], 2) + shapes[..., :2]
    halves = shapes[..., 2:].exp() / 2
    boxes = torch.cat([centres - halves, centres + halves], 2)
    limits = torch.tensor([columns, rows, columns, rows], device=boxes.device)
    return {"boxes": torch.minimum(boxes.clamp(min=0), limits) * STRIDE, "scores": scores, "labels": labels}


def _normed(inputs: int, outputs: int, stride: int = 1) -> Sequence[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer, nn.GroupNorm(GROUPS, outputs)
