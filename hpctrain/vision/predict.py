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
from hpctrain.ingest.picture import FITS, Fitted, fitted
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
    run's data set, which must then be there. Raises DataError for a folder that is no detection run, CheckpointError
    for a model that cannot be loaded.
    """

    def __init__(self, folder: Path, size: int | None = None, fit: str | None = None) -> None:
        self._parts = saved_model(folder)
        job, about = self._parts.job, about_data(self._parts.job)
        side = size or (about.size if about is not None else None)
        _try_out(self._parts, side or TRIED, folder)
        if side is None:
            raise DataError(f"{_unknown_size(job)}; give it with --size")
        self._side, self._fit = side, fit or (about.fit if about is not None else next(iter(FITS)))
        named = job.metric.options.get("classes")
        known = named if isinstance(named, list) else about.classes if about is not None else []
        self._names: Sequence[object] = known

    def detections(self, picture: Image.Image, threshold: float) -> list[Detection]:
        """What the model finds in a picture (RGB) with at least that score, the best first."""
        small = fitted(picture, self._side, self._fit)
        with torch.no_grad():
            found = _outputs(self._parts, _tensor(small, self._side))
        boxes, scores, labels = (found[key][0].cpu() for key in KEYS)
        limits = torch.tensor(picture.size * 2, dtype=torch.float64)
        boxes = torch.minimum((boxes.double() / torch.tensor(small.scale * 2)).clamp(min=0), limits)
        kept = (scores >= threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        order = scores[kept].argsort(descending=True, stable=True)
        rows = zip(labels[kept][order].tolist(), scores[kept][order].tolist(), boxes[kept][order].tolist(), strict=True)
        return [Detection(self._name(number), number, score, tuple(box)) for number, score, box in rows]

    def _name(self, number: int) -> str:
        return str(self._names[number]) if 0 <= number < len(self._names) else f"class {number}"


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


def _unknown_size(job: Job) -> str:
    file = ingested_file(job)
    if file is None:
        return f"data.name = {job.data.name!r} does not say how large its pictures are"
    return f"{shown_path(file)}, which says how large the run's pictures are, is not there"
