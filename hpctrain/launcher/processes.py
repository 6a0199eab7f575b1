"""Other processes on this machine: those of one launch, their names, parents and exit codes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from hpctrain.launcher.facts import MARK, MPICH

# linux/pidfd.h: the first version of struct pidfd_info begins with its mask and ends with the exit code.
PIDFD_INFO = struct.Struct("=Q52si")
PIDFD_INFO_EXIT = 1 << 3
PIDFD_GET_INFO = 0xC040FF0B


def environments(mark: str) -> dict[int, dict[str, str]]:
    """The environments, by PID, of this user's other living processes whose environment has the mark."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            variables = process.environ()
            if variables.get(MARK) == mark and process.pid != os.getpid():
                found[process.pid] = variables
    return found


def marked(mark: str) -> list[int]:
    """The PIDs of this user's other living processes whose environment has the mark."""
    return list(environments(mark))


def name(pid: int) -> str:
    """The name of a process; "" if it is gone."""
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return ""


def parent(pid: int) -> int:
    """The PID of a process's parent; 0 if the process is gone."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def living(pid: int) -> bool:
    """Whether a process may still have files open: it is neither gone nor a zombie."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait until that child ends, for `seconds` at most. `Popen.wait` would notice the end up to 50 ms late."""
    try:
        file = os.pidfd_open(process.pid)
    except (OSError, AttributeError):  # not on this system
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        return
    try:
        poll = select.poll()
        poll.register(file, select.POLLIN)
        poll.poll(1000 * seconds)
    finally:
        os.close(file)


def exit_code(pidfd: int, pid: int) -> int | None:
    """How the process behind that pidfd ended, as from waitpid; None if unknown.

    psutil provides this only for children of the calling process.
    """
    code = _code_of_zombie(pid)
    return _code_of_pidfd(pidfd) if code is None else code


def _code_of_pidfd(pidfd: int) -> int | None:
    """From Linux 6.15 on; None before."""
    info = bytearray(PIDFD_INFO.pack(PIDFD_INFO_EXIT, bytes(52), 0))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, _, code = PIDFD_INFO.unpack(info)
    return code if mask & PIDFD_INFO_EXIT else None


def _code_of_zombie(pid: int) -> int | None:
    """None if its parent has reaped it already."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[49]) if len(fields) > 49 and fields[0] == "Z" else None


def used_files() -> Iterator[tuple[set[str], bool]]:
    """For each process: the files it has open, or mapped in shared memory, and whether it is one of hydra's."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            # psutil would read smaps, for which the kernel walks every page of the process.
            maps = Path(f"/proc/{process.pid}/maps").read_text(errors="replace")
            if maps:  # else it is a kernel process, or has ended except for closing its files
                used = set(re.findall(r"(/dev/shm/\S+)", maps)) | {file.path for file in process.open_files()}
                yield used, process.name() in MPICH.parents
