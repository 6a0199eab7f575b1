"""Pascal VOC: Annotations/NAME.xml, JPEGImages/NAME.jpg, and lists of names in ImageSets/Main."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring
from PIL import Image

from hpctrain.errors import DataError
from hpctrain.ingest.picture import stored_picture
from hpctrain.ingest.reading import Column, Format, Item, LeftOut, Listing, Row

SPLITS = ("train", "val", "trainval", "test")
CORNERS = ("xmin", "ymin", "xmax", "ymax")
SUFFIXES = (".jpg", ".jpeg", ".png")
MOST_BYTES = 1 << 24  # of an annotation


class VOC(Format):
    """Boxes with classes. A box is left out, and its picture kept, if it is of an unknown class, has no area, or is not
    inside the picture."""

    kind = "voc"
    columns = (
        Column("boxes", "<f4", 4, offsets=True),  # left, top, right, bottom in the stored picture's pixels
        Column("labels", "<i4"),
        Column("difficult", "|u1"),
    )

    def listing(self, root: Path) -> Listing:
        places: dict[str, int] = {}
        listing = Listing()
        for split, names in _lists(root).items():
            listing.splits[split] = [places.setdefault(name, len(places)) for name in dict.fromkeys(names)]
        listing.items = [Item(name, f"JPEGImages/{name}") for name in places]
        return listing

    def picture(self, root: Path, item: Item) -> Path:
        files = [root / f"{item.picture}{suffix}" for suffix in SUFFIXES]
        return next((file for file in files if file.exists()), files[0])

    def opened(self, path: Path) -> Image.Image:
        """The picture as it is stored: boxes are of that, whatever EXIF says."""
        return stored_picture(path)

    def row(self, root: Path, item: Item, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Row, list[str]]:
        row: Row = {"boxes": [], "classes": [], "difficult": []}
        problems: list[str] = []
        for number, found in enumerate(_annotation(root / "Annotations" / f"{item.name}.xml").iter("object"), start=1):
            name = (found.findtext("name") or "").strip()
            try:
                box = self._box(found, name, size)
            except ValueError as error:
                problems.append(f"object {number} ({name or 'without a name'}) {error}; left out")
                continue
            row["boxes"].append([value * scale[place % 2] for place, value in enumerate(box)])
            row["classes"].append(name)
            row["difficult"].append(int((found.findtext("difficult") or "").strip() == "1"))
        return row, problems

    def _box(self, found: Element, name: str, size: tuple[int, int]) -> list[float]:
        """(left, top, right, bottom). Raises ValueError, saying what is wrong."""
        if not name or (self.classes is not None and name not in self.classes):
            raise ValueError("is of an unknown class")
        box = [_number(found.findtext(f"bndbox/{corner}"), corner) for corner in CORNERS]
        left, top, right, bottom = box
        place = ", ".join(f"{value:g}" for value in box)
        if left >= right or top >= bottom:
            raise ValueError(f"has a box without area ({place})")
        if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
            raise ValueError(f"has a box ({place}) that is not inside its picture of {size[0]} x {size[1]} pixels")
        return box

    def values(self, row: Row, numbers: Mapping[str, int]) -> dict[str, list[Any]]:
        labels = [numbers[name] for name in row["classes"]]
        return {"boxes": row["boxes"], "labels": labels, "difficult": row["difficult"]}

    def names(self, row: Row) -> Sequence[str]:
        names: list[str] = row["classes"]
        return names


def _lists(root: Path) -> dict[str, list[str]]:
    """The names of each split; without lists, all annotations are one split, `all`."""
    lists = {split: root / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    found = {split: _words(path) for split, path in lists.items() if path.is_file()}
    if found:
        return found
    if not (root / "Annotations").is_dir():
        raise DataError(f"{root}: no Pascal VOC; expected the folders Annotations, JPEGImages and ImageSets/Main")
    return {"all": sorted(path.stem for path in (root / "Annotations").glob("*.xml"))}


def _words(path: Path) -> list[str]:
    """The first word of each line."""
    lines = path.read_text(errors="replace").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


def _annotation(path: Path) -> Element:
    """The tree of an XML file. A document type is refused: entities could expand to any length. Raises LeftOut."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise LeftOut(f"its annotation has more than {MOST_BYTES:,} bytes")
        tree: Element = fromstring(path.read_bytes(), forbid_dtd=True)
        return tree
    except FileNotFoundError:
        raise LeftOut("its annotation is missing") from None
    except OSError as error:
        raise LeftOut(f"its annotation cannot be read ({error.strerror})") from None
    except DefusedXmlException:
        raise LeftOut("its annotation declares a document type, which could expand to any size") from None
    except (ParseError, ValueError, LookupError) as error:
        raise LeftOut(f"its annotation is not valid XML ({error})") from None


def _number(text: str | None, corner: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"has {corner} = {text!r}, which is not a number")
    return value
