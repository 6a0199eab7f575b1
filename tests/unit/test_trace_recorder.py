"""The recorder: spans of a lane never overlap, nothing is lost, and it is cheap."""

import random
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.trace.events import PhaseSwitch, PlainEvent, from_json
from hpctrain.trace.recorder import NullRecorder, Recorder, measure_span_cost
from hpctrain.trace.schema import KINDS, SPAN_STRUCT, SPANS, TABLES, Kind


class Clock:
    """A clock that tests set."""

    def __init__(self, now=0):
        self.now = now

    def __call__(self):
        return self.now


def test_span_becomes_one_row():
    recorder = Recorder()
    recorder.step = 7
    recorder.open("send", 100, 4096, 3, 1 << 61, 32, 1e18)
    recorder.close(150)
    (row,) = recorder.drain()["spans"]
    assert row.tolist() == (7, Kind.SEND, 0, 0, 100, 150, 4096, 3, 1 << 61, 32, 1e18)
    assert recorder.drain()["spans"].size == 0


def test_child_cuts_its_parent_and_counters_are_kept_once():
    recorder = Recorder()
    recorder.open("reduce", 0, 800, 5, 9, 32, 200.0)
    recorder.open("recv", 10, 400, 2, 1)
    recorder.close(30)
    recorder.open("send", 30, 400, 2, 2)
    recorder.close(60)
    recorder.close(100)
    rows = recorder.drain()["spans"]
    assert rows["items"].tolist() == [32, 0, 0, 0] and rows["flops"].tolist() == [200.0, 0.0, 0.0, 0.0]
    cut = [
        (KINDS[k - 1], p, a, b, n) for k, p, a, b, n in rows[["kind", "piece", "start_ns", "end_ns", "bytes"]].tolist()
    ]
    assert cut == [
        ("reduce", 0, 0, 10, 800),
        ("recv", 0, 10, 30, 400),
        ("send", 0, 30, 60, 400),
        ("reduce", 1, 60, 100, 0),
    ]
    assert set(rows["id"][rows["kind"] == Kind.REDUCE].tolist()) == {9}


def test_span_without_duration_keeps_its_bytes():
    recorder = Recorder()
    recorder.open("send", 5, 64)
    recorder.open("wait", 5)
    recorder.close(9)
    recorder.close(9)
    rows = recorder.drain()["spans"]
    assert rows[["kind", "start_ns", "end_ns", "bytes"]].tolist() == [(Kind.SEND, 5, 5, 64), (Kind.WAIT, 5, 9, 0)]


def test_passed_span_cuts_what_is_open_and_ends_now():
    clock = Clock()
    recorder = Recorder(clock)
    recorder.step = 7
    recorder.open("update", 0, 800)
    clock.now = 60
    recorder.passed(Kind.REDUCE, 20, 400, 9)
    recorder.passed(Kind.REDUCE, 60, 1 << 70, 9)
    recorder.close(100)
    rows = recorder.drain()["spans"]
    assert rows[["step", "kind", "piece", "start_ns", "end_ns", "bytes"]].tolist() == [
        (7, Kind.UPDATE, 0, 0, 20, 800),
        (7, Kind.REDUCE, 0, 20, 60, 400),
        (7, Kind.REDUCE, 0, 60, 60, 2**63 - 1),
        (7, Kind.UPDATE, 1, 60, 100, 0),
    ]
    assert rows["id"].tolist() == [-1, 9, 9, -1] and rows["peer"].tolist() == [-1] * 4


actions = st.lists(st.tuples(st.sampled_from(["open", "close", "drain"]), st.integers(0, 5), st.sampled_from(KINDS)))


@settings(max_examples=300, deadline=None)
@given(actions)
def test_spans_of_a_lane_tile_the_covered_time(moves):
    recorder, now, covered = Recorder(), 0, 0
    bytes_by_kind: Counter[str] = Counter()
    own: Counter[str] = Counter()
    stack: list[str] = []
    parts: list[Any] = []
    for number, (move, wait, kind) in enumerate([*moves, *[("close", 1, "data")] * len(moves)]):
        now += wait
        if stack:
            covered += wait
            own[stack[-1]] += wait
        if move == "open":
            recorder.open(kind, now, number)
            bytes_by_kind[kind] += number
            stack.append(kind)
        elif move == "close" and stack:
            recorder.close(now)
            stack.pop()
        elif move == "drain":
            parts.append(recorder.drain()["spans"])
    spans = np.concatenate([*parts, recorder.drain()["spans"]])
    assert (spans["end_ns"] >= spans["start_ns"]).all()
    assert (spans["start_ns"][1:] >= spans["end_ns"][:-1]).all()
    took = spans["end_ns"] - spans["start_ns"]
    assert took.sum() == covered
    for code, kind in enumerate(KINDS, 1):
        mine = spans["kind"] == code
        assert took[mine].sum() == own[kind]
        assert spans["bytes"][mine].sum() == bytes_by_kind[kind]


def test_open_span_stays_open_when_drained():
    recorder = Recorder()
    recorder.open("wait", 10)
    assert recorder.drain()["spans"].size == 0
    recorder.close(500)
    assert recorder.drain()["spans"][["start_ns", "end_ns"]].tolist() == [(10, 500)]


def test_unknown_kind_is_an_immediate_error():
    with pytest.raises(ValueError, match="'sending' is not a known span kind; choose from data, forward"):
        Recorder().open("sending", 0)
    with pytest.raises(ValueError, match="'lost' is not a known outcome"):
        Recorder().step_done(0, 1.0, 1, 0.1, "lost")
    with pytest.raises(RuntimeError, match="never opened"):
        Recorder().close(1)


