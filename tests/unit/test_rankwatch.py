"""Which rank ended first, and how; with real processes but without a launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

from hpctrain.launcher.facts import MARK
from hpctrain.launcher.noise import Reported
from hpctrain.launcher.rankwatch import End, RankWatch, culprits, ranks, verdict

KILLED, SEGMENTATION, BUS = signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS


def ends(*reported: tuple[int, int | None, float]) -> list[End]:
    """Ends from (rank, code, time)."""
    return [End(rank, 100 + rank, code, time) for rank, code, time in reported]


def status(number: int) -> int:
    """An exit status as a waitpid code."""
    return number << 8


class TestCulprits:
    @pytest.mark.parametrize(
        ("reported", "blamed"),
        [
            (ends((2, KILLED, 5.0), (1, status(1), 5.1), (0, KILLED, 5.1)), [1]),  # MPI_Abort, with its own words
            (ends((1, KILLED, 5.0), (0, KILLED, 5.1), (2, KILLED, 5.1)), [1]),  # killed; the launcher killed the others
            (ends((1, status(0), 5.0), (0, KILLED, 5.1), (2, KILLED, 5.1)), [1]),  # os._exit(0)
            (ends((0, KILLED, 5.0), (2, KILLED, 5.0), (1, SEGMENTATION, 5.0)), [1]),  # a crash is recognisable
            (ends((0, KILLED, 5.0), (2, KILLED, 5.015), (1, KILLED, 5.1)), [0, 2]),  # too close for the order to count
            (ends((1, None, 5.0), (0, None, 5.1)), []),  # the launcher may know
            (ends((2, status(3), 5.0), (0, KILLED, 5.1)), [2]),
            (ends((0, status(0), 5.0), (1, status(0), 5.0), (2, KILLED, 5.1)), [2]),  # the end of the run
            (ends((0, status(0), 1.0), (1, KILLED, 9.0)), [1]),  # long after rank 0 had finished
            (ends((0, status(0), 5.0), (1, status(0), 5.1)), []),
            (ends((1, status(0), 5.0), (0, status(2), 5.3), (2, KILLED, 5.4)), [0]),  # a mistake, reported by rank 0
            ([], []),
        ],
    )
    def test_culprits_among_ended_ranks(self, reported: list[End], blamed: list[int]) -> None:
        assert [end.rank for end in culprits(reported, killed=True)] == blamed

    def test_ranks_count_as_killed_only_if_the_launcher_says_so(self) -> None:
        assert culprits(ends((1, KILLED, 5.0), (0, KILLED, 5.1)), killed=False) == []

    def test_culprits_among_ranks_in_the_middle_of_a_run(self) -> None:
        reported = ends((0, status(0), 5.0), (1, status(0), 5.1), (2, None, 5.1))
        assert culprits(reported, killed=False) == []
        assert [end.rank for end in culprits(reported, killed=False, unfinished={1, 2})] == [1]
        late = ends((0, KILLED, 5.0), (2, status(0), 5.002), (1, KILLED, 5.1))
        assert [end.rank for end in culprits(late, killed=True, unfinished={0, 1, 2})] == [2]


class TestVerdict:
    def reported(
        self,
        *reported: tuple[int, int | None, float],
        codes: tuple[int, ...] = (),
        silent: bool = False,
        killed: bool = False,
    ) -> str:
        return verdict(ends(*reported), [Reported(None, None, "node7", 9)] if killed else [], codes, silent)

    def test_verdict_names_rank_and_signal(self) -> None:
        reported = self.reported((1, KILLED, 5.0), (0, KILLED, 5.1), killed=True)
        assert reported.startswith("rank 1 with PID 101 on ")
        assert reported.endswith(" was killed by signal 9 (SIGKILL)")
        assert self.reported((0, KILLED, 5.0), (1, KILLED, 5.0), killed=True).startswith("one of the ranks [0, 1] on ")

    def test_verdict_explains_a_bus_error(self) -> None:
        reported = self.reported((1, BUS, 5.0), (0, KILLED, 5.1))
        assert "signal 7 (SIGBUS): usually /dev/shm is full (" in reported
        assert "MiB free" in reported
        assert "docker run --shm-size" in reported

    def test_status_is_reported_only_if_the_rank_printed_nothing(self) -> None:
        assert self.reported((1, status(3), 5.0)) == ""
        assert self.reported((1, status(3), 5.0), silent=True).endswith("ended with exit status 3 and no error message")
        gone = self.reported((1, status(0), 5.0), (0, KILLED, 5.1))
        assert gone.startswith("rank 1 with PID 101")
        assert "ended in the middle of the run, with exit status 0" in gone

    def test_launcher_supplies_what_the_watch_missed(self) -> None:
        """Hydra's list is wrong for ranks that it killed itself: 0 for rank 2."""
        unseen = (1, None, 5.0), (0, None, 5.1), (2, None, 5.1)
        assert self.reported(*unseen, codes=(9, 9, 0), killed=True).startswith("rank 1 with PID 101")
        assert "exit status 0" in self.reported(*unseen, codes=(9, 0, 0), killed=True)
        assert "rank 1 " in self.reported(*reversed(unseen), codes=(9, 11, 0))
        assert self.reported(*unseen, codes=(0, 0, 0)) == ""
        assert self.reported(*unseen) == ""
        assert self.reported(killed=True) == "a rank on node7 was killed by signal 9 (SIGKILL)"
        left = verdict([], [Reported(2, 77, "node7", 0)], [], False)
        assert left.startswith("rank 2 with PID 77 on node7 ended in the middle")
        seen = verdict(ends((2, None, 5.0)), [Reported(2, 0, "node7", 9)], [], False)
        assert seen == "rank 2 with PID 102 on node7 was killed by signal 9 (SIGKILL)"

    def test_launcher_decides_between_killed_ranks_that_ended_together(self) -> None:
        """It lists 0 for most of those that it has killed itself; what only it has seen proves nothing."""
        seen = (0, KILLED, 5.0), (1, KILLED, 5.001), (2, KILLED, 5.002)
        assert self.reported(*seen, codes=(0, 9, 0), killed=True).startswith("rank 1 with PID 101 on ")
        assert self.reported(*seen, codes=(9, 9, 0), killed=True).startswith("one of the ranks [0, 1] on ")
        unseen = ends((0, None, 5.0), (1, None, 5.001))
        reported = [Reported(None, None, "node7", 9)]
        unsure = verdict(unseen, reported, [9, 0], True, unfinished={0, 1})
        assert unsure.startswith("one of the ranks [0, 1] on ")
        assert unsure.endswith(" ended in the middle of the run; the launcher then ended the other ranks")

    def test_no_rank_is_blamed_for_stopping_when_asked(self) -> None:
        assert self.reported((1, signal.SIGUSR1, 5.0), (0, KILLED, 5.1), silent=True) == ""


def test_only_ranks_are_watched_not_their_children() -> None:
    mark = uuid.uuid4().hex

    def rank(number: int, end: str) -> subprocess.Popen[bytes]:
        code = f"import os, subprocess, time; subprocess.Popen(['sleep', '1.5']); time.sleep(1); {end}"
        variables = {**os.environ, MARK: mark, "PMI_RANK": str(number)}
        return subprocess.Popen([sys.executable, "-c", code], env=variables)

    def runs(process: subprocess.Popen[bytes]) -> bool:
        """Unlike `poll`, this leaves the exit status in /proc for the watch to read."""
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    started = [rank(0, "time.sleep(60)"), rank(1, "os._exit(3)")]
    try:
        with RankWatch(mark, 2) as watch:
            deadline = time.monotonic() + 20
            while not watch.ends:
                found = ranks(mark).keys()
                if all(map(runs, started)):  # a child of an ended rank is an orphan, and counts as a rank
                    assert found <= {process.pid for process in started}
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
