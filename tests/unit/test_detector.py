"""The detector: its targets, loss and detections by hand; training over ranks; jobs/bccd.toml."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hpctrain.cli import main
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.task import distance, vector
from hpctrain.data.splits import Splits
from hpctrain.errors import ModelError
from hpctrain.job import Job
from hpctrain.models.average_precision import AveragePrecision
from hpctrain.models.detector import (
    Detector,
    Found,
    detection_loss,
    detections,
    detector,
    focal_loss,
    heat_map,
)
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
BOXES = torch.tensor([[[4.0, 8, 20, 16], [0, 0, 0, 0]], [[0, 0, 8, 8], [30, 1, 32, 31]]])  # in two pictures of 32 x 32
LABELS = torch.tensor([[1, -1], [0, 1]])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def perfect(boxes: Tensor, labels: Tensor, classes: int = 2, side: int = 8) -> Found:
    """What a net without errors would say of pictures with `side` by `side` cells."""
    scores, shapes = torch.full((len(boxes), classes, side, side), -20.0), torch.zeros(len(boxes), 4, side, side)
    for picture, box in (labels >= 0).nonzero().tolist():
        left, top, right, bottom = (boxes[picture, box] / 4).tolist()
        x, y = (left + right) / 2, (top + bottom) / 2
        scores[picture, labels[picture, box], int(y), int(x)] = 20.0
        sizes = [math.log(right - left), math.log(bottom - top)]
        shapes[picture, :, int(y), int(x)] = torch.tensor([x - int(x), y - int(y), *sizes])
    return Found(scores, shapes)


# -- targets and loss --------------------------------------------------------------------------------------------
def test_heat_is_one_at_centres_and_falls_with_the_size_of_the_box() -> None:
    cells, sizes = torch.tensor([[[3.0, 2.0], [7.0, 0.0]]]), torch.tensor([[[4.0, 2.0], [9.0, 9.0]]])
    labels = torch.tensor([[1, -1]])
    heat = heat_map(torch.zeros(1, 2, 5, 8), cells, sizes, labels, labels >= 0)
    assert heat.shape == (1, 2, 5, 8)
    assert heat[0, 0].max() == 0
    assert heat[0, 1, 2, 3] == 1
    wide, high = (0.54 * 4 + 1) / 6, (0.54 * 2 + 1) / 6
    assert heat[0, 1, 2, 4] == pytest.approx(math.exp(-1 / (2 * wide**2)))
    assert heat[0, 1, 3, 3] == pytest.approx(math.exp(-1 / (2 * high**2)))
    assert heat[0, 1, 1, 2] == pytest.approx(math.exp(-1 / (2 * wide**2) - 1 / (2 * high**2)))


def test_near_objects_of_a_class_do_not_add_up() -> None:
    cells, sizes = torch.tensor([[[3.0, 2.0], [4.0, 2.0]]]), torch.full((1, 2, 2), 6.0)
    both = heat_map(torch.zeros(1, 1, 5, 8), cells, sizes, torch.zeros(1, 2).long(), torch.ones(1, 2) > 0)
    alone = [heat_map(torch.zeros(1, 1, 5, 8), cells, sizes, torch.zeros(1, 2).long(), there)
             for there in torch.eye(2)[:, None] > 0]  # fmt: skip
    assert torch.equal(both, torch.maximum(*alone))
    assert (both <= 1).all() and int((both == 1).sum()) == 2


def test_focal_loss_by_hand() -> None:
    """A centre with the score 0.6, and beside it a cell with the heat 0.5 and the score 0.2."""
    chances, heat = torch.tensor([0.6, 0.2]), torch.tensor([1.0, 0.5])
    expected = -(0.4**2) * math.log(0.6) - 0.5**4 * 0.2**2 * math.log(0.8)
    assert float(focal_loss(chances.logit(), heat)) == pytest.approx(expected, rel=1e-5)


def test_loss_is_a_sum_over_the_boxes() -> None:
    right = perfect(BOXES, LABELS)
    total, weight = detection_loss(right, BOXES, LABELS)
    assert int(weight) == 3 + 2
    assert float(total) < 1e-4
    wrong = right._replace(shapes=right.shapes + 0.25)
    assert float(detection_loss(wrong, BOXES, LABELS)[0] - total) == pytest.approx(3 * 4 * 0.25, rel=1e-5)
    parts = [detection_loss(Found(*(each[i : i + 1] for each in wrong)), BOXES[i : i + 1], LABELS[i : i + 1])
             for i in range(2)]  # fmt: skip
    assert float(parts[0][0] + parts[1][0]) == pytest.approx(float(detection_loss(wrong, BOXES, LABELS)[0]), rel=1e-5)


def test_pictures_without_boxes_teach_that_there_is_nothing() -> None:
    nothing = torch.full((1, 2), -1)
    found = Found(torch.zeros(1, 2, 8, 8, requires_grad=True), torch.zeros(1, 4, 8, 8, requires_grad=True))
    total, weight = detection_loss(found, torch.zeros(1, 2, 4), nothing)
    assert int(weight) == 1
    total.backward()
    assert found.scores.grad is not None and (found.scores.grad > 0).all()


def test_boxes_at_the_border_have_a_cell() -> None:
    """A centre on the right or lower border itself, as of a box without width."""
    boxes = torch.tensor([[[32.0, 32, 32, 32]]])
    found = Found(torch.zeros(1, 1, 8, 8), torch.zeros(1, 4, 8, 8))
    total, weight = detection_loss(found, boxes, torch.zeros(1, 1, dtype=torch.int64))
    assert int(weight) == 2 and total.isfinite()


# -- detections --------------------------------------------------------------------------------------------------
def test_detections_of_a_perfect_net_are_the_boxes() -> None:
    found = detections(perfect(BOXES, LABELS), most=4)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "boxes": (2, 4, 4), "scores": (2, 4), "labels": (2, 4),
    }  # fmt: skip
    torch.testing.assert_close(found["boxes"][0, 0], BOXES[0, 0])
    assert found["labels"][0, 0] == 1
    assert (found["scores"][0] > 0.5).tolist() == [True, False, False, False]
    order = found["labels"][1, :2].argsort()
    torch.testing.assert_close(found["boxes"][1, :2][order], BOXES[1])
    metric = AveragePrecision()
    metric.update(found, {"boxes": BOXES, "labels": LABELS})
    assert metric.value()["mAP"] == 1.0


def test_only_peaks_are_detections_and_the_best_come_first() -> None:
    scores = torch.full((1, 1, 6, 6), -9.0)
    scores[0, 0, 2, 2], scores[0, 0, 2, 3], scores[0, 0, 5, 5] = 1.0, 0.9, 2.0
    found = detections(Found(scores, torch.zeros(1, 4, 6, 6)), most=3)
    assert found["scores"][0, :2].tolist() == pytest.approx(torch.tensor([2.0, 1.0]).sigmoid().tolist())
    assert found["scores"][0, 2] < 0.01
    assert found["boxes"][0, 0].tolist() == [18.0, 18.0, 22.0, 22.0]  # one cell, around the corner of the cell
    assert detections(Found(scores, torch.zeros(1, 4, 6, 6)))["scores"].shape == (1, 36)


def test_boxes_end_at_the_picture() -> None:
    shapes = torch.zeros(1, 4, 4, 8)
    shapes[:, 2:] = 5.0
    boxes = detections(Found(torch.zeros(1, 1, 4, 8), shapes), most=1)["boxes"]
    assert boxes[0, 0].tolist() == [0.0, 0.0, 32.0, 16.0]


# -- the model ---------------------------------------------------------------------------------------------------
def test_what_the_model_returns() -> None:
    model = detector(classes=2, width=16)
    images = torch.rand(2, 3, 32, 48)
    trained = model(images, BOXES, LABELS, scale=torch.ones(2, 2))
    assert list(trained) == ["loss"] and trained["loss"][0].requires_grad
    model.eval()
    assert list(model(images, BOXES, LABELS)) == ["loss", "boxes", "scores", "labels"]
    found = model(images)
    assert {name: tuple(part.shape) for name, part in found.items()} == {
        "boxes": (2, 100, 4), "scores": (2, 100), "labels": (2, 100),
    }  # fmt: skip
    assert found["boxes"][..., 0::2].max() <= 48 and found["boxes"][..., 1::2].max() <= 32


def test_scores_are_low_before_training() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        scores = detector().eval()(torch.rand(2, 3, 64, 64))["scores"]
    assert 0.05 < float(scores.median()) < 0.5


def test_size_and_wrong_arguments() -> None:
    assert 200_000 < sum(p.numel() for p in detector().parameters()) < 500_000
    with pytest.raises(ModelError, match="model.width = 24: .* a multiple of 16"):
        detector(width=24)
    with pytest.raises(ModelError, match="model.classes = 0"):
        detector(classes=0)
    model = detector(classes=1, width=16)
    with pytest.raises(ModelError, match=r"multiples of 16, not \(1, 3, 32, 40\); choose such a size .*--size"):
        model(torch.rand(1, 3, 32, 40), BOXES[:1], LABELS[:1])
    with pytest.raises(ModelError, match="model.classes = 1, but a box has the class 1; set model.classes"):
        model(torch.rand(2, 3, 32, 32), BOXES, LABELS)
    with pytest.raises(ModelError, match="trains on samples with boxes and labels"):
        model(torch.rand(2, 3, 32, 32))


# -- training ----------------------------------------------------------------------------------------------------
class Squares(Dataset[dict[str, Tensor]]):
    """Pictures of 32 x 32 with bright squares of 6 to 14 pixels, which are of class 0, and dark ones, of class 1. Every
    fifth picture has none."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.samples = [self._made(generator, 0 if place % 5 == 4 else 2) for place in range(count)]

    @staticmethod
    def _made(generator: torch.Generator, squares: int) -> dict[str, Tensor]:
        image = 0.4 + 0.2 * torch.rand(3, 32, 32, generator=generator)
        boxes, labels = torch.zeros(3, 4), torch.full((3,), -1)
        for place in range(squares):
            label, side = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 2), (6, 15)))
            left = int(torch.randint(0, 17 - side, (), generator=generator)) + 16 * place
            top = int(torch.randint(0, 33 - side, (), generator=generator))
            image[:, top : top + side, left : left + side] = 1.0 - label
            boxes[place], labels[place] = torch.tensor([left, top, left + side, top + side]), label
        return {"image": image, "boxes": boxes, "labels": labels, "scale": torch.ones(2)}

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.samples[index]


