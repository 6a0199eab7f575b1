"""The events of a run: a frozen dataclass for each kind of event. Does not use h5py or NumPy.

In a trace file an event is its kind and a JSON object with the fields of its class. `str(event)` is a sentence for
people; nothing parses it. To add a kind, write a class here and add it to `KINDS`. An event of an unknown kind, or
whose fields do not match its class (written by a newer hpctrain, or damaged), is read as a `PlainEvent`.
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

KIND_BYTES, JSON_BYTES = 24, 480  # the most for an event in a file
ELLIPSIS = "…"


@dataclass(frozen=True)
class Event:
    """Base class of all events. Fields are int, float, bool or str."""

    kind: ClassVar[str]


@dataclass(frozen=True)
class PhaseEntered(Event):
    """A rank begins a phase, in a role ("worker" or "server") under a strategy."""

    kind = "role"
    phase: int
    role: str
    strategy: str

    def __str__(self) -> str:
        return f"phase {self.phase}: {self.role} of {self.strategy}"


@dataclass(frozen=True)
class RuleStatistic(Event):
    """A rule's comparison with its threshold: `value` `sign` `threshold`, such as 0.02 <= 0.05.

    `of`: the name of the value if it is not the rule's own statistic ("metric"). `unready`: why the rule does not end
    the phase although the comparison holds; "" if nothing prevents it.
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
        """The comparison as text, without `unready`."""
        if self.of:
            return f"{self.rule}: {self.of} {self.value:.4f} {self.sign} {self.threshold:g}"
        return f"{self.rule} {self.value:{'.4f' if self.value >= 0.001 else '.2g'}} {self.sign} {self.threshold:g}"

    def __str__(self) -> str:
        return self.compared() + (f", {self.unready}" if self.unready else "")


@dataclass(frozen=True)
class PhaseSwitch(Event):
    """A phase ends and the next begins. `why`: the reason given by the rule that ended it."""

    kind = "switch"
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class CheckpointWritten(Event):
    """A checkpoint was written. `file`: its name in checkpoints/."""

    kind = "checkpoint"
    file: str

    def __str__(self) -> str:
        return self.file


@dataclass(frozen=True)
class SharesChanged(Event):
    """The workers' shares of the work follow their speeds (balance = "throughput") in the rounds that come.

    `unit`: "samples per step" or "steps per round". `before`, `after`: the shares in the order of ranks, or their range
    if there are many. `slowest`: the rank that took longest; `excess`: its time over the mean of all workers. `gain`:
    how many times as fast training should become.
    """

    kind = "rebalance"
    unit: str
    before: str
    after: str
    slowest: int
    excess: float
    gain: float

    def __str__(self) -> str:
        why = f"rank {self.slowest} computed for {self.excess:.2f} times the mean"
        return f"{self.unit} {self.before} -> {self.after}: {why}; {self.gain:.2f} times as fast is expected"


@dataclass(frozen=True)
class ShardsSized(Event):
    """The servers' shards get sizes in proportion to the bandwidth of their links (shard_sizes = "bandwidth").

    `percent`: of an equal share, in the order of servers. `slowest`: the rank of the slowest server; `least`, `most`:
    bytes per second that the slowest and the fastest have reached in each direction, per worker.
    """

    kind = "shards"
    percent: str
    slowest: int
    least: float
    most: float

    def __str__(self) -> str:
        why = f"rank {self.slowest} takes {self.least:.3g} bytes/s from each worker, the fastest {self.most:.3g}"
        return f"percent of an equal shard {self.percent}: {why}"


@dataclass(frozen=True)
class LossScaleChanged(Event):
    """The factor of the loss changes on this worker (train.precision = "mixed_float16"), from the next step on."""

    kind = "loss_scale"
    old: float
    new: float
    why: str

    def __str__(self) -> str:
        return f"loss scale {self.old:g} -> {self.new:g}: {self.why}"


