"""The examples on the page: pictures with boxes, captions and other text, from the latest evaluation.

examples.json may come from anywhere: its values are checked, and texts are escaped by the template.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpctrain.errors import TraceError
from hpctrain.filenames import EXAMPLES, MOST_BOXES, MOST_EXAMPLES
from hpctrain.text import escaped
from hpctrain.trace.files import read_regular

if TYPE_CHECKING:
    from hpctrain.trace import Run

LARGEST = 4 << 20  # bytes of examples.json


@dataclass(frozen=True)
class PageBox:
    """A rectangle in pixels. `title`: label and score."""

    x: float
    y: float
    width: float
    height: float
    title: str
    true: bool


@dataclass(frozen=True)
class PageExample:
    """`url`: a data URL with the picture, or empty; `width`, `height`: of the picture that the boxes belong to."""

    name: str
    text: str
    truth: list[str]
    url: str
    width: float
    height: float
    boxes: list[PageBox]


@dataclass(frozen=True)
class PageExamples:
    """`when`: which evaluation they are of."""

    when: str
    examples: list[PageExample]


def read_examples(run: Run) -> PageExamples | None:
    """What the latest evaluation shows; None if it shows nothing. Raises TraceError for a damaged file."""
    path = run.folder / EXAMPLES
    if not path.exists():
        return None
    try:
        found = json.loads(read_regular(path, LARGEST))
        examples = [_example(each) for each in found["examples"][:MOST_EXAMPLES]]
        when = f"{escaped(str(found['split']))}, epoch {float(found['epoch']):.2f}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise TraceError(f"{EXAMPLES} cannot be read: it is damaged ({type(error).__name__})") from None
    return PageExamples(when, examples) if examples else None


def _example(each: dict[str, Any]) -> PageExample:
    truth = [escaped(str(line)) for line in list[Any](each["truth"])]
    picture, width, height = each.get("jpeg"), _number(each.get("width", 1)), _number(each.get("height", 1))
    if min(width, height) <= 0 or isinstance(each["truth"], str):
        raise ValueError(each["name"])
    url = f"data:image/jpeg;base64,{_base64(picture)}" if picture is not None else ""
    boxes = list(_boxes(each["boxes"][:MOST_BOXES]))
    return PageExample(escaped(str(each["name"])), escaped(str(each["text"])), truth, url, width, height, boxes)


def _boxes(given: list[dict[str, Any]]) -> Iterator[PageBox]:
    for each in given:
        left, top, right, bottom = map(_number, each["sides"])
        score = each["score"]
        title = escaped(str(each["label"])) + ("" if score is None else f" {_number(score):.2f}")
        yield PageBox(left, top, max(0.0, right - left), max(0.0, bottom - top), title, score is None)


def _number(value: Any) -> float:
    """A finite number. Raises ValueError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _base64(text: str) -> str:
    """The same text, if it is nothing but base64. Raises ValueError."""
    try:
        return base64.b64encode(base64.b64decode(text, validate=True)).decode()
    except binascii.Error:
        raise ValueError("not base64") from None
