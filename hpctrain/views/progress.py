"""Says on stderr how far something has come, once it has taken long enough for somebody to wonder."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

PATIENCE_S = 2.0  # before the first word
EVERY_S = 5.0  # where lines cannot be redrawn


class Progress:
    """Call it with what is being done: on a terminal one line is redrawn, elsewhere there is one now and then.

    `out`: default stderr. A context manager; at its end the line is wiped out.
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
        """`total` rows are now to be done; `what`: "writing spans"."""
        self._what, self._done, self._total = what, 0, total

    def advance(self, rows: int) -> None:
        """So many more of them are done."""
        self._done += rows
        self(f"{self._what}: {100 * self._done / max(1, self._total):.0f} % of {self._total:,}")

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()
