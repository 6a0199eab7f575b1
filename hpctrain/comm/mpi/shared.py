"""Arenas in memory shared by the ranks of a node (MPI-3 shared windows), with epochs to wait for."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from hpctrain.comm.base import Arena, Buffer
from hpctrain.comm.mpi.start import MPI

BOARD = 64  # bytes before each rank's part: its epoch, alone on a cache line
SHARED_MEMORY = "/dev/shm"


class PrivateArena(Arena):
    """Memory of this rank alone."""

    def __init__(self, length: int, dtype: np.dtype[Any]) -> None:
        self.mine = np.zeros(length, dtype)
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None


class SharedArena(Arena):
    """One window over the ranks of a node. Collective over `node`, like `free`. `id` plus an epoch is the id of a wait.

    `publish` (a store of the epoch after a memory barrier) and `arrived` make writes visible. The window stays locked:
    MPICH accepts Win.Sync only inside an access epoch.
    """

    def __init__(self, node: MPI.Intracomm, length: int, dtype: np.dtype[Any], id: int) -> None:
        self.id = id
        nbytes = BOARD + -(-length * dtype.itemsize // BOARD) * BOARD
        self._window = MPI.Win.Allocate_shared(nbytes, 1, comm=node)
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._epochs: list[np.ndarray[Any, Any]] = []
        self.parts: list[Buffer] = []
        lengths = node.allgather(length)
        for rank in range(node.size):
            memory, _ = self._window.Shared_query(rank)
            data = np.asarray(memory).view(np.uint8)
            self._epochs.append(data[:8].view(np.int64))
            size = lengths[rank] * dtype.itemsize
            self.parts.append(data[BOARD : BOARD + size].view(dtype))
        self._rank = node.rank
        self.mine = self.parts[node.rank]
        self._epochs[node.rank][0] = 0
        self.mine[...] = 0
        self.epoch = 0
        self._window.Sync()
        node.Barrier()
        self._window.Sync()

    def publish(self) -> None:
        """Make this rank's writes visible to the other ranks."""
        self._window.Sync()
        self.epoch += 1
        self._epochs[self._rank][0] = self.epoch

    def sync(self) -> None:
        """A memory barrier: the message that follows or precedes it then orders the accesses of both ranks."""
        self._window.Sync()

    def arrived(self) -> bool:
        """Whether every rank of the node has published as often as this one."""
        epoch = self.epoch
        for other in self._epochs:
            if other[0] < epoch:
                return False
        self._window.Sync()
        return True

    def behind(self) -> int:
        """How many fewer times than this rank some rank of the node has published, at most."""
        first = min(int(other[0]) for other in self._epochs)
        self._window.Sync()
        return self.epoch - first

    def free(self) -> None:
        self.parts, self._epochs = [], []
        self.mine = None
        self._window.Unlock_all()
        self._window.Free()


def why_not_shared(node: MPI.Intracomm, nbytes: int) -> str | None:
    """Why arenas of `nbytes` per rank of the node cannot be shared; None if they can. Collective.

    Touching more shared memory than is available kills the process (a bus error), so this is checked first.
    """
    needed = node.allreduce(nbytes)
    reason = None
    if node.rank == 0:
        try:
            status = os.statvfs(SHARED_MEMORY)
            free = status.f_bavail * status.f_frsize
        except OSError as error:
            return node.bcast(f"{SHARED_MEMORY} cannot be accessed ({error.strerror})")
        if needed > 0.9 * free:
            reason = (
                f"{SHARED_MEMORY} has {free / 2**20:.0f} MiB free, but {needed / 2**20:.0f} MiB are needed; "
                "give the node (or container: --shm-size) more shared memory"
            )
    return node.bcast(reason)
