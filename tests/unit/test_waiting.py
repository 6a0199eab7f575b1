"""How a real rank waits: MPI itself is not needed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from hpctrain.comm.mpi.requests import LOOKS, Waiting
from hpctrain.comm.waiting import BETWEEN, LONGEST, NAP


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The naps taken, on a clock that only naps advance."""
    taken: list[float] = []
    monkeypatch.setattr(time, "sleep", taken.append)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0 + sum(taken))
    yield taken


class After:
    """Becomes true after some seconds of naps."""

    def __init__(self, naps: list[float], seconds: float) -> None:
        self.naps, self.seconds, self.polls = naps, seconds, 0

    def __call__(self) -> bool:
        self.polls += 1
        return sum(self.naps) >= self.seconds


def test_idle_naps_grow_with_the_wait_and_no_further(naps: list[float]) -> None:
    Waiting(naps=True).until(After(naps, 0.5), idle=True)
    assert naps[0] == NAP
    assert naps == sorted(naps)
    assert naps[-1] == LONGEST
    for index, nap in enumerate(naps):
        assert nap <= max(NAP, sum(naps[:index]) / 8) + 1e-9
    assert len(naps) < 600, "50-microsecond naps would be 10,000"


def test_next_wait_begins_with_short_naps(naps: list[float]) -> None:
    waiting = Waiting(naps=True)
    for _ in range(2):
        before = len(naps)
        waiting.until(After(naps, sum(naps) + 0.1), idle=True)
        assert naps[before] == NAP


def test_naps_grow_less_while_a_long_message_moves(naps: list[float]) -> None:
    Waiting(naps=True).until(After(naps, 0.5))
    assert naps[0] == NAP
    assert naps == sorted(naps)
    assert naps[-1] == BETWEEN
    for index, nap in enumerate(naps):
        assert nap <= max(NAP, sum(naps[:index]) / 32) + 1e-9


def test_patient_waits_begin_with_long_naps(naps: list[float]) -> None:
    Waiting(naps=True, patient=True).until(After(naps, 0.1))
    assert set(naps) == {BETWEEN}


def test_a_rank_polls_again_while_polls_take_long(naps: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI moves a piece of a long message in each poll."""
    durations, clock, polls = iter([50e-6] * LOOKS + [1e-6] + [50e-6] * LOOKS), [0.0], list[int]()

    def ready() -> bool:
        polls.append(len(naps))
        clock[0] += next(durations) if naps else 0.0
        return polls.count(3) == LOOKS

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    Waiting(naps=True).until(ready)
    assert [polls.count(nap) for nap in (1, 2, 3)] == [LOOKS, 1, LOOKS]


def test_short_waits_take_no_nap(naps: list[float]) -> None:
    count = iter(range(100))
    Waiting(naps=True).until(lambda: next(count) == 10, idle=True)
    assert naps == []


def test_spinning_takes_no_nap(naps: list[float]) -> None:
    count = iter(range(10_000))
    Waiting(naps=False).until(lambda: next(count) == 5000, idle=True)
    assert naps == []
