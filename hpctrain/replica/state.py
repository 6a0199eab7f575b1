"""The state that a strategy hands over at the end of a phase and writes into checkpoints.

`State` belongs to the model: by element or by parameter of the arena, never by rank. `Own` belongs to one worker.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from hpctrain.comm.base import BFLOAT16, Buffer, Communicator, Request, Tag
from hpctrain.comm.phantom import Phantom, deliver

Row = tuple[str, tuple[int, ...], np.dtype[Any]]  # path, shape and dtype of an array
OPTIMIZER = "optimizer"
STRATEGY = "strategy"
CODEC = "codec/"  # prefix of what a worker's codec keeps, among its own arrays
REST = f"{CODEC}rest"  # what its messages have left out so far
MEMORY = f"{CODEC}memory"  # what its codec knows of parameters
_STRATEGY_IN_0_1 = "strategy: "  # key prefix of the strategy's own moments among the optimizer's


@dataclass
class Section:
    """The state that one part of a strategy (the optimizer, an outer optimizer) keeps for the arena's stretch.

    `flat[key]`: an array with one value for every element of the stretch. `named[parameter][key]`: an array of any
    shape for one parameter. `numbers[what][key]`: plain values.
    """

    flat: dict[str, Buffer] = field(default_factory=dict)
    named: dict[str, dict[str, Buffer]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def keys(self) -> set[str]:
        """The names of all entries, including plain numbers."""
        return set(self.flat).union(*self.named.values(), *self.numbers.values())

    def forget(self, but: Collection[str] = ()) -> None:
        """Remove everything but these keys."""
        self.flat = {key: array for key, array in self.flat.items() if key in but}
        self.named = {name: {k: v for k, v in own.items() if k in but} for name, own in self.named.items()}
        self.numbers = {name: {k: v for k, v in own.items() if k in but} for name, own in self.numbers.items()}

    def arrays(self) -> Iterator[tuple[str, Buffer]]:
        """All arrays with their paths, in a fixed order."""
        for key in sorted(self.flat):
            yield f"flat/{quote(key, safe='')}", self.flat[key]
        for name in sorted(self.named):
            for key in sorted(self.named[name]):
                yield f"named/{quote(key, safe='')}/{name}", self.named[name][key]

    def place(self, path: str, array: Buffer) -> None:
        """Insert one array at a path from `arrays`."""
        kind, key, *name = path.split("/", 2)
        if kind == "flat":
            self.flat[unquote(key)] = array
        else:
            self.named.setdefault(name[0], {})[unquote(key)] = array


@dataclass
class State:
    """The state of the arena's stretch [low, high), in sections, and the strategy's counters.

    `counters`: plain values of the strategy (versions, dropped gradients). `rule`: what the rule that ends the phase
    has observed. Complete on rank 0, None elsewhere.
    """

    low: int
    high: int
    sections: dict[str, Section] = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)

    @property
    def optimizer(self) -> Section:
        """The section of the job's optimizer."""
        return self.section(OPTIMIZER)

    def section(self, name: str) -> Section:
        """The section of that name; created empty if there is none."""
        return self.sections.setdefault(name, Section())

    def keep_optimizer_only(self) -> None:
        """Remove everything that applies only to the phase that ends."""
        self.sections = {OPTIMIZER: self.optimizer}
        self.counters, self.rule = {}, {}

    def cut(self, low: int, high: int, names: Sequence[str]) -> State:
        """The part for a stretch inside this one that contains the parameters `names`; views, not copies."""
        here = slice(low - self.low, high - self.low)
        sections = {
            name: Section(
                {key: array[here] for key, array in section.flat.items()},
                {parameter: section.named[parameter] for parameter in names if parameter in section.named},
                section.numbers,
            )
            for name, section in self.sections.items()
        }
        return State(low, high, sections, self.counters, self.rule)

    def arrays(self) -> list[tuple[str, Buffer]]:
        """All arrays with their paths, in a fixed order. The optimizer's paths have no prefix."""
        return [
            (path if name == OPTIMIZER else f"{name}/{path}", array)
            for name in sorted(self.sections)
            for path, array in self.sections[name].arrays()
        ]

    def place(self, path: str, array: Buffer) -> None:
        """Insert one array at a path from `arrays`."""
        name, inner = _split(path)
        key = unquote(inner.removeprefix("flat/"))
        if name == OPTIMIZER and key.startswith(_STRATEGY_IN_0_1):
            self.section(STRATEGY).flat[key.removeprefix(_STRATEGY_IN_0_1)] = array
        else:
            self.section(name).place(inner, array)

    def copy(self) -> State:
        """A copy with its own arrays."""
        whole = State(self.low, self.high, {}, self.counters, self.rule)
        for name, section in self.sections.items():
            whole.section(name).numbers = section.numbers
        for path, array in self.arrays():
            whole.place(path, array.copy())
        return whole

    def room(self, section: str, key: str, dtype: np.dtype[Any]) -> Buffer:
        """The section's array with one value for every element; created with zeros if missing."""
        flat = self.section(section).flat
        if key not in flat:
            flat[key] = np.zeros(self.high - self.low, dtype)
        return flat[key]

    def head(self) -> dict[str, Any]:
        """Everything except the arrays, as plain values."""
        numbers = {name: section.numbers for name, section in self.sections.items()}
        return {"bounds": [self.low, self.high], "numbers": numbers, "counters": self.counters, "rule": self.rule}

    @classmethod
    def of_head(cls, head: dict[str, Any]) -> State:
        """The state described by `head`, without its arrays."""
        low, high = head["bounds"]
        sections = {name: Section(numbers=numbers) for name, numbers in head["numbers"].items()}
        return cls(low, high, sections, head["counters"], head["rule"])


