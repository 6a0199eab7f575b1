"""Augmentations of pictures with boxes: a box stays where its object is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hpctrain.data.augment import Augmentation, flip, light, shift
from hpctrain.data.boxes import crop_boxes, flip_boxes, turn_boxes
from hpctrain.data.loader import Loader
from hpctrain.data.order import Order
from hpctrain.errors import DataError

BOXES = ((8, 4, 24, 12), (40, 20, 52, 36))


def sample(size: tuple[int, int] = (40, 64), boxes: Sequence[tuple[int, int, int, int]] = BOXES) -> dict[str, Tensor]:
    """A picture (height, width) with up to three objects that fill their boxes: the first of class 0 and red, the
    second of class 1 and green, the third of class 2 and blue."""
    image = torch.zeros(3, *size)
    for channel, (left, top, right, bottom) in enumerate(boxes):
        image[channel, top:bottom, left:right] = 1.0
    rows = torch.zeros(3, 4)
    rows[: len(boxes)] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([0, 1, 2])
    labels[len(boxes) :] = -1
    return {"image": image, "boxes": rows, "labels": labels, "scale": torch.ones(2)}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def found_in(image: Tensor, channel: int) -> list[int]:
    """The box of the bright pixels."""
    rows, columns = (image[channel] >= 0.5).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize(("function", "ways"), [(flip_boxes, 4), (turn_boxes, 2)])
def test_boxes_follow_their_objects_exactly(function: Augmentation, ways: int) -> None:
    before = sample((64, 64))
    kept = {name: part.clone() for name, part in before.items()}
    different = set()
    for seed in range(60):
        after = function(before, seeded(seed))
        for place in range(2):
            assert after["boxes"][place].tolist() == found_in(after["image"], place)
        assert after["boxes"][2].tolist() == [0.0] * 4
        assert torch.equal(after["labels"], before["labels"]) and torch.equal(after["scale"], before["scale"])
        different.add(tuple(after["boxes"].flatten().tolist()))
    assert len(different) == ways
    assert all(torch.equal(before[name], part) for name, part in kept.items())


def test_flips_of_pictures_that_are_not_square() -> None:
    for seed in range(8):
        after = flip_boxes(sample(), seeded(seed))
        assert after["boxes"][:2].tolist() == [found_in(after["image"], place) for place in range(2)]
    with pytest.raises(DataError, match=r"turn_boxes takes square pictures, not \(3, 40, 64\)"):
        turn_boxes(sample(), seeded(0))


def test_crops_move_and_scale_boxes_with_their_objects() -> None:
    ratios = []
    for seed in range(100):
        before = sample(boxes=(*BOXES, (28, 14, 36, 22)))
        after = crop_boxes(before, seeded(seed))
        assert after["image"].shape == (3, 30, 48)
        for place, (left, top, right, bottom) in enumerate(after["boxes"].tolist()):
            if after["labels"][place] < 0:
                assert (left, top, right, bottom) == (0.0, 0.0, 0.0, 0.0)
                continue
            assert found_in(after["image"], place) == pytest.approx([left, top, right, bottom], abs=0.6)
            assert left >= 0 and top >= 0 and right <= 48 and bottom <= 30
            if left > 0 and right < 48:
                ratios.append((right - left) / float(before["boxes"][place, 2] - before["boxes"][place, 0]))
    assert 0.75 <= min(ratios) < 0.85
    assert 1.15 < max(ratios) <= 1.35


def test_crops_leave_out_what_is_hardly_visible() -> None:
    lone = sample((40, 40), boxes=((0, 0, 40, 40),))
    kept = [int(crop_boxes(lone, seeded(seed), zoom=1.0, visible=0.5)["labels"][0]) for seed in range(20)]
    assert kept == [0] * 20  # 56 % of it
    assert all(crop_boxes(lone, seeded(seed), zoom=1.0, visible=0.6)["labels"][0] == -1 for seed in range(20))
    after = crop_boxes(lone, seeded(0), zoom=1.0, visible=0.5)
    assert after["boxes"][0].tolist() == [0.0, 0.0, 30.0, 30.0]


def test_crops_lie_among_the_boxes() -> None:
    """The lower half is only there to make the picture square, as after `--fit pad`."""
    tops = set()
    for seed in range(50):
        padded = sample((64, 64), boxes=((0, 0, 10, 10), (50, 22, 64, 32)))
        padded["image"][:, 32:] = 7.0
        image = crop_boxes(padded, seeded(seed), zoom=1.0)["image"]
        tops.add(int((image[0] == 7.0).all(1).sum()))
    assert tops == {16}  # a window of 48 rows that has all boxes lies at the top
    numbered = sample(boxes=()) | {"image": torch.arange(40 * 64.0).reshape(1, 40, 64)}
    corners = {float(crop_boxes(numbered, seeded(seed), zoom=1.0)["image"][0, 0, 0]) for seed in range(20)}
    assert len(corners) > 10  # anywhere


def test_light_changes_colours_and_nothing_else() -> None:
    before = sample()
    before["image"] = 0.2 + 0.6 * torch.rand(3, 40, 64)
    changed = [light(before, seeded(seed)) for seed in range(30)]
    for after in changed:
        assert torch.equal(after["boxes"], before["boxes"])
        assert after["image"].min() >= 0 and after["image"].max() <= 1
    means = torch.stack([after["image"].mean((1, 2)) for after in changed])
    assert means.mean(1).std() > 0.03  # brighter and darker
    assert (means / means.mean(1, keepdim=True)).std(0).min() > 0.01  # with other colours
    deviations = torch.stack([after["image"].std() for after in changed])
    assert deviations.std() > 0.01
    assert torch.equal(light(before["image"], seeded(3)), changed[3]["image"])  # of a tensor, too
    dark = light(torch.full((1, 4, 4), 0.5, dtype=torch.float64), seeded(0))
    assert dark.dtype == torch.float64


@pytest.mark.parametrize("function", [flip_boxes, turn_boxes, crop_boxes])
def test_samples_without_boxes_are_refused(function: Augmentation) -> None:
    name = getattr(function, "__name__", "")
    with pytest.raises(DataError, match=f"{name} takes samples that are mappings with image, boxes and labels.*Tensor"):
        function(torch.zeros(3, 4, 4), seeded(0))
    with pytest.raises(DataError, match=f"{name} takes .* but was given the keys image, label; leave it out"):
        function({"image": torch.zeros(3, 4, 4), "label": 1}, seeded(0))


@pytest.mark.parametrize("function", [flip, shift])
def test_augmentations_of_tensors_refuse_mappings(function: Augmentation) -> None:
    with pytest.raises(DataError, match="takes tensors, but the samples are mappings with the keys image, boxes"):
        function(sample(), seeded(0))


# -- in a loader -------------------------------------------------------------------------------------------------
class Scenes(Dataset[Any]):
    """Samples that are mappings, or pairs of a mapping and a number."""

    def __init__(self, paired: bool) -> None:
        self.paired = paired

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        found = sample((64, 64))
        return (found, index) if self.paired else found


def marked(given: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """An augmentation of a user's own."""
    return {**given, "mark": torch.rand((), generator=generator)}


@pytest.mark.parametrize("paired", [False, True])
def test_loader_passes_mappings_whole(paired: bool) -> None:
    order = Order(24, seed=1)
    functions: list[Augmentation] = [flip_boxes, turn_boxes, crop_boxes, light, marked]
    batches = []
    for threads in (0, 2):
        with Loader(Scenes(paired), order, threads=threads, augment=functions, seed=3) as loader:
            loader.request(0, 8)
            first = loader.take(0, 8)
            loader.request(8, 16)
            batches.append([first, loader.take(8, 16), loader.take(16, 24)])
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one.inputs[name], part) for name, part in other.inputs.items())
        assert one.inputs["image"].shape == (8, 3, 48, 48)
        assert len(set(one.inputs["mark"].tolist())) == 8
        assert (one.targets is not None) == paired
