"""How a job ends that one rank alone ends."""

from __future__ import annotations

import atexit
import os
import sys
import time
import traceback
from typing import Any

from hpctrain.errors import HpctrainError

PATIENCE = 2.0  # seconds that a rank lets the others speak first, at most
INTERRUPTED = 130


def end_all_ranks(rank: int, error: BaseException) -> None:
    """Tell what only this rank, number `rank`, may know, and end all ranks.

    A user's mistake is a sentence, with the error's status; an interruption status 130; anything else is the
    traceback, with this rank's number before every line, status 1. Rank 0 speaks at once, the others in turn a moment
    later, so that an error that all of them have is reported once.
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
    """From now on, if an exception that nothing catches ends this program, it ends all ranks, once Python has told it.

    Else MPI_Finalize, in which this rank would wait for the others, might wait for ever.
    """
    atexit.unregister(_end_if_uncaught)  # once is enough
    atexit.register(_end_if_uncaught)


def _end_if_uncaught() -> None:
    error = _uncaught()
    if error is not None and not (isinstance(error, HpctrainError) and error.everywhere):
        _abort(_status(error))


def _uncaught() -> BaseException | None:
    """What ends this program, if an exception does. Test runners and interactive shells leave the exceptions that they
    have caught in the same place; those do not come from the main program's outermost frame."""
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
    world.Abort(status)
    time.sleep(PATIENCE)  # MPICH's returns at times before its launcher has killed this process
    os._exit(status)
