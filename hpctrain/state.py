"""What a strategy hands on at the end of a phase and into checkpoints: by parameter, never by rank."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from hpctrain.comm.base import BFLOAT16, Buffer, Communicator, Request, Tag

Counters = dict[str, dict[str, Any]]
Row = tuple[str, tuple[int, ...], np.dtype[Any]]  # path, shape and dtype of an array
FLAT = "flat/"
OWN = "strategy: "  # before the key of a moment that is not the optimizer's


@dataclass
class State:
    """Optimizer state of the arena's stretch [low, high), plus counters.

    `flat[key]`: a moment of every element of the stretch (elementwise optimizers). `named[parameter][key]`: one
    parameter's own (other optimizers). `groups[i][key]`: plain numbers of parameter group i ("step").
    `counters`: the strategy's own numbers (versions, dropped gradients). `rule`: what the rule that ends the
    phase has seen (from where it is observed). Whole on rank 0, None elsewhere.
    """

    low: int
    high: int
    flat: dict[str, Buffer] = field(default_factory=dict)
    named: dict[str, dict[str, Buffer]] = field(default_factory=dict)
    groups: Counters = field(default_factory=dict)
    counters: dict[str, Any] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)

    def add_own(self, moments: dict[str, Buffer]) -> None:
        """Moments of the strategy itself, which the optimizer must not see."""
        self.flat |= {OWN + key: moment for key, moment in moments.items()}

    def take_own(self) -> dict[str, Buffer]:
        """Those moments; they are not in the state any longer."""
        keys = [key for key in self.flat if key.startswith(OWN)]
        return {key.removeprefix(OWN): self.flat.pop(key) for key in keys}

    def moments(self) -> set[str]:
        """The names of what the optimizer keeps here, plain numbers included."""
        own = {key for key in self.flat if not key.startswith(OWN)}
        return own.union(*self.named.values(), *self.groups.values())

    def forget_moments(self, but: Collection[str] = ()) -> None:
        """Take out what the optimizer keeps, but that: it begins those anew."""
        self.flat = {key: array for key, array in self.flat.items() if key in but or key.startswith(OWN)}
        self.named = {name: {k: v for k, v in own.items() if k in but} for name, own in self.named.items()}
        self.groups = {name: {k: v for k, v in own.items() if k in but} for name, own in self.groups.items()}

    def cut(self, low: int, high: int, names: Sequence[str]) -> State:
        """The part for a stretch inside this one that holds the parameters `names`; views, not copies."""
        here = slice(low - self.low, high - self.low)
        flat = {key: value[here] for key, value in self.flat.items()}
        named = {name: self.named[name] for name in names if name in self.named}
        return State(low, high, flat, named, self.groups, self.counters, self.rule)

    def arrays(self) -> list[tuple[str, Buffer]]:
        """All arrays with a path each, in a fixed order."""
        rows = [(f"{FLAT}{quote(key, safe='')}", self.flat[key]) for key in sorted(self.flat)]
        for name in sorted(self.named):
            own = self.named[name]
            rows += [(f"named/{quote(key, safe='')}/{name}", own[key]) for key in sorted(own)]
        return rows

    def copy(self) -> State:
        """With arrays of its own."""
        flat = {key: array.copy() for key, array in self.flat.items()}
        named = {name: {key: array.copy() for key, array in own.items()} for name, own in self.named.items()}
        return State(self.low, self.high, flat, named, self.groups, self.counters, self.rule)

    def room(self, key: str, dtype: np.dtype[Any]) -> Buffer:
        """That moment; zeros, if there is none yet."""
        if key not in self.flat:
            self.flat[key] = np.zeros(self.high - self.low, dtype)
        return self.flat[key]

    def place(self, path: str, array: Buffer) -> None:
        """The inverse of `arrays`, one at a time."""
        kind, key, *name = path.split("/", 2)
        if kind == "flat":
            self.flat[unquote(key)] = array
        else:
            self.named.setdefault(name[0], {})[unquote(key)] = array


def send_state(comm: Communicator, state: State, dest: int) -> None:
    """To one rank, which calls `recv_state` or `collect_state`. Typed buffers and JSON; nothing is pickled."""
    comm.wait_all(start_send_state(comm, state, dest))


def start_send_state(comm: Communicator, state: State, dest: int) -> list[Request]:
    """`send_state`, started; the state must not change before these are done."""
    rows = state.arrays()
    head = {
        "bounds": [state.low, state.high],
        "arrays": [[path, list(a.shape), str(a.dtype)] for path, a in rows],
        "groups": state.groups,
        "counters": state.counters,
        "rule": state.rule,
    }
    text = np.frombuffer(json.dumps(head).encode(), np.uint8).copy()
    flat = [np.ascontiguousarray(array).reshape(-1) for _, array in rows if array.size]
    return [comm.start_send(part, dest, Tag.STATE) for part in (np.array([text.size], np.int64), text, *flat)]


def recv_state(comm: Communicator, source: int) -> State:
    """From one rank, which calls `send_state`."""
    state, rows = _recv_head(comm, source)
    for path, shape, dtype in rows:
        state.place(path, np.empty(shape, dtype))
    comm.wait_all(_start_recv_arrays(comm, state, rows, source))
    return state


def collect_state(comm: Communicator, own: State, sources: Sequence[int], length: int) -> State:
    """The whole arena's state, of this rank's `own` piece and those that `sources` send.

    Moments are received at once from all of them, where they are to lie.
    """
    heads = [_recv_head(comm, source) for source in sources]
    whole, requests = merge([own, *(piece for piece, _ in heads)], length), []
    for source, (piece, rows) in zip(sources, heads, strict=True):
        for path, shape, dtype in rows:
            here = slice(piece.low, piece.high)
            room = whole.room(unquote(path.removeprefix(FLAT)), dtype)[here] if path.startswith(FLAT) else None
            piece.place(path, room if room is not None else np.empty(shape, dtype))
        requests += _start_recv_arrays(comm, piece, rows, source)
        whole.named.update(piece.named)
    comm.wait_all(requests)
    return whole


def _recv_head(comm: Communicator, source: int) -> tuple[State, list[Row]]:
    """A state that lacks its arrays, and what these are going to be."""
    size = np.zeros(1, np.int64)
    comm.recv(size, source, Tag.STATE)
    text = np.empty(int(size[0]), np.uint8)
    comm.recv(text, source, Tag.STATE)
    head = json.loads(text.tobytes())
    rows = [
        (path, tuple(shape), BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
        for path, shape, dtype in head["arrays"]
    ]
    low, high = head["bounds"]
    return State(low, high, {}, {}, head["groups"], head["counters"], head["rule"]), rows


def _start_recv_arrays(comm: Communicator, state: State, rows: Sequence[Row], source: int) -> list[Request]:
    arrays = dict(state.arrays())
    flat = [arrays[path].reshape(-1) for path, _, _ in rows]
    return [comm.start_recv(array, source, Tag.STATE) for array in flat if array.size]


def merge(pieces: Sequence[State], length: int) -> State:
    """The whole arena's state from the pieces of a cut; its arrays are a piece's where that has all of them."""
    whole = State(0, length)
    for piece in pieces:
        for key, part in piece.flat.items():
            if part.size == length:
                whole.flat[key] = part
            else:
                whole.room(key, part.dtype)[piece.low : piece.high] = part
        whole.named.update(piece.named)
        for index, numbers in piece.groups.items():
            whole.groups.setdefault(index, {}).update(numbers)
        whole.counters.update(piece.counters)
        whole.rule.update(piece.rule)
    return whole
