"""A problem that `hpctrain doctor` found, and helpers for its wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hpctrain.doctor.facts import NodeFacts

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Problem:
    """`severity`: error (a run will not work), warning (it will be slow or fragile), note. `do`: advice."""

    severity: Severity
    where: str
    what: str
    do: str


def millions(count: int) -> str:
    """A count in words, such as "1.9 million" or "1.2 billion"."""
    return f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"


def speed(gigabytes: float) -> str:
    """A bandwidth, given in GB/s, for a message."""
    return f"{gigabytes:.1f} GB/s" if gigabytes >= 1 else f"{gigabytes * 1e3:.3g} MB/s"


def at(node: NodeFacts) -> str:
    """A node for a message."""
    return f"node {node.index} ({node.host})"


def gpus(count: int) -> str:
    """A number of GPUs, for a message."""
    return counted(count, "GPU")


def counted(count: int, word: str) -> str:
    """A number with its noun, in singular or plural."""
    return f"{count} {word}{'s' * (count != 1)}"


def mib(nbytes: float) -> str:
    """A number of bytes, in MiB."""
    return f"{nbytes / 2**20:,.0f} MiB"
