"""The event by which every rank tells which phase it enters, and as what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

KIND = "role"
_TEXT = re.compile(r"phase (\d+): (\w+) of (.+)")


class Entry(NamedTuple):
    """A rank enters a phase."""

    phase: int
    role: str
    strategy: str

    def __str__(self) -> str:
        return f"phase {self.phase}: {self.role} of {self.strategy}"


def entries(events: pd.DataFrame) -> Iterator[tuple[int, int, int, Entry]]:
    """(rank, attempt, t_ns, what was entered) of those of `Run.events` that tell it, in their order."""
    columns = (events[name].tolist() for name in ("rank", "attempt", "t_ns", "kind", "text"))
    for rank, attempt, t_ns, kind, text in zip(*columns, strict=True):
        if entry := parse_entry(kind, text):
            yield rank, attempt, t_ns, entry


def parse_entry(kind: str, text: str) -> Entry | None:
    """What an event tells, if it is of kind "role" and tells that."""
    match = _TEXT.fullmatch(text) if kind == KIND else None
    return Entry(int(match[1]), match[2], match[3]) if match else None
