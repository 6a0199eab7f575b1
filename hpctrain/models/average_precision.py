"""Mean average precision of detections at IoU 0.5, as pycocotools computes it (Lin et al. 2014)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.errors import JobError, ModelError
from hpctrain.models.examples import Box, Example

IOU = 0.5
MOST = 100  # detections that count, per picture and class
PLACES = 101  # recalls at which precision is read
SHOWN = 8  # examples
CLEAR = 0.3  # the least score of a box in an example


class AveragePrecision:
    """mAP@0.5: the mean over classes of the average precision, and that of each class.

    Outputs: a mapping with `boxes` (n, any, 4), left, top, right, bottom; `scores` and `labels` (n, any). Targets: a
    mapping with `boxes` (n, most, 4) and `labels` (n, most), negative where there is no further box; `image` (n, 3,
    height, width) from 0 to 1, if there, is shown in examples. Detections with the score 0 do not count: they fill up.
    Boxes are compared as they are, so in pixels of the stored picture.

    `classes`: names in the order of their numbers. Without them there is only the mean, since a part of the data need
    not have all classes.
    """

    def __init__(self, classes: Sequence[str] = ()) -> None:
        named = isinstance(classes, (list, tuple)) and all(isinstance(name, str) for name in classes)
        if not named or len(set(classes)) < len(classes):
            raise ModelError(f"metric.classes = {classes!r}: expected a list of different names")
        self._names = list(classes)
        self.start()

    def check_data(self, dataset: Any) -> None:
        """Raise JobError if the data set names its classes, and they are others or in another order: values would get
        the names of other classes."""
        known = getattr(dataset, "classes", None)
        if self._names and known is not None and list(known) != list(self._names):
            raise JobError(
                f"metric.classes = {list(self._names)!r}, but the classes of the data are {list(known)!r}; name them "
                "all, in that order"
            )

    def start(self) -> None:
        """Reset."""
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._right: list[Tensor] = []
        self._truth: list[Tensor] = []
        self._examples: list[Example] = []

    def update(self, outputs: Any, targets: Any) -> None:
        """Add a batch. Raises ModelError for outputs or targets without the keys."""
        found = zip(*_parts(outputs, "boxes", "scores", "labels"), strict=True)
        true = zip(*_parts(targets, "boxes", "labels"), strict=True)
        for place, ((boxes, scores, labels), (true_boxes, true_labels)) in enumerate(zip(found, true, strict=True)):
            there, counts = true_labels >= 0, scores > 0
            truth = true_boxes[there], true_labels[there]
            detected = boxes[counts], scores[counts], labels[counts]
            self._add(*detected, *truth)
            if len(self._examples) < SHOWN and "image" in targets:
                self._show(targets["image"][place], detected, truth)

    def _add(self, boxes: Tensor, scores: Tensor, labels: Tensor, true_boxes: Tensor, true_labels: Tensor) -> None:
        if self._names and len(true_labels) and int(true_labels.max()) >= len(self._names):
            raise ModelError(
                f"a box has the class {int(true_labels.max())}, but metric.classes has {len(self._names)} names; name "
                "all classes of the data set, in its order"
            )
        self._truth.append(true_labels)
        for label in labels.unique().tolist():
            own = (labels == label).nonzero()[:, 0]
            own = own[scores[own].argsort(descending=True, stable=True)][:MOST]
            self._scores.append(scores[own])
            self._labels.append(labels[own])
            self._right.append(matched(boxes[own], true_boxes[true_labels == label]))

    def state(self) -> dict[str, list[Tensor]]:
        """Of each detection its score, its class, and whether it is right; the classes of all boxes."""
        return {"scores": self._scores, "labels": self._labels, "right": self._right, "truth": self._truth}

    def merge(self, states: Sequence[Mapping[str, list[Tensor]]]) -> None:
        """Replace this rank's detections by those of all ranks."""
        for name in ("scores", "labels", "right", "truth"):
            setattr(self, f"_{name}", [part for state in states for part in state[name]])

    def value(self) -> dict[str, float]:
        """`mAP`, and `AP NAME` for each class of `classes`; NaN for a class without a box, which does not count in the
        mean."""
        scores, labels, right, truth = (
            torch.cat([torch.zeros(0), *parts]) for parts in (self._scores, self._labels, self._right, self._truth)
        )
        most = len(self._names) or (int(truth.max()) + 1 if len(truth) else 0)
        found = {
            label: average_precision(scores[labels == label], right[labels == label] > 0, int((truth == label).sum()))
            for label in range(most)
        }
        counted = [value for value in found.values() if value == value]
        return {"mAP": sum(counted) / len(counted) if counted else float("nan")} | {
            f"AP {name}": found[label] for label, name in enumerate(self._names)
        }

    def examples(self) -> list[Example]:
        """The first pictures with the boxes of their annotation and those found."""
        return self._examples

    def _show(self, picture: Tensor, found: tuple[Tensor, ...], truth: tuple[Tensor, Tensor]) -> None:
        boxes, scores, labels = (part[found[1] >= CLEAR] for part in found)
        drawn = self._boxes(truth[0], truth[1], [None] * len(truth[0])) + self._boxes(boxes, labels, scores.tolist())
        self._examples.append(Example(f"picture {len(self._examples) + 1}", picture.cpu(), drawn))

    def _boxes(self, boxes: Tensor, labels: Tensor, scores: Sequence[float | None]) -> list[Box]:
        rows = zip(boxes.tolist(), labels.tolist(), scores, strict=True)
        return [
            Box(left, top, right, bottom, self._name(label), score) for (left, top, right, bottom), label, score in rows
        ]

    def _name(self, label: int) -> str:
        return self._names[label] if label < len(self._names) else str(label)


