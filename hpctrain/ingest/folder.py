"""A folder per class (torchvision's ImageFolder), or folders train, val, test ... with a folder per class each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpctrain.errors import DataError
from hpctrain.ingest.reading import Column, Format, Item, Listing, Row

SPLITS = ("train", "val", "valid", "validation", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ClassFolders(Format):
    """One class per picture: the name of its folder. Files with other suffixes than pictures have are ignored."""

    kind = "folder"
    columns = (Column("labels", "<i8"),)

    def listing(self, root: Path) -> Listing:
        listing, tops = Listing(), _folders(root)
        parts = {name: Path(name) for name in tops} if tops and set(tops) <= set(SPLITS) else {"all": Path()}
        for split, place in parts.items():
            listing.splits[split] = []
            for name in _folders(root / place):
                if self.classes is not None and name not in self.classes:
                    listing.problems.append(f"{place / name}: the folder is of an unknown class; left out")
                    continue
                for file in _pictures(root / place / name):
                    path = str(place / name / file)
                    listing.add(split, Item(path, path, name))
        if not tops:
            raise DataError(f"{root}: no folders of classes; expected a folder per class, with its pictures")
        return listing

    def row(self, root: Path, item: Item, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Row, list[str]]:
        return {"class": item.about}, []

    def values(self, row: Row, numbers: Mapping[str, int]) -> dict[str, list[Any]]:
        return {"labels": [numbers[row["class"]]]}

    def names(self, row: Row) -> Sequence[str]:
        return (row["class"],)


def _folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[str]:
    """Paths of the pictures in a folder and its folders, relative to it."""
    found = []
    for place, folders, files in os.walk(folder):
        folders.sort()
        inside = os.path.relpath(place, folder)
        found += [os.path.normpath(os.path.join(inside, name)) for name in files if name.lower().endswith(SUFFIXES)]
    return sorted(found)
