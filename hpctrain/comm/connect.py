"""Joining the MPI job that this process was started in."""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.cluster import check_singleton
from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from hpctrain.job import Job


def connect(job: Job | None = None) -> Communicator:
    """The communicator over all ranks, as the job's [communicator] and [trace] ask (if it is known). Collective.

    Raises ClusterError where the launcher and the MPI library do not belong together. From then on an uncaught
    HpctrainError is told in one sentence by rank 0 alone, and any other uncaught exception ends all ranks.
    """
    import time

    from hpctrain.comm import mpi
    from hpctrain.trace.recorder import NullRecorder, Recorder

    check_singleton(mpi.launched_together(), mpi.library(), os.environ)
    if job is None:
        comm = mpi.world()
    else:
        recorder = Recorder(time.monotonic_ns) if job.trace.enabled else NullRecorder()
        comm = mpi.world(recorder, job.communicator.ranks_per_node, job.communicator.wait)
    sys.excepthook = lambda kind, error, trace: _uncaught(comm, kind, error, trace)
    return comm


def abort_with_traceback(comm: Communicator, error: BaseException) -> None:
    """Print the exception with this rank's number before every line, and end all ranks."""
    from hpctrain.comm import mpi

    lines = "".join(traceback.format_exception(error)).splitlines()
    sys.stderr.write("".join(f"rank {comm.rank}: {line}\n" for line in lines))
    sys.stderr.flush()
    mpi.abort(1)


def report(error: HpctrainError, rank: int) -> int:
    """Tell a user's mistake, once: the exit status that this rank should end with.

    Rank 0 alone ends with 2. The launchers make that the job's status, and neither kills rank 0 before it has
    spoken, as Open MPI does when another rank is first to end with a status that is not 0.
    """
    if rank != 0:
        return 0
    sys.stderr.write(f"hpctrain: {error}\n")
    sys.stderr.flush()
    return 2


def _uncaught(
    comm: Communicator, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, HpctrainError):
        raise SystemExit(report(error, comm.rank))
    if issubclass(kind, KeyboardInterrupt) or comm.size == 1:
        sys.__excepthook__(kind, error, trace)
    else:
        abort_with_traceback(comm, error)
