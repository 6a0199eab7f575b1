"""Start ranks, wait for them, and ask them to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from hpctrain.errors import ClusterError
from hpctrain.launcher.cleanup import clear, watcher
from hpctrain.launcher.deadline import Deadline, stopping_file, unfinished
from hpctrain.launcher.environment import rank_environment
from hpctrain.launcher.facts import MARK, STOPPING
from hpctrain.launcher.mpiexec import LibraryQuery, find_mpiexec
from hpctrain.launcher.output import Pump
from hpctrain.launcher.processes import wait
from hpctrain.launcher.rankwatch import RankWatch, verdict

ABANDONED = 5.0  # seconds that a launcher may take to end the other ranks after one ended in the middle of a run
GRACE = 10.0  # seconds between asking the ranks to stop and killing them, unless they announce that they will stop


def run(
    count: int,
    command: Sequence[str],
    *,
    grace: float = GRACE,
    environment: Mapping[str, str] | None = None,
    asked: LibraryQuery | None = None,
) -> int:
    """Start `command` on `count` ranks, forward their output line by line, and return the job's exit status.

    SIGINT, SIGTERM or SIGHUP asks the ranks to stop (SIGUSR1). After `grace` seconds (or later, while a step or a
    checkpoint can be expected to end), or on a second signal, they are killed and the status is 137. A message names a
    rank that was killed or exited silently. However the job ends, it leaves no rank and no file of the MPI library on
    this machine. Signals are handled in the main thread only. Raises ClusterError when no mpiexec fits. `asked`: see
    `find_mpiexec`.
    """
    if count < 1:
        raise ClusterError(f"-n {count}: at least 1 rank is needed")
    mpi = find_mpiexec(asked=asked)
    variables = rank_environment(mpi.library, {**os.environ, **(environment or {})})
    mark = variables[MARK] = uuid.uuid4().hex
    variables[STOPPING] = str(stopping_file(mark))
    started = time.time()
    job = _Job(Deadline(grace, stopping_file(mark)))
    path, *arguments = mpi.command(count)
    with (
        _signals(job),
        job.start([path, *mpi.prints_codes, *arguments, *command], variables) as process,
        RankWatch(mark, count) as ranks,
        watcher(process.pid, mark, started, grace),
    ):
        try:
            status = job.wait(lambda: ranks.first_end(unfinished(mark)) if ranks.ends else None)
            if status != 128 + signal.SIGKILL:
                job.drain()
            why = job.why(ranks, unfinished(mark))
            for text in filter(None, (why, job.advice())):
                _say(text)
            return status or int(bool(why))
        finally:  # also ends the ranks of a launcher that was killed
            clear(mark, process.pid, started)
            job.drain()


class _Job:
    """The started launcher: its output, stop requests and the wait for its end."""

    process: subprocess.Popen[bytes]

    def __init__(self, deadline: Deadline) -> None:
        self.deadline = deadline
        self._explained = False
        self._pumps: list[Pump] = []

    @contextlib.contextmanager
    def start(self, argv: Sequence[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
        """Start the launcher in its own session: a terminal's Ctrl-C must not reach it."""
        self.process = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for source, target in ((self.process.stdout, 1), (self.process.stderr, 2)):
            assert source is not None
            self._pumps.append(Pump(source, target))
            self._pumps[-1].start()
        if self.deadline.asked is not None:  # asked to stop before the launcher had started
            self.process.send_signal(signal.SIGUSR1)
        with self.process:
            yield self.process

    def ask(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a stop signal: send SIGUSR1, which both launchers forward without killing any process."""
        self.deadline.ask()
        if hasattr(self, "process") and not self.deadline.again:
            self.process.send_signal(signal.SIGUSR1)

    def wait(self, lost: Callable[[], float | None]) -> int:
        """The job's exit status, once the launcher has ended; 137 if it has not by the deadline, or does not end the
        others although a rank has ended in the middle of a run. `lost`: when a rank did that, if any has."""
        if not self._ended_in_time(lost):
            if not self._abandoned(lost):
                _say("the ranks had not stopped yet and were killed")
            return 128 + signal.SIGKILL
        status = self.process.returncode
        usr1, kill = signal.SIGUSR1, signal.SIGKILL
        early = (usr1, -usr1, 128 + usr1, usr1 | kill)  # hydra combines the statuses of all ranks by OR
        if self.deadline.asked is not None and status in early:  # ended before the ranks could handle the signal
            return 128 + signal.SIGINT
        return 128 - status if status < 0 else status

    def why(self, ranks: RankWatch, unfinished: set[int]) -> str:
        """Which rank made the job fail, if that rank could not report it itself; else ""."""
        silent = self.deadline.asked is None and not any(pump.passed for pump in self._pumps)
        reported = [one for pump in self._pumps for one in pump.noise.reported]
        codes = [code for pump in self._pumps for code in pump.noise.codes]
        return verdict(ranks.finish(), reported, codes, silent, unfinished)

    def advice(self) -> str:
        """What to do about an error that a rank has printed; "" if there is nothing to say."""
        if not any(pump.noise.without_hpctrain for pump in self._pumps):
            return ""
        return f"the Python of the ranks lacks hpctrain; {sys.executable} has it (write plain `python` after --)"

    def drain(self) -> None:
        """Wait until all output has been forwarded."""
        for pump in self._pumps:
            pump.join(5.0)

    def _abandoned(self, lost: Callable[[], float | None]) -> bool:
        """Launchers sometimes do not notice such an end, or leave the others waiting for that rank."""
        end = lost()
        return end is not None and time.monotonic() > end + ABANDONED

    def _ended_in_time(self, lost: Callable[[], float | None]) -> bool:
        while self.process.poll() is None:
            if self.deadline.late() or self._abandoned(lost):
                return False
            if self.deadline.long() and not self._explained:
                what = "step in progress and its checkpoint" if self.deadline.hopeful() else "ranks to end"
                _say(f"waiting for the {what}; press Ctrl-C again to stop at once")
                self._explained = True
            wait(self.process, 0.1)
        return True


@contextlib.contextmanager
def _signals(job: _Job) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    former: dict[int, Any] = {number: signal.signal(number, job.ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    sys.stderr.write(f"hpctrain run: {text}\n")
    sys.stderr.flush()
