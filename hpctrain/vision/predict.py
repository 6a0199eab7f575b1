"""Detections of a run's model in pictures: boxes in pixels of the picture itself, whatever its size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hpctrain.data.loader import Batch
from hpctrain.errors import DataError, HpctrainError
from hpctrain.ingest.picture import Fitted, fitted
from hpctrain.ingest.store import About
from hpctrain.ingest.voc import VOC
from hpctrain.job import Job
from hpctrain.run.prepare import Measurable
from hpctrain.text import shown, shown_path
from hpctrain.vision.saved import about_data, ingested_file, saved_model

KEYS = "boxes", "scores", "labels"  # what a detector returns
TRIED = 64  # side of the blank picture that a model is tried on if the size of its pictures is not known


@dataclass(frozen=True)
class Detection:
    """An object that was found: its class (`label`, and its `number`), the score from 0 to 1, and its box: left, top,
    right, bottom in pixels of the picture."""

    label: str
    number: int
    score: float
    box: tuple[float, float, float, float]


class Predictor:
    """The detector of a run, used on one picture at a time.

    `size`, `fit`: how pictures are brought to the size that the model takes, as `hpctrain ingest` does; None: as in the
    run's data set, which must then be there. Classes have the names in the job's metric.classes, or else those in the
    data set. Raises DataError for a folder that is no detection run, and for a data set that is not the run's,
    CheckpointError for a model that cannot be loaded.
    """

    def __init__(self, folder: Path, size: int | None = None, fit: str | None = None) -> None:
        self._parts = saved_model(folder)
        job = self._parts.job
        self._names = _named_classes(job)
        about = None if size and fit and self._names else about_data(job)
        _try_out(self._parts, size or (about.size if about is not None else TRIED), folder)
        if about is not None:
            _check_data(job, about, self._names)
            size, fit, self._names = size or about.size, fit or about.fit, about.classes
        if size is None or fit is None:
            raise DataError(f"{_unknown_size(job)}; give it with --size and --fit")
        self._side, self._fit = size, fit

    def detections(self, picture: Image.Image, threshold: float) -> list[Detection]:
        """What the model finds in a picture (RGB) with at least that score, and more than 0, the best first."""
        small = fitted(picture, self._side, self._fit)
        with torch.no_grad():
            found = _outputs(self._parts, _tensor(small, self._side))
        boxes, scores, labels = (found[key][0].cpu() for key in KEYS)
        limits = torch.tensor(picture.size * 2, dtype=torch.float64)
        boxes = torch.minimum((boxes.double() / torch.tensor(small.scale * 2)).clamp(min=0), limits)
        kept = (scores > 0) & (scores >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        order = scores[kept].argsort(descending=True, stable=True)
        rows = zip(labels[kept][order].tolist(), scores[kept][order].tolist(), boxes[kept][order].tolist(), strict=True)
        return [Detection(self._name(number), number, score, tuple(box)) for number, score, box in rows]

    def _name(self, number: int) -> str:
        return self._names[number] if 0 <= number < len(self._names) else f"class {number}"


def _tensor(small: Fitted, side: int) -> Tensor:
    """(1, 3, side, side) from 0 to 1, as the samples of a data set."""
    pixels = torch.frombuffer(bytearray(small.pixels), dtype=torch.uint8).view(side, side, 3)
    return pixels.permute(2, 0, 1)[None].to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _outputs(parts: Measurable, image: Tensor) -> Any:
    batch = parts.move(Batch({"image": image}, None, len(image)))
    with parts.autocast():
        return parts.model(**batch.inputs)


def _try_out(parts: Measurable, side: int, folder: Path) -> None:
    """Raise DataError unless the model finds boxes in a blank picture, or none."""
    what = f"{shown_path(folder)} is not a detection run: its model ({shown(parts.job.model.name)})"
    try:
        with torch.no_grad():
            found = _outputs(parts, torch.zeros(1, 3, side, side))
    except HpctrainError:
        raise
    except Exception as error:  # of a model that takes something else, it may be any
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{what} cannot be called with a picture ({text})") from None
    if not isinstance(found, Mapping) or not all(isinstance(found.get(key), Tensor) for key in KEYS):
        keys = f"the keys {', '.join(map(str, found))}" if isinstance(found, Mapping) else f"a {type(found).__name__}"
        raise DataError(f"{what} returned {keys} instead of {', '.join(KEYS)}")


def _named_classes(job: Job) -> list[str]:
    """The job's metric.classes; empty if there are none."""
    named = job.metric.options.get("classes")
    return list(map(str, named)) if isinstance(named, list) else []


def _check_data(job: Job, about: About, named: Sequence[str]) -> None:
    """Raise DataError if the file at data.file is not what the run had: another one may lie there by now, or in the
    current folder."""
    file = f"{shown_path(Path(str(job.data.options['file'])))}, the run's data.file,"
    advice = "call the command in the folder where the run was started, or give --size and --fit"
    if about.kind != VOC.kind:
        raise DataError(f"{file} was made by `hpctrain ingest {about.kind}`, not by `... {VOC.kind}`; {advice}")
    if named and list(named) != about.classes:
        theirs, ours = (shown(", ".join(names), 200) for names in (about.classes, named))
        raise DataError(f"{file} has the classes {theirs}, but the run's metric.classes are {ours}; {advice}")


def _unknown_size(job: Job) -> str:
    file = ingested_file(job)
    if file is None:
        return f"data.name = {job.data.name!r} does not say how large its pictures are"
    return f"{shown_path(file)}, which says how large the run's pictures are, is not there"
