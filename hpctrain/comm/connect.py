"""Joining the MPI job that this process was started in."""

from __future__ import annotations

import os
import sys
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.comm.base import Communicator
from hpctrain.comm.mpi.ending import end_all_ranks_with_this_program
from hpctrain.errors import ClusterError, HpctrainError
from hpctrain.launcher.started import check_singleton

if TYPE_CHECKING:
    import torch

    from hpctrain.job import Job


def connect(job: Job | None = None) -> Communicator:
    """The communicator over all ranks, as the job's [communicator] and [trace] ask (if it is known). Collective.

    Raises ClusterError where the launcher and the MPI library do not belong together. From then on a program that ends
    with an uncaught exception ends all ranks.
    """
    from hpctrain.comm.mpi import library
    from hpctrain.comm.mpi.communicator import world
    from hpctrain.trace.recorder import NullRecorder, Recorder

    check_singleton(library.launched_together(), library.name(), os.environ)
    if job is None:
        comm = world()
    else:
        recorder = Recorder(time.monotonic_ns) if job.trace.enabled else NullRecorder()
        comm = world(recorder, job.communicator.ranks_per_node, job.communicator.wait)
    if comm.size > 1:
        end_all_ranks_with_this_program()
    return comm


def place_arenas(job: Job, comm: Communicator, device: torch.device) -> tuple[Communicator, str | None]:
    """The communicator whose arenas lie on this rank's `device`, and what a user should know about that. Collective.

    Raises ClusterError, on all ranks, where some computes on a GPU and others do not.
    """
    from hpctrain.comm.device.choice import open_device
    from hpctrain.comm.device.gpu import usable_gpus

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


def tell_once(error: HpctrainError, rank: int) -> None:
    """If nothing catches `error`, which all ranks raise, rank 0 alone is to tell it, in one sentence. To that end
    `sys.excepthook` is another one for as long as the error lives; it passes on all others."""
    former, known = sys.excepthook, weakref.ref(error)

    def hook(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        if isinstance(value, HpctrainError) and value is known():
            raise SystemExit(report(value, rank))
        former(kind, value, trace)

    def restore() -> None:
        if sys.excepthook is hook:
            sys.excepthook = former

    sys.excepthook = hook
    weakref.finalize(error, restore).atexit = False
