"""Removes everything that a launch leaves on this machine: its processes, and the files of its MPI library.

A watcher process cleans up when `hpctrain run` itself is killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hpctrain.launcher.deadline import Deadline, stopping_file, temporary, unfinished_files
from hpctrain.launcher.facts import HYDRA_FILE, PRTE_FOLDER, SHARED_MEMORY
from hpctrain.launcher.processes import living, marked, used_files

GONE = 10.0  # seconds that killed processes may take to end: freeing their memory takes time


def clear(mark: str, launcher: int, started: float) -> None:
    """Kill the processes with this mark on this machine, then remove the files that their MPI library left."""
    deadline = time.monotonic() + GONE
    dying: set[int] = set()  # their environment is gone, but they may still have files open
    while True:
        pids = marked(mark)
        dying = {pid for pid in dying.union(pids) if living(pid)}
        if not dying or time.monotonic() >= deadline:
            break
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    for path in (stopping_file(mark), *unfinished_files(mark)):
        path.unlink(missing_ok=True)
    for path in leftovers(started, launcher):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def leftovers(started: float, launcher: int) -> list[Path]:
    """This user's files from MPI libraries and launchers that are newer than `started` and not in use.

    Includes the session folder of the Open MPI launcher with that PID.
    """
    found = [temporary() / f"{PRTE_FOLDER}{launcher}"]
    for folder, pattern in ((Path("/dev/shm"), SHARED_MEMORY), (temporary(), HYDRA_FILE)):
        for path in folder.iterdir() if folder.is_dir() else ():
            with contextlib.suppress(OSError):
                status = path.stat()
                # File times come from a coarser clock than time.time().
                ours = status.st_uid == os.getuid() and status.st_ctime >= started - 0.1
                if ours and re.match(pattern, path.name):
                    found.append(path)
    used = _in_use() if len(found) > 1 else set()
    return [path for path in found if path.exists() and str(path) not in used]


def _in_use() -> set[str]:
    """Paths of files that living processes have open or mapped; all of hydra's files while any hydra process lives."""
    used: set[str] = set()
    for files, of_hydra in used_files():
        used |= files
        if of_hydra:
            used |= {str(path) for path in temporary().glob(HYDRA_FILE + "*")}
    return used


@contextlib.contextmanager
def watcher(launcher: int, mark: str, started: float, grace: float) -> Iterator[None]:
    """While entered, a separate process watches this one, and cleans up if it is killed.

    Until then it is a shell, not yet Python: that would start beside the ranks and take their time.
    """
    root = str(Path(__file__).resolve().parents[2])
    code = "import sys; sys.path.insert(0, sys.argv[1]); from hpctrain.launcher import watch; watch(*sys.argv[2:])"
    argv = [sys.executable, "-c", code, root, str(launcher), mark, str(started), str(grace)]
    shell = ["/bin/sh", "-c", 'read -r line || exec "$@"', "watcher"]
    with subprocess.Popen([*shell, *argv], stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin is not None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                process.stdin.write(b"done\n")
                process.stdin.close()


def watch(launcher: str, mark: str, started: str, grace: str) -> None:
    """The watcher process's main function, once its input has ended without a line: `hpctrain run` was killed."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(launcher), signal.SIGUSR1)
    deadline = Deadline(float(grace), stopping_file(mark))
    deadline.ask()
    while marked(mark) and not deadline.late():
        time.sleep(0.1)
    clear(mark, int(launcher), float(started))
