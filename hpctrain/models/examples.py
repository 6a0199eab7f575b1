"""Examples: a few samples with what the model makes of them, for people to look at in a report.

A metric or an evaluation of a job's own (a class) may have the method `examples()`. It is called on rank 0, after the
last `update` and before `merge`, and returns `Example` objects for samples that rank 0 has seen, which are the first of
the data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST = 16  # examples in a report


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

    `picture`: (height, width, 3) uint8, or a tensor (3, height, width) with values from 0 to 1; None: without one.
    `text`: what the model says, such as a caption; `truth`: what it should have said, a line each.
    """

    name: str
    picture: Any = None
    boxes: Sequence[Box] = ()
    text: str = ""
    truth: Sequence[str] = ()
