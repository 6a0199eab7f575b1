"""mAP@0.5: by hand, against pycocotools, over ranks, and through an evaluation."""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.nn.functional import cross_entropy

from hpctrain.errors import ModelError
from hpctrain.job import Job
from hpctrain.models import metrics
from hpctrain.models.average_precision import (
    MOST,
    AveragePrecision,
    average_precision,
    intersection_over_union,
    matched,
)


def padded(rows: list[tuple[list[float], int]], most: int) -> tuple[Tensor, Tensor]:
    """Boxes and labels of a picture, as a sample has them."""
    boxes, labels = torch.zeros(most, 4), torch.full((most,), -1)
    for place, (box, label) in enumerate(rows):
        boxes[place], labels[place] = torch.tensor(box), label
    return boxes, labels


def batch_of(pictures: list[list[tuple[list[float], int]]], most: int = 5) -> dict[str, Tensor]:
    boxes, labels = zip(*(padded(rows, most) for rows in pictures), strict=True)
    return {"boxes": torch.stack(boxes), "labels": torch.stack(labels)}


def outputs_of(pictures: list[list[tuple[list[float], int, float]]], most: int = 5) -> dict[str, Tensor]:
    """As the detector returns them: rows of score 0 fill up."""
    found = batch_of([[(box, label) for box, label, _ in rows] for rows in pictures], most)
    scores = torch.zeros(len(pictures), most)
    for picture, rows in enumerate(pictures):
        scores[picture, : len(rows)] = torch.tensor([score for _, _, score in rows])
    return {"boxes": found["boxes"], "labels": found["labels"].clamp(min=0), "scores": scores}


def value_of(*batches: tuple[Any, Any], classes: tuple[str, ...] = ()) -> dict[str, float]:
    metric = AveragePrecision(classes)
    metric.start()
    for outputs, targets in batches:
        metric.update(outputs, targets)
    metric.merge([metric.state()])
    return metric.value()


# -- by hand -----------------------------------------------------------------------------------------------------
def test_overlap_of_boxes() -> None:
    some = torch.tensor([[0.0, 0, 10, 10], [5, 5, 5, 9]])
    others = torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    torch.testing.assert_close(intersection_over_union(some, others), torch.tensor([[1 / 3, 0, 1.0], [0, 0, 0]]))


def test_a_box_is_found_once_by_the_best_detection() -> None:
    truth = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 12]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 4.9]])
    assert matched(boxes, truth).tolist() == [True, True, False, False]  # the second takes what the first has left
    assert matched(boxes, truth[:0]).tolist() == [False] * 4
    assert matched(torch.tensor([[0.0, 0, 10, 5]]), truth[:1]).tolist() == [True]  # an IoU of 0.5 suffices


def test_average_precision_at_101_recalls() -> None:
    """Right, wrong, right, of three boxes: precision 1 up to a recall of 1/3, 2/3 up to 2/3, and nothing further."""
    found = average_precision(torch.tensor([0.9, 0.5, 0.7]), torch.tensor([True, True, False]), 3)
    assert found == pytest.approx((34 * 1.0 + 33 * 2 / 3) / 101)
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 2) == 0.0
    assert math.isnan(average_precision(torch.ones(1), torch.ones(1, dtype=torch.bool), 0))


CELL, PLATE = [10.0, 10, 30, 30], [50.0, 50, 60, 60]


def test_mean_over_the_classes_that_occur() -> None:
    """The cell is found; of two platelets one; a bird occurs nowhere, but is found once, which does not count."""
    outputs = outputs_of([[(CELL, 0, 0.9), (PLATE, 1, 0.8), (CELL, 2, 0.99)]])
    targets = batch_of([[(CELL, 0), (PLATE, 1), ([0, 0, 5, 5], 1)]])
    found = value_of((outputs, targets), classes=("cell", "platelet", "bird"))
    assert list(found) == ["mAP", "AP cell", "AP platelet", "AP bird"]
    assert found["AP cell"] == 1.0
    assert found["AP platelet"] == pytest.approx(51 / 101)
    assert math.isnan(found["AP bird"])
    assert found["mAP"] == pytest.approx((1 + 51 / 101) / 2)


def test_classes_without_names_have_numbers() -> None:
    found = value_of((outputs_of([[(CELL, 2, 0.9)]]), batch_of([[(CELL, 2)]])))
    assert list(found) == ["mAP", "AP 0", "AP 1", "AP 2"]
    assert (found["mAP"], found["AP 2"]) == (1.0, 1.0)


def test_nothing_to_find() -> None:
    assert math.isnan(value_of((outputs_of([[(CELL, 0, 0.9)]]), batch_of([[]])), classes=("cell",))["mAP"])
    empty = AveragePrecision(["cell"])
    empty.merge([empty.state()])
    assert math.isnan(empty.value()["mAP"])


def test_a_hundred_detections_count_per_picture_and_class() -> None:
    """The right one is the last of 100, or of 101."""
    for wrong, expected in ((MOST - 1, 1 / MOST), (MOST, 0.0)):
        rows = [([80.0, 80, 90, 90], 0, 0.9)] * wrong + [(CELL, 0, 0.1), (PLATE, 1, 0.05)]
        found = value_of((outputs_of([rows], most=MOST + 5), batch_of([[(CELL, 0), (PLATE, 1)]])))
        assert found["AP 0"] == pytest.approx(expected)
        assert found["AP 1"] == 1.0


