"""Keep ranks alive after MPICH's mpiexec has died, long enough for a checkpoint.

Hydra's mpiexec does not handle SIGHUP: it dies when its terminal is closed. The proxy between it and the ranks then
finds its connection closed, and kills them within a millisecond. So the first rank on mpiexec's node keeps copies of
mpiexec's connections. The proxies notice nothing until these are closed too, which happens when that rank is done or
dead. Meanwhile nothing forwards output and signals.

Needs Linux 5.6 or later, and a system that lets a process copy another's file descriptors (Yama's ptrace_scope = 0).
Elsewhere there is no lifeline, and ranks die with their mpiexec.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from dataclasses import dataclass, field
from typing import Self

from hpctrain.launcher.facts import MPICH
from hpctrain.launcher.processes import name, parent

PIDFD_GETFD = 438  # the number of the system call, on every architecture


@dataclass
class Lifeline:
    """`death`: a pidfd that becomes readable when mpiexec is gone. `copies`: mpiexec's connections to its proxies."""

    death: int
    copies: list[int] = field(default_factory=list)

    @classmethod
    def of_parent(cls) -> Self | None:
        """A lifeline of the mpiexec that started this process; None unless this is the first rank on mpiexec's node."""
        proxy = os.getppid()
        if os.environ.get(MPICH.local_rank) != "0" or name(proxy) not in MPICH.parents:
            return None
        mpiexec = parent(proxy)
        if not name(mpiexec).startswith("mpiexec"):  # on other nodes it is the remote shell
            return None
        return cls.of(mpiexec)

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """A lifeline of that process; None if the system forbids it."""
        with contextlib.suppress(OSError, AttributeError):
            line = cls(os.pidfd_open(pid))
            try:
                for number in _connections(pid):
                    line.copies.append(_copy(line.death, number))
            except OSError:
                line.close()
                raise
            return line
        return None

    def close(self) -> None:
        """Close the copies, so that the proxies notice. May be called repeatedly."""
        for number in [*self.copies, self.death]:
            with contextlib.suppress(OSError):
                os.close(number)
        self.copies, self.death = [], -1


def _connections(pid: int) -> list[int]:
    """The file descriptors of that process's sockets and pipes, except standard streams."""
    files = {int(entry.name): os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    return [number for number, what in files.items() if number > 2 and what.startswith(("socket:", "pipe:"))]


def _copy(pidfd: int, number: int) -> int:
    """Copy that process's file descriptor into this process (not inherited by children). Raises OSError."""
    copied = int(ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, number, 0))
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copied
