"""Options that a run measures when it begins, and keeps from then on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpctrain.comm.base import Communicator
from hpctrain.job import Job
from hpctrain.run.agreement import agreed
from hpctrain.run.identity import recorded
from hpctrain.run.resume import leaves

AUTO = "auto"


def tuned(job: Job, comm: Communicator, folder: Path | None) -> Job:
    """The job with the values of the options that its strategies measure (`Strategy.tune`).

    `folder`: on rank 0, the run that is resumed, whose values are taken. Collective.
    """
    read = agreed(comm, lambda: dict(leaves(recorded(folder))) if folder is not None else {})
    known: dict[str, Any] = comm.broadcast_json(read)
    found: dict[str, Any] = {}
    for index, phase in enumerate(job.schedule):
        options, table = phase.strategy.options, job.key(index, "strategy")
        wanted = [name for name in getattr(phase.strategy.resolve(), "measured", ()) if getattr(options, name) == AUTO]
        found |= {key: known[key] for name in wanted if known.get(key := f"{table}.{name}", AUTO) != AUTO}
        if any(f"{table}.{name}" not in found for name in wanted):
            measured = phase.strategy.resolve().tune(options, comm)
            found |= {f"{table}.{name}": value for name, value in measured.items()}
    return job.resolved(found) if found else job
