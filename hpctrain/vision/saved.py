"""The saved model of a run, to be used in this process; and what the run's data set says about its pictures."""

from __future__ import annotations

from pathlib import Path

from hpctrain.comm.virtual.world import World
from hpctrain.data.splits import Splits
from hpctrain.errors import CheckpointError, DataError
from hpctrain.filenames import BEST, JOB, MODEL
from hpctrain.ingest.store import About
from hpctrain.job import Job
from hpctrain.models.wrappers import load_plain_state
from hpctrain.run.checkpoint import load_model
from hpctrain.run.prepare import Measurable, prepare_evaluation
from hpctrain.text import shown_path


def saved_model(folder: Path) -> Measurable:
    """The model of a run, in evaluation mode, with its arithmetic and device: that of the best evaluation if the run
    kept it, else of the run's end. The job's data is not loaded; its schedule and ranks do not matter here.

    Raises DataError if the folder is no run or has no model yet, CheckpointError if the model does not fit the job.
    """
    if not (folder / JOB).is_file():
        raise DataError(f"{shown_path(folder)} is not a run folder: it has no {JOB}")
    file = next((path for path in (folder / BEST, folder / MODEL) if path.is_file()), None)
    if file is None:
        raise DataError(f"{shown_path(folder)} has no model yet: it is saved when the run ends")
    job = Job.load(folder / JOB, ["strategy=default", "phases=default"])
    if job.device == "cuda":
        job = job.override(["device=auto"])
    tensors = load_model(file)
    parts: Measurable = World(1).run(lambda comm: prepare_evaluation(job, comm, Splits(None)))[0]
    try:
        load_plain_state(parts.model, tensors)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:200]  # torch names each tensor on a line of its own
        raise CheckpointError(f"{shown_path(file)} does not fit the job's model: {line}") from None
    parts.model.eval()
    return parts


def ingested_file(job: Job) -> Path | None:
    """The file that `hpctrain ingest` made, of a job that trains with one; it may be missing by now."""
    file = job.data.options.get("file")
    return Path(file) if job.data.name == "ingested" and isinstance(file, str) else None


def about_data(job: Job) -> About | None:
    """What the run's data set says about itself; None if it is not there, or was not made by `hpctrain ingest`. Raises
    DataError for a file of that name that is something else."""
    path = ingested_file(job)
    return About.of(path) if path is not None and path.exists() else None
