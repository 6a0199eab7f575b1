"""BCCD: blood cells in microscope images, cut out along the boxes of its annotations (Pascal VOC), three classes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import torch
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from hpctrain.data.memory import Images
from hpctrain.data.options import data_folder, whole
from hpctrain.data.splits import Splits
from hpctrain.errors import DataError

CLASSES = ("RBC", "WBC", "Platelets")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MEAN, STD = 0.7016, 0.0802  # of the training crops, pixels from 0 to 1
LISTS = Path("ImageSets", "Main")

Box = tuple[int, int, int, int]


def bccd_crops(path: str | None = None, size: int = 32, limit: int | None = None) -> Splits:
    """2,804 crops to train on, 1,137 to validate and 945 to test on, as BCCD's own lists say (ImageSets/Main).

    (3, size, size) float32 with mean 0 and standard deviation 1; int64 classes 0 (red cells, 85 %), 1 (white cells) and
    2 (platelets). A crop is what a box contains, scaled to a square. Two boxes without area are left out.

    Searches in `bccd_voc/BCCD` and `BCCD` inside the folder `path`, and in `path` itself; without `path`, in the folder
    set by HPCTRAIN_DATA, else in `data`. `limit`: use only the first `limit` training crops. Raises DataError for files
    that are missing or corrupt.
    """
    side, first = whole("size", size), whole("limit", limit) if limit is not None else None
    folder = _find(data_folder(path))
    return Splits(*(_part(folder, part, side, first if part == "train" else None) for part in ("train", "val", "test")))


def _find(folder: Path) -> Path:
    for place in (folder / "bccd_voc" / "BCCD", folder / "BCCD", folder):
        if (place / LISTS).is_dir():
            return place
    raise DataError(
        f"no BCCD in {folder}: expected the folder bccd_voc/BCCD with Annotations, ImageSets and JPEGImages; put it "
        "there, or set data.path, or HPCTRAIN_DATA to the folder that contains bccd_voc/"
    )


def _part(folder: Path, part: str, size: int, limit: int | None) -> Images:
    crops, classes = list[NDArray[np.uint8]](), list[int]()
    for name in _bytes(folder / LISTS / f"{part}.txt").decode(errors="replace").split():
        if limit is not None and len(crops) >= limit:
            break
        boxes = list(_boxes(folder / "Annotations" / f"{name}.xml"))
        classes += [kind for kind, _ in boxes]
        crops += _cut(folder / "JPEGImages" / f"{name}.jpg", [box for _, box in boxes], size)
    if not crops:
        raise DataError(f"{folder / LISTS / f'{part}.txt'} names no image with a box; download BCCD again")
    pixels = torch.from_numpy(np.stack(crops[:limit])).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(classes[:limit]), MEAN, STD)


def _cut(path: Path, boxes: list[Box], size: int) -> list[NDArray[np.uint8]]:
    """(size, size, 3) pixels of each box."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read as an image ({error}); download it again") from None
    for box in boxes:
        if not (box[0] >= 0 and box[1] >= 0 and box[2] <= image.width and box[3] <= image.height):
            raise DataError(
                f"{path} has {image.width} by {image.height} pixels, but its annotation has the box {box}; "
                "download both from the same place"
            )
    scaled = [image.crop(box).resize((size, size), Image.Resampling.BILINEAR) for box in boxes]
    return [np.asarray(crop, dtype=np.uint8) for crop in scaled]


def _boxes(path: Path) -> Iterator[tuple[int, Box]]:
    """(class, box) of each object of an annotation; the right and the lower border are outside the box."""
    for found in _annotation(path).iter("object"):
        name = found.findtext("name") or ""
        if name not in CLASSES:
            raise DataError(f"{path}: an object is named {name!r}; expected {', '.join(CLASSES)}")
        left, top, right, bottom = (_place(path, found.findtext(f"bndbox/{corner}")) for corner in CORNERS)
        if left < right and top < bottom:
            yield CLASSES.index(name), (left, top, right, bottom)


def _place(path: Path, text: str | None) -> int:
    try:
        return int(text or "")
    except ValueError:
        raise DataError(f"{path}: a box has the corner {text!r}; expected whole numbers of pixels") from None


def _annotation(path: Path) -> Element:
    """The tree of an XML file. A document type is refused: entities could expand to any length."""
    try:
        tree: Element = fromstring(_bytes(path), forbid_dtd=True)
        return tree
    except DefusedXmlException:
        raise DataError(f"{path} declares a document type, which annotations do not have; download it again") from None
    except (ParseError, ValueError, LookupError) as error:
        raise DataError(f"{path} is not valid XML ({error}); download it again") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
