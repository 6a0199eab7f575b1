"""The cost of checks: of gradients, in one training that alternates steps with and without them; and at the start."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median

import numpy as np

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.runs import quiet_session, random_samples
from hpctrain.bench.workload import HIDDEN, MLP, RESNET, Load
from hpctrain.comm.alike import check_alike, data_topic, job_topic, model_topic
from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.models.mlp import mlp
from hpctrain.models.resnet18 import resnet18
from hpctrain.replica import blocks
from hpctrain.run.api import Session, fit_batch

TURN = 2  # steps
EARLY = 4  # pairs of turns that are discarded
STARTS = 9
WITHOUT, WITH, COST = "without, ms", "with, ms", "cost, %"
# The last two numbers: steps per turn, pairs of turns.
LOADS = {
    MLP: Load(lambda: mlp(784, 10, HIDDEN), (784,), 32, TURN, 250),
    RESNET: Load(lambda: resnet18(), (3, 32, 32), 16, TURN, 40),
}
_CHECK = blocks._is_finite
LIMITS = {MLP: 2.0, RESNET: 0.5}  # percent


def measure_checks(comm: Communicator, progress: Callable[[str], None]) -> FigureTable:
    """Milliseconds per step of `all_reduce` with and without the check, and the cost in percent. Collective."""
    table = FigureTable(
        "checks",
        f"checking that gradients are finite: all_reduce, {comm.size} rank{'s' * (comm.size > 1)}, ms per step "
        f"(turns of {TURN} steps)",
        [WITHOUT, WITH, COST],
    )
    for label, load in LOADS.items():
        progress(f"checks: {label}, {load.blocks} pairs of turns")
        pairs, at_start = _measure(comm, load)
        ratios = Sample(tuple(100 * (checked / plain - 1) for plain, checked in pairs), "%")
        table.rows[label] = {
            WITHOUT: Sample(tuple(1e3 * plain for plain, _ in pairs), "ms"),
            WITH: Sample(tuple(1e3 * checked for _, checked in pairs), "ms"),
            COST: ratios,
        }
        low, high = ratios.quartiles
        error = 1.2533 * (high - low) / 1.349 / np.sqrt(len(pairs))  # of the median of normally distributed values
        limit = f", limit {LIMITS[label]:g} %" if label in LIMITS else ""
        table.notes.append(f"{label}: median {ratios.median:.2f} %, standard error {error:.2f} %{limit}")
        once = ", ".join(f"{what} {median(seconds) * 1e3:.1f}" for what, seconds in at_start.items())
        table.notes.append(f"{label}, once at the start, ms: {once}")
    return table


def _measure(comm: Communicator, load: Load) -> tuple[list[tuple[float, float]], dict[str, list[float]]]:
    """(without, with) in seconds per step, and the seconds of each comparison at the start."""
    steps = 2 * TURN * (load.blocks + EARLY)
    job = Job(
        model=load.build,
        data=random_samples(load.inputs, load.batch * comm.size * 8),
        optimizer={"name": "SGD", "lr": 1e-4, "momentum": 0.9},
        train={"steps": steps, "batch_size": load.batch},
        trace={"enabled": False},
    )
    with quiet_session(job, comm) as session:
        at_start = _at_start(comm, session)
        batches = session.batches()
        pairs = _pairs(session, batches, load.blocks + EARLY)[EARLY:]
        for batch in batches:  # the run's end
            fit_batch(session, batch)
    return pairs, at_start


def _at_start(comm: Communicator, session: Session) -> dict[str, list[float]]:
    """Repeated times, in seconds, of the comparisons that a session makes once. Here the ranks agree, as usual."""
    prepared = session.prepared
    replica, untrained = prepared.replica, prepared.untrained
    compared: dict[str, Callable[[], None]] = {
        "the job": lambda: check_alike(comm, [job_topic(session.job.plain())]),
        "model and data": lambda: check_alike(
            comm, [data_topic(prepared.splits), model_topic(replica.layout, untrained.frozen(), untrained.buffers())]
        ),
        "frozen parameters and buffers": lambda: untrained.share(comm),
    }
    took: dict[str, list[float]] = {what: [] for what in compared}
    for _ in range(STARTS):
        for what, compare in compared.items():
            comm.barrier()
            start = time.perf_counter()
            compare()
            took[what].append(time.perf_counter() - start)
    return took


def _pairs(session: Session, batches: Iterator[Batch], count: int) -> list[tuple[float, float]]:
    """(without, with) in seconds per step. The order alternates, so that drift cancels out."""
    pairs = []
    for pair in range(count):
        took = {}
        for checked in (False, True) if pair % 2 else (True, False):
            with nullcontext() if checked else _nothing_checked():
                took[checked] = _turn(session, batches)
        pairs.append((took[False], took[True]))
    return pairs


def _turn(session: Session, batches: Iterator[Batch]) -> float:
    start = time.perf_counter()
    for _ in range(TURN):
        batch = next(batches, None)
        if batch is None:
            raise HpctrainError("hpctrain bench checks: interrupted before it had finished; start it again")
        fit_batch(session, batch)
    return (time.perf_counter() - start) / TURN


@contextmanager
def _nothing_checked() -> Iterator[None]:
    blocks._is_finite = lambda block: True
    try:
        yield
    finally:
        blocks._is_finite = _CHECK
