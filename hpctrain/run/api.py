"""What users import to train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import connect, tell_once
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
    """Run a job on all ranks of the MPI job (or of `comm`), by its own model, data and loss. Collective.

    `resume`: the run folder to go on in, or a `Resume`, which says what may differ. Raises HpctrainError, on all
    ranks, for a user's mistakes; another exception on one rank ends all ranks, its traceback first. So does sys.exit()
    on one rank; called on all ranks in the same step it ends the run, and the program. Where files of the run cannot be
    written it goes on to its end, and then raises UnwrittenError, on all ranks, which has the result.
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
    """For a loop of your own: `for batch in s.batches(): ...; s.step(loss)`. Collective; all ranks run the body.

    On a server rank `s.batches()` serves, and yields nothing until its role changes. `s.result` is there after.
    Ranks that leave the loop early (`break`, `return`, sys.exit()) all do so after the same number of steps: then the
    run ends there, without a result. One that leaves alone ends the job, and is named (LeftError).
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
    """What this rank raises and the others cannot know of is reported and ends them too. What all raise is reported
    once, if nothing catches it."""
    try:
        yield
    except (GeneratorExit, SystemExit):  # all ranks leave the loop, or another error would have come of it
        raise
    except BaseException as error:
        if comm.concurrent:  # virtual ranks share one process
            if isinstance(error, HpctrainError) and (error.everywhere or comm.size == 1):
                tell_once(error, comm.rank)
            elif comm.size > 1:
                end_all_ranks(comm.rank, error)
        raise


def fit(session: Session) -> None:
    """The standard loop."""
    for batch in session.batches():
        fit_batch(session, batch)


def fit_batch(session: Session, batch: Batch) -> None:
    """What the standard loop does with a batch."""
    forward = session.prepared.forward
    with session.autocast(), forward.explained(batch):
        loss = forward.loss(forward.outputs(batch), batch)
    session.step(loss)
