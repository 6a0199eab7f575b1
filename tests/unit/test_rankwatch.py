"""Which rank ended first, and how; the processes are real, the launcher is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from hpctrain.rankwatch import MARK, End, RankWatch, culprits, ranks, verdict

KILLED, SEGMENTATION, BUS = signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS


def ends(*told: tuple[int, int | None, float]) -> list[End]:
    """(rank, code, time); those of one time were noticed together."""
    return [End(rank, 100 + rank, code, time, int(1000 * time)) for rank, code, time in told]


def status(number: int) -> int:
    """An exit status as a code of waitpid."""
    return number << 8


class TestCulprits:
    @pytest.mark.parametrize(
        ("told", "blamed"),
        [
            (ends((1, KILLED, 5.0), (0, KILLED, 5.1), (2, KILLED, 5.1)), [1]),  # killed; the launcher killed the others
            (ends((1, status(0), 5.0), (0, KILLED, 5.1), (2, KILLED, 5.1)), [1]),  # os._exit(0)
            (ends((0, KILLED, 5.0), (2, KILLED, 5.0), (1, SEGMENTATION, 5.0)), [1]),  # a crash tells itself
            (ends((0, KILLED, 5.0), (2, KILLED, 5.0), (1, KILLED, 5.1)), [0, 2]),  # noticed together
            (ends((1, None, 5.0), (0, KILLED, 5.1)), [1]),
            (ends((2, status(3), 5.0), (0, KILLED, 5.1)), [2]),
            (ends((0, status(0), 5.0), (1, status(0), 5.0), (2, KILLED, 5.1)), [2]),  # the end of the run
            (ends((0, status(0), 1.0), (1, KILLED, 9.0)), [1]),  # long after rank 0 had finished
            (ends((0, status(0), 5.0), (1, status(0), 5.1)), []),
            (ends((1, status(0), 5.0), (0, status(2), 5.3), (2, KILLED, 5.4)), [0]),  # a mistake, told by rank 0
            ([], []),
        ],
    )
    def test_of_those_that_ended(self, told: list[End], blamed: list[int]) -> None:
        assert [end.rank for end in culprits(told)] == blamed


class TestVerdict:
    def test_names_rank_and_signal(self) -> None:
        told = verdict(ends((1, KILLED, 5.0), (0, KILLED, 5.1)), silent=False)
        assert told.startswith("rank 1 with PID 101 on ")
        assert told.endswith(" was ended by signal 9 (SIGKILL)")
        assert verdict(ends((0, KILLED, 5.0), (1, KILLED, 5.0)), silent=False).startswith("one of the ranks 0, 1 on ")

    def test_says_what_a_bus_error_means(self) -> None:
        told = verdict(ends((1, BUS, 5.0), (0, KILLED, 5.1)), silent=False)
        assert "signal 7 (SIGBUS): usually /dev/shm is full (" in told
        assert "MiB free" in told
        assert "docker run --shm-size" in told

    def test_a_status_is_told_only_if_the_rank_has_not_spoken(self) -> None:
        assert verdict(ends((1, status(3), 5.0)), silent=False) == ""
        assert verdict(ends((1, status(3), 5.0)), silent=True).endswith("ended with exit status 3 and did not say why")
        gone = verdict(ends((1, status(0), 5.0), (0, KILLED, 5.1)), silent=False)
        assert "rank 1 with PID 101" in gone
        assert "ended in the middle of the run, with exit status 0" in gone

    def test_nobody_is_blamed_for_stopping_when_asked(self) -> None:
        assert verdict(ends((1, signal.SIGUSR1, 5.0), (0, KILLED, 5.1)), silent=True) == ""


def test_ranks_are_watched_but_not_what_they_started() -> None:
    mark = uuid.uuid4().hex

    def rank(number: int, end: str) -> subprocess.Popen[bytes]:
        code = f"import os, subprocess, time; subprocess.Popen(['sleep', '1.5']); time.sleep(1); {end}"
        variables = {**os.environ, MARK: mark, "PMI_RANK": str(number)}
        return subprocess.Popen([sys.executable, "-c", code], env=variables)

    started = [rank(0, "time.sleep(60)"), rank(1, "os._exit(3)")]
    try:
        with RankWatch(mark, 2) as watch:
            deadline = time.monotonic() + 20
            while not watch.ends:
                assert ranks(mark).keys() <= {process.pid for process in started}
                assert time.monotonic() < deadline
                time.sleep(0.02)
            started[0].kill()
            while len(watch.ends) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert [(end.rank, end.pid, end.status, end.signal) for end in watch.ends] == [
            (1, started[1].pid, 3, 0),
            (0, started[0].pid, None, signal.SIGKILL),
        ]
    finally:
        for process in started:
            process.kill()
            process.wait()
