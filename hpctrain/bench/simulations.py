"""How long whole simulated runs take: with gradients, beside the gradients alone, and of thousands of ranks."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.hosts import Description, HostGroup, HostLink
from hpctrain.job import Job
from hpctrain.models.lenet5 import lenet5
from hpctrain.simulate.calibration import Calibration, MeasuredCost, ModelCosts
from hpctrain.simulate.simulation import Simulation

BATCH = 64
WORKERS = 64
LEARNT = {"all_reduce": 0, "parameter_server": 1}  # servers, by strategy
ROUNDS = (3, 13)  # of the two runs whose difference counts
ALONE = 300  # gradients
REPETITIONS = 3
LARGE: tuple[tuple[int, int], ...] = ((256, 50), (1024, 50), (4096, 5))  # ranks, rounds
GRADIENT, WITH, RATIO, START = "the gradient alone, ms", "with --learn, ms", "ratio", "start of the run, s"


def measure_learn(progress: Callable[[str], None]) -> FigureTable:
    """Measure what a gradient costs in a run with `--learn`, and by itself, in turns."""
    table = FigureTable(
        "simulate_learn",
        f"{WORKERS} virtual workers that learn: processor time per gradient of LeNet-5, {BATCH} samples, one thread",
        list(LEARNT),
        notes=[
            f"--learn: what a run of {ROUNDS[1]} steps per worker takes longer than one of {ROUNDS[0]}, per gradient; "
            "start: the rest of the short one.",
            "parameter_server: asynchronous, one server. Links of 1 Gbit/s; computing times vary by 10 %.",
        ],
    )
    taken: dict[str, dict[str, list[float]]] = {}
    for repetition in range(REPETITIONS):
        for strategy, servers in LEARNT.items():
            progress(f"simulated learning, {strategy}, {repetition + 1} of {REPETITIONS}")
            alone = _gradients()
            short, long = (_learn(strategy, servers, rounds) for rounds in ROUNDS)
            each = (long - short) / (WORKERS * (ROUNDS[1] - ROUNDS[0]))
            start = short - WORKERS * ROUNDS[0] * each
            found = {GRADIENT: 1e3 * alone, WITH: 1e3 * each, RATIO: each / alone, START: start}
            for row, value in found.items():
                taken.setdefault(row, {}).setdefault(strategy, []).append(value)
    for row, cells in taken.items():
        unit = row.rpartition(", ")[2] if row != RATIO else ""
        table.rows[row] = {column: Sample(tuple(values), unit) for column, values in cells.items()}
    return table


def measure_scale(progress: Callable[[str], None]) -> FigureTable:
    """Measure whole simulations of costs with many ranks, each in a process of its own."""
    table = FigureTable(
        "simulate_scale",
        "simulated runs of LeNet-5, default all_reduce, each rank on a host of its own: processor time and memory",
        ["s", "MiB"],
        notes=["10 Mbit/s links; computing times vary by 10 %. From the start of a run to its end."],
    )
    for ranks, rounds in LARGE:
        progress(f"{ranks:,} simulated ranks")
        with ProcessPoolExecutor(1, get_context("spawn")) as apart:
            seconds, mib = apart.submit(run_costs, ranks, rounds).result()
        table.rows[f"{ranks:,} ranks, {rounds} steps"] = {"s": Sample((seconds,), "s"), "MiB": Sample((mib,), "MiB")}
    return table


def run_costs(ranks: int, rounds: int) -> tuple[float, float]:
    """Simulate costs; returns seconds of processor time, and MiB of memory that this process has used at most."""
    torch.set_num_threads(1)
    seconds = _simulated(["strategy=all_reduce"], ranks, rounds, 10.0, learn=False)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _gradients() -> float:
    """Seconds for one."""
    inputs, targets = images(BATCH).tensors
    model, taken = lenet5(), 0.0
    for step in range(ALONE + ALONE // 10):
        if step == ALONE // 10:
            taken = time.process_time()
        functional.cross_entropy(model(inputs), targets).backward()
    return (time.process_time() - taken) / ALONE


def _learn(strategy: str, servers: int, rounds: int) -> float:
    return _simulated([f"strategy={strategy}"], WORKERS + servers, rounds, 1000.0, learn=True)


def _simulated(keys: Sequence[str], ranks: int, rounds: int, mbit: float, learn: bool) -> float:
    """Seconds of processor time."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as folder:
        data = (images(ranks * BATCH * rounds if learn else BATCH), images(BATCH))
        job = Job(
            output=folder, model="lenet5", data=data, threads=1,
            train={"steps": rounds, "batch_size": BATCH, "evaluate_every": {"fraction": 1}}, trace={"report": False},
        ).override(list(keys))  # fmt: skip
        cluster = Description(hosts=[HostGroup(count=ranks)], link=HostLink(mbit_per_s=mbit))
        simulation = Simulation(job, cluster, learn=learn)
        began = time.process_time()
        simulation.run(assumed())
        return time.process_time() - began


def images(count: int) -> TensorDataset:
    """Random ones, of MNIST's size."""
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 1, 28, 28, generator=generator), torch.arange(count) % 10)


def assumed() -> Calibration:
    """Round numbers for LeNet-5 with batches of 64: what they are does not change how long a simulation takes."""
    layers = sum(1 for _ in lenet5().parameters())
    model = ModelCosts(
        name="lenet5",
        parameters=sum(each.numel() for each in lenet5().parameters()),
        forward=MeasuredCost(fixed_s=2e-3, least=BATCH, most=BATCH, spread=0.1),
        backward=MeasuredCost(fixed_s=4e-3, least=BATCH, most=BATCH, spread=0.1),
        order=list(reversed(range(layers))),
        shares=[1 / layers] * layers,
    )
    spans = dict.fromkeys(("data", "reduce", "update", "encode", "decode", "send"), MeasuredCost(each_s=1e-10))
    return Calibration(source="round numbers", model=model, spans=spans)
