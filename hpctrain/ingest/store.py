"""The HDF5 file. Its bytes depend on the samples only: not on who read them, on interruptions, or on the time.

The pictures' data set has one chunk per sample, without filters, and all chunks are allocated when it is created: HDF5
then lays them one after the other and keeps no index ("implicit"). So the file's metadata never changes while pictures
are written, which is done without HDF5, at places known beforehand: a process that is killed leaves a valid file, with
holes where nothing has been written. All else is added at the end.

| data set | shape | |
|---|---|---|
| pictures | (n, size, size, 3) uint8 | RGB |
| sizes, scales | (n, 2) | width and height in the picture's file; what x and y were multiplied by |
| names, names_offsets | (bytes,), (n + 1,) | UTF-8; sample i has [offsets[i], offsets[i + 1]) |
| split_NAME | (any,) int64 | the samples of that split, in its order |
| problems | (bytes,) | UTF-8, a line each |
| about | (bytes,) | JSON: see `About` |
| the format's columns | | see voc, captions, folder |
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t

from hpctrain.errors import DataError
from hpctrain.ingest.reading import Column, Listing, Recipe, Row
from hpctrain.text import shown_path

VERSIONS = ("v110", "v110")  # of HDF5's format: the first with implicit indices
BLOCK = 1 << 12  # elements of a column that are written at once
FORMAT, COMMAND = "hpctrain ingest 1", "hpctrain ingest"
UNREADABLE = (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError)  # of h5py, for other files
COMMON = (Column("names", "|u1", offsets=True), Column("sizes", "<i4", 2), Column("scales", "<f8", 2))


@dataclass(frozen=True)
class About:
    """What a file says about itself. `most`: the largest number of elements that a sample has in each column with
    offsets; `counts`: samples or objects of each class; `fingerprint`: see `Recipe`."""

    format: str
    kind: str
    size: int
    fit: str
    samples: int
    classes: list[str]
    counts: list[int]
    splits: dict[str, int]
    most: dict[str, int]
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> About:
        """What that file says. Raises DataError if it is none of ours."""
        return read_about(cls, path, FORMAT, COMMAND)


class Described(Protocol):
    """What a file says about itself; `format`: which kind of file it is."""

    @property
    def format(self) -> str: ...


Kind = TypeVar("Kind", bound=Described)


def read_about(kind: Callable[..., Kind], path: Path, format: str, command: str) -> Kind:
    """What the file says about itself, in its data set `about`. `format`: which it must have; `command`: what makes
    such files. Raises DataError if it is another file."""
    try:
        with opened(path) as file:
            found = kind(**json.loads(file["about"][:].tobytes()))
    except FileNotFoundError:
        raise DataError(f"{shown_path(path)}: there is no such file; `{command}` makes one") from None
    except UNREADABLE:
        raise not_ours(path, command) from None
    if found.format != format:
        raise DataError(f"{shown_path(path)} has the format {found.format!r}, not {format!r}; make it again")
    return found


def not_ours(path: Path, command: str = COMMAND) -> DataError:
    """For a file that cannot be read, although `command` seems to have made it."""
    return DataError(
        f"{shown_path(path)} was not made by `{command}`, or is damaged; make it again, or name another file"
    )


def opened(path: Path) -> h5py.File:
    """The file for reading; not locked, as some parallel file systems cannot."""
    return h5py.File(path, "r", locking=False)


class PictureFile:
    """Writes pictures into a file that is being made. A context manager."""

    def __init__(self, path: Path, count: int, size: int) -> None:
        """Create the file for at most `count` pictures; pictures that it already has stay.

        Metadata that an interrupted `complete` has changed becomes what it was.
        """
        self.path, self._bytes, fresh = path, 3 * size * size, path.with_name(f"{path.name}.new")
        try:
            self._start = _create(fresh, count, size)
            if path.exists():
                _reset(path, fresh, self._start, self._start + count * self._bytes)
            else:
                os.replace(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
        self._file = os.open(path, os.O_RDWR)

    def write(self, slot: int, pixels: bytes) -> None:
        """Write picture number `slot`."""
        place, left = self._start + slot * self._bytes, memoryview(pixels)
        while left:
            done = os.pwrite(self._file, left, place)
            place, left = place + done, left[done:]

    def sync(self) -> None:
        """Wait until all pictures are on the disk."""
        os.fdatasync(self._file)

    def __enter__(self) -> PictureFile:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._file)


def _create(path: Path, count: int, size: int) -> int:
    """Create a file for that many pictures; returns where the first one begins. The others follow it immediately."""
    shape, properties = (count, size, size, 3), h5p.create(h5p.DATASET_CREATE)
    properties.set_chunk((1, size, size, 3))
    properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    with h5py.File(path, "w", libver=VERSIONS, locking=False) as file:
        h5d.create(file.id, b"pictures", h5t.STD_U8LE, h5s.create_simple(shape, shape), properties)
        where = file["pictures"].id
        first, last = (int(where.get_chunk_info_by_coord((slot, 0, 0, 0)).byte_offset) for slot in (0, count - 1))
        if last - first != (count - 1) * 3 * size * size:
            raise RuntimeError("this HDF5 does not lay chunks one after the other")
    return first


def _reset(path: Path, fresh: Path, start: int, stop: int) -> None:
    """Make all of a file but the bytes [start, stop) what they are in `fresh`."""
    with open(path, "r+b") as file, open(fresh, "rb") as source:
        file.truncate(stop)
        file.write(source.read(start))
        file.seek(stop)
        source.seek(stop)
        shutil.copyfileobj(source, file)
        file.truncate(fresh.stat().st_size)


Rows = Callable[[], Iterator[tuple[str, Row | None, Sequence[str]]]]  # name, row (None: left out), problems: per item


def complete(path: Path, listing: Listing, recipe: Recipe, fingerprint: str, rows: Rows) -> None:
    """Add all that is not pixels, and wait until the file is on the disk. Reads `rows()` twice: first to see which
    classes there are."""
    with h5py.File(path, "r+", libver=VERSIONS, locking=False) as file:
        form, classes = recipe.format, recipe.format.classes
        if classes is None:
            classes = tuple(sorted({name for _, row, _ in rows() if row is not None for name in form.names(row)}))
        numbers = {name: number for number, name in enumerate(classes)}
        counts, slots = [0] * len(classes), np.full(len(listing.items), -1, np.int64)
        writers = {each.name: ColumnWriter(file, each) for each in (*COMMON, *form.columns)}
        problems, kept = ColumnWriter(file, Column("problems", "|u1")), 0
        problems.add(_lines(listing.problems))
        for place, (name, row, found) in enumerate(rows()):
            problems.add(_lines(found))
            if row is None:
                continue
            values = {"names": _text(name), "sizes": [row["size"]], "scales": [row["scale"]]}
            for column, added in (values | form.values(row, numbers)).items():
                writers[column].add(added)
            for each in form.names(row):
                counts[numbers[each]] += 1
            slots[place], kept = kept, kept + 1
        for writer in (*writers.values(), problems):
            writer.close()
        splits = {}
        for split, items in listing.splits.items():
            members = slots[np.asarray(items, np.int64)]
            members = members[members >= 0]
            name = split.replace("/", "_")
            file.create_dataset(f"split_{name}", data=members, track_times=False)
            splits[name] = len(members)
        pictures = file["pictures"]
        size = pictures.shape[1]
        pictures.id.set_extent((kept, size, size, 3))
        most = {name: writer.most for name, writer in writers.items() if writer.column.offsets}
        about = About(FORMAT, form.kind, size, recipe.fit, kept, list(classes), counts, splits, most, fingerprint)
        text = json.dumps(asdict(about)).encode()
        file.create_dataset("about", data=np.frombuffer(text, np.uint8), track_times=False)
    with open(path, "rb") as written:
        os.fsync(written.fileno())


class ColumnWriter:
    """Appends a sample's values at a time to a column of a file. `most`: the largest number that a sample had."""

    def __init__(self, file: h5py.File, column: Column) -> None:
        self.column, self.most, self._added = column, 0, 0
        self._waiting: list[Any] = []
        self._offsets = ColumnWriter(file, Column(f"{column.name}_offsets", "<i8")) if column.offsets else None
        rest = () if column.width == 1 else (column.width,)
        chunks, most = (BLOCK // column.width, *rest), (None, *rest)
        self._data = file.create_dataset(
            column.name, (0, *rest), column.dtype, maxshape=most, chunks=chunks, track_times=False
        )
        if self._offsets is not None:
            self._offsets.add([0])

    def add(self, values: list[Any]) -> None:
        """Append what one sample has."""
        self._waiting += values
        self._added += len(values)
        self.most = max(self.most, len(values))
        if self._offsets is not None:
            self._offsets.add([self._added])
        while len(self._waiting) >= BLOCK:
            self._write(self._waiting[:BLOCK])
            del self._waiting[:BLOCK]

    def close(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._write(self._waiting)
        if self._offsets is not None:
            self._offsets.close()

    def _write(self, values: list[Any]) -> None:
        before = self._data.shape[0]
        self._data.resize(before + len(values), axis=0)
        self._data[before:] = np.asarray(values, self.column.dtype)


def problems_of(path: Path) -> list[str]:
    """The problems that were found when the file was made."""
    with opened(path) as file:
        return str(file["problems"][:].tobytes().decode(errors="replace")).splitlines()


def _text(text: str) -> list[int]:
    return list(text.encode(errors="replace"))


def _lines(texts: Iterable[str]) -> list[int]:
    return _text("".join(f"{' '.join(text.splitlines())}\n" for text in texts))
