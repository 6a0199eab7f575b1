"""What mpiexec itself says when ranks end badly, taken out of its output."""

from __future__ import annotations

import re
import signal


class NoiseFilter:
    """Takes out of a launcher's output what only says that ranks ended badly: they have said so themselves.

    A rank that was killed could say nothing; there the block becomes one line. Lines that might begin a block
    are held until the next one, or `flush`.
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
    WHO = re.compile(rb"process (rank \d+ with PID \d+) on node (\S+)|PID \d+ RUNNING AT (\S+)")
    SIGNAL = re.compile(rb"exited on\s+signal (\d+)|THE EXIT STRING: .*\(signal (\d+)\)")

    def __init__(self) -> None:
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
            return self._end() if rule else b""
        after_rule = bool(self._held) and self.RULE.match(self._held[-1].strip()) is not None
        if after_rule and self.BLOCK.match(text):
            self._held, self._block = [], text
            return b""
        if self.LINE.match(text):
            return self.flush() + self._killed(text)
        if rule or not text:
            out = self.flush() if after_rule else b""
            self._held.append(line)
            return out
        return self.flush() + line

    def flush(self) -> bytes:
        """What was held, because nothing followed."""
        out, self._held = b"".join(self._held), []
        return out

    def _end(self) -> bytes:
        text, self._block = self._block or b"", None
        self._who = self.WHO.search(text)
        return self._killed(text)

    def _killed(self, text: bytes) -> bytes:
        """Who was killed is in the block; by which signal, too (Open MPI), or in a line that follows (hydra)."""
        number = self.SIGNAL.search(text)
        if number is None or self._who is None:
            return b""
        (rank, host, other), self._who = self._who.groups(), None
        value = int(number[1] or number[2])
        if value in (signal.SIGUSR1, signal.SIGTERM):  # it was asked to
            return b""
        where = f"{(rank or b'a rank').decode()} on {(host or other).decode()}"
        return f"hpctrain run: {where} was ended by {_signal_name(value)}\n".encode()


def _signal_name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
