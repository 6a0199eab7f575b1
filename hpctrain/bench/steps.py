"""Bench of synchronous steps, by strategy and beside other libraries. All functions here are collective."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from hpctrain.bench import rivals
from hpctrain.bench.comparison import Comparison, Goal, exposed, ratio
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.workload import LOADS, MLP, RESNET, Alone, Load, Workload
from hpctrain.comm.base import Communicator
from hpctrain.job import registry
from hpctrain.replica.buckets import Buckets
from hpctrain.strategies.base import Strategy
from hpctrain.strategies.phase import Phase

Progress = Callable[[str], None]
Way = tuple[str, dict[str, Any]]
WALL, PROCESSOR = "step", "processor time"
SECONDS, FEWEST = 100.0, 3  # for all blocks, and blocks even if they take longer
NOTHING, TUNED = "no exchange", "DDP tuned"
DEFAULT, MESSAGE, SERVERS = "all_reduce", "all_reduce, message", "parameter_server, sync"
BFLOAT16, TOPK = "all_reduce, bfloat16", "all_reduce, topk 1 %"
POWERSGD = "all_reduce, powersgd rank 2"
LOCAL, LOCAL_TOPK = "local_sgd, every 8", "local_sgd, every 8, topk 1 %"
ALONE = "no computation, {}"


@dataclass(frozen=True)
class MeasuredWays:
    """Which ways of exchanging are measured, and what is wanted of them."""

    ways: Mapping[str, Way]
    rivals: tuple[str, ...] | None = None  # besides tuned DDP; None: all that are installed
    against_tuned: Mapping[tuple[str, str], float] = field(default_factory=dict)  # (way, model): most of DDP's time
    exposed: Mapping[tuple[str, str], float] = field(default_factory=dict)  # the same of DDP's exposed communication
    against_default: Mapping[tuple[str, str], float] = field(default_factory=dict)  # the same of all_reduce's time
    alone: tuple[str, ...] = ()  # ways that are measured without computation, too: how long the network takes


ON_A_NODE = MeasuredWays(
    {
        DEFAULT: ("all_reduce", {}),
        MESSAGE: ("all_reduce", {"exchange": "message"}),
        SERVERS: ("parameter_server", {"mode": "sync", "colocated": True}),
    },
    against_default={(SERVERS, MLP): 1.10, (SERVERS, RESNET): 1.10},
)
BETWEEN_NODES = MeasuredWays(
    {
        DEFAULT: ("all_reduce", {}),
        MESSAGE: ("all_reduce", {"exchange": "message"}),
        BFLOAT16: ("all_reduce", {"codec": "bfloat16"}),
        TOPK: ("all_reduce", {"codec": {"name": "topk", "keep": 0.01}}),
        POWERSGD: ("all_reduce", {"codec": "powersgd"}),
        LOCAL: ("local_sgd", {"every": 8}),
        LOCAL_TOPK: ("local_sgd", {"every": 8, "codec": {"name": "topk", "keep": 0.01}}),
    },
    rivals=(),
    against_tuned={
        (DEFAULT, MLP): 0.95, (BFLOAT16, MLP): 0.58, (TOPK, MLP): 0.25, (POWERSGD, MLP): 0.25, (LOCAL_TOPK, MLP): 0.25
    },
    exposed={(DEFAULT, RESNET): 0.4, (BFLOAT16, RESNET): 0.25},
    alone=(DEFAULT, BFLOAT16),
)


class Cost(NamedTuple):
    """What a step takes, averaged over the ranks: seconds, and seconds of processor time over all threads."""

    wall: float
    cpu: float


def measure_mlp(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure a step of the MLP, by way of exchanging."""
    return measure(comm, progress, "step_mlp", MLP, LOADS[MLP])


