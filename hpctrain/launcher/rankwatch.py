"""Which rank ended first, and how: hydra does not know, and kills the others before they can say anything.

The launcher is the parent of the ranks, not this process. But a process can be watched by a file descriptor, and until
its parent has collected it, /proc has its exit status. Linux 5.3 and later; elsewhere nothing is known.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hpctrain.launcher.facts import LAUNCHERS
from hpctrain.launcher.noise import Told, ended_by
from hpctrain.launcher.processes import environments, exit_code, parent

# Slurm's would not do: whatever a batch script starts has inherited the script's own rank.
RANK_VARIABLES = tuple(dict.fromkeys(launcher.rank for launcher in LAUNCHERS if launcher.kind))
TOGETHER = 2.0  # seconds within which a launcher kills the other ranks
LAUNCHERS_OWN = {signal.SIGKILL, signal.SIGTERM}
ASKED = {signal.SIGUSR1, signal.SIGTERM}


@dataclass(frozen=True)
class End:
    """That a rank's process has ended. `code`: as from waitpid, None if it could not be read. `time`: monotonic.

    Ends of one `batch` were noticed together: which one came first is not known. `seen`: whether the code was read
    from the process itself.
    """

    rank: int
    pid: int
    code: int | None
    time: float
    batch: int
    seen: bool = True

    @property
    def signal(self) -> int:
        """What ended it, 0 if it ended by itself, or nobody knows."""
        return self.code & 0x7F if self.code is not None else 0

    @property
    def status(self) -> int | None:
        """Its exit status; None if there is none, or nobody knows."""
        return self.code >> 8 if self.code is not None and not self.signal else None


def ranks(mark: str) -> dict[int, int]:
    """The ranks' processes by PID; not what they have started themselves."""
    numbers = {pid: _rank(variables) for pid, variables in environments(mark).items()}
    return {pid: rank for pid, rank in numbers.items() if rank is not None and numbers.get(parent(pid)) != rank}


class RankWatch:
    """While entered, notes on a thread of its own how the `count` ranks with that mark end."""

    def __init__(self, mark: str, count: int) -> None:
        self.mark, self.count = mark, count
        self.ends: list[End] = []
        self._watched: dict[int, tuple[int, int]] = {}  # (rank, PID) by file
        self._seen: set[int] = set()
        self._batch = 0
        self._poll = select.poll()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)

    def __enter__(self) -> RankWatch:
        self._stop, self._stopper = os.pipe()
        self._poll.register(self._stop, select.POLLIN)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.finish()
        for file in [*self._watched, self._stop]:
            os.close(file)

    def finish(self) -> list[End]:
        """Stop watching: what ended, and how, in order."""
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                os.close(self._stopper)
            self._thread.join()
        return self.ends

    def _run(self) -> None:
        pause = 0.05
        while True:
            incomplete = len(self._seen) < self.count and hasattr(os, "pidfd_open")
            if incomplete:
                self._look()
                pause = min(1.0, pause * 1.2)
            ready = {file for file, _ in self._poll.poll(1000 * pause if incomplete else None)}
            for file in ready - {self._stop}:
                self._note(file)
            self._batch += 1
            if ready == {self._stop}:
                return

    def _look(self) -> None:
        for pid, rank in ranks(self.mark).items():
            if pid not in self._seen:
                with contextlib.suppress(OSError):
                    file = os.pidfd_open(pid)
                    self._seen.add(pid)
                    self._watched[file] = rank, pid
                    self._poll.register(file, select.POLLIN)

    def _note(self, file: int) -> None:
        rank, pid = self._watched.pop(file)
        self.ends.append(End(rank, pid, exit_code(pid), time.monotonic(), self._batch))
        self._poll.unregister(file)
        os.close(file)


def culprits(ends: Sequence[End], killed: bool, unfinished: Collection[int] = ()) -> list[End]:
    """Of ranks that have ended: the one because of which the launcher ended the others, or those that may be it.

    `killed`: the launcher knows of one that was killed. `unfinished`: ranks that were in the middle of a run. Empty if
    all ended as they should, or how they ended is not known.
    """
    crashed = [end for end in ends if end.signal and end.signal not in LAUNCHERS_OWN]
    failed = [end for end in ends if end.status]  # the launcher may have killed others before this one had ended
    if crashed or failed:
        return (crashed or failed)[:1]
    for end in ends:
        if end.rank in unfinished or (killed and end.signal):
            return [other for other in ends if (other.batch, other.code) == (end.batch, end.code)]
        if end.status == 0 and _killed_others(end, ends):
            return [end]
    return []


def _killed_others(end: End, ends: Sequence[End]) -> bool:
    """Whether the launcher ended all others because this rank, the first to end, had left."""
    others = [other for other in ends if other is not end]
    killed = [other for other in others if other.signal and other.time - end.time < TOGETHER]
    by_itself = [other for other in others if other.seen and other.status is not None]
    return end is ends[0] and bool(killed) and not by_itself


def verdict(
    ends: Sequence[End], told: Sequence[Told], codes: Sequence[int], silent: bool, unfinished: Collection[int] = ()
) -> str:
    """Who ended the job, in one sentence without an end; "" if nobody did, or it has spoken for itself.

    `told`, `codes`: what the launcher said of that, see `NoiseFilter`. `silent`: no rank has said anything.
    `unfinished`: ranks that were in the middle of a run.
    """
    for one in told:
        if one.rank is not None:
            pid = next((end.pid for end in ends if end.rank == one.rank), one.pid)  # prterun says 0 at times
            return _sentence(f"rank {one.rank} with PID {pid} on {one.host}", one.number, 0, silent)
    found = culprits([_completed(end, codes) for end in ends], bool(told), unfinished)
    if found:
        end, several = found[0], sorted(end.rank for end in found)
        where = f"rank {end.rank} with PID {end.pid}" if len(several) == 1 else f"one of the ranks {several}"
        return _sentence(f"{where} on {socket.gethostname()}", end.signal, end.status or 0, silent)
    return _sentence(f"a rank on {told[0].host}", told[0].number, 0, silent) if told else ""


def _sentence(where: str, number: int, status: int, silent: bool) -> str:
    if number:
        return "" if number in ASKED else ended_by(where, number)
    if status == 0:
        return f"{where} ended in the middle of the run, with exit status 0; the launcher then ended the others"
    return f"{where} ended with exit status {status} and did not say why" if silent else ""


def _completed(end: End, codes: Sequence[int]) -> End:
    """With its code by the launcher's list where this process did not see it."""
    return replace(end, code=codes[end.rank], seen=False) if end.code is None and end.rank < len(codes) else end


def _rank(variables: Mapping[str, str]) -> int | None:
    found = (variables.get(name, "") for name in RANK_VARIABLES)
    return next((int(number) for number in found if number.isdigit()), None)
