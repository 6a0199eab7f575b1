"""Captions to train and to evaluate on, with features of their pictures. `data.name = "captions"` in a job."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hpctrain.data.options import whole
from hpctrain.data.splits import Splits
from hpctrain.data.vocabulary import Vocabulary
from hpctrain.errors import DataError
from hpctrain.filenames import MOST_EXAMPLES
from hpctrain.ingest.store import About, opened
from hpctrain.text import did_you_mean, shown_path
from hpctrain.vision.featurefile import FeatureFile

FOLDS = 5
Sample = tuple[dict[str, Tensor], None]


def captions(
    file: str,
    fold: int | None = None,
    folds: int | None = None,
    min_count: int = 1,
    length: int | None = None,
    train_split: str | None = None,
    validation_split: str | None = None,
    test_split: str | None = None,
) -> Splits:
    """The splits of a file made by `hpctrain features`: to train, one sample per caption (`CaptionSet`); to validate
    and to test, one per picture (`PictureSet`).

    By default `train`, `val` and `test`, or what begins so (`train2017`). `fold`: instead, of all pictures but those to
    test on, number fold, fold + folds, fold + 2 folds ... (default: 5 folds) are to validate and the others to train.
    `min_count`: words that occur less often in the training captions are unknown; `length`: words at most (default: the
    longest training caption). Raises DataError.
    """
    if fold is None and folds is not None:
        raise DataError(f"data.folds = {folds!r} without data.fold: set data.fold = 0 or another, or leave it out")
    known, named = FeatureFile(Path(file)), (train_split, validation_split, test_split)
    train, *others = _splits(known, *named) if fold is None else _folds(known, fold, folds, *named)
    own = [text for picture in train for text in known.captions[picture]]
    longest = None if length is None else whole("length", length)
    words = Vocabulary.of(own, whole("min_count", min_count), longest, known.about.recipe)
    return Splits(
        CaptionSet(known, train, words), *(PictureSet(known, part, words) if len(part) else None for part in others)
    )


def _splits(known: FeatureFile, *names: str | None) -> list[NDArray[np.int64]]:
    """The pictures to train, to validate and to test on; none where there is no such split."""
    found = [_split(known, name, start) for name, start in zip(names, ("train", "val", "test"), strict=True)]
    if not len(found[0]):
        has = known.about.splits
        raise DataError(
            f"{shown_path(known.path)} has no pictures to train on among its splits ({', '.join(has)}); name one with "
            "data.train_split, or set data.fold = 0 to hold back a fifth of all pictures"
        )
    return found


def _split(known: FeatureFile, name: str | None, start: str) -> NDArray[np.int64]:
    """The pictures of the split `name`, or of that which is called `start` or begins so; none if there is no such."""
    has = known.about.splits
    if name is not None and name not in has:
        guess = did_you_mean(name, has)
        raise DataError(f"{shown_path(known.path)} has no split {name!r}{guess}; it has {', '.join(has)}")
    name = name or (start if start in has else next((split for split in has if split.startswith(start)), None))
    return np.zeros(0, np.int64) if name is None else known.split(name)


def _folds(known: FeatureFile, fold: int, folds: int | None, *names: str | None) -> list[NDArray[np.int64]]:
    """The pictures to train, to validate and to test on; of the names of splits only that to test on may be given."""
    for key, name in zip(("train_split", "validation_split"), names, strict=False):
        if name is not None:
            raise DataError(f"data.fold = {fold!r} and data.{key} = {name!r} both say what to train on; leave one out")
    test = _split(known, names[-1], "test")
    pictures = np.setdiff1d(np.arange(known.about.samples), test)
    count, folds = len(pictures), FOLDS if folds is None else folds
    if whole("folds", folds) < 2 or folds > count:
        raise DataError(f"data.folds = {folds}: expected a number from 2 to {count}, the number of pictures")
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < folds:
        raise DataError(f"data.fold = {fold!r}: expected a number from 0 to {folds - 1} (data.folds = {folds})")
    held = np.arange(count) % folds == fold
    return [pictures[~held], pictures[held], test]


class CaptionSet(Dataset[Sample]):
    """Every caption of some pictures: mappings of `features` (width,) float32, `tokens` (length + 2,) int64
    (`Vocabulary.encode`), and `vocabulary` (bytes,) uint8. In a batch the vocabulary has no dimension for samples."""

    def __init__(self, known: FeatureFile, pictures: NDArray[np.int64], words: Vocabulary) -> None:
        texts = [known.captions[picture] for picture in pictures]
        self.known, self.vocabulary, self._packed = known, words, words.packed()
        self.pictures = np.repeat(pictures, [len(each) for each in texts])  # of each caption
        self._tokens = words.encode([text for each in texts for text in each])

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Sample:
        batch, _ = self.gather(torch.tensor([index]))
        return {key: value if key == "vocabulary" else value[0] for key, value in batch.items()}, None

    def gather(self, indices: Tensor) -> Sample:
        """The samples at `indices` (int64, one-dimensional) as one batch."""
        features = torch.from_numpy(self.known.features[self.pictures[indices.numpy()]])
        return {"features": features, "tokens": self._tokens[indices], "vocabulary": self._packed}, None


class PictureSet(Dataset[Sample]):
    """Some pictures with all their captions: mappings as those of `CaptionSet`, but `tokens` is (most, length + 2),
    with rows of PAD if there are fewer captions than of other pictures, and besides:

    - `captions` (bytes,) uint8: UTF-8, a zero after each, and zeros at the end; `name` likewise: the picture's;
    - in a batch, `pictures` (m, size, size, 3) uint8: of its first m samples, those among the first `MOST_EXAMPLES` of
      the data set; none if the file that `hpctrain features` has read is no longer there.
    """

    def __init__(self, known: FeatureFile, pictures: NDArray[np.int64], words: Vocabulary) -> None:
        self.known, self.numbers, self.vocabulary, self._packed = known, pictures, words, words.packed()
        self.captions = [known.captions[picture] for picture in pictures]
        most = max(map(len, self.captions))
        self._tokens = torch.zeros(len(pictures), most, words.length + 2, dtype=torch.int64)
        for row, texts in zip(self._tokens, self.captions, strict=True):
            row[: len(texts)] = words.encode(texts)
        self._texts = _bytes(["".join(f"{text}\0" for text in texts) for texts in self.captions])
        self._names = _bytes([known.names[picture] for picture in pictures])
        self._pictures = _first(known, pictures[:MOST_EXAMPLES])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Sample:
        batch, _ = self.gather(torch.tensor([index]))
        return {key: value if key in ("vocabulary", "pictures") else value[0] for key, value in batch.items()}, None

    def gather(self, indices: Tensor) -> Sample:
        """The samples at `indices` (int64, one-dimensional) as one batch."""
        shown = indices[(indices < len(self._pictures)).int().cumprod(0).bool()]
        values = {"tokens": self._tokens, "captions": self._texts, "name": self._names}
        return {
            "features": torch.from_numpy(self.known.features[self.numbers[indices.numpy()]]),
            **{key: value[indices] for key, value in values.items()},
            "vocabulary": self._packed,
            "pictures": self._pictures[shown],
        }, None


def texts_of(row: Tensor) -> list[str]:
    """The texts in a row of zeros and UTF-8 (`captions` or `name` of a batch)."""
    return [part.decode(errors="replace") for part in bytes(row.cpu().numpy()).split(b"\0") if part]


def _bytes(texts: Sequence[str]) -> Tensor:
    """(n, bytes of the longest) uint8, zeros at the end."""
    rows = [np.frombuffer(text.encode(), np.uint8) for text in texts]
    found = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.uint8)
    for place, row in zip(found, rows, strict=True):
        place[: len(row)] = torch.from_numpy(row.copy())
    return found


def _first(known: FeatureFile, pictures: NDArray[Any]) -> Tensor:
    """These pictures, if the file they were in is still what it was; else none."""
    size = known.about.size
    try:
        if About.of(known.pictures).fingerprint != known.about.source:
            raise DataError("another file")
        with opened(known.pictures) as file:
            return torch.from_numpy(file["pictures"][pictures])
    except (DataError, OSError, KeyError):
        return torch.zeros(0, size, size, 3, dtype=torch.uint8)