def squares(count: int = 23, seed: int = 0) -> Splits:
    """For jobs."""
    return Splits(Squares(count, seed), Squares(11, seed + 1))


def square_job(folder: Path, *overrides: str, **tables: Any) -> Job:
    base: dict[str, Any] = {
        "model": {"name": "detector", "classes": 2, "width": 16},
        "data": {"name": f"{__name__}:squares", "augment": ["flip_boxes", "turn_boxes", "light"]},
        "loss": "model",
        "metric": {"name": "average_precision", "classes": ["bright", "dark"]},
        "optimizer": {"name": "AdamW", "lr": 0.01},
        "train": {"epochs": 2, "batch_size": 3, "clip_norm": 5.0},
        "output": str(folder),
        "trace": {"enabled": False},
        "threads": 1,
    }
    return Job(**base | tables).override(overrides)


def trained(job: Job, ranks: int) -> Any:
    return World(ranks).run(lambda comm: helpers.quiet_train(comm, job))[0]


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("all_reduce", 3), ("{name='parameter_server', mode='sync'}", 4)], ids=["all_reduce", "ps"]
)
@pytest.mark.parametrize(
    ("precision", "optimizer", "limit"),
    [("float64", "{name='AdamW', lr=0.003}", 1e-9), ("float32", "{name='SGD', lr=0.005, momentum=0.9}", 1e-5)],
)
def test_three_workers_equal_one_process(
    tmp_path: Path, precision: str, optimizer: str, limit: float, strategy: str, ranks: int
) -> None:
    """With augmentation, and rounds in which some workers have pictures without a box. One rank is a server."""
    keys = [f"train.precision={precision}", f"optimizer={optimizer}"]
    together = trained(square_job(tmp_path, *keys, f"strategy={strategy}"), ranks)
    alone = trained(square_job(tmp_path, *keys, "train.batch_size=9"), 1)
    assert distance(vector(together.model), vector(alone.model)) < limit
    assert together.metrics == pytest.approx(alone.metrics, abs=100 * limit, nan_ok=True)
    torch.manual_seed(0)
    assert distance(vector(together.model), vector(detector(classes=2, width=16))) > 0.01  # it has learnt something