@dataclass(frozen=True)
class IntervalChanged(Event):
    """Workers train by themselves for another number of steps per round, from the next round on (strategy.every)."""

    kind = "interval"
    old: int
    new: int
    why: str

    def __str__(self) -> str:
        return f"steps per round {self.old} -> {self.new}: {self.why}"


@dataclass(frozen=True)
class Logged(Event):
    """A number that the user's program logged on this rank (`Session.log`), after so many steps and samples."""

    kind = "log"
    name: str
    value: float
    step: int
    samples: int

    def __str__(self) -> str:
        return f"{self.name} {self.value:.6g}"


@dataclass(frozen=True)
class Failure(Event):
    """The run failed on this rank. `error`, `message`: the exception's class and text."""

    kind = "failure"
    error: str
    message: str

    def __str__(self) -> str:
        return f"{self.error}: {self.message}"


@dataclass(frozen=True)
class SamplingStopped(Event):
    """Resource use is no longer sampled. `error`, `message`: class and text of the exception that stopped it."""

    kind = "resources"
    error: str
    message: str

    def __str__(self) -> str:
        return f"sampling stopped: {self.error}: {self.message}"


@dataclass(frozen=True)
class DeviceTimesMissing(Event):
    """Spans whose times on the device are not known, and why."""

    kind = "device"
    spans: int
    why: str

    def __str__(self) -> str:
        return f"no device times of {self.spans} span{'s' * (self.spans != 1)}: {self.why}"


@dataclass(frozen=True)
class MeasuredLink(Event):
    """The link to another rank, measured at the start of the run: one-way latency in seconds, bytes per second."""

    kind = "network"
    peer: int
    same_node: bool
    latency_s: float
    bytes_per_s: float

    def __str__(self) -> str:
        where = "same node" if self.same_node else "another node"
        return f"rank {self.peer}, {where}: {self.latency_s:.3g} s, {self.bytes_per_s:.3g} bytes/s"


@dataclass(frozen=True)
class TransportChosen(Event):
    """How device buffers reach other ranks: "ipc", "nccl", "mpi" or "staged". `why`: as a sentence, with the times."""

    kind = "transport"
    transport: str
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class PlainEvent(Event):
    """An event of an unknown kind, with a text for people."""

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
        SharesChanged,
        ShardsSized,
        LossScaleChanged,
        IntervalChanged,
        Logged,
        Failure,
        SamplingStopped,
        DeviceTimesMissing,
        MeasuredLink,
        TransportChosen,
    )
}


# -- writing -------------------------------------------------------------------------------------------------------
def written(event: Event) -> tuple[bytes, bytes]:
    """(kind, JSON) as stored in a file: UTF-8 of at most KIND_BYTES and JSON_BYTES.

    If the JSON would be longer, the longest texts among the fields are shortened, with an ellipsis.
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
    """Replace numbers that are not finite, which JSON lacks, by texts that float() can read."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shortened(text: str, room: int) -> str:
    """`text` cut by at least one character and ended with an ellipsis, to fit into `room` bytes of JSON."""
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
    """The event stored as this kind and JSON, with texts safe for a terminal; a PlainEvent if not one of `KINDS`."""
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
    """`value` as the type `kind`. Raises TypeError, ValueError or OverflowError if a field cannot hold it."""
    if kind == "float" and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != kind or (kind == "int" and abs(value) > 2**62):
        raise TypeError(value)
    return escaped(value) if isinstance(value, str) else value


Of = TypeVar("Of", bound=Event)


def chosen(events: pd.DataFrame, kind: type[Of]) -> Iterator[tuple[int, int, int, Of]]:
    """Yield (rank, attempt, t_ns, event) for those of `Run.events` that are of class `kind`, in their order."""
    columns = (events[name].tolist() for name in ("rank", "attempt", "t_ns", "event"))
    for rank, attempt, t_ns, event in zip(*columns, strict=True):
        if isinstance(event, kind):
            yield rank, attempt, t_ns, event
