"""Examples: a few samples with what the model makes of them, for people to look at in a report.

A metric or an evaluation of a job's own (a class) may have the method `examples()`. It is called on rank 0, after the
last `update` and before `merge`, and returns `Example` objects for samples that rank 0 has seen, which are the first of
the data set.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hpctrain.errors import ModelError
from hpctrain.filenames import MOST_BOXES

MOST_LINES = 20  # of an example's truth
MOST_TEXT, MOST_LABEL = 2000, 100  # characters
MOST_PIXELS = 320  # of the longer side of a picture in a report
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Box:
    """A box in pixels of the example's picture. `score`: from 0 to 1, or None for a box of the annotation."""

    left: float
    top: float
    right: float
    bottom: float
    label: str = ""
    score: float | None = None


@dataclass(frozen=True)
class Example:
    """A sample and what the model makes of it.

    `picture`: (height, width, 3) uint8, or a tensor (3, height, width), uint8 or from 0 to 1; None: without one.
    `text`: what the model says, such as a caption; `truth`: what it should have said, a line each.
    """

    name: str
    picture: Any = None
    boxes: Sequence[Box] = ()
    text: str = ""
    truth: Sequence[str] = ()


def plain(example: Example) -> dict[str, Any]:
    """The example for a JSON file. Its picture is a JPEG as base64, smaller if it is large; `width` and `height` are
    those of the picture that the boxes belong to. Boxes whose numbers are not finite are left out. Raises ModelError,
    with the example's name, for what is no picture or no box."""
    truth = [example.truth] if isinstance(example.truth, str) else list(example.truth)
    try:
        boxes = [_plain_box(box) for box in list(example.boxes)[:MOST_BOXES]]
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"example {example.name!r}: its boxes must be hpctrain.Box objects with numbers as sides ({error})"
        ) from None
    found = {
        "name": str(example.name)[:MOST_TEXT],
        "text": str(example.text)[:MOST_TEXT],
        "truth": [str(line)[:MOST_TEXT] for line in truth[:MOST_LINES]],
        "boxes": [box for box in boxes if all(map(math.isfinite, [*box["sides"], box["score"] or 0.0]))],
    }
    if example.picture is None:
        return found
    image = Image.fromarray(_pixels(example))
    width, height = image.size
    image.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return found | {"width": width, "height": height, "jpeg": base64.b64encode(buffer.getvalue()).decode()}


def _plain_box(box: Box) -> dict[str, Any]:
    sides = [float(side) for side in (box.left, box.top, box.right, box.bottom)]
    score = None if box.score is None else float(box.score)
    return {"sides": sides, "label": str(box.label)[:MOST_LABEL], "score": score}


def _pixels(example: Example) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    given = example.picture
    if isinstance(given, Tensor) and given.dim() == 3 and given.shape[0] == 3 and given.numel():
        if given.dtype == torch.uint8:
            return given.detach().permute(1, 2, 0).to("cpu").contiguous().numpy()
        bright = given.detach().float().clamp(0, 1).mul(255).round()
        return bright.permute(1, 2, 0).to("cpu").numpy().astype(np.uint8)
    if isinstance(given, np.ndarray) and given.dtype == np.uint8 and given.shape[2:] == (3,) and given.size:
        return np.ascontiguousarray(given)
    shape = f" of shape {tuple(given.shape)}" if hasattr(given, "shape") else ""
    raise ModelError(
        f"example {example.name!r}: its picture is a {type(given).__name__}{shape}; expected (height, width, 3) uint8, "
        "or a tensor (3, height, width) of uint8 or with values from 0 to 1"
    )
