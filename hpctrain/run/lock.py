"""The lock of a run folder: a file that names the process using the folder, renewed while that process lives.

Not every shared file system supports operating system locks. This lock needs only what NFS and Lustre guarantee:
linking a file to a name that must not exist yet, and renaming one file over another, are atomic.

A process that finds a lock whose holder is dead may take it over, and only one process may do so. It first takes a
second lock, the succession, named by the dead lock's token. Then it checks that the dead lock is still there, renames
its own over it, and releases the succession. This is correct because (1) only one process at a time can hold the
succession; (2) only the holder of its succession replaces a lock, and a dead holder does nothing; so (3) what was read
after taking the succession is still true at the rename. A latecomer that read the dead lock earlier finds another one
when it checks again, and gives way. The succession is a lock like any other: if its holder dies during the takeover, it
can be taken over, too.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

from hpctrain.errors import CheckpointError, RunInUseError
from hpctrain.filenames import LOCK
from hpctrain.launcher.facts import SLURM
from hpctrain.run.identity import slurm_job

BEAT = 10.0  # seconds between two renewals
NO_LINKS = frozenset([errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])  # hard links unsupported
STALE = 60.0  # seconds without renewal after which a holder on another machine counts as dead


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock or tries to get it. `machine`: boot and PID namespace, "" if unknown. `started`: in
    kernel ticks, which distinguishes it from another process with the same PID. `since`: for people."""

    token: str
    host: str
    machine: str
    pid: int
    started: int
    since: str
    slurm_job: str = ""
    restarts: int = 0

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> Self:
        """This process, with a new token."""
        restarts = environment.get(SLURM.restarts, "")
        job = slurm_job(environment)
        return cls(
            uuid.uuid4().hex,
            socket.gethostname(),
            _machine(),
            os.getpid(),
            _started(os.getpid()) or -1,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            job,
            int(restarts) if restarts.isdecimal() else 0,
        )

    def __str__(self) -> str:
        slurm = f", Slurm job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{slurm}, since {self.since}"


class _Found(NamedTuple):
    """A lock found on disk. `holder`: None if it cannot be read; `token` identifies the lock even then."""

    token: str
    holder: Holder | None
    renewed: float  # by the file system's clock


class Lock:
    """A run folder that this process uses. `release` frees it; so does the end of the process, if it can."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        """Lock the folder. Raises RunInUseError if another process uses it, CheckpointError if no lock can be made."""
        self.path = folder / LOCK
        self.holder = Holder.here(environment)
        own = _beside(self.path, f"wanted-{self.holder.token}")
        try:
            own.write_text(json.dumps(asdict(self.holder)))  # complete before it gets its final name
            _take(self.path, own, self.holder)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}); a run must be able to write to its folder"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()
        atexit.register(self.release)

    def release(self) -> None:
        """Release the folder. Does nothing if already released, or if another process now holds it."""
        if self._released.is_set() or os.getpid() != self.holder.pid:  # a forked child must not release it
            return
        self._released.set()
        self._thread.join(timeout=BEAT)
        atexit.unregister(self.release)
        with contextlib.suppress(OSError):
            if self._is_mine():
                self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise RunInUseError if another process has taken over the folder. It does so if this process stood still for
        long (suspended, file system unavailable)."""
        found = None
        with contextlib.suppress(OSError):
            found = _read(self.path)
        if found is not None and found.token != self.holder.token:
            raise RunInUseError(
                f"{self.path.parent} has been taken over by {found.holder or 'another process'}, because this "
                f"process gave no sign of life for {STALE:.0f} s; it stops here and leaves the folder to the other"
            )

    def _is_mine(self) -> bool:
        found = _read(self.path)
        return found is not None and found.token == self.holder.token

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                if self._is_mine():
                    os.utime(self.path)  # to the file system's own time


def _take(path: Path, own: Path, me: Holder) -> None:
    """Make `own`, which names `me`, the lock at `path`. Raises RunInUseError if a live process holds it."""
    while not _link(own, path):
        found = _read(path)
        if found is None:  # released in the meantime
            continue
        if not _is_dead(found, me, path.parent):
            raise RunInUseError(
                f"{path.parent} is in use by {found.holder or 'an unknown process'}; wait for it to end, or start a "
                f"new run without --resume (if it is dead, this is detected within {STALE:.0f} s)"
            )
        succession = _beside(path, found.token)
        _take(succession, own, me)
        try:
            now = _read(path)
            if now is not None and now.token == found.token:
                _put(own, path)
                return
        finally:
            succession.unlink(missing_ok=True)


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{LOCK}-{what}")


def _link(own: Path, path: Path) -> bool:
    """Hard-link `own` as `path`; False if `path` already exists."""
    try:
        os.link(own, path)
        return True
    except FileExistsError:
        return _same(own, path)  # NFS may repeat a request whose reply was lost
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:  # created in place, and empty for a moment
            with open(path, "x") as file:
                file.write(own.read_text())
            return True
        except FileExistsError:
            return False


def _same(own: Path, path: Path) -> bool:
    try:
        return os.path.samefile(own, path)
    except FileNotFoundError:
        return False


def _put(own: Path, path: Path) -> None:
    """Rename a copy of `own` over `path`."""
    beside = _beside(path, f"taking-{uuid.uuid4().hex}")
    beside.write_text(own.read_text())
    os.replace(beside, path)


def _read(path: Path) -> _Found | None:
    """The current lock at `path`, or None. Reopens the file, so that NFS asks its server. Raises OSError."""
    try:
        with open(path, "rb") as file:
            status, text = os.fstat(file.fileno()), file.read()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    holder = _parsed(text)
    token = holder.token if holder is not None else f"{status.st_ino}-{status.st_ctime_ns}"
    return _Found(token, holder, status.st_mtime)


def _parsed(text: bytes) -> Holder | None:
    """The holder that a lock file names; None if it is truncated or not one of ours."""
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    typed = all(type(getattr(holder, part.name)).__name__ == part.type for part in fields(holder))
    return holder if typed and holder.token.isalnum() and 0 < holder.pid < 2**31 else None


def _is_dead(found: _Found, me: Holder, folder: Path) -> bool:
    """Whether the lock's holder is known to be dead."""
    holder = found.holder
    if holder is not None and _ended_by_slurm(holder, me):
        return True
    if holder is not None and holder.machine and holder.machine == me.machine:
        return not _lives(holder.pid, holder.started)
    return _now(folder) - found.renewed > STALE


def _ended_by_slurm(holder: Holder, me: Holder) -> bool:
    """Whether Slurm has ended the holder: it ends all processes of a job before restarting it."""
    return bool(me.slurm_job) and holder.slurm_job == me.slurm_job and holder.restarts < me.restarts


def _now(folder: Path) -> float:
    """The time by the file system's clock, which may differ from this machine's."""
    probe = _beside(folder / LOCK, f"clock-{uuid.uuid4().hex}")
    try:
        with open(probe, "wb") as file:
            return os.fstat(file.fileno()).st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _lives(pid: int, started: int) -> bool:
    """Whether the process with that PID and start time still runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, whose /proc may be hidden
        pass
    now = _started(pid)
    return now is None or now == started


def _started(pid: int) -> int | None:
    """When that process started, in kernel ticks since boot; 0 for a zombie, None if hidden."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in (b"Z", b"X") else 0


def _machine() -> str:
    """The current boot of this machine and its PID namespace (containers have their own); "" if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