def test_the_loss_of_an_evaluation_does_not_depend_on_its_batches(tmp_path: Path) -> None:
    """Some of the pictures have no box; alone in a batch they count as in one with others."""
    keys = ["train.epochs=1", "optimizer.lr=0.001", "train.precision=float64"]
    one, eight = (trained(square_job(tmp_path, *keys, f"train.evaluate_batch={size}"), 1).metrics for size in (1, 8))
    assert one == pytest.approx(eight, rel=1e-9)
    assert (squares().validation[4]["labels"] < 0).all()


@pytest.mark.parametrize(
    ("strategy", "ranks"),
    [
        ({"name": "parameter_server"}, 3),
        ({"name": "local_sgd", "every": 2}, 2),
        ({"name": "switch"}, 3),
        ({"name": "diloco", "every": 2}, 2),
    ],
)
def test_trains_under_other_strategies(tmp_path: Path, strategy: dict[str, Any], ranks: int) -> None:
    found = trained(square_job(tmp_path, strategy=strategy), ranks).metrics
    assert list(found)[:1] == ["loss"] and 0 < found["loss"] < 20


def test_detector_learns(tmp_path: Path) -> None:
    keys = ["data.count=60", "train.epochs=16", "train.batch_size=10", "train.evaluate_every.epochs=8"]
    found = trained(square_job(tmp_path, *keys), 1).metrics
    assert found["metric"] == found["metric.mAP"] > 0.6
    assert (found["metric.AP bright"] + found["metric.AP dark"]) / 2 == pytest.approx(found["metric.mAP"])


def test_mixed_precision_keeps_boxes_exact() -> None:
    model = detector(classes=2, width=16).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(torch.rand(1, 3, 32, 32), BOXES[:1], LABELS[:1])
    assert found["boxes"].dtype == found["loss"][0].dtype == torch.float32


def test_the_bccd_job_fits_the_data_set(tmp_path: Path) -> None:
    """Class names are those that `hpctrain ingest` finds, in their order."""
    from hpctrain.data.options import data_folder
    from hpctrain.ingest.store import About

    source = data_folder(None) / "bccd_voc" / "BCCD"
    if not source.is_dir():
        pytest.skip(f"no {source}: left out the check of jobs/bccd.toml")
    out = tmp_path / "bccd.h5"
    assert main(["ingest", "voc", str(source), str(out), "-n", "1"]) == 0
    job = Job.load(ROOT / "jobs" / "bccd.toml", [f"data.file={out}"])
    about = About.of(out)
    assert job.metric.options["classes"] == about.classes
    assert job.model.options["classes"] == len(about.classes)
    assert {name: about.splits[name] for name in ("train", "val", "test")} == {"train": 205, "val": 87, "test": 72}
    assert isinstance(job.model.bind()(), Detector)
