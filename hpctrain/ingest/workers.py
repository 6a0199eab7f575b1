"""Who computes tasks: the ranks that a launcher started, or processes of this machine; and how fast they do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from hpctrain.errors import DataError, HpctrainError
from hpctrain.ingest.tasks import Inline, processes
from hpctrain.launcher.started import launched_rank, launched_size
from hpctrain.text import shown_path

AHEAD = 4  # tasks per worker that are under way, or wait to be written
SYNC_S = 1.0  # between writing down what has been done; what is done in between is done again after a crash

Make = Callable[[Executor | None, int | None], int]


def on_ranks(asked: int | None, make: Make) -> int:
    """The exit status of `make(executor, workers)` with the ranks that a launcher started, or of `make(None, None)`.

    Collective over these ranks: rank 0 calls `make`, the others compute its tasks. `asked`: workers that the user asked
    for, which is a mistake if ranks were started.
    """
    launched, by = launched_size(os.environ)
    if launched == 1:
        return make(None, None)
    from hpctrain.comm.connect import connect, report
    from hpctrain.comm.mpi.executor import ranks

    rank = launched_rank(os.environ)
    try:
        comm = connect()
        rank = comm.rank
        with ranks() as executor:
            if executor is None:
                return 0
            if asked is not None:
                raise DataError(f"-n {asked}: {by} has already started {launched} ranks; leave -n out")
            return make(executor, comm.size - 1)
    except HpctrainError as mistake:
        return report(mistake, rank)


def check_options(workers: int | None, out: Path) -> None:
    """Raise DataError for a number of workers or an output file that cannot be."""
    if workers is not None and workers < 1:
        raise DataError(f"-n {workers}: at least 1 process must read")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise DataError(f"{shown_path(out)}: expected the name of a file to write, in a folder that exists")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0))


def local(count: int, *preload: str) -> contextlib.AbstractContextManager[Executor]:
    """An executor over `count` processes that have loaded the modules `preload`; for 1, over this process."""
    return processes(count, *preload) if count > 1 else Inline()


class Rate:
    """Says when to write things down, and how long the rest will take. `what`: the command, for people."""

    def __init__(self, what: str, done: int, total: int) -> None:
        self._what, self._first, self._total, self._began = what, done, total, time.monotonic()
        self._due = self._began + SYNC_S

    def due(self) -> bool:
        """Whether SYNC_S seconds have passed since this was last true."""
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + SYNC_S
        return True

    def text(self, done: int) -> str:
        """For the progress line."""
        rate = (done - self._first) / (time.monotonic() - self._began)
        left = (self._total - done) / rate if rate else float("inf")
        return f"{self._what}: {done:,} of {self._total:,} pictures, {rate:.0f}/s, {left:.0f} s left"