def test_steps_events_clock_resources_and_device():
    clock = Clock(42)
    recorder = Recorder(clock)
    recorder.step = 3
    recorder.step_done(1, 0.5, 32, 0.1, "dropped", 2, 4, 1, 960)
    recorder.event(PhaseSwitch("é" * 400))
    recorder.clock(-17, 5)
    recorder.resource(99.5, 1 << 40)
    recorder.device(3, Kind.UPDATE, 50, 60, 1)
    rows = recorder.drain()
    assert rows["steps"].tolist() == [(3, 1.0, 0.5, 32, 0.1, 2, 2, 4, 1, 960, 42)]
    t_ns, kind, data = rows["events"][0].tolist()
    assert (t_ns, kind) == (42, b"switch")
    assert from_json(kind.decode(), data.decode()) == PhaseSwitch("é" * 233 + "…")
    assert rows["clock"].tolist() == [(42, -17, 5)]
    assert rows["resources"].tolist() == [(42, 99.5, 1 << 40, -1, -1, -1.0, -1)]
    assert rows["device"].tolist() == [(3, Kind.UPDATE, 50, 60, 1)]
    assert {name: rows[name].dtype for name in rows} == TABLES


def test_lanes_have_their_own_stack_and_step():
    recorder = Recorder()
    server = recorder.lane(1)
    assert recorder.lane(0) is recorder
    assert recorder.lane(1) is server
    recorder.step, server.step = 10, 20
    recorder.open("wait", 0)
    server.open("recv", 1)
    server.close(2)
    recorder.close(9)
    assert recorder.drain()["spans"][["step", "kind", "lane"]].tolist() == [(20, Kind.RECV, 1), (10, Kind.WAIT, 0)]


def test_two_threads_lose_nothing():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        _two_threads()
    finally:
        sys.setswitchinterval(interval)


def _two_threads():
    recorder, count = Recorder(), 20_000

    def record(lane):
        for number in range(count):
            lane.open("send", 2 * number, number)
            lane.close(2 * number + 1)
            lane.event(PlainEvent("x", str(number)))

    threads = [threading.Thread(target=record, args=(recorder.lane(n),)) for n in (0, 1)]
    for thread in threads:
        thread.start()
    parts = []
    while any(thread.is_alive() for thread in threads):
        parts.append(recorder.drain())
    parts.append(recorder.drain())
    spans = np.concatenate([part["spans"] for part in parts])
    for lane in (0, 1):
        assert spans["bytes"][spans["lane"] == lane].tolist() == list(range(count))
    assert sum(len(part["events"]) for part in parts) == 2 * count


def test_null_recorder_does_nothing():
    recorder = NullRecorder()
    assert recorder.lane(1) is recorder
    recorder.open("anything", 1)
    recorder.close(2)
    recorder.close(3)
    recorder.passed(1, 2, 3, 4)
    recorder.step_done(0, 0.0, 1, 0.1)
    recorder.event(PlainEvent("a", "b"))
    recorder.clock(1, 2)
    recorder.resource(1, 2)
    assert all(len(rows) == 0 for rows in recorder.drain().values())


def test_packed_span_is_a_row_of_the_table():
    values = (random.getrandbits(60), 3, 1, 0, 5, 6, 7, -1, -2, 32, 1e30)
    assert np.frombuffer(SPAN_STRUCT.pack(*values), SPANS)[0].tolist() == values


def test_cost_of_a_span_is_measured():
    assert 0 < measure_span_cost(100) < 1  # seconds


def test_importing_loads_neither_h5py_nor_pandas():
    code = (
        "import sys, hpctrain.trace, hpctrain.trace.reader, hpctrain.trace.writer, hpctrain.trace.totals, "
        "hpctrain.trace.resources; print([m for m in ('h5py', 'pandas', 'psutil', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_numbers_too_large_for_their_column_are_clamped():
    """Nothing is raised, by which a run would end."""
    recorder = Recorder(Clock(5))
    recorder.step = 2**70
    recorder.open("send", 100, -(2**80), 2**40, 1, 10**20, 10**400)
    recorder.close(2**65)
    recorder.step = 1
    recorder.step_done(0.5, 1.0, 2**64, 0.1, "applied", 1, 2**31, 300, 2**63)
    recorder.resource(1e300, 2**70)
    recorder.clock(-(2**64), 2**64)
    rows = recorder.drain()
    assert rows["spans"].tolist() == [(2**63 - 1, 6, 0, 0, 100, 2**63 - 1, -(2**63), 2**31 - 1, 1, 2**63 - 1, 0.0)]
    assert rows["steps"].tolist() == [(1, 0.5, 1.0, 2**63 - 1, 0.1, 1, 1, 2**31 - 1, 300, 2**63 - 1, 5)]
    assert rows["resources"]["resident"].tolist() == [2**63 - 1]
    assert rows["clock"].tolist() == [(5, -(2**63), 2**63 - 1)]
    assert all(len(block) == 0 for block in recorder.drain().values())


def test_pieces_beyond_a_byte_are_numbered_255():
    recorder = Recorder()
    recorder.open("forward", 0, items=8)
    for at in range(1, 600, 2):
        recorder.open("recv", at)
        recorder.close(at + 1)
    recorder.close(600)
    rows = recorder.drain()["spans"]
    pieces = rows["piece"][rows["kind"] == Kind.FORWARD].tolist()
    assert pieces[:256] == list(range(256)) and set(pieces[256:]) == {255}
    assert rows["items"].sum() == 8
