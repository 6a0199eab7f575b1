"""Milliseconds per step of real ranks on one host. Functions here are collective over the ranks of an MPI job."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpctrain.bench.runs import quiet_session
from hpctrain.comm.base import Communicator
from hpctrain.run.api import fit_batch
from hpctrain.study.case import Case
from hpctrain.study.payload import steps_per_round

WORKERS = 2
UNMEASURED, MEASURED = 20, 120  # steps, each rounded up to whole rounds


def milliseconds(comm: Communicator, cases: Sequence[Case]) -> dict[str, float]:
    """By row: of the mean step of a worker, over whole rounds. All ranks return the same.

    Each case takes its first ranks of `comm`; the others wait. Where all_reduce has a codec it exchanges messages,
    since it needs none on one host. The data sets must have an option `limit`, in samples.
    """
    found = {}
    for case in cases:
        group = comm.split(0 if comm.rank < case.ranks() else None, comm.rank)
        seconds = np.zeros(1)
        if group is not None:
            seconds[0] = _step_seconds(group, case)
            group.free()
        comm.broadcast(seconds)
        found[case.row.name] = round(1e3 * float(seconds[0]), 2)
    return found


def _step_seconds(comm: Communicator, case: Case) -> float:
    """On rank 0, which is a worker."""
    job = case.job()
    options = job.schedule[0].strategy.options
    period = steps_per_round(job)
    first, count = (-(-steps // period) * period for steps in (UNMEASURED, MEASURED))
    keys = ["train.epochs=1", f"data.limit={(first + count + 1) * case.setting.workers * job.train.batch_size}"]
    if hasattr(options, "exchange") and getattr(options, "codec", "none") != "none":
        keys.append("strategy.exchange=message")
    marks: list[int] = []
    with quiet_session(job.override(keys), comm) as running:
        for batch in running.batches():
            marks.append(comm.now())
            fit_batch(running, batch)
    if len(marks) <= first:  # a server, or a worker that others overtook
        return 0.0
    last = min(first + count, len(marks) - 1)
    return (marks[last] - marks[first]) / (last - first) / 1e9
