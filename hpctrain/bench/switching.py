"""The cost of a switch: from the end of the last step of one phase to the first forward of the next.

Measured from the traces of whole runs, kept in memory here.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.runs import quiet_session, random_samples
from hpctrain.bench.together import seconds_per_call
from hpctrain.bench.workload import HIDDEN
from hpctrain.comm.base import Buffer, Communicator
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.run.api import fit
from hpctrain.run.tracing import measure_clock
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import KIND_CODES

Progress = Callable[[str], None]
ALLOWANCE_MS, BROADCASTS = 50.0, 2  # limit for a switch: this time plus this many broadcasts of the model
RUNS = 3  # per model
SWITCHES = 6  # per run
ROUNDS = 4  # rounds per phase, with one batch per rank
BATCH = 32
TO_ASYNC, TO_ALL_REDUCE, BROADCAST, LIMIT = "to async", "to all_reduce", "broadcast", "limit"
STRATEGIES: tuple[dict[str, Any], ...] = ({"name": "all_reduce"}, {"name": "parameter_server", "mode": "async"})


@dataclass(frozen=True)
class SwitchedModel:
    """The [model] and [optimizer] of a run, and the shape of its inputs."""

    model: dict[str, Any]
    optimizer: dict[str, Any]
    inputs: tuple[int, ...]


_LARGE = {"name": "mlp", "inputs": 784, "hidden": HIDDEN}
_MOMENTUM = {"name": "SGD", "lr": 1e-3, "momentum": 0.9}
MODELS = {
    "convnet, SGD with momentum": SwitchedModel({"name": "convnet"}, _MOMENTUM, (1, 8, 8)),
    "mlp, 10.0 M, SGD with momentum": SwitchedModel(_LARGE, _MOMENTUM, (784,)),
    "mlp, 10.0 M, Adam": SwitchedModel(_LARGE, {"name": "Adam", "lr": 1e-4}, (784,)),
}


def measure_switch(comm: Communicator, progress: Progress) -> FigureTable:
    """Switch repeatedly from all-reduce to an asynchronous parameter server (one server) and back. Collective."""
    if comm.size < 2:
        raise ClusterError(
            "hpctrain bench switch: a server and a worker are needed, but 1 rank was started; use -n 4, for example"
        )
    table = FigureTable(
        "switch",
        f"a switch between all_reduce on {comm.size} ranks and an asynchronous parameter server "
        f"({comm.size - 1} workers, 1 server): last step's end to first forward, slowest rank, ms",
        [TO_ASYNC, TO_ALL_REDUCE, BROADCAST, LIMIT],
    )
    measured = (TO_ASYNC, TO_ALL_REDUCE, BROADCAST)
    taken: dict[str, dict[str, list[float]]] = {name: {column: [] for column in measured} for name in MODELS}
    for run in range(RUNS):
        for name, model in MODELS.items():
            progress(f"switch of {name}, {run + 1} of {RUNS}")
            pauses, broadcasts = _switch_back_and_forth(comm, model)
            taken[name][TO_ASYNC] += pauses[0::2]
            taken[name][TO_ALL_REDUCE] += pauses[1::2]
            taken[name][BROADCAST] += broadcasts
    for name, columns in taken.items():
        _fill_row(table, name, {c: Sample(tuple(1e3 * v for v in values), "ms") for c, values in columns.items()})
    table.notes.append(f"The limit is {ALLOWANCE_MS:g} ms plus {BROADCASTS} times the measured broadcast of the model.")
    return table


def _fill_row(table: FigureTable, name: str, row: dict[str, Sample]) -> None:
    limit = ALLOWANCE_MS + BROADCASTS * row[BROADCAST].median
    table.rows[name] = {**row, LIMIT: Sample((limit,), "ms")}
    slowest = max(row[TO_ASYNC].median, row[TO_ALL_REDUCE].median)
    table.notes.append(f"{name}: {slowest:.1f} ms, limit {limit:.1f} ms: {'met' if slowest <= limit else 'not met'}")


def _switch_back_and_forth(comm: Communicator, model: SwitchedModel) -> tuple[list[float], list[float]]:
    """Seconds of each switch of a run, in order, and of broadcasts of its model. Collective."""
    traced = copy(comm)
    traced.recorder = Recorder(comm.now)
    with quiet_session(_job(model, comm.size), traced) as session:
        values = np.ones(session.replica.layout.length, session.replica.layout.dtype)
        broadcasts = [seconds_per_call(comm, lambda: comm.broadcast(values), 1) for _ in range(4)][1:]
        measure_clock(session.comm)
        fit(session)
    return pauses_between(comm, SWITCHES + 1, traced.recorder.drain()), broadcasts


def _job(model: SwitchedModel, ranks: int) -> Job:
    """A job whose phases have equal numbers of samples, all-reduce first."""
    samples = ROUNDS * ranks * BATCH
    phases: list[dict[str, Any]] = [
        {"strategy": STRATEGIES[i % 2], "until": {"rule": "after", "samples": samples}} for i in range(SWITCHES + 1)
    ]
    del phases[-1]["until"]
    return Job(
        model=model.model,
        optimizer=model.optimizer,
        data=random_samples(model.inputs, samples),
        train={"epochs": SWITCHES + 1, "batch_size": BATCH},
        phases=phases,
        trace={"enabled": False},  # no files
    )


def pauses_between(comm: Communicator, phases: int, traced: dict[str, Buffer]) -> list[float]:
    """Seconds between consecutive phases on the slowest rank: from its last step's end to its first forward.

    `traced`: what this rank's recorder recorded. For a rank that was a server in the earlier phase, the pause begins at
    the end of the workers' last step. Collective.
    """
    steps, spans = traced["steps"], traced["spans"]
    clock = int(traced["clock"]["offset_ns"][-1])
    forwards = spans[spans["kind"] == KIND_CODES["forward"]]
    mine = np.full((2, phases), -1, np.int64)
    for phase in range(phases):
        own = steps[steps["phase"] == phase]
        if len(own):
            starts = forwards["start_ns"][np.isin(forwards["step"], own["step"])]
            mine[:, phase] = starts.min() + clock, own["t_ns"].max() + clock
    table = comm.gather_rows(mine.reshape(-1)).reshape(comm.size, 2, phases)
    return [_pause(table[:, 1, phase], table[:, 0, phase + 1]) / 1e9 for phase in range(phases - 1)]


def _pause(ends: Buffer, starts: Buffer) -> int:
    """Pause of the slowest rank in nanoseconds; -1 stands for the time of a rank without such a step."""
    begun = np.where(ends < 0, ends.max(), ends)
    return int((starts - begun).max())
