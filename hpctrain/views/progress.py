"""Shows on stderr how far a long operation has come, once it has taken two seconds."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

PATIENCE_S = 2.0  # before the first message
EVERY_S = 5.0  # between messages where lines cannot be redrawn


class Progress:
    """Call it with a text that says what is being done. On a terminal one line is redrawn; elsewhere a line is printed
    every few seconds.

    `out`: default stderr. Use it as a context manager; the line is erased at the end.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self._out: TextIO = out or sys.stderr
        self._live = self._out.isatty()
        self._what, self._done, self._total = "", 0, 0
        self._due, self._open = time.monotonic() + PATIENCE_S, False

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._open:
            self._write("\r\x1b[K")

    def __call__(self, text: str) -> None:
        now = time.monotonic()
        if now < self._due:
            return
        self._due = now + (0.2 if self._live else EVERY_S)
        self._write(f"\r\x1b[K{text}" if self._live else f"{text}\n")
        self._open = self._live

    def begin(self, what: str, total: int) -> None:
        """Begin an operation on `total` rows; `what`: its name, such as "writing spans"."""
        self._what, self._done, self._total = what, 0, total

    def advance(self, rows: int) -> None:
        """Report that `rows` more rows are done."""
        self._done += rows
        self(f"{self._what}: {100 * self._done / max(1, self._total):.0f} % of {self._total:,}")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