def matched(boxes: Tensor, truth: Tensor) -> Tensor:
    """Which of the `boxes` (n, 4) of a class, the best first, find one of `truth` (m, 4): bool (n,).

    Each takes the box of the annotation that it overlaps most, among those that no better detection has taken; of equal
    ones the last, as pycocotools.
    """
    right = torch.zeros(len(boxes), dtype=torch.bool)
    overlaps = intersection_over_union(boxes.double().cpu(), truth.double().cpu())
    for place in range(len(boxes) if len(truth) else 0):
        best = len(truth) - 1 - int(overlaps[place].flip(0).argmax())
        if overlaps[place, best] >= IOU:
            right[place] = True
            overlaps[:, best] = -1.0
    return right


def intersection_over_union(some: Tensor, others: Tensor) -> Tensor:
    """(n, 4) and (m, 4) -> (n, m), from 0 to 1; 0 for boxes without area."""
    low = torch.maximum(some[:, None, :2], others[None, :, :2])
    high = torch.minimum(some[:, None, 2:], others[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (some, others)]
    union = areas[0][:, None] + areas[1] - common
    return torch.where(union > 0, common / union, 0.0)


def average_precision(scores: Tensor, right: Tensor, boxes: int) -> float:
    """The mean of the precision at recalls of 0, 0.01, ... 1, where precision is the highest at that recall or a
    higher one. `scores` and `right` (n,): of the detections; `boxes`: in the annotations; NaN if there are none."""
    if not boxes:
        return float("nan")
    hits = right[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    highest = precision.flip(0).cummax(0).values.flip(0)
    recalls = torch.from_numpy(np.linspace(0, 1, PLACES))  # to the bit those of pycocotools, as some are equal to hits
    places = torch.searchsorted(hits / boxes, recalls)
    return float(torch.cat([highest, torch.zeros(1)])[places].mean())


def _parts(given: Any, *keys: str) -> list[Tensor]:
    """Those parts of outputs or targets. Raises ModelError."""
    if not isinstance(given, Mapping) or any(key not in given for key in keys):
        what = f"the keys {', '.join(map(str, given))}" if isinstance(given, Mapping) else f"a {type(given).__name__}"
        raise ModelError(f"average_precision takes mappings with {', '.join(keys)}, but was given {what}")
    return [given[key] for key in keys]
