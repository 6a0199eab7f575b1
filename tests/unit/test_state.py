"""State that moves between phases and ranks, and into files."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from hpctrain.comm.base import BFLOAT16, Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.replica.state import Section, State, collect_state, merge, recv_state, send_state, start_send_state


def full() -> State:
    """The state of an arena of 8, with everything it can contain."""
    optimizer = Section(
        flat={"exp_avg": np.arange(8.0), "half": np.arange(8, dtype=np.float32).astype(BFLOAT16), "a/b %": np.ones(8)},
        named={
            "layer/1.weight": {"row/var": np.ones((2, 1, 3), np.float32), "scalar": np.array(2.5)},
            "own": {"buffer/bn.running_mean": np.arange(3.0), "random": np.arange(5, dtype=np.uint8)},
            "flat": {
                "empty": np.zeros((0, 4)),
                "flag": np.array(True),
                "count": np.array(7),
                "wide": np.ones((2, 2)).T,
            },
        },
        numbers={"0": {"step": ["float32", 3.0]}, "1": {"mu": ["float64", math.inf], "x": ["number", None]}},
    )
    outer = Section({"exp_avg": np.arange(8.0) + 1}, {"own": {"momentum": np.ones(3)}}, {"outer": {"rate": 0.7}})
    return State(
        0,
        8,
        {"optimizer": optimizer, "outer": outer},
        counters={"versions": 12.0},
        rule={"losses": [0.5, 0.25], "name": "über"},
    )


def assert_equal(one: State, other: State) -> None:
    assert one.head() == other.head()
    for name in one.sections:
        here, there = one.section(name).named, other.section(name).named
        assert {n: set(own) for n, own in here.items()} == {n: set(own) for n, own in there.items()}
    for (path, a), (same, b) in zip(one.arrays(), other.arrays(), strict=True):
        assert (path, a.shape, a.dtype) == (same, b.shape, b.dtype)
        assert a.tobytes() == b.tobytes()


def test_state_paths_round_trip() -> None:
    state, again = full(), State.of_head(json.loads(json.dumps(full().head())))
    paths = [path for path, _ in state.arrays()]
    assert len(set(paths)) == len(paths) == 13
    for path, array in state.arrays():
        again.place(path, array)
    assert_equal(again, state)


@pytest.mark.parametrize("source", [0, 2])
def test_state_moves_from_rank_to_rank(source: int) -> None:
    def body(comm: Communicator) -> State | None:
        if comm.rank == source:
            send_state(comm, full(), 1)
            send_state(comm, State(3, 3), 1)
        elif comm.rank == 1:
            state = recv_state(comm, source)
            assert_equal(recv_state(comm, source), State(3, 3))
            for _, array in state.arrays():
                array[...] = array  # its own, writable memory
            return state
        return None

    assert_equal(World(3).run(body)[1], full())


def pieces(bounds: list[int], state: State, names: dict[str, int]) -> list[State]:
    cuts = zip(bounds, bounds[1:], strict=False)
    return [state.cut(low, high, [n for n, at in names.items() if low <= at < high]) for low, high in cuts]


@pytest.mark.parametrize("bounds", [[0, 8], [0, 3, 8], [0, 0, 1, 1, 5, 8, 8]])
def test_cut_and_merge(bounds: list[int]) -> None:
    state, places = full(), {"layer/1.weight": 0, "own": 4, "flat": 7}
    found = pieces(bounds, state, places)
    for low, high, piece in zip(bounds, bounds[1:], found, strict=False):
        assert all(array.size == high - low for section in piece.sections.values() for array in section.flat.values())
    assert_equal(merge(found, 8), state)


def test_cut_of_a_cut() -> None:
    inner = full().cut(2, 7, []).cut(3, 5, [])
    assert (inner.low, inner.high, inner.optimizer.flat["exp_avg"].tolist()) == (3, 5, [3.0, 4.0])


def test_merging_pieces_when_some_lack_a_moment() -> None:
    with_moment: Any = State(0, 2, {"optimizer": Section({"m": np.ones(2, np.float32)})})
    whole = merge([with_moment, State(2, 5)], 5)
    assert whole.optimizer.flat["m"].tolist() == [1, 1, 0, 0, 0]
    assert whole.optimizer.flat["m"].dtype == np.float32


@pytest.mark.parametrize("bounds", [[0, 3, 3, 8], [0, 0, 8, 8], [0, 2, 5, 8]])
def test_pieces_of_other_ranks_are_collected(bounds: list[int]) -> None:
    places = {"layer/1.weight": 0, "own": 4, "flat": 7}

    def body(comm: Communicator) -> State | None:
        mine = pieces(bounds, full(), places)[comm.rank]
        if comm.rank:
            comm.wait_all(start_send_state(comm, mine, 0))
            return None
        return collect_state(comm, mine, [2, 1], 8)

    found = World(3).run(body)[0]
    assert found is not None
    assert_equal(found, full())


def test_copy_has_its_own_arrays() -> None:
    state = full()
    copy = state.copy()
    for _, array in copy.arrays():
        array[...] = 0
    assert_equal(state, full())
