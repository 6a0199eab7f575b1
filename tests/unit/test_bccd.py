"""Crops of BCCD's boxes: what is cut out, and files that are missing or damaged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpctrain.data.bccd import MEAN, STD, bccd_crops
from hpctrain.errors import DataError

BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
LEFT, RIGHT, FLAT = (0, 0, 40, 60), (40, 10, 80, 50), (30, 30, 30, 30)


def annotation(*objects: tuple[str, tuple[int, int, int, int]]) -> str:
    """XML with these names and boxes."""
    return f"<annotation>{''.join(BOX.format(name, *box) for name, box in objects)}</annotation>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of 80 by 60 pixels, red on their left half and blue on the right: two to train on, one per other part."""
    place = tmp_path / "bccd_voc" / "BCCD"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (place / name).mkdir(parents=True)
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40, 0] = pixels[:, 40:, 2] = 255
    for name in "abcd":
        Image.fromarray(pixels).save(place / "JPEGImages" / f"{name}.jpg", quality=100, subsampling=0)
        (place / "Annotations" / f"{name}.xml").write_text(annotation(("WBC", LEFT), ("Platelets", RIGHT)))
    (place / "Annotations" / "b.xml").write_text(annotation(("RBC", FLAT), ("RBC", RIGHT)))
    for part, names in (("train", "a\nb\n"), ("val", "c\n"), ("test", "d\n")):
        (place / "ImageSets" / "Main" / f"{part}.txt").write_text(names)
    return tmp_path


def test_a_crop_is_what_its_box_contains(folder: Path) -> None:
    splits = bccd_crops(path=str(folder), size=8)
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (3, 2, 2)  # the flat box is left out
    images, classes = splits.train.gather(torch.arange(3))
    assert images.shape == (3, 3, 8, 8)
    assert classes.tolist() == [1, 2, 0]
    assert classes.dtype == torch.int64
    shades = ((images * STD + MEAN) * 255).round()
    for shade, channel in zip(shades, (0, 2, 2), strict=True):
        wanted = torch.zeros(3, 8, 8)
        wanted[channel] = 255
        torch.testing.assert_close(shade, wanted, atol=8, rtol=0)  # JPEG


def test_first_crops_only(folder: Path) -> None:
    splits = bccd_crops(path=str(folder / "bccd_voc" / "BCCD"), limit=1)
    assert (len(splits.train), len(splits.test)) == (1, 2)
    assert splits.train[0][0].shape == (3, 32, 32)


def test_bccd_is_found_through_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCTRAIN_DATA", str(folder))
    assert len(bccd_crops().train) == 3


@pytest.mark.parametrize("key", ["size", "limit"])
def test_wrong_options_are_refused(folder: Path, key: str) -> None:
    options: dict[str, Any] = {key: 0}
    with pytest.raises(DataError, match=rf"data.{key} = 0: expected a whole number of at least 1"):
        bccd_crops(path=str(folder), **options)


def written(name: str, text: str | bytes) -> Callable[[Path], None]:
    """What replaces a file."""

    def spoil(place: Path) -> None:
        (place / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


ENTITIES = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no list": (lambda place: (place / "ImageSets/Main/val.txt").unlink(), r"val\.txt cannot be read: No such file"),
    "empty list": (written("ImageSets/Main/test.txt", ""), r"test\.txt names no image with a box"),
    "no annotation": (lambda place: (place / "Annotations/a.xml").unlink(), r"a\.xml cannot be read: No such file"),
    "no XML": (written("Annotations/a.xml", "<annotation><object>"), r"a\.xml is not valid XML \("),
    "document type": (written("Annotations/a.xml", ENTITIES), r"a\.xml declares a document type"),
    "in UTF-16": (written("Annotations/a.xml", ENTITIES.encode("utf-16")), r"a\.xml declares a document type"),
    "other class": (written("Annotations/a.xml", annotation(("cat", LEFT))), r"an object is named 'cat'; expected RBC"),
    "no corner": (written("Annotations/a.xml", annotation(("RBC", LEFT)).replace("xmax", "x")), "has the corner None"),
    "outside": (written("Annotations/a.xml", annotation(("RBC", (0, 0, 81, 9)))), r"80 by 60 pixels, but .*81, 9\)"),
    "no image": (lambda place: (place / "JPEGImages/a.jpg").unlink(), r"a\.jpg cannot be read as an image"),
    "no JPEG": (written("JPEGImages/a.jpg", "<html>"), r"a\.jpg cannot be read as an image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_named(folder: Path, fault: str) -> None:
    spoil, message = FAULTS[fault]
    spoil(folder / "bccd_voc" / "BCCD")
    with pytest.raises(DataError, match=message) as caught:
        bccd_crops(path=str(folder))
    assert "\n" not in str(caught.value)


def test_truncated_image_is_named(folder: Path) -> None:
    file = folder / "bccd_voc/BCCD/JPEGImages/a.jpg"
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(DataError, match=r"a\.jpg cannot be read as an image"):
        bccd_crops(path=str(folder))


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no BCCD in .*: expected the folder bccd_voc/BCCD .*set data.path, or HPC"):
        bccd_crops(path=str(tmp_path))


def test_the_real_cells() -> None:
    path = Path(os.environ.get("HPCTRAIN_DATA") or "data") / "bccd_voc"
    if not path.is_dir():
        pytest.skip(f"no {path}: left out the check of BCCD itself")
    splits = bccd_crops()
    parts = (splits.train, splits.validation, splits.test)
    assert [part.targets.bincount().tolist() for part in parts] == [[2381, 214, 209], [967, 87, 83], [805, 71, 69]]
    images, _ = splits.train.gather(torch.arange(len(splits.train)))
    assert abs(float(images.mean())) < 0.01
    assert abs(float(images.std()) - 1) < 0.01
