"""Parameter server on real ranks: round trips per second. What a slow worker costs, and what helps.

All measuring functions are collective.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from hpctrain.bench.comparison import Goal, ratio
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.rivals import CHUNKS
from hpctrain.bench.runs import quiet_session, random_samples
from hpctrain.bench.workload import LARGE, Load, Workload
from hpctrain.cluster import assign_roles
from hpctrain.comm.base import Communicator
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.models.mlp import mlp
from hpctrain.strategies.parameter_server import ParameterServer, ParameterServerOptions, ParameterServerServer
from hpctrain.strategies.phase import Phase

Progress = Callable[[str], None]

# -- round trips -------------------------------------------------------------------------------------------------
PUSHED: Load = LARGE
DEDICATED, COLOCATED, ROUNDED = "dedicated server", "colocated server", "dedicated server, bfloat16"
WAYS: dict[str, dict[str, Any]] = {  # what the strategy is given
    DEDICATED: {},
    COLOCATED: {"colocated": True},  # shares its rank with a worker; on one node only
    ROUNDED: {"codec": "bfloat16"},  # both ways; on several nodes only, because within a node nothing is sent
}
RPC = f"torch RPC in {CHUNKS} chunks"
COMPUTES = {"no computation": False, "with gradients": True}
TARGETS = {  # (several nodes, way, column), against RPC
    (False, DEDICATED, "with gradients"): 1.85,
    (True, DEDICATED, "no computation"): 1.03,
    (True, ROUNDED, "no computation"): 1.6,
}
BLOCKS = 6
PUSHES = 24  # average number per worker in a block, if it takes at most SECONDS
SECONDS, FEWEST = 1.5, 6
UNCOUNTED = 2  # a worker's first pushes, which touch fresh memory


def measure_pushes(comm: Communicator, progress: Progress) -> FigureTable:
    """Total round trips (push of a gradient, update, pull of the parameters) per second of all workers."""
    if comm.size < 2:
        raise ClusterError(
            "hpctrain bench pushes: a server and a worker are needed, but 1 rank was started; use -n 3, for example"
        )
    workload = Workload(comm, PUSHED, momentum=0.0)
    ways = _ways(workload)
    counts = {(name, column): _count(comm, way(FEWEST, computes)) for name, way in ways.items()
              for column, computes in COMPUTES.items()}  # fmt: skip
    taken: dict[str, dict[str, list[float]]] = {name: {column: [] for column in COMPUTES} for name in ways}
    for block in range(BLOCKS):
        progress(f"pushes, block {block + 1} of {BLOCKS}")
        for name, way in ways.items():
            for column, computes in COMPUTES.items():
                taken[name][column].append(way(counts[name, column], computes))
    return _pushes_table(workload, taken)


def _ways(workload: Workload) -> dict[str, Callable[[int, bool], float]]:
    """By name: a function of (average number of round trips per worker, whether gradients are computed), which returns
    the round trips per second."""
    ways: dict[str, Callable[[int, bool], float]] = {}
    left_out = COLOCATED if len(set(workload.comm.nodes)) > 1 else ROUNDED
    for name, options in WAYS.items():
        if name != left_out:
            ways[name] = partial(push_rate, workload, options)
    if workload.comm.concurrent:
        ways[RPC] = partial(rpc_rate, workload.comm, workload.load)
    return ways


def _count(comm: Communicator, rate: float) -> int:
    """How many round trips per worker to measure in a block."""
    return int(np.clip(rate * SECONDS / max(1, comm.size - 1), FEWEST, PUSHES))


def _pushes_table(workload: Workload, taken: dict[str, dict[str, list[float]]]) -> FigureTable:
    comm, threads = workload.comm, torch.get_num_threads()
    megabytes = workload.replica.layout.length * 4 / 1e6
    table = FigureTable(
        "pushes",
        f"asynchronous parameter server, {comm.size} ranks with {threads} torch thread{'s' * (threads > 1)} each, 1 "
        f"server, model of {megabytes:.3g} MB, SGD; round trips per second of all workers",
        list(COMPUTES),
    )
    for name, columns in taken.items():
        table.rows[_row(name, comm.size)] = {c: Sample(tuple(v), "1/s") for c, v in columns.items()}
    if RPC in taken:
        several = len(set(comm.nodes)) > 1
        table.comparisons = [
            ratio(f"{name} / {RPC}", column, Sample(tuple(taken[name][column]), ""), Sample(tuple(values), ""),
                  _target(several, name, column))
            for name in WAYS if name in taken for column, values in taken[RPC].items()
        ]  # fmt: skip
    return table


def _target(several: bool, name: str, column: str) -> Goal | None:
    value = TARGETS.get((several, name, column))
    return Goal(value, at_least=True) if value is not None else None


def _row(name: str, size: int) -> str:
    workers = size if WAYS.get(name, {}).get("colocated") else size - 1
    return f"{name}, {workers} worker{'s' * (workers > 1)}"


def push_rate(workload: Workload, given: dict[str, Any], pushes: int, computes: bool) -> float:
    """Round trips per second, summed over the workers, each measured by its own clock. `given`: to the strategy."""
    comm = workload.comm
    options = ParameterServerOptions.model_validate({"mode": "async", "servers": 1, **given})
    strategy, workers = ParameterServer(options), comm.size if options.colocated else comm.size - 1
    phase = workload.begin(strategy, total=pushes * workers * workload.load.batch)
    rate = np.zeros(1)
    if phase.workers is not None:
        strategy.join(phase)
        rate[0] = _rate_of(_push_all(phase, workload, strategy, computes))
        strategy.leave()
    else:
        server = ParameterServerServer(options)
        server.join(phase)
        server.serve()
    workload.end(phase)
    comm.all_reduce(rate)
    return float(rate[0])


def _push_all(phase: Phase, workload: Workload, strategy: ParameterServer, computes: bool) -> list[int]:
    """The end time of each of this worker's round trips, in nanoseconds."""
    ends: list[int] = []
    loss = workload.compute()  # without computation, these gradients are pushed every time
    while True:
        samples = workload.load.batch if strategy.slices() else 0
        if computes and samples:
            loss = workload.compute()
        outcome = strategy.step(samples, loss)
        ends.append(phase.comm.now())
        if outcome.ask:
            return ends


