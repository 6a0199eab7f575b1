"""Joining the MPI job that this process was started in."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.cluster import check_singleton
from hpctrain.comm.base import Communicator
from hpctrain.errors import ClusterError, HpctrainError

if TYPE_CHECKING:
    import torch

    from hpctrain.job import Job

PATIENCE = 2.0  # seconds that a rank lets the others speak first, at most


def connect(job: Job | None = None) -> Communicator:
    """The communicator over all ranks, as the job's [communicator] and [trace] ask (if it is known). Collective.

    Raises ClusterError where the launcher and the MPI library do not belong together. From then on an uncaught
    HpctrainError that all ranks raise is told in one sentence by rank 0 alone, and any other uncaught exception,
    also in a thread, ends all ranks.
    """
    from hpctrain.comm import mpi
    from hpctrain.trace.recorder import NullRecorder, Recorder

    check_singleton(mpi.launched_together(), mpi.library(), os.environ)
    if job is None:
        comm = mpi.world()
    else:
        recorder = Recorder(time.monotonic_ns) if job.trace.enabled else NullRecorder()
        comm = mpi.world(recorder, job.communicator.ranks_per_node, job.communicator.wait)
    sys.excepthook = lambda kind, error, trace: _uncaught(comm, kind, error, trace)
    if comm.size > 1:
        threading.excepthook = lambda told: _uncaught_in_thread(comm, told)
    return comm


def place_arenas(job: Job, comm: Communicator, device: torch.device) -> tuple[Communicator, str | None]:
    """The communicator whose arenas lie on this rank's `device`, and what a user should know about that. Collective.

    Raises ClusterError, on all ranks, where some computes on a GPU and others do not.
    """
    from hpctrain.comm.device import open_device
    from hpctrain.comm.gpu import usable_gpus

    kinds = comm.gather_json(device.type)
    if len(set(kinds)) > 1:
        without = [comm.members[rank] for rank, kind in enumerate(kinds) if kind == "cpu"]
        error = ClusterError(
            f'device = "{job.device}": ranks {without} have no GPU that torch and CuPy can use, the others have one; '
            'use nodes that are alike, or device = "cpu"'
        )
        error.everywhere = True
        raise error
    if device.type == "cpu":
        why = usable_gpus()[1] if job.device == "auto" else None
        return comm, f"computing on the CPU: {why}" if why is not None else None
    return open_device(comm, device.index, job.communicator.cuda_aware)


def end_all_ranks(comm: Communicator, error: BaseException) -> None:
    """Tell what only this rank may know, and end all ranks.

    A user's mistake is a sentence, with the error's status; an interruption status 130; anything else is the
    traceback, with this rank's number before every line, status 1. Rank 0 speaks at once, the others in turn a moment
    later, so that what all of them ran into is told once.
    """
    from hpctrain.comm import mpi

    if comm.rank > 0:
        time.sleep(min(PATIENCE, 1.0 + 0.05 * comm.rank))
    status = 1
    if isinstance(error, HpctrainError):
        text, status = f"hpctrain: rank {comm.rank}: {error}\n", error.status
    elif isinstance(error, KeyboardInterrupt):
        text, status = "hpctrain: interrupted before the first step; nothing was saved\n", 130
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
        text = "".join(f"rank {comm.rank}: {line}\n" for line in lines)
    sys.stderr.write(text)
    sys.stderr.flush()
    mpi.abort(status)
    time.sleep(PATIENCE)  # MPICH's returns at times before its launcher has killed this process
    os._exit(status)


def report(error: HpctrainError, rank: int) -> int:
    """Tell a user's mistake, once: the exit status that this rank should end with.

    Rank 0 alone ends with it. The launchers make that the job's status, and neither kills rank 0 before it has
    spoken, as Open MPI does when another rank is first to end with a status that is not 0.
    """
    if rank != 0:
        return 0
    sys.stderr.write(f"hpctrain: {error}\n")
    sys.stderr.flush()
    return error.status


def _uncaught(
    comm: Communicator, kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if isinstance(error, HpctrainError) and (error.everywhere or comm.size == 1):
        raise SystemExit(report(error, comm.rank))
    if comm.size == 1:
        sys.__excepthook__(kind, error, trace)
    else:
        end_all_ranks(comm, error)


def _uncaught_in_thread(comm: Communicator, told: threading.ExceptHookArgs) -> None:
    if told.exc_value is not None and not isinstance(told.exc_value, SystemExit):
        end_all_ranks(comm, told.exc_value)
