"""Connects to the MPI job that this process was started in."""

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
    """The communicator over all ranks, configured by the job's [communicator] and [trace] (if given). Collective.

    Raises ClusterError if the launcher and the MPI library do not match. From then on, a program that ends with an
    uncaught exception ends all ranks.
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
    """The communicator whose arenas lie on this rank's `device`, and a note for the user, if any. Collective.

    Raises ClusterError, on all ranks, if some ranks compute on a GPU and others do not.
    """
    from hpctrain.comm.device.choice import open_device
    from hpctrain.comm.device.gpu import usable_gpus

    kinds = comm.gather_json(device.type)
    if len(set(kinds)) > 1:
        without = [comm.members[rank] for rank, kind in enumerate(kinds) if kind == "cpu"]
        error = ClusterError(
            f'device = "{job.device}": ranks {without} have no GPU that torch and CuPy can use, but other ranks do; '
            'use nodes of the same kind, or device = "cpu"'
        )
        error.everywhere = True
        raise error
    if device.type != "cuda":
        why = usable_gpus()[1] if job.device == "auto" else None
        return comm, f"computing on the CPU: {why}" if why is not None else None
    table = job.communicator
    return open_device(comm, device.index, table.device_transport, table.cuda_aware)


def report(error: HpctrainError, rank: int) -> int:
    """Report a user error once; returns the exit status that this rank should end with.

    Only rank 0 reports it and ends with its status, which launchers use as the job's status. If another rank were the
    first to end with a non-zero status, Open MPI would kill rank 0 before it has reported the error.
    """
    if rank != 0:
        return 0
    sys.stderr.write(f"hpctrain: {error}\n")
    sys.stderr.flush()
    return error.status


def report_once(error: HpctrainError, rank: int) -> None:
    """If nothing catches `error`, which all ranks raise, make rank 0 alone report it, in one sentence. This replaces
    `sys.excepthook` for the lifetime of the error; other exceptions are passed on."""
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
