"""Outliving MPICH's mpiexec for as long as a checkpoint takes.

Hydra's mpiexec does not handle SIGHUP: it dies when its terminal is closed. The proxy between it and the ranks then
finds its connection closed, and kills them within a millisecond. So the first rank of mpiexec's own node keeps copies
of mpiexec's connections: the proxies see nothing until those are closed too, which they are when that rank is done,
or gone. What mpiexec passed on (output, signals) stays undone meanwhile.

Linux 5.6 and later, where the system lets a process copy another's files (Yama's ptrace_scope = 0); elsewhere there is
no lifeline, and ranks die with their mpiexec.
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
    """`death`: a file that becomes readable when mpiexec is gone. `copies`: what its proxies were connected to."""

    death: int
    copies: list[int] = field(default_factory=list)

    @classmethod
    def of_parent(cls) -> Self | None:
        """Of the mpiexec that started this process; None unless this is the first rank of mpiexec's own node."""
        proxy = os.getppid()
        if os.environ.get(MPICH.local_rank) != "0" or name(proxy) not in MPICH.parents:
            return None
        mpiexec = parent(proxy)
        if not name(mpiexec).startswith("mpiexec"):  # on other nodes it is the remote shell
            return None
        return cls.of(mpiexec)

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """Of that process; None where the system forbids it."""
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
        """Let the proxies find out. Harmless when repeated."""
        for number in [*self.copies, self.death]:
            with contextlib.suppress(OSError):
                os.close(number)
        self.copies, self.death = [], -1


def _connections(pid: int) -> list[int]:
    """That process's sockets and pipes, standard streams excepted."""
    files = {int(entry.name): os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd")}
    return [number for number, what in files.items() if number > 2 and what.startswith(("socket:", "pipe:"))]


def _copy(pidfd: int, number: int) -> int:
    """That process's file of this number, as one of ours (not passed on to children). Raises OSError."""
    copied = int(ctypes.CDLL(None, use_errno=True).syscall(PIDFD_GETFD, pidfd, number, 0))
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copied
