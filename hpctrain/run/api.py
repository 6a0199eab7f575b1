"""The functions that users import to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import connect, report_once
from hpctrain.comm.mpi.ending import end_all_ranks
from hpctrain.data.loader import Batch
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.run.begin import begun
from hpctrain.run.folder import Narrator
from hpctrain.run.result import Result
from hpctrain.run.resume import Resume
from hpctrain.run.session import Session

__all__ = ["Result", "Session", "fit", "fit_batch", "session", "train"]


def train(
    job: Job,
    comm: Communicator | None = None,
    resume: Resume | Path | str | None = None,
    out: Narrator | None = None,
) -> Result:
    """Run a job on all ranks of the MPI job (or of `comm`), with its own model, data and loss. Collective.

    `resume`: the run folder to resume, or a `Resume`, which says what may differ. A user's mistakes raise HpctrainError
    on all ranks; another exception on one rank ends all ranks, after printing its traceback. So does sys.exit() on one
    rank; called on all ranks in the same step, it ends the run and the program. If files of the run cannot be written,
    the run continues to its end, and then raises UnwrittenError, which holds the result, on all ranks.
    """
    with session(job, comm, resume, out) as running:
        fit(running)
    return running.result


@contextmanager
def session(
    job: Job,
    comm: Communicator | None = None,
    resume: Resume | Path | str | None = None,
    out: Narrator | None = None,
) -> Iterator[Session]:
    """For your own training loop: `for batch in s.batches(): ...; s.step(loss)`. Collective; all ranks run the body.

    On a server rank `s.batches()` serves, and yields nothing until its role changes. `s.result` is available
    afterwards. Ranks that leave the loop early (`break`, `return`, sys.exit()) must all do so after the same number of
    steps: then the run ends there, without a result. A rank that leaves alone ends the job, and the error names it
    (LeftError).
    """
    if comm is None:
        comm = connect(job)
    with (
        _whole_job_fails_together(comm),
        begun(job, comm, Resume.of(resume), out) as run,
        Session(run) as running,
    ):
        yield running


@contextmanager
def _whole_job_fails_together(comm: Communicator) -> Iterator[None]:
    """Report an error that only this rank knows of, and end the other ranks as well. An error that all ranks raise is
    reported once, if nothing catches it."""
    try:
        yield
    except (GeneratorExit, SystemExit):  # all ranks leave the loop; otherwise there would be another error
        raise
    except BaseException as error:
        if comm.concurrent:  # virtual ranks share one process
            if isinstance(error, HpctrainError) and (error.everywhere or comm.size == 1):
                report_once(error, comm.rank)
            elif comm.size > 1:
                end_all_ranks(comm.rank, error)
        raise


def fit(session: Session) -> None:
    """The standard loop."""
    for batch in session.batches():
        fit_batch(session, batch)


def fit_batch(session: Session, batch: Batch) -> None:
    """Process one batch as the standard loop does."""
    forward = session.prepared.forward
    with session.autocast(), forward.explained(batch):
        loss = forward.loss(forward.outputs(batch), batch)
    session.step(loss)