def rpc_rate(comm: Communicator, load: Load, pushes: int, computes: bool) -> float:
    """The same with torch RPC; the server is on the rank that ours would be on. Real ranks only."""
    from hpctrain.bench.rpc import ChunkWorker, agents

    (server,) = assign_roles(comm.nodes, 1, False).servers
    rate = np.zeros(1)
    worker = ChunkWorker(load) if comm.rank != server else None
    with agents(comm, server):
        if worker is not None:
            ends: list[int] = []
            worker.compute()
            for _ in range(pushes):
                if computes:
                    worker.compute()
                worker.trip()
                ends.append(comm.now())
            rate[0] = _rate_of(ends)
    comm.all_reduce(rate)
    return float(rate[0])


def _rate_of(ends: list[int]) -> float:
    """Round trips per second, without the last one, which waits until all workers are done."""
    counted = ends[UNCOUNTED - 1 : -1]
    if len(counted) < 2:
        return 0.0
    return (len(counted) - 1) * 1e9 / max(1, counted[-1] - counted[0])


# -- a slow worker -----------------------------------------------------------------------------------------------
WORKERS, SLOWED, FACTOR = 4, 1, 3.0
COMPUTE_SECONDS = 0.01
SAMPLES, BATCH = 8192, 32
REPETITIONS = 5
ALL_REDUCE = "all_reduce"
MODES: dict[str, tuple[dict[str, Any], float | None]] = {
    ALL_REDUCE: ({"name": "all_reduce"}, None),
    "all_reduce, balance": ({"name": "all_reduce", "balance": "throughput"}, 0.55),
    "local_sgd, every 4": ({"name": "local_sgd", "every": 4}, None),
    "local_sgd, every 4, balance": ({"name": "local_sgd", "every": 4, "balance": "throughput"}, None),
    "parameter_server, sync": ({"name": "parameter_server", "mode": "sync"}, None),
    "parameter_server, sync, balance": ({"name": "parameter_server", "mode": "sync", "balance": "throughput"}, 0.55),
    "parameter_server, async": ({"name": "parameter_server", "mode": "async"}, 0.45),
    "parameter_server, bounded": ({"name": "parameter_server", "mode": "bounded"}, 1.0),
}