@dataclass
class Own:
    """State that belongs to one worker: `arrays` of any shape (its moments, residuals), and plain `numbers`."""

    arrays: dict[str, Buffer] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.arrays or self.numbers)


def send_state(comm: Communicator, state: State, dest: int) -> None:
    """Send to one rank, which calls `recv_state` or `collect_state`. Typed buffers and JSON; nothing is pickled."""
    comm.wait_all(start_send_state(comm, state, dest))


def start_send_state(comm: Communicator, state: State, dest: int) -> list[Request]:
    """Start `send_state`; the state must not change before the requests are done."""
    rows = state.arrays()
    head = {**state.head(), "arrays": [[path, list(a.shape), str(a.dtype)] for path, a in rows]}
    text = np.frombuffer(json.dumps(head).encode(), np.uint8).copy()
    flat = [_contiguous(array).reshape(-1) for _, array in rows if array.size]
    return [comm.start_send(part, dest, Tag.STATE) for part in (np.array([text.size], np.int64), text, *flat)]


def _contiguous(array: Buffer) -> Buffer:
    return array if isinstance(array, Phantom) else np.ascontiguousarray(array)


def recv_state(comm: Communicator, source: int) -> State:
    """Receive from one rank, which calls `send_state`."""
    state, rows = _recv_head(comm, source)
    for path, shape, dtype in rows:
        state.place(path, np.empty(shape, dtype))
    comm.wait_all(_start_recv_arrays(comm, state, rows, source))
    return state


def collect_state(comm: Communicator, own: State, sources: Sequence[int], length: int) -> State:
    """The whole arena's state, from this rank's piece `own` and those that `sources` send.

    Arrays with one value per element are received from all sources at the same time, directly into the result.
    """
    heads = [_recv_head(comm, source) for source in sources]
    whole, requests = merge([own, *(piece for piece, _ in heads)], length), []
    for source, (piece, rows) in zip(sources, heads, strict=True):
        for path, shape, dtype in rows:
            name, inner = _split(path)
            if inner.startswith("flat/"):
                key = unquote(inner.removeprefix("flat/"))
                piece.place(path, whole.room(name, key, dtype)[piece.low : piece.high])
            else:
                piece.place(path, np.empty(shape, dtype))
        requests += _start_recv_arrays(comm, piece, rows, source)
        for name, section in piece.sections.items():
            whole.section(name).named.update(section.named)
    comm.wait_all(requests)
    return whole


def _recv_head(comm: Communicator, source: int) -> tuple[State, list[Row]]:
    """Receive a state without its arrays, and their paths, shapes and dtypes."""
    size = np.zeros(1, np.int64)
    comm.recv(size, source, Tag.STATE)
    text = np.empty(int(size[0]), np.uint8)
    comm.recv(text, source, Tag.STATE)
    head = json.loads(text.tobytes())
    rows = [
        (path, tuple(shape), BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
        for path, shape, dtype in head["arrays"]
    ]
    return State.of_head(head), rows


def _start_recv_arrays(comm: Communicator, state: State, rows: Sequence[Row], source: int) -> list[Request]:
    arrays = dict(state.arrays())
    flat = [arrays[path].reshape(-1) for path, _, _ in rows]
    return [comm.start_recv(array, source, Tag.STATE) for array in flat if array.size]


def _split(path: str) -> tuple[str, str]:
    """(section, path within it) of an array's path."""
    name, _, rest = path.partition("/")
    return (OPTIMIZER, path) if name in ("flat", "named") else (name, rest)


def merge(pieces: Sequence[State], high: int, low: int = 0) -> State:
    """The state of the arena's stretch [low, high) from the pieces of a cut. Arrays are not copied if one piece covers
    all of it."""
    whole = State(low, high)
    for piece in pieces:
        for name, section in piece.sections.items():
            into = whole.section(name)
            for key, part in section.flat.items():
                if part.size == high - low:
                    into.flat[key] = part
                else:
                    deliver(part, whole.room(name, key, part.dtype)[piece.low - low : piece.high - low])
            into.named.update(section.named)
            for what, numbers in section.numbers.items():
                into.numbers.setdefault(what, {}).update(numbers)
        whole.counters.update(piece.counters)
        whole.rule.update(piece.rule)
    return whole
