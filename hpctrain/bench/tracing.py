"""What tracing costs a training: the job of jobs/tracing.toml with traces and without, by turns."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from pathlib import Path

from hpctrain.bench.report import Sample, Table
from hpctrain.bench.runs import quiet_session
from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.trace.reader import Run, open_run
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import TABLES
from hpctrain.trainer import fit

JOB = Path(__file__).with_name("tracing.toml")  # jobs/tracing.toml links to it
PAIRS = 21
LIMIT = 1.01  # of traced to untraced time
WITHOUT, WITH, COST = "without, ms", "with, ms", "cost, %"
SPANS, BYTES = "spans/step", "bytes/step"


@dataclass(frozen=True)
class Training:
    """One training on this rank. `step_ms`: mean of its steps, without evaluations and checkpoints; `spans`, `bytes`:
    what a step added to this rank's trace.
    """

    step_ms: float
    spans: float = 0.0
    bytes: float = 0.0


def measure_tracing(comm: Communicator, progress: Callable[[str], None]) -> Table:
    """Milliseconds per step with traces and without, and the cost of tracing as a share, by pairs. Collective."""
    job = Job.load(JOB)
    _train(comm, job, traced=True)  # what only a process's first training takes, belongs to no pair
    pairs = []
    for pair in range(PAIRS):
        progress(f"tracing, pair {pair + 1} of {PAIRS}")
        pairs.append(_train_pair(comm, job, traced_first=pair % 2 == 1))
    model, batch = job.model.name, job.train.batch_size
    table = Table(
        "tracing",
        f"tracing: {model} on {job.data.name}, batch {batch}, {comm.size} rank{'s' * (comm.size > 1)}; ms per step "
        "without and with traces, cost of pairs, rows and bytes that a step adds to a rank's file",
        [WITHOUT, WITH, COST, SPANS, BYTES],
    )
    _fill_row(table, f"{model}, {batch}", pairs)
    return table


def _train_pair(comm: Communicator, job: Job, traced_first: bool) -> tuple[Training, Training]:
    """(without traces, with traces)."""
    done = {traced: _train(comm, job, traced) for traced in (traced_first, not traced_first)}
    return done[False], done[True]


def _train(comm: Communicator, job: Job, traced: bool) -> Training:
    job = job.override([f"trace.enabled={str(traced).lower()}"])
    if traced:
        comm = copy(comm)
        comm.recorder = Recorder(comm.now)
    training = None
    with quiet_session(job, comm) as session:
        fit(session)
        if not session.result.interrupted:
            phase, run = session.result.phases[0], open_run(session.folder) if traced else None
            training = _account(1e3 * phase.seconds / phase.steps, run, comm.rank)
    if training is None:
        raise HpctrainError("hpctrain bench tracing: interrupted before all was measured; start it again")
    return training


def _account(step_ms: float, run: Run | None, rank: int) -> Training:
    if run is None:
        return Training(step_ms)
    rows = {name: run.rows(name)[rank, 1] for name in TABLES}
    size = sum(count * TABLES[name].itemsize for name, count in rows.items())
    return Training(step_ms, rows["spans"] / rows["steps"], size / rows["steps"])


def _fill_row(table: Table, name: str, pairs: list[tuple[Training, Training]]) -> None:
    ratios = Sample(tuple(traced.step_ms / plain.step_ms for plain, traced in pairs), "")
    table.rows[name] = {
        WITHOUT: Sample(tuple(plain.step_ms for plain, _ in pairs), "ms"),
        WITH: Sample(tuple(traced.step_ms for _, traced in pairs), "ms"),
        COST: Sample(tuple(100 * (ratio - 1) for ratio in ratios.values), "%"),
        SPANS: Sample(tuple(traced.spans for _, traced in pairs), "1"),
        BYTES: Sample(tuple(traced.bytes for _, traced in pairs), "B"),
    }
    low, high = ratios.quartiles
    kept = "kept" if ratios.median <= LIMIT else "not kept"
    table.notes.append(
        f"Median ratio of {len(pairs)} pairs {ratios.median:.4f} (middle half {low:.4f}-{high:.4f}), "
        f"limit {LIMIT:g}: {kept}"
    )
