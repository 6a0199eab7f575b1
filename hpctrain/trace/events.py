"""What can happen in a run, besides spans and steps: a frozen class for each kind of event. No h5py or NumPy here.

In a file an event is its kind and a JSON object with the fields of its class. `str(event)` is the sentence that people
read; nothing parses it. To add a kind: a class here, in `KINDS`. A kind that is not there, or one whose fields are not
those of its class (of a newer hpctrain, or damaged), is read as a `PlainEvent`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from hpctrain.text import escaped

if TYPE_CHECKING:
    import pandas as pd

KIND_BYTES, JSON_BYTES = 24, 480  # of an event in a file, at most
ELLIPSIS = "…"


@dataclass(frozen=True)
class Event:
    """Fields are int, float, bool or str."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class PhaseEntered(Event):
    """A rank begins a phase, with a role ("worker" or "server"), under a strategy."""

    kind = "role"
    phase: int
    role: str
    strategy: str

    def __str__(self) -> str:
        return f"phase {self.phase}: {self.role} of {self.strategy}"


@dataclass(frozen=True)
class RuleStatistic(Event):
    """What a rule compared with its threshold: `value` `sign` `threshold`, such as 0.02 <= 0.05.

    `of`: what the value is, where that is not the rule's own statistic ("metric"). `unready`: why the rule does not end
    the phase although the comparison holds; "" if nothing keeps it from that.
    """

    kind = "rule"
    rule: str
    value: float
    sign: str
    threshold: float
    of: str = ""
    unready: str = ""

    @property
    def fired(self) -> bool:
        """Whether the rule ends the phase."""
        return self.sign in ("<=", ">=") and not self.unready

    def compared(self) -> str:
        """The comparison alone."""
        if self.of:
            return f"{self.rule}: {self.of} {self.value:.4f} {self.sign} {self.threshold:g}"
        return f"{self.rule} {self.value:{'.4f' if self.value >= 0.001 else '.2g'}} {self.sign} {self.threshold:g}"

    def __str__(self) -> str:
        return self.compared() + (f", {self.unready}" if self.unready else "")


@dataclass(frozen=True)
class PhaseSwitch(Event):
    """A phase ends and the next begins. `why`: the reason of the rule that ended it."""

    kind = "switch"
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """`file`: its name in checkpoints/."""

    kind = "checkpoint"
    file: str

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class Failure(Event):
    """The run failed on this rank, with that exception."""

    kind = "failure"
    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


@dataclass(frozen=True)
class SamplingStopped(Event):
    """The machine's use is not sampled any more, because of that exception."""

    kind = "resources"
    error: str
    message: str

    def __str__(self) -> str:
        return f"sampling stopped: {self.error}: {self.message}"


@dataclass(frozen=True)
class MeasuredLink(Event):
    """The connection to another rank, as measured when the run began: seconds one way, bytes per second."""

    kind = "network"
    peer: int
    same_node: bool
    latency_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        where = "same node" if self.same_node else "another node"
        return f"rank {self.peer}, {where}: {self.latency_s:.3g} s, {self.bytes_per_s:.3g} bytes/s"


@dataclass(frozen=True)
class PlainEvent(Event):
    """One of a kind that is not known here, with a text for people."""

    kind: str  # type: ignore[misc]  # of each event its own
    text: str = ""

    def __str__(self) -> str:
        return self.text


KINDS: dict[str, type[Event]] = {
    each.kind: each
    for each in (
        PhaseEntered,
        RuleStatistic,
        PhaseSwitch,
        CheckpointWritten,
        Failure,
        SamplingStopped,
        MeasuredLink,
    )
}


# -- writing -------------------------------------------------------------------------------------------------------
def written(event: Event) -> tuple[bytes, bytes]:
    """(kind, JSON), in UTF-8, as they stand in a file: of at most KIND_BYTES and JSON_BYTES.

    Where they would be longer, the longest texts among the fields are shortened, with an ellipsis.
    """
    kind = _cut(event.kind, KIND_BYTES)
    if isinstance(event, PlainEvent):
        values: dict[str, Any] = {"text": event.text}
    else:
        values = {field.name: getattr(event, field.name) for field in fields(event)}
    data = _json(values)
    while len(data) > JSON_BYTES:
        texts = [name for name, value in values.items() if isinstance(value, str)]
        name = max(texts, key=lambda name: len(_json(values[name])))
        room = len(_json(values[name])) - 2 - (len(data) - JSON_BYTES)
        values[name] = _shortened(values[name], max(0, room))
        data = _json(values)
    return kind, data


def _json(value: Any) -> bytes:
    return json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite: these are texts, which float() reads."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(text: str, room: int) -> str:
    """So much of `text`, and an ellipsis, that it takes at most `room` bytes in JSON; at least one character less."""
    low, high = 0, len(text) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_json(text[:middle] + ELLIPSIS)) - 2 <= room else (low, middle - 1)
    return text[:low] + ELLIPSIS if room >= len(ELLIPSIS.encode()) else ""


def _cut(text: str, size: int) -> bytes:
    data = text.encode(errors="replace")
    if len(data) <= size:
        return data
    return data[: size - len(ELLIPSIS.encode())].decode(errors="ignore").encode() + ELLIPSIS.encode()


# -- reading -------------------------------------------------------------------------------------------------------
def from_json(kind: str, text: str) -> Event:
    """The event that is written so, its texts fit for a terminal; a PlainEvent if it is none of `KINDS`."""
    kind, plain = escaped(kind), PlainEvent(escaped(kind), escaped(text))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return plain
    if not isinstance(values, dict):
        return plain
    if list(values) == ["text"] and isinstance(values["text"], str):
        return PlainEvent(kind, escaped(values["text"]))
    found = KINDS.get(kind)
    if found is None:
        return plain
    try:
        return found(**{field.name: _value(values[field.name], str(field.type)) for field in fields(found)})
    except (KeyError, TypeError, ValueError, OverflowError):
        return plain


def _value(value: Any, kind: str) -> Any:
    """`value`, if it can stand in a field of that type."""
    if kind == "float" and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind or (kind == "int" and abs(value) > 2**62):
        raise TypeError(value)
    return escaped(value) if isinstance(value, str) else value


Of = TypeVar("Of", bound=Event)


def chosen(events: pd.DataFrame, kind: type[Of]) -> Iterator[tuple[int, int, int, Of]]:
    """(rank, attempt, t_ns, event) of those of `Run.events` that are of that class, in their order."""
    columns = (events[name].tolist() for name in ("rank", "attempt", "t_ns", "event"))
    for rank, attempt, t_ns, event in zip(*columns, strict=True):
        if isinstance(event, kind):
            yield rank, attempt, t_ns, event
