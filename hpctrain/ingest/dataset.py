"""torch data sets over files that `hpctrain ingest` has made. `data.name = "ingested"` in a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpctrain.data.boxes import NO_LABEL
from hpctrain.data.splits import Splits
from hpctrain.errors import DataError
from hpctrain.ingest.store import About, not_ours, opened
from hpctrain.text import did_you_mean


def ingested(
    file: str, train_split: str | None = None, validation_split: str | None = None, test_split: str | None = None
) -> Splits:
    """The splits of a file made by `hpctrain ingest`; by default `train` (or `all`), `val` and `test`, if it has them.

    Samples are mappings (see `IngestedSet`) or, of a file of kind `folder`, pairs (image, label). Raises DataError.
    """
    path = Path(file)
    has = About.of(path).splits
    train = train_split or ("all" if "train" not in has and "all" in has else "train")
    names = (train, validation_split or _if_there("val", has), test_split or _if_there("test", has))
    return Splits(*(None if name is None else _samples(path, name) for name in names))


def _if_there(name: str, splits: dict[str, int]) -> str | None:
    return name if splits.get(name) else None


def _samples(path: Path, split: str) -> Dataset[Any]:
    samples = IngestedSet(path, split)
    return LabelledImages(samples) if samples.about.kind == "folder" else samples


class IngestedSet(Dataset[dict[str, Tensor]]):
    """The samples of a split, or of the whole file (`split` None), as dictionaries of tensors:

    - `image` (3, size, size) float32 from 0 to 1, `scale` (2,) float32: by what x and y were multiplied;
    - kind `voc`: `boxes` (most, 4) float32, left, top, right and bottom in pixels of the image, and `labels` (most,)
      int64, -1 where there is no further box; most: the largest number of boxes in the file;
    - kind `captions`: `captions` (most,) uint8, UTF-8 with a zero after each caption, and zeros at the end;
    - kind `folder`: `label`, int64.

    `classes`: their names, in the order of their numbers. The file is opened by the process that first reads a sample,
    also after a fork; a data set can be pickled. Several threads may read. Raises DataError if the file was not made by
    `hpctrain ingest` or has no such split.
    """

    def __init__(self, path: str | Path, split: str | None = None) -> None:
        self.path, self.split, self.about = Path(path), split, About.of(Path(path))
        if split is not None and split not in self.about.splits:
            guess, known = did_you_mean(split, self.about.splits), ", ".join(self.about.splits)
            raise DataError(f"{path} has no split {split!r}{guess}; it has {known}")
        self.classes = self.about.classes
        self._members: NDArray[np.int64] | None = None
        if split is not None:
            try:
                with opened(self.path) as file:
                    self._members = file[f"split_{split}"][:]
            except (OSError, RuntimeError, KeyError):
                raise not_ours(self.path) from None
        self._open: tuple[int, h5py.File] | None = None  # by which process, and the file

    def __len__(self) -> int:
        return self.about.samples if self._members is None else len(self._members)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        slot, file = self._slot(index), self._file()
        pixels = torch.from_numpy(file["pictures"][slot]).permute(2, 0, 1)
        sample = {
            "image": pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255),
            "scale": torch.from_numpy(file["scales"][slot].astype(np.float32)),
        }
        if self.about.kind == "folder":
            return sample | {"label": torch.tensor(int(file["labels"][slot]))}
        if self.about.kind == "captions":
            return sample | {"captions": self._padded("captions", slot, 0)}
        boxes = self._padded("boxes", slot, 0)
        first, last = (int(place) for place in file["boxes_offsets"][slot : slot + 2])
        labels = torch.full((len(boxes),), NO_LABEL, dtype=torch.int64)
        labels[: last - first] = torch.from_numpy(file["labels"][first:last].astype(np.int64))
        return sample | {"boxes": boxes, "labels": labels}

    def name(self, index: int) -> str:
        """The name of a sample: of its picture's file, or in its list."""
        return self._bytes("names", self._slot(index)).decode(errors="replace")

    def captions(self, index: int) -> list[str]:
        """The captions of a sample of kind `captions`, for tokenizers."""
        return self._bytes("captions", self._slot(index)).decode(errors="replace").split("\0")[:-1]

    def labels(self) -> NDArray[np.int64]:
        """The classes of all samples of kind `folder`, in their order."""
        found: NDArray[np.int64] = self._file()["labels"][:]
        return found if self._members is None else found[self._members]

    def _slot(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index %= len(self)
        return index if self._members is None else int(self._members[index])

    def _bytes(self, column: str, slot: int) -> bytes:
        return bytes(self._values(column, slot).tobytes())

    def _values(self, column: str, slot: int) -> NDArray[Any]:
        """What a sample has in a column with offsets."""
        file = self._file()
        first, last = file[f"{column}_offsets"][slot : slot + 2]
        values: NDArray[Any] = file[column][first:last]
        return values

    def _padded(self, column: str, slot: int, value: int) -> Tensor:
        """The same, as long as that of the sample that has most."""
        values = self._values(column, slot)
        padded = np.full((self.about.most[column], *values.shape[1:]), value, values.dtype)
        padded[: len(values)] = values
        return torch.from_numpy(padded)

    def _file(self) -> h5py.File:
        """This process's own handle: one that was inherited by a fork would share the parent's."""
        process, held = os.getpid(), self._open
        if held is None or held[0] != process:
            self._open = held = process, opened(self.path)
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}


class LabelledImages(Dataset[tuple[Tensor, Tensor]]):
    """The samples of kind `folder` as pairs (image, label), as classifiers take them. `targets`: all labels."""

    def __init__(self, samples: IngestedSet) -> None:
        self.samples, self.targets = samples, samples.labels()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        sample = self.samples[index]
        return sample["image"], sample["label"]
