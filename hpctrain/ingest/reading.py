"""What is to be read, and what reading gives. All of it can be pickled: it goes to other processes and ranks."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from hpctrain.ingest.picture import fitted, upright_picture

VERSION = 2  # of the file's layout, and of how pictures are read

Row = dict[str, Any]  # plain values, as JSON has them


class LeftOut(Exception):
    """This sample cannot be part of the data set; the message says why."""


@dataclass(frozen=True, slots=True)
class Item:
    """A sample to read: its name, unique in the data set; its picture, relative to the source; what else its format
    knows about it (plain values)."""

    name: str
    picture: str
    about: Any = None


@dataclass
class Listing:
    """All samples to read, in their order in the file, and the numbers of those in each split. `problems`: what was
    found to be wrong before any picture is read."""

    items: list[Item] = field(default_factory=list)
    splits: dict[str, list[int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, split: str, item: Item) -> None:
        """Add a sample, which is in that split only."""
        self.splits.setdefault(split, []).append(len(self.items))
        self.items.append(item)


@dataclass(frozen=True)
class Column:
    """Values of all samples, one after the other: `name` (n, width), or (n,) for width 1. `offsets`: a second data set
    says where each sample's begin."""

    name: str
    dtype: str
    width: int = 1
    offsets: bool = False


class Format(ABC):
    """How pictures and annotations lie in a folder."""

    kind: ClassVar[str]
    columns: ClassVar[tuple[Column, ...]]

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        self.classes = None if classes is None else tuple(classes)

    @abstractmethod
    def listing(self, root: Path) -> Listing:
        """What there is to read. Raises DataError if the folder is not of this format."""

    def picture(self, root: Path, item: Item) -> Path:
        """The file of that picture."""
        return root / item.picture

    def opened(self, path: Path) -> Image.Image:
        """The picture in that file, as RGB. Raises ValueError, saying what is wrong, if it cannot be read."""
        return upright_picture(path)

    @abstractmethod
    def row(self, root: Path, item: Item, size: tuple[int, int], scale: tuple[float, float]) -> tuple[Row, list[str]]:
        """The annotation of a picture of that size in pixels (width, height), scaled; and what is wrong with it. Raises
        LeftOut."""

    @abstractmethod
    def values(self, row: Row, numbers: Mapping[str, int]) -> dict[str, list[Any]]:
        """What a sample appends to each of `columns`; `numbers`: of the classes."""

    def names(self, row: Row) -> Sequence[str]:
        """The classes that a row has."""
        return ()


@dataclass(frozen=True)
class Reading:
    """What became of an item: pixels (size * size * 3 bytes) and a row, or None if it is left out."""

    name: str
    pixels: bytes | None
    row: Row | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """How items are read. `size`: side of the pictures in pixels; `fit`: a name in `picture.FITS`."""

    root: Path
    format: Format
    size: int
    fit: str

    def read(self, items: Sequence[Item]) -> list[Reading]:
        """Read some items. Never raises an error because of what is in a file."""
        return [self._read(item) for item in items]

    def _read(self, item: Item) -> Reading:
        try:
            picture = fitted(self._picture(item), self.size, self.fit)
            row, problems = self.format.row(self.root, item, picture.size, picture.scale)
        except (LeftOut, ValueError, OSError) as error:  # OSError: a folder that may not be searched, a name too long
            return Reading(item.name, None, None, (f"{item.name}: {error}; left out",))
        row |= {"size": picture.size, "scale": picture.scale}
        return Reading(item.name, picture.pixels, row, tuple(f"{item.name}: {text}" for text in problems))

    def _picture(self, item: Item) -> Image.Image:
        try:
            return self.format.opened(self.format.picture(self.root, item))
        except ValueError as error:
            raise LeftOut(f"its picture {error}") from None

    def fingerprint(self, listing: Listing) -> str:
        """Equal for data sets that are made of the same names and annotations in the same way, whatever their place."""
        head = [VERSION, self.format.kind, self.format.classes, self.size, self.fit, listing.splits, listing.problems]
        made = hashlib.sha256(json.dumps(head).encode())
        for item in listing.items:
            made.update(json.dumps([item.name, item.picture, item.about]).encode())
        return made.hexdigest()


def batches(items: Sequence[Item], start: int, size: int) -> Iterator[Sequence[Item]]:
    """The items from `start` on, `size` at a time."""
    for place in range(start, len(items), size):
        yield items[place : place + size]
