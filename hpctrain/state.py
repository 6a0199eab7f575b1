"""What a strategy hands on at the end of a phase and into checkpoints: by parameter, never by rank."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from hpctrain.comm.base import BFLOAT16, Buffer, Communicator, Tag

Counters = dict[str, dict[str, Any]]


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
    counters: dict[str, float] = field(default_factory=dict)
    rule: dict[str, Any] = field(default_factory=dict)

    def cut(self, low: int, high: int, names: Sequence[str]) -> State:
        """The part for a stretch inside this one that holds the parameters `names`; views, not copies."""
        here = slice(low - self.low, high - self.low)
        flat = {key: value[here] for key, value in self.flat.items()}
        named = {name: self.named[name] for name in names if name in self.named}
        return State(low, high, flat, named, self.groups, self.counters, self.rule)

    def arrays(self) -> list[tuple[str, Buffer]]:
        """All arrays with a path each, in a fixed order."""
        rows = [(f"flat/{quote(key, safe='')}", self.flat[key]) for key in sorted(self.flat)]
        for name in sorted(self.named):
            own = self.named[name]
            rows += [(f"named/{quote(key, safe='')}/{name}", own[key]) for key in sorted(own)]
        return rows

    def place(self, path: str, array: Buffer) -> None:
        """The inverse of `arrays`, one at a time."""
        kind, key, *name = path.split("/", 2)
        if kind == "flat":
            self.flat[unquote(key)] = array
        else:
            self.named.setdefault(name[0], {})[unquote(key)] = array


def send_state(comm: Communicator, state: State, dest: int) -> None:
    """To one rank, which calls `recv_state`. Typed buffers and JSON; nothing is pickled."""
    rows = state.arrays()
    head = {
        "bounds": [state.low, state.high],
        "arrays": [[path, list(a.shape), str(a.dtype)] for path, a in rows],
        "groups": state.groups,
        "counters": state.counters,
        "rule": state.rule,
    }
    text = np.frombuffer(json.dumps(head).encode(), np.uint8).copy()
    comm.send(np.array([text.size], np.int64), dest, Tag.STATE)
    comm.send(text, dest, Tag.STATE)
    for _, array in rows:
        if array.size:
            comm.send(np.ascontiguousarray(array).reshape(-1), dest, Tag.STATE)


def recv_state(comm: Communicator, source: int) -> State:
    """From one rank, which calls `send_state`."""
    size = np.zeros(1, np.int64)
    comm.recv(size, source, Tag.STATE)
    text = np.empty(int(size[0]), np.uint8)
    comm.recv(text, source, Tag.STATE)
    head = json.loads(text.tobytes())
    low, high = head["bounds"]
    state = State(low, high, {}, {}, head["groups"], head["counters"], head["rule"])
    for path, shape, dtype in head["arrays"]:
        array = np.empty(shape, BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype))
        if array.size:
            comm.recv(array.reshape(-1), source, Tag.STATE)
        state.place(path, array)
    return state


def merge(pieces: Sequence[State], length: int) -> State:
    """The whole arena's state from the pieces of a cut."""
    whole = State(0, length)
    for piece in pieces:
        for key, part in piece.flat.items():
            if key not in whole.flat:
                whole.flat[key] = np.zeros(length, part.dtype)
            whole.flat[key][piece.low : piece.high] = part
        whole.named.update(piece.named)
        for index, numbers in piece.groups.items():
            whole.groups.setdefault(index, {}).update(numbers)
        whole.counters.update(piece.counters)
        whole.rule.update(piece.rule)
    return whole