def measure_slow(comm: Communicator, progress: Progress) -> FigureTable:
    """Seconds per epoch with one slow worker, by strategy, and relative to all-reduce."""
    if comm.size != WORKERS + 1:
        raise ClusterError(
            f"hpctrain bench slow: {WORKERS} workers and 1 server are needed, but "
            f"{'1 rank was' if comm.size == 1 else f'{comm.size} ranks were'} started; use -n {WORKERS + 1}"
        )
    table = FigureTable(
        "slow",
        f"an epoch of {SAMPLES:,} samples, {WORKERS} workers of batch {BATCH}, one of them {FACTOR:g} times slower",
        ["seconds", "of all_reduce", "limit"],
    )
    workers = comm.split(0 if comm.rank < WORKERS else None, comm.rank)
    taken: dict[str, list[float]] = {name: [] for name in MODES}
    for repetition in range(REPETITIONS):
        progress(f"slow worker, {repetition + 1} of {REPETITIONS}")
        for name, (strategy, _) in MODES.items():
            among = comm if strategy["name"] == "parameter_server" else workers
            taken[name].append(_epoch_seconds(comm, among, strategy))
    if workers is not None:
        workers.free()
    for name, (_, limit) in MODES.items():
        _fill_row(table, name, taken, limit)
    milliseconds = COMPUTE_SECONDS * 1e3
    table.notes.append(
        f"Computation is a sleep of {milliseconds:g} ms per {BATCH} samples, so that all workers compute at the same "
        "time even on fewer cores than workers; the slow one sleeps as long as debug.slow says."
    )
    return table


def _fill_row(table: FigureTable, name: str, taken: dict[str, list[float]], limit: float | None) -> None:
    row = table.rows[name] = {"seconds": Sample(tuple(taken[name]), "s")}
    if name != ALL_REDUCE:
        shares = tuple(own / base for own, base in zip(taken[name], taken[ALL_REDUCE], strict=True))
        row["of all_reduce"] = Sample(shares, "")
    if limit is None:
        return
    row["limit"] = Sample((limit,), "")
    met = "met" if row["of all_reduce"].median <= limit else "not met"
    table.notes.append(f"{name}: {row['of all_reduce'].median:.3f} of all_reduce's time, limit {limit:g}: {met}")


def _epoch_seconds(comm: Communicator, among: Communicator | None, strategy: dict[str, Any]) -> float:
    """Seconds to train one epoch on `among`, which includes rank 0; other ranks wait. Collective over `comm`."""
    seconds = np.zeros(1)
    if among is not None:
        seconds[0] = _train_epoch(among, strategy)
    comm.broadcast(seconds)
    return float(seconds[0])


def _train_epoch(comm: Communicator, strategy: dict[str, Any]) -> float:
    job = Job(
        model=lambda: mlp(64, 10, [32]),
        data=random_samples((64,), SAMPLES),
        optimizer={"name": "SGD", "lr": 0.01},
        train={"epochs": 1, "batch_size": BATCH},
        strategy=strategy,
        debug={"slow": {SLOWED: FACTOR}},
        trace={"enabled": False},
    )
    with quiet_session(job, comm) as session:
        for batch in session.batches():
            comm.sleep(COMPUTE_SECONDS * batch.size / BATCH)
            session.step(nn.functional.cross_entropy(session.model(batch.inputs), batch.targets))
    return session.result.phases[0].seconds