def measure_resnet18(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure a step of the residual network, by way of exchanging."""
    return measure(comm, progress, "step_resnet18", RESNET, LOADS[RESNET])


def measure(comm: Communicator, progress: Progress, name: str, label: str, load: Load) -> FigureTable:
    """Measure a step (forward, backward, exchange, SGD with momentum) of the model `label`."""
    threads, measured = torch.get_num_threads(), ON_A_NODE if len(set(comm.nodes)) == 1 else BETWEEN_NODES
    table = FigureTable(
        name,
        f"{label}: synchronous step of {comm.size} workers, {threads} torch thread{'s' * (threads > 1)} each; ms, and "
        "ms of processor time of all threads of a rank",
        [WALL, PROCESSOR],
    )
    if SERVERS in measured.ways:
        table.notes.append("parameter_server has one server beside each worker.")
    with ExitStack() as stack:
        blocks, note = _blocks(comm, load, measured, stack)
        table.notes += [note] if note else []
        costs = _in_turn(comm, blocks, load.blocks, lambda text: progress(f"step of {label}, {text}"))
    for way, taken in costs.items():
        table.rows[way] = {
            WALL: Sample(tuple(1e3 * cost.wall for cost in taken), "ms"),
            PROCESSOR: Sample(tuple(1e3 * cost.cpu for cost in taken), "ms"),
        }
    table.comparisons = compare(table, label, measured)
    return table


def _in_turn(
    comm: Communicator, ways: Mapping[str, Callable[[], Cost]], blocks: int, progress: Progress
) -> dict[str, list[Cost]]:
    """The cost of each way, block by block, in turn: that many blocks, or as many as SECONDS allow."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    start, seconds = comm.now(), np.zeros(1)
    for block in range(blocks):
        if block >= FEWEST and seconds[0] > SECONDS:
            break
        progress(f"block {block + 1} of {blocks}")
        for name, run in ways.items():
            costs[name].append(run())
        seconds[0] = (comm.now() - start) / 1e9
        comm.broadcast(seconds)
    return costs


def _blocks(
    comm: Communicator, load: Load, measured: MeasuredWays, stack: ExitStack
) -> tuple[dict[str, Callable[[], Cost]], str]:
    """By name: what runs a block of steps; and a note on the rivals. `stack`: keeps what the rivals need."""
    bench = StepBench(comm, load)
    blocks: dict[str, Callable[[], Cost]] = {NOTHING: lambda: bench.block(None)}
    for name, way in measured.ways.items():
        if load.steps % way[1].get("every", 1):
            continue  # a block would have no whole rounds
        blocks[name] = partial(bench.block, _tuned(comm, way))
        if name in measured.alone:
            blocks[ALONE.format(name)] = partial(bench.block, _tuned(comm, way), computes=False)
    if not comm.concurrent or comm.size < 2:
        return blocks, ""
    stack.enter_context(rivals.process_group(comm))
    tried = {mb: RivalBench(comm, load, rivals.tuned_ddp(load, mb)) for mb in rivals.BUCKETS_MB}
    first = {mb: bench.block().wall for mb, bench in tried.items()}
    best = min(first, key=lambda mb: first[mb])
    blocks[TUNED] = tried[best].block
    for name, build in rivals.trainings().items():
        if measured.rivals is None or name in measured.rivals:
            blocks[name] = RivalBench(comm, load, build(load)).block
    seconds = ", ".join(f"{1e3 * wall:.3g} ms with {mb} MiB" for mb, wall in first.items())
    return blocks, f"DDP tuned has gradients in buckets of {best} MiB, a static graph, fused SGD (tried: {seconds})"


def _tuned(comm: Communicator, way: Way) -> Way:
    """With what a run measures at its start. Collective."""
    cls = registry.resolve("strategy", way[0])
    return way[0], {**way[1], **cls.tune(cls.Options(**way[1]), comm)}


def compare(table: FigureTable, label: str, measured: MeasuredWays) -> list[Comparison]:
    """Every way against tuned DDP, and what else is wanted."""
    samples = {name: row[WALL] for name, row in table.rows.items()}
    found = [
        ratio(f"{name} / {base}", WALL, samples[name], samples[base], _target(wanted, name, label))
        for base, wanted in ((TUNED, measured.against_tuned), (DEFAULT, measured.against_default))
        for name in measured.ways
        if {base, name} <= samples.keys() and (base == TUNED or (name, label) in wanted)
    ]
    return found + [
        exposed(f"exposed communication, {name} / {TUNED}", WALL, samples[name], samples[TUNED], samples[NOTHING],
                _target(measured.exposed, name, label))
        for name in measured.ways
        if measured.exposed and {TUNED, name} <= samples.keys()
    ]  # fmt: skip


def _target(wanted: Mapping[tuple[str, str], float], name: str, label: str) -> Goal | None:
    value = wanted.get((name, label))
    return Goal(value) if value is not None else None


def timed(comm: Communicator, load: Load, step: Callable[[], None], period: int = 1) -> Cost:
    """The cost of a step, over `load.steps` steps after some that do not count: whole rounds of `period` steps, since
    the first one touches fresh memory."""
    for _ in range(-(-load.unmeasured // period) * period):
        step()
    comm.barrier()
    start, used = comm.now(), time.process_time()
    for _ in range(load.steps):
        step()
    cost = np.array([(comm.now() - start) / 1e9, time.process_time() - used]) / load.steps
    comm.all_reduce(cost)
    wall, cpu = cost / comm.size
    return Cost(float(wall), float(cpu))


class StepBench:
    """A model on every rank; `block` trains it for some steps with one strategy."""

    def __init__(self, comm: Communicator, load: Load) -> None:
        self.comm, self.load = comm, load
        self.workload = Workload(comm, load, momentum=0.9)
        self.replica = self.workload.replica

    def block(self, way: Way | None, computes: bool = True) -> Cost:
        """Train with that strategy, or with no exchange. `computes`: run forward and backward, else only the rest."""
        cls = registry.resolve("strategy", way[0]) if way is not None else Alone
        given = dict(way[1]) if way is not None else {}
        if given.get("colocated"):
            given["servers"] = self.comm.size
        strategy: Strategy = cls(cls.Options(**given)) if way is not None else cls(None)
        phase = self.workload.begin(strategy)
        strategy.join(phase)
        early = strategy.bucket_bytes
        buckets = Buckets(self.replica, early, strategy.ready, strategy.poll) if early else None
        step = partial(self._step, phase, strategy, buckets, computes)
        cost = timed(self.comm, self.load, step, given.get("every", 1))
        if buckets is not None:
            buckets.remove()
        strategy.leave()
        self.workload.end(phase)
        return cost

    def _step(self, phase: Phase, strategy: Strategy, buckets: Buckets | None, computes: bool) -> None:
        batch = self.load.batch
        phase.step.round_end = phase.cursor + batch * self.comm.size
        strategy.before()
        if buckets is not None:
            buckets.arm()
        loss = self.workload.compute() if computes else 0.0
        if buckets is not None:
            buckets.flush()
        strategy.step(batch, loss)


class RivalBench:
    """The same for a training of another library."""

    def __init__(self, comm: Communicator, load: Load, training: rivals.PlainTraining) -> None:
        self.comm, self.load, self.training = comm, load, training

    def block(self) -> Cost:
        """Train for some steps."""
        return timed(self.comm, self.load, self.training.step)
