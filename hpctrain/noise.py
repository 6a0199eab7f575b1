"""What mpiexec itself says when ranks end badly, taken out of its output."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass

SHARED = "/dev/shm"


@dataclass(frozen=True)
class Told:
    """What a launcher says about a rank that ended badly. `number`: the signal, 0 if it left in mid-run by itself."""

    rank: int | None
    pid: int | None
    host: str
    number: int


class NoiseFilter:
    """Takes out of a launcher's output what only says that ranks ended badly: they have said so themselves.

    A rank that was killed could say nothing: what the blocks say about it is in `told`. `codes`: how each rank ended,
    as from waitpid, where the launcher gives them all and they were on one host; for ranks that it has killed itself
    they may be wrong. Lines that might begin a block are held until the next one, or `flush`.
    """

    RULE = re.compile(rb"(-{60,}|={60,})$")
    BLOCK = re.compile(
        rb"prterun (detected|noticed|has exited)|MPI_ABORT was invoked|=\s+BAD TERMINATION OF ONE OF YOUR APPL"
    )
    LINE = re.compile(
        rb"\[mpiexec@\S+\] (Sending Ctrl-C|Press Ctrl-C)|\[\S+:\d+\] PMIX ERROR: PMIX_ERR_UNREACH"
        rb"|Abort\(\d+\) on node \d+ \(rank|YOUR APPLICATION TERMINATED WITH THE EXIT STRING"
        rb"|This typically refers to a problem with your appl|Please see the FAQ page for debugging"
    )
    # The PID that hydra gives may be that of a rank that it has killed itself.
    WHO = re.compile(rb"process rank (\d+) with PID (\d+) on node (\S+)|PID \d+ RUNNING AT (\S+)")
    LEFT = re.compile(rb"exiting\s+improperly")
    CODES = re.compile(rb"\[mpiexec@\S+\] Exit codes: \[[^]]+\] ([-\d,]+)(.*)")
    SIGNAL = re.compile(rb"exited on\s+signal (\d+)|THE EXIT STRING: .*\(signal (\d+)\)")

    def __init__(self) -> None:
        self.told: list[Told] = []
        self.codes: list[int] = []
        self._held: list[bytes] = []
        self._block: bytes | None = None
        self._who: re.Match[bytes] | None = None

    def feed(self, line: bytes) -> bytes:
        """Take one line with its end; returns what may be printed now."""
        line = line.replace(b"\0", b"")  # prterun ends its blocks with one
        text = line.strip()
        rule = self.RULE.match(text) is not None
        if self._block is not None:
            self._block += b" " + text
            if rule:
                self._end()
            return b""
        after_rule = bool(self._held) and self.RULE.match(self._held[-1].strip()) is not None
        if after_rule and self.BLOCK.match(text):
            self._held, self._block = [], text
            return b""
        if codes := self.CODES.match(text):
            if not codes[2].strip():
                self.codes = [int(code) for code in codes[1].split(b",") if code]
            return self.flush()
        if self.LINE.match(text):
            self._note_killed(text)
            return self.flush()
        if rule or not text:
            out = self.flush() if after_rule else b""
            self._held.append(line)
            return out
        return self.flush() + line

    def flush(self) -> bytes:
        """What was held, because nothing followed."""
        out, self._held = b"".join(self._held), []
        return out

    def _end(self) -> None:
        text, self._block = self._block or b"", None
        self._who = self.WHO.search(text)
        self._note_killed(text)

    def _note_killed(self, text: bytes) -> None:
        """Who was killed is in the block; by which signal, too (Open MPI), or in a line that follows (hydra)."""
        number = self.SIGNAL.search(text)
        if self._who is None or (number is None and not self.LEFT.search(text)):
            return
        (rank, pid, host, other), self._who = self._who.groups(), None
        value = int(number[1] or number[2]) if number is not None else 0
        host = (host or other).decode()
        one = Told(int(rank), int(pid), host, value) if rank is not None else Told(None, None, host, value)
        self.told.append(one)


def ended_by(where: str, number: int) -> str:
    """That a signal ended the rank named by `where`, and what to do about it where that is known."""
    text = f"{where} was ended by {_signal_name(number)}"
    if number == signal.SIGBUS:
        text += f": usually {SHARED} is full ({_free(SHARED)}); remove files there, or make it larger "
        text += "(docker run --shm-size=2g)"
    return text


def _free(path: str) -> str:
    try:
        status = os.statvfs(path)
    except OSError:
        return "there is none"
    free, total = (status.f_frsize * blocks >> 20 for blocks in (status.f_bavail, status.f_blocks))
    return f"{free} of {total} MiB free"


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
