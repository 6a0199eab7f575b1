"""The commands `hpctrain train` and `hpctrain evaluate`."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.comm.alike import check_alike, job_topic
from hpctrain.comm.connect import report
from hpctrain.comm.mpi.ending import end_all_ranks
from hpctrain.errors import INTERRUPTED, CheckpointError, HpctrainError
from hpctrain.filenames import JOB, MODEL
from hpctrain.job.roles import roles_of
from hpctrain.launcher.started import launched_rank

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.job import Job
    from hpctrain.run.resume import Resume


def main(load: Callable[[], tuple[Job, Resume | Path | str | None]]) -> int:
    """Train on the ranks that the launcher started; returns the exit status of this rank.

    `load` reads the job. Its errors are reported after MPI has started, before torch is imported. A rank that ends
    before MPI_Init while another enters it leaves that one waiting forever (MPICH's launcher); a rank that ends with an
    error status before rank 0 has reported causes rank 0 to be killed (Open MPI's).
    """
    error: HpctrainError | None = None
    job: Job | None = None
    resume: Resume | Path | str | None = None
    try:
        with _imports_kept():
            job, resume = load()
    except HpctrainError as mistake:
        error = mistake
    rank = launched_rank(os.environ)
    comm: Communicator | None = None
    try:
        from hpctrain.comm.connect import connect

        comm = connect(job)
        rank = comm.rank
        errors = comm.gather_json(str(error) if error is not None else None)
        first = next((text for text in errors if text is not None), None)
        if first is not None:
            raise HpctrainError(first)
        assert job is not None
        check_alike(comm, [job_topic(job.plain())])
        roles_of(job, comm.nodes)
        with _imports_kept():
            from hpctrain.run.api import train

        result = train(job, comm, resume)
    except HpctrainError as mistake:
        return _exit(report(mistake, rank))
    except Exception as failure:
        if comm is not None and comm.size > 1:
            end_all_ranks(rank, failure)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return _exit(result.status if rank == 0 else 0)


@contextmanager
def _imports_kept() -> Iterator[None]:
    """Turn garbage collection off during imports. Imported objects live as long as the process; scanning them over and
    over while torch is imported, and once more at the end, takes a quarter of the time of a short run. (Not if torch is
    already imported: then the process belongs to someone else.)"""
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _exit(status: int) -> int:
    """Give the other ranks time to end: Open MPI's launcher reports ranks that end with a status before others do."""
    if status:
        time.sleep(0.3)
    return status


def evaluate_run(folder: Path) -> list[str]:
    """Evaluate a run's saved model as the run did at its end: on the test samples, or else the validation samples.

    Runs in this process only: the job's schedule, ranks and device do not matter here. Returns the results as lines of
    text. Raises HpctrainErrors.
    """
    from hpctrain.comm.virtual.world import World
    from hpctrain.errors import DataError
    from hpctrain.job import Job
    from hpctrain.models.wrappers import load_plain_state
    from hpctrain.run.checkpoint import load_model
    from hpctrain.run.evaluate import evaluate
    from hpctrain.run.prepare import prepare_evaluation

    job = Job.load(folder / JOB, ["strategy=default", "phases=default"])
    if job.device == "cuda":
        job = job.override(["device=auto"])
    tensors = load_model(folder / MODEL)

    def body(comm: Communicator) -> list[str]:
        parts = prepare_evaluation(job, comm)
        try:
            load_plain_state(parts.model, tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{folder / MODEL} does not fit the job's model: {error}") from None
        splits = parts.splits
        name, dataset = ("test", splits.test) if splits.test is not None else ("validation", splits.validation)
        if dataset is None:
            raise DataError(f"data.name = {job.data.name!r} has no test or validation samples to evaluate on")
        batch, monitor = job.train.evaluation_batch, job.metric.monitor
        return evaluate(parts.judge, dataset, comm, batch, parts.move, parts.collate, monitor).text(name, job.measured)

    return World(1).run(body)[0]
