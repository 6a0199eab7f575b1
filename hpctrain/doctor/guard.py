"""A guard against hanging: a process that reports slow stages, and ends this process if a stage never finishes."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

SLOW = 2.0  # seconds after which a stage is reported
LIMIT = 120.0  # seconds that a stage may take
DONE = "done"
LAST_WORDS = 1.0  # seconds between reporting and killing, so that the other ranks can report too


class Guard:
    """Watches this process until `close`, or until it ends. Create it before starting threads.

    It is a child process, not a thread, because MPI_Init holds the interpreter and may end the process. `process`
    names this one; `reports`: whether to report slow stages, and this process's death, on stderr. If a stage takes
    longer than `limit` seconds, every process reports it and is killed.
    """

    def __init__(self, process: str, reports: bool, slow: float = SLOW, limit: float = LIMIT) -> None:
        reading, self._writing = os.pipe()
        parent = os.getpid()
        self._child = os.fork()
        if self._child == 0:
            try:
                os.close(self._writing)
                _guard(reading, parent, process, reports, slow, limit)
            finally:
                os._exit(0)
        os.close(reading)

    def stage(self, text: str) -> None:
        """Announce the next stage, such as "starting MPI"."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._writing, text.encode() + b"\n")

    def close(self) -> None:
        """Stop watching: all stages are done."""
        self.stage(DONE)
        os.close(self._writing)
        os.waitpid(self._child, 0)


def _guard(reading: int, parent: int, process: str, reports: bool, slow: float, limit: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent; this process ends with it
    os.closerange(3, reading)
    os.closerange(reading + 1, 4096)  # must not keep a rank's connection to its launcher open
    stage, began, reported = "starting", time.monotonic(), not reports
    while True:
        due = began + (limit if reported else min(slow, limit))
        if select.select([reading], [], [], max(0.0, due - time.monotonic()))[0]:
            data = os.read(reading, 4096)
            if not data:
                break
            stage, began, reported = data.decode().split("\n")[-2], time.monotonic(), not reports
        elif time.monotonic() >= began + limit:
            _write(
                f"hpctrain doctor: {process} was still {stage} after {limit:.0f} s and is killed; check what it "
                "waits for: a rank that has died or was never started, a network that drops messages, or a file system "
                "that does not respond"
            )
            time.sleep(LAST_WORDS)
            os.kill(parent, signal.SIGKILL)
            return
        else:
            _write(f"hpctrain doctor: {stage} ...")
            reported = True
    if reports and stage != DONE:
        _write(
            f"hpctrain doctor: {process} died while {stage}; see the last output above. If MPI was starting, the usual "
            "cause is a launcher that does not belong to the library: `hpctrain run` finds the right mpiexec; under "
            "Slurm, check srun --mpi"
        )


def _write(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), text.encode() + b"\n")
