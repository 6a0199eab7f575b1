"""How long to wait for ranks that were asked to stop, and the files by which they ask for more time."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

RENEWED = 5.0  # seconds for which a rank's request for more time is valid
QUIET = 3.0  # seconds of waiting that need no explanation


class Deadline:
    """How long to wait for ranks that were asked to stop: `grace` seconds, longer while they renew `stopping`."""

    def __init__(self, grace: float, stopping: Path) -> None:
        self.grace, self.stopping = grace, stopping
        self.asked: float | None = None
        self.again = False
        self._renewed: tuple[int, float] = 0, 0.0  # the file's modification time, and when it was first seen

    def ask(self) -> None:
        """Record that the ranks were asked to stop; a second call leaves them no more time."""
        if self.asked is None:
            self.asked = time.monotonic()
        else:
            self.again = True

    def hopeful(self) -> bool:
        """Whether a rank has recently announced that it is about to stop."""
        with contextlib.suppress(OSError):
            stamp = self.stopping.stat().st_mtime_ns
            if stamp != self._renewed[0]:
                self._renewed = stamp, time.monotonic()
        return self._renewed[0] > 0 and time.monotonic() - self._renewed[1] < RENEWED

    def late(self) -> bool:
        """Whether to kill the ranks now."""
        if self.asked is None:
            return False
        return self.again or (time.monotonic() >= self.asked + self.grace and not self.hopeful())

    def long(self) -> bool:
        """Whether the wait is long enough to tell the user why."""
        return self.asked is not None and time.monotonic() >= self.asked + QUIET


def temporary() -> Path:
    """The folder of temporary files that the launchers use."""
    return Path(os.environ.get("TMPDIR", "/tmp"))


def stopping_file(mark: str) -> Path:
    """The file that the ranks with this mark renew while they are about to stop."""
    return temporary() / f"hpctrain-stopping-{mark}"


def unfinished_files(mark: str) -> list[Path]:
    """The file of each rank with this mark that has begun a run and not finished it."""
    return list(temporary().glob(f"{stopping_file(mark).name}.*"))


def unfinished(mark: str) -> set[int]:
    """The ranks with this mark that have begun a run and not finished it."""
    return {int(path.suffix[1:]) for path in unfinished_files(mark)}
