"""The cost of tracing: two trainings of the job jobs/tracing.toml, one with traces, alternate every few steps.

If whole runs alternated, the machine's own fluctuations would be larger than the effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.runs import quiet_session
from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.run.api import fit_batch
from hpctrain.trace.reader import Run, open_run
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.resources import measure_sample_cost
from hpctrain.trace.schema import TABLES

JOB = Path(__file__).with_name("tracing.toml")  # jobs/tracing.toml links to it
TURN = 2  # steps: longer turns give fewer pairs, with the same variation
EARLY = 100  # pairs of turns that are discarded: the first steps do extra work
PROGRESS = 500  # pairs between progress messages
LIMIT = 1.01  # ratio of traced to untraced time
WITHOUT, WITH, RECORDING = "without, ms", "with, ms", "recording, %"
SPANS, BYTES = "spans/step", "bytes/step"


@dataclass(frozen=True)
class Written:
    """What a step adds to this rank's trace, and how long writing it takes."""

    spans: float
    bytes: float
    seconds: float


class Scenario(Protocol):
    """A training that advances on request."""

    def take_turn(self) -> float | None:
        """Seconds per step of TURN steps; None when the training is over."""


class Training:
    """A training in its own run folder. All methods are collective."""

    def __init__(self, stack: ExitStack, comm: Communicator, job: Job, traced: bool) -> None:
        if traced:
            comm = copy(comm)
            comm.recorder = Recorder()
        job = job.override([f"trace.enabled={str(traced).lower()}"])
        self.session = stack.enter_context(quiet_session(job, comm))
        self._batches = self.session.batches()

    def take_turn(self) -> float | None:
        start = time.perf_counter()
        for _ in range(TURN):
            batch = next(self._batches, None)
            if batch is None:
                return None
            fit_batch(self.session, batch)
        return (time.perf_counter() - start) / TURN


def measure_tracing(comm: Communicator, progress: Callable[[str], None]) -> FigureTable:
    """Milliseconds per step with and without traces, and the cost of tracing as a share. Collective."""
    job = Job.load(JOB)
    # Each run trains only half of the time; twice the interval gives as many writes per step as in a normal run.
    flush = f"trace.flush_seconds={2 * job.trace.flush_seconds}"
    with ExitStack() as stack:
        plain = Training(stack, comm, job, traced=False)
        traced = Training(stack, comm, job.override([flush]), traced=True)
        total = plain.session.prepared.total
        pairs = _take_turns(plain, traced, progress)
        done = all(training.session.totals.cursor == total for training in (plain, traced))
        written = _account(open_run(traced.session.folder), comm.rank) if done else None
    if written is None:
        raise HpctrainError("hpctrain bench tracing: interrupted before it had finished; start it again")
    if not pairs:
        raise HpctrainError(
            f"hpctrain bench tracing: the job has fewer than {TURN} steps on {comm.size} ranks; start fewer ranks"
        )
    model, batch = job.model.name, job.train.batch_size
    table = FigureTable(
        "tracing",
        f"tracing: {model} on {job.data.name}, batch {batch}, {comm.size} rank{'s' * (comm.size > 1)}; ms per step "
        "without and with traces, the cost of recording, rows and bytes that a step adds to a rank's file",
        [WITHOUT, WITH, RECORDING, SPANS, BYTES],
    )
    _fill_row(table, f"{model}, {batch}", pairs, written, measure_sample_cost() / job.trace.resources_seconds)
    return table


def _take_turns(plain: Scenario, traced: Scenario, progress: Callable[[str], None]) -> list[tuple[float, float]]:
    """(without, with) in seconds per step, by pair of turns. The order alternates, so that drift cancels out."""
    pairs: list[tuple[float, float]] = []
    while True:
        order = (plain, traced) if len(pairs) % 2 == 0 else (traced, plain)
        took = {training: training.take_turn() for training in order}
        without, with_ = took[plain], took[traced]
        if without is None or with_ is None:
            break
        pairs.append((without, with_))
        if len(pairs) % PROGRESS == 1:
            progress(f"tracing, pair {len(pairs):,} of turns of {TURN} steps each")
    return pairs[min(EARLY, len(pairs) // 4) :]


def _account(run: Run, rank: int) -> Written:
    rows = {name: run.rows(name)[rank, 1] for name in TABLES}
    size = sum(count * TABLES[name].itemsize for name, count in rows.items())
    writing = run.spans(rank, "trace")
    seconds = float((writing["end_ns"] - writing["start_ns"]).sum()) / 1e9
    return Written(rows["spans"] / rows["steps"], size / rows["steps"], seconds / rows["steps"])


def _fill_row(
    table: FigureTable, name: str, pairs: list[tuple[float, float]], written: Written, sampling: float
) -> None:
    """Add a row and its notes. `sampling`: share of a thread's time spent on samples of the resources."""
    ratios = Sample(tuple(traced / plain for plain, traced in pairs), "")
    table.rows[name] = {
        WITHOUT: Sample(tuple(1e3 * plain for plain, _ in pairs), "ms"),
        WITH: Sample(tuple(1e3 * traced for _, traced in pairs), "ms"),
        RECORDING: Sample(tuple(100 * (ratio - 1) for ratio in ratios.values), "%"),
        SPANS: Sample((written.spans,), "1"),
        BYTES: Sample((written.bytes,), "B"),
    }
    low, high = ratios.quartiles
    # Standard error of the median of normally distributed values.
    error = 1.2533 * (high - low) / 1.349 / np.sqrt(len(pairs))
    writing = 1e3 * written.seconds / table.rows[name][WITHOUT].median
    total = ratios.median + writing + sampling
    met = "met" if total <= LIMIT else "not met"
    table.notes += [
        f"Recording: median ratio of {len(pairs)} pairs of turns {ratios.median:.4f}, standard error {error:.4f}. "
        f"Occasional writing: {writing:.4f}. Sampling of resources: {sampling:.4f}.",
        f"Together {total:.4f}, limit {LIMIT:g}: {met}",
    ]
