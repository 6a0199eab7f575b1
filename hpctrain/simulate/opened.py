"""Runs of a job that only train: for measurements and simulations."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hpctrain.comm.base import Communicator
from hpctrain.job import Job
from hpctrain.run.begin import begun
from hpctrain.run.folder import Narrator
from hpctrain.run.prepare import Prepared
from hpctrain.run.session import Session

RARELY = 100_000, 50, 100  # objects, young collections, middle ones


@contextmanager
def opened(
    job: Job, comm: Communicator, build: Callable[[Job, Communicator], Prepared], out: Narrator | None = None
) -> Iterator[Session]:
    """A session of virtual ranks whose parts `build` makes. `out`: None: it says nothing. Collective."""
    with begun(job, comm, None, out or Narrator(enabled=False), build) as run, Session(run) as running:
        yield running


@contextmanager
def collected_rarely() -> Iterator[None]:
    """Within it, garbage collection seldom looks through all objects. Those of thousands of ranks are millions, almost
    all of which live as long as the run: it took a third of the time."""
    before = gc.get_threshold()
    gc.set_threshold(*RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def only_steps(job: Job, steps: int | None, output: str) -> Job:
    """The job without evaluations and checkpoints, for `steps` rounds (None: as many as it has), with its run folder in
    `output`."""
    changes = [f"output={output}", "train.evaluate_every={fraction=1.0}", "train.checkpoint_every=default"]
    if steps is not None:
        changes.append(f"train.steps={steps}")
    return job.override([*changes, "train.target=default", "train.patience=default"])
