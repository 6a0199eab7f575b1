"""Which rank ended first, and how: hydra does not know, and kills the others before they can report anything.

The launcher, not this process, is the parent of the ranks. But a file descriptor (pidfd) can watch any process, and
has its exit code from Linux 6.15 on; before, /proc has it until the parent has reaped the process. Needs Linux 5.3 or
later; elsewhere nothing is known.

The order of the ends is no proof when they are close together: a rank closes its connection to the launcher before it
has ended, so on a busy machine those that the launcher then kills may end before it.
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
from hpctrain.launcher.noise import Reported, killed_by
from hpctrain.launcher.processes import environments, exit_code, parent

# Slurm's variable is not usable: everything that a batch script starts inherits the script's own rank.
RANK_VARIABLES = tuple(dict.fromkeys(launcher.rank for launcher in LAUNCHERS if launcher.kind))
TOGETHER = 2.0  # seconds within which a launcher kills the other ranks
SIMULTANEOUS = 0.02  # seconds within which the order of ends is not certain: a few time slices of the scheduler
LAUNCHERS_OWN = {signal.SIGKILL, signal.SIGTERM}
ASKED = {signal.SIGUSR1, signal.SIGTERM}


@dataclass(frozen=True)
class End:
    """The end of a rank's process. `code`: as from waitpid, None if it could not be read. `time`: monotonic.

    `seen`: whether the code was read from the process itself.
    """

    rank: int
    pid: int
    code: int | None
    time: float
    seen: bool = True

    @property
    def signal(self) -> int:
        """The signal that ended it; 0 if it exited by itself or this is unknown."""
        return self.code & 0x7F if self.code is not None else 0

    @property
    def status(self) -> int | None:
        """Its exit status; None if there is none or it is unknown."""
        return self.code >> 8 if self.code is not None and not self.signal else None


def ranks(mark: str) -> dict[int, int]:
    """The ranks by PID; processes that the ranks have started are left out."""
    numbers = {pid: _rank(variables) for pid, variables in environments(mark).items()}
    return {pid: rank for pid, rank in numbers.items() if rank is not None and numbers.get(parent(pid)) != rank}


class RankWatch:
    """While entered, records in its own thread how the `count` ranks with that mark end."""

    def __init__(self, mark: str, count: int) -> None:
        self.mark, self.count = mark, count
        self.ends: list[End] = []
        self._watched: dict[int, tuple[int, int]] = {}  # (rank, PID) by file descriptor
        self._seen: set[int] = set()
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

    def first_end(self, ranks: Collection[int]) -> float | None:
        """When the first of these ranks that has ended did so; None if none has."""
        return min((end.time for end in tuple(self.ends) if end.rank in ranks), default=None)

    def finish(self) -> list[End]:
        """Stop watching, and return the ends in order."""
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
        code = exit_code(file, pid)
        self.ends.append(End(rank, pid, code, time.monotonic()))
        self._poll.unregister(file)
        os.close(file)


def culprits(ends: Sequence[End], killed: bool, unfinished: Collection[int] = ()) -> list[End]:
    """The rank that made the launcher end the others, or the candidates, among the ranks that have ended.

    `killed`: the launcher reported a killed rank. `unfinished`: ranks that were in the middle of a run. Empty if all
    ended normally, or if it is not known how they ended.
    """
    crashed = [end for end in ends if end.signal and end.signal not in LAUNCHERS_OWN]
    failed = [end for end in ends if end.status]  # the launcher may have killed others before this one ended
    if crashed or failed:
        return (crashed or failed)[:1]
    for end in ends:
        if end.rank in unfinished or (killed and end.signal):
            together = [one for one in _simultaneous(end, ends) if one.rank in unfinished or (killed and one.signal)]
            exited = [one for one in together if one.seen and one.status == 0]  # the launcher does not do that
            return exited or together
        if end.status == 0 and _killed_others(end, ends):
            return [end]
    return []


def _simultaneous(end: End, ends: Sequence[End]) -> list[End]:
    return [one for one in ends if abs(one.time - end.time) <= SIMULTANEOUS]


def _killed_others(end: End, ends: Sequence[End]) -> bool:
    """Whether the launcher ended all others because this rank, the first to end, had exited."""
    others = [other for other in ends if other is not end]
    killed = [other for other in others if other.signal and other.time - end.time < TOGETHER]
    by_itself = [other for other in others if other.seen and other.status is not None]
    return end is ends[0] and bool(killed) and not by_itself


def verdict(
    ends: Sequence[End],
    reported: Sequence[Reported],
    codes: Sequence[int],
    silent: bool,
    unfinished: Collection[int] = (),
) -> str:
    """Which rank ended the job, as a sentence without a full stop; "" if none did, or if that rank reported it itself.

    `reported`, `codes`: what the launcher reported, see `NoiseFilter`. `silent`: no rank has printed anything.
    `unfinished`: ranks that were in the middle of a run.
    """
    for one in reported:
        if one.rank is not None:
            pid = next((end.pid for end in ends if end.rank == one.rank), one.pid)  # prterun sometimes reports 0
            return _sentence(f"rank {one.rank} with PID {pid} on {one.host}", one.number, 0, silent)
    found = culprits(_completed(ends, codes), bool(reported), unfinished)
    if found:
        return _blame(_listed(found, codes), silent)
    return _sentence(f"a rank on {reported[0].host}", reported[0].number, 0, silent) if reported else ""


def _blame(found: Sequence[End], silent: bool) -> str:
    end, several = found[0], sorted(end.rank for end in found)
    where = f"rank {end.rank} with PID {end.pid}" if len(several) == 1 else f"one of the ranks {several}"
    where += f" on {socket.gethostname()}"
    if end.code is not None and all(one.code == end.code for one in found):
        return _sentence(where, end.signal, end.status, silent)
    return f"{where} ended in the middle of the run; the launcher then ended the other ranks"


def _sentence(where: str, number: int, status: int | None, silent: bool) -> str:
    if number:
        return "" if number in ASKED else killed_by(where, number)
    if not status:
        return f"{where} ended in the middle of the run, with exit status 0; the launcher then ended the other ranks"
    return f"{where} ended with exit status {status} and no error message" if silent else ""


def _completed(ends: Sequence[End], codes: Sequence[int]) -> list[End]:
    """With the launcher's code for each rank whose code this process could not read.

    The launcher lists 0 for ranks that it has killed itself, so a 0 counts only for the rank that ended first.
    """
    believed = _simultaneous(ends[0], ends) if ends else []
    return [
        replace(end, code=codes[end.rank], seen=False)
        if end.code is None and end.rank < len(codes) and (codes[end.rank] or believed == [end])
        else end
        for end in ends
    ]


def _listed(found: Sequence[End], codes: Sequence[int]) -> Sequence[End]:
    """Those of the candidates, all seen to be killed, that the launcher lists as killed.

    It seldom lists those that it has killed itself, for it does not wait for them.
    """
    killed = all(end.seen and end.signal for end in found)
    return [end for end in found if killed and end.rank < len(codes) and codes[end.rank]] or found


def _rank(variables: Mapping[str, str]) -> int | None:
    found = (variables.get(name, "") for name in RANK_VARIABLES)
    return next((int(number) for number in found if number.isdigit()), None)
