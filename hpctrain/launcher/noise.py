"""Removes mpiexec's own messages about failed ranks from its output."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpctrain.launcher.facts import LAUNCHERS, Words

SHARED = "/dev/shm"
RULE = re.compile(rb"(-{60,}|={60,})$")


@dataclass(frozen=True)
class Reported:
    """What a launcher reports about a failed rank. `number`: the signal, 0 if the rank exited by itself in mid-run."""

    rank: int | None
    pid: int | None
    host: str
    number: int


def _compiled(pick: Callable[[Words], Sequence[str]]) -> tuple[re.Pattern[bytes], ...]:
    """The picked patterns of all launchers, compiled; empty ones are left out."""
    patterns = dict.fromkeys(pattern for launcher in LAUNCHERS for pattern in pick(launcher.words) if pattern)
    return tuple(re.compile(pattern.encode()) for pattern in patterns)


BLOCK = _compiled(lambda words: [words.block])
LINE = _compiled(lambda words: words.lines)
WHO = _compiled(lambda words: [words.who])
LEFT = _compiled(lambda words: [words.left])
SIGNAL = _compiled(lambda words: [words.signal])
CODES = _compiled(lambda words: [words.codes])
WITHOUT_HPCTRAIN = b"ModuleNotFoundError: No module named 'hpctrain'"


class NoiseFilter:
    """Removes messages about failed ranks from a launcher's output: the ranks have reported their failure themselves.

    A rank that was killed could report nothing: `reported` has what the blocks say about it. `codes`: how each rank
    ended, as from waitpid, if the launcher lists all of them and they were on one host; they may be wrong for ranks
    that the launcher itself has killed. `without_hpctrain`: a rank's Python does not have hpctrain. Lines that might
    begin a block are held until the next line, or `flush`.
    """

    def __init__(self) -> None:
        self.reported: list[Reported] = []
        self.codes: list[int] = []
        self.without_hpctrain = False
        self._held: list[bytes] = []
        self._block: bytes | None = None
        self._who: re.Match[bytes] | None = None

    def feed(self, line: bytes) -> bytes:
        """Take one line with its line end; return what may be printed now."""
        line = line.replace(b"\0", b"")  # prterun ends its blocks with a NUL
        text = line.strip()
        self.without_hpctrain |= text.endswith(WITHOUT_HPCTRAIN)
        rule = RULE.match(text) is not None
        if self._block is not None:
            self._block += b" " + text
            if rule:
                self._end()
            return b""
        after_rule = bool(self._held) and RULE.match(self._held[-1].strip()) is not None
        if after_rule and any(block.match(text) for block in BLOCK):
            self._held, self._block = [], text
            return b""
        if codes := _search(CODES, text):
            if not codes["more"].strip():
                self.codes = [int(code) for code in codes["codes"].split(b",") if code]
            return self.flush()
        if any(line.match(text) for line in LINE):
            self._note_killed(text)
            return self.flush()
        if rule or not text:
            out = self.flush() if after_rule else b""
            self._held.append(line)
            return out
        return self.flush() + line

    def flush(self) -> bytes:
        """Return the held lines when no more input follows."""
        out, self._held = b"".join(self._held), []
        return out

    def _end(self) -> None:
        text, self._block = self._block or b"", None
        self._who = _search(WHO, text)
        self._note_killed(text)

    def _note_killed(self, text: bytes) -> None:
        """The block names the killed rank; the signal is in it too (Open MPI) or in a line that follows (hydra)."""
        number = _search(SIGNAL, text)
        if self._who is None or (number is None and not _search(LEFT, text)):
            return
        who, self._who = self._who.groupdict(), None
        rank, pid = (int(who[key]) if key in who else None for key in ("rank", "pid"))
        signalled = int(number["number"]) if number is not None else 0
        self.reported.append(Reported(rank, pid, who["host"].decode(), signalled))


def _search(patterns: Sequence[re.Pattern[bytes]], text: bytes) -> re.Match[bytes] | None:
    return next((found for pattern in patterns if (found := pattern.search(text))), None)


def killed_by(where: str, number: int) -> str:
    """A message that a signal killed the rank named by `where`, with advice if there is any."""
    text = f"{where} was killed by {_signal_name(number)}"
    if number == signal.SIGBUS:
        text += f": usually {SHARED} is full ({_free(SHARED)}); remove files there, or make it larger "
        text += "(docker run --shm-size=2g)"
    return text


def _free(path: str) -> str:
    try:
        status = os.statvfs(path)
    except OSError:
        return "it does not exist"
    free, total = (status.f_frsize * blocks >> 20 for blocks in (status.f_bavail, status.f_blocks))
    return f"{free} of {total} MiB free"


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
