"""Benches of a single process: virtual ranks, the cost of a span and of a sample of the resources."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork, Network
from hpctrain.comm.virtual.world import World
from hpctrain.trace.recorder import measure_span_cost
from hpctrain.trace.resources import measure_sample_cost

RANKS = 512
ELEMENTS = 1024  # per rank: short, so that messages dominate, not sums
ROUNDS = 1  # all-reduces per run: half a million messages
REPETITIONS = 5
NETWORKS: dict[str, tuple[Callable[[], Network], bool]] = {
    "a link per rank": (LinkNetwork, True),
    "one node": (LinkNetwork, False),
    "free network": (FreeNetwork, False),
}


def measure_virtual(progress: Callable[[str], None]) -> FigureTable:
    """Measure ring all-reduces of virtual ranks, each with its own torch state."""
    table = FigureTable(
        "virtual",
        f"virtual ranks: ring all-reduce of {RANKS} ranks, {ELEMENTS} float32 each; per second, in thousands",
        ["resumptions", "messages"],
        notes=["On the free network about every second message has arrived when it is received: no rank waits for it."],
    )
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in NETWORKS}
    for repetition in range(REPETITIONS):
        progress(f"virtual ranks, {repetition + 1} of {REPETITIONS}")
        for name, (network, apart) in NETWORKS.items():
            taken[name].append(ring_rates(RANKS, network(), apart))
    for name, rates in taken.items():
        columns = zip(table.columns, zip(*rates, strict=True), strict=True)
        table.rows[name] = {c: Sample(tuple(v / 1e3 for v in values), "1000/s") for c, values in columns}
    return table


def ring_rates(ranks: int, network: Network, apart: bool) -> tuple[float, float]:
    """(resumptions, messages) per second of ring all-reduces. `apart`: every rank on its own node."""

    def body(comm: VirtualCommunicator) -> None:
        for _ in range(ROUNDS):
            comm.all_reduce(np.ones(ELEMENTS, np.float32), algorithm="ring")

    world = World(ranks, nodes=range(ranks) if apart else None, network=network)
    start = time.perf_counter()
    world.run(body)
    seconds = time.perf_counter() - start
    return world.resumptions / seconds, ROUNDS * 2 * (ranks - 1) * ranks / seconds


def measure_trace(progress: Callable[[str], None]) -> FigureTable:
    """Measure the cost of recording a span, and of a sample of the resources."""
    progress("trace")
    spans = tuple(measure_span_cost(20_000) * 1e6 for _ in range(9))
    samples = tuple(measure_sample_cost() * 1e6 for _ in range(9))
    table = FigureTable(
        "trace",
        "trace: cost of a span (with its two clock readings and its share of draining) and of a sample, us",
        ["us"],
    )
    table.rows = {"span": {"us": Sample(spans, "us")}, "sample": {"us": Sample(samples, "us")}}
    return table
