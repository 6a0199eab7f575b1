"""Ends the whole job when a single rank fails."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from typing import Any

from hpctrain.errors import INTERRUPTED, HpctrainError

PATIENCE = 2.0  # maximum time in seconds that a rank lets others report first
FORWARDING = 0.2  # seconds for the launcher to forward what was just written; MPICH's may drop it in an abort


def end_all_ranks(rank: int, error: BaseException) -> None:
    """Report an error that only this rank, number `rank`, may have, and end all ranks.

    A user error is reported as a sentence, with the error's status; an interruption has status 130; anything else is
    reported as a traceback, with this rank's number before every line, and status 1. Rank 0 reports immediately, the
    others a little later, in turn, so that an error on all ranks is reported once.
    """
    if rank > 0:
        time.sleep(min(PATIENCE, 1.0 + 0.05 * rank))
    if isinstance(error, HpctrainError):
        text = f"hpctrain: rank {rank}: {error}\n"
    elif isinstance(error, KeyboardInterrupt):
        text = "hpctrain: interrupted before the first step; nothing was saved\n"
    else:
        lines = "".join(traceback.format_exception(error)).splitlines()
        text = "".join(f"rank {rank}: {line}\n" for line in lines)
    sys.stderr.write(text)
    sys.stderr.flush()
    _abort(_status(error))


def end_all_ranks_with_this_program() -> None:
    """From now on, an uncaught exception in this program ends all ranks, once Python has reported it.

    Otherwise MPI_Finalize, in which this rank would wait for the others, might never return.
    """
    atexit.unregister(_end_if_uncaught)  # register only once
    atexit.register(_end_if_uncaught)


def _end_if_uncaught() -> None:
    error = _uncaught()
    if error is not None and not (isinstance(error, HpctrainError) and error.everywhere):
        _abort(_status(error))


def _uncaught() -> BaseException | None:
    """The exception that ends this program, if any. Test runners and interactive shells store exceptions that they have
    caught in the same place; those do not come from the main program's outermost frame."""
    error: BaseException | None = getattr(sys, "last_value", None)
    trace = error.__traceback__ if error is not None else None
    outermost = trace.tb_frame.f_globals.get("__name__") if trace is not None else None
    return error if outermost in ("__main__", "runpy") else None


def _status(error: BaseException) -> int:
    if isinstance(error, HpctrainError):
        return error.status
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _abort(status: int) -> None:
    from hpctrain.comm.mpi.start import MPI

    world: Any = MPI.COMM_WORLD
    time.sleep(FORWARDING)
    world.Abort(status)
    time.sleep(PATIENCE)  # MPICH's Abort sometimes returns before its launcher has killed this process
    os._exit(status)