@pytest.mark.parametrize(
    ("outputs", "targets", "message"),
    [
        (torch.zeros(2), {}, "mappings with boxes, scores, labels, but was given a Tensor"),
        ({"loss": 1}, {}, "but was given the keys loss"),
        (outputs_of([[]]), torch.zeros(1), "mappings with boxes, labels, but was given a Tensor"),
        (outputs_of([[]]), batch_of([[(CELL, 1)]]), r"a box has the class 1, but metric.classes has 1 name"),
    ],
)
def test_wrong_outputs_and_targets_are_refused(outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        value_of((outputs, targets), classes=("cell",))


@pytest.mark.parametrize("classes", ["cell", [1, 2], 3, ["a", "a"]])
def test_wrong_names_are_refused(classes: Any) -> None:
    with pytest.raises(ModelError, match=r"^metric\.classes = .*expected a list of different names"):
        metrics.bind(Job(metric={"name": "average_precision", "classes": classes}).metric, cross_entropy)


# -- against pycocotools -----------------------------------------------------------------------------------------
def scene(generator: torch.Generator, pictures: int, found: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random boxes of three classes, and detections around them, some far away, some of another class; scores have two
    digits, so some are equal."""
    corners = torch.rand(pictures, 12, 2, generator=generator) * 80
    boxes = torch.cat([corners, corners + 8 + 24 * torch.rand(pictures, 12, 2, generator=generator)], 2)
    labels = torch.randint(-1, 3, (pictures, 12), generator=generator)
    which = torch.randint(0, 12, (pictures, found), generator=generator)
    moved = boxes.gather(1, which[..., None].expand(-1, -1, 4)).clone()
    moved += torch.randn(moved.shape, generator=generator) * 2
    moved[..., 2:] = torch.maximum(moved[..., 2:], moved[..., :2] + 1)
    near = labels.gather(1, which).clamp(min=0)
    other = torch.randint(0, 3, near.shape, generator=generator)
    kinds = torch.where(torch.rand(near.shape, generator=generator) < 0.8, near, other)
    scores = (torch.rand(near.shape, generator=generator) * 100).round() / 100
    return {"boxes": moved, "scores": scores, "labels": kinds}, {"boxes": boxes, "labels": labels}


def coco_ap(outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> list[float]:
    """pycocotools' average precision of each class at an IoU of 0.5."""
    def sides(box: Tensor) -> list[float]:
        left, top, right, bottom = box.double().tolist()
        return [left, top, right - left, bottom - top]

    truth, results = list[dict[str, Any]](), list[dict[str, Any]]()
    for picture, (boxes, labels) in enumerate(zip(targets["boxes"], targets["labels"], strict=True)):
        for box, label in zip(boxes, labels.tolist(), strict=True):
            if label >= 0:
                side = sides(box)
                row = {"image_id": picture, "category_id": label, "bbox": side, "area": side[2] * side[3]}
                truth.append(row | {"iscrowd": 0, "id": len(truth) + 1})
    for picture, parts in enumerate(zip(outputs["boxes"], outputs["scores"], outputs["labels"], strict=True)):
        for box, score, label in zip(*parts, strict=True):
            results.append(
                {"image_id": picture, "category_id": int(label), "bbox": sides(box), "score": float(score)}
            )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": picture} for picture in range(len(targets["boxes"]))],
            "categories": [{"id": label, "name": str(label)} for label in range(3)],
            "annotations": truth,
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.params.iouThrs = [0.5]
        judge.evaluate()
        judge.accumulate()
    precision = judge.eval["precision"][0, :, :, 0, 2]  # (recalls, classes), of all sizes, 100 detections
    return [float(precision[:, label].mean()) for label in range(3)]


@pytest.mark.parametrize(("seed", "pictures", "found"), [(0, 7, 30), (1, 1, 3), (2, 20, 12), (3, 3, 4 * MOST)])
def test_same_as_pycocotools(seed: int, pictures: int, found: int) -> None:
    outputs, targets = scene(torch.Generator().manual_seed(seed), pictures, found)
    theirs = coco_ap(outputs, targets)
    ours = value_of((outputs, targets), classes=("0", "1", "2"))
    assert [ours[f"AP {label}"] for label in range(3)] == pytest.approx(theirs, abs=1e-12)
    assert ours["mAP"] == pytest.approx(sum(theirs) / 3, abs=1e-12)
    assert 0.02 < ours["mAP"] < 0.98  # or else little would be compared


# -- over ranks --------------------------------------------------------------------------------------------------
def test_same_over_any_number_of_ranks() -> None:
    outputs, targets = scene(torch.Generator().manual_seed(4), 9, 20)
    whole = value_of((outputs, targets))
    metrics = [AveragePrecision() for _ in range(4)]
    for metric, (low, high) in zip(metrics, [(0, 2), (2, 2), (2, 7), (7, 9)], strict=True):
        metric.start()
        for place in range(low, high):
            one = ({key: part[place : place + 1] for key, part in each.items()} for each in (outputs, targets))
            metric.update(*one)
    metrics[0].merge([metric.state() for metric in metrics])
    assert metrics[0].value() == whole
    metrics[0].start()
    assert math.isnan(metrics[0].value()["mAP"])


def test_examples_show_true_boxes_and_clear_detections() -> None:
    metric = AveragePrecision(["cell", "platelet"])
    pictures = 12
    outputs = outputs_of([[(PLATE, 1, 0.75), (CELL, 0, 0.05)]] * pictures)
    targets = batch_of([[(CELL, 0)]] * pictures) | {"image": torch.rand(pictures, 3, 16, 16)}
    metric.update(outputs, targets)
    shown = metric.examples()
    assert 1 < len(shown) < pictures
    assert [(box.label, box.score) for box in shown[0].boxes] == [("cell", None), ("platelet", 0.75)]
    assert [(box.left, box.bottom) for box in shown[0].boxes] == [(10, 30), (50, 60)]
    assert torch.equal(shown[1].picture, targets["image"][1])
    metric.start()
    assert metric.examples() == []
