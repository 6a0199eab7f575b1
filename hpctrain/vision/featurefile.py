"""The HDF5 file of `hpctrain features`: what a net sees in each picture, and the captions.

| data set | shape | |
|---|---|---|
| features | (n, width) float32 | one after the other in the file, so that processes can map them |
| names, captions; each with `_offsets` | (bytes,), (n + 1,) | as `hpctrain ingest captions` writes them |
| split_NAME | (any,) int64 | the pictures of that split |
| about | (bytes,) | JSON: see `FeatureAbout` |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5p, h5s, h5t
from numpy.typing import NDArray

from hpctrain.errors import DataError
from hpctrain.ingest.store import UNREADABLE, VERSIONS, not_ours, opened, read_about
from hpctrain.text import shown_path

FORMAT, COMMAND = "hpctrain features 1", "hpctrain features"
COPIED = "names", "captions"


@dataclass(frozen=True)
class FeatureAbout:
    """What a file says about itself. `pictures`: the file of `hpctrain ingest`, relative to this one; `source`: that
    file's fingerprint; `weights`: a hash of the net's; `fingerprint`: equal for files that were made alike."""

    format: str
    pictures: str
    source: str
    backbone: str
    weights: str
    size: int
    fit: str
    width: int
    samples: int
    splits: dict[str, int]
    fingerprint: str

    @classmethod
    def of(cls, path: Path) -> FeatureAbout:
        """What that file says. Raises DataError if it is none of ours."""
        return read_about(cls, path, FORMAT, COMMAND)

    @property
    def recipe(self) -> dict[str, Any]:
        """How a picture becomes features: what another picture needs for the same model."""
        return {"backbone": self.backbone, "weights": self.weights, "size": self.size, "fit": self.fit}


class FeatureFile:
    """A file that `hpctrain features` has made. `features` (n, width) float32 are mapped from it: processes of a node
    share the memory. `captions[i]`, `names[i]`: of picture i. Raises DataError if it is none."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.about = Path(path), FeatureAbout.of(Path(path))
        with opened(self.path) as file:
            try:
                data = file["features"]
                place, shape = data.id.get_offset(), (self.about.samples, self.about.width)
                names, captions = (_texts(file, column) for column in COPIED)
                self._splits = {name: _members(file, name, shape[0]) for name in self.about.splits}
                if place is None or data.shape != shape or data.dtype != np.float32:
                    raise ValueError
                if not len(names) == len(captions) == shape[0]:
                    raise ValueError
            except UNREADABLE:
                raise not_ours(self.path, COMMAND) from None
        self.features: NDArray[np.float32] = np.memmap(self.path, np.float32, "r", place, shape)
        self.names, self.captions = names, [text.split("\0")[:-1] for text in captions]

    def split(self, name: str) -> NDArray[np.int64]:
        """The pictures of that split. Raises KeyError."""
        return self._splits[name]

    @property
    def pictures(self) -> Path:
        """Where the file of pictures was, relative to this one."""
        return self.path.parent / self.about.pictures


def _members(file: h5py.File, split: str, samples: int) -> NDArray[np.int64]:
    """The pictures of a split, of so many. Raises ValueError if it has others."""
    found: NDArray[np.int64] = file[f"split_{split}"][:].astype(np.int64)
    if len(found) and not 0 <= found.min() <= found.max() < samples:
        raise ValueError
    return found


def _texts(file: h5py.File, column: str) -> list[str]:
    whole, offsets = file[column][:].tobytes(), file[f"{column}_offsets"][:]
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return [whole[first:last].decode(errors="replace") for first, last in pairs]


@contextmanager
def readable(source: Path) -> Iterator[None]:
    """Errors of the block are those of the file `source` that `hpctrain ingest` has made: they become DataErrors."""
    try:
        yield
    except (OSError, RuntimeError, KeyError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else "it is damaged"
        raise DataError(
            f"{shown_path(source)} cannot be read ({reason}); make it again with `hpctrain ingest captions`"
        ) from None


class FeatureWriter:
    """Writes such a file from the one it is made of, `source`; its bytes do not depend on time. A context manager."""

    def __init__(self, path: Path, about: FeatureAbout, source: Path) -> None:
        """Raises DataError if the source cannot be read, OSError if the file cannot be written."""
        columns = [each for column in COPIED for each in (column, f"{column}_offsets")]
        with readable(source), opened(source) as known:
            copied = {name: known[name][:] for name in (*columns, *(f"split_{split}" for split in about.splits))}
        self._file = h5py.File(path, "w", libver=VERSIONS, locking=False)
        shape, properties = (about.samples, about.width), h5p.create(h5p.DATASET_CREATE)
        properties.set_layout(h5d.CONTIGUOUS)
        properties.set_alloc_time(h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5d.FILL_TIME_NEVER)
        properties.set_obj_track_times(False)
        h5d.create(self._file.id, b"features", h5t.IEEE_F32LE, h5s.create_simple(shape, shape), properties)
        for name, values in copied.items():
            self._file.create_dataset(name, data=values, track_times=False)
        text = np.frombuffer(json.dumps(asdict(about)).encode(), np.uint8)
        self._file.create_dataset("about", data=text, track_times=False)

    def write(self, place: int, features: NDArray[np.float32]) -> None:
        """Those of the pictures from number `place` on."""
        self._file["features"][place : place + len(features)] = features

    def __enter__(self) -> FeatureWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
