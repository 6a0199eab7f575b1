"""How fast time is simulated: collectives of many virtual ranks by messages, and as one loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.flows import FlowNetwork
from hpctrain.comm.virtual.network import LinkNetwork, Network
from hpctrain.comm.virtual.platform import Collectives
from hpctrain.comm.virtual.world import World
from hpctrain.hosts import Description, HostGroup

RANKS = 512
ELEMENTS = 1024  # per rank
MANY, STEPS = 1024, 100
LARGE = 25_000_000  # elements that take no memory
REPETITIONS = 3
LINKS, FLOWS = "links", "flows"
BY: dict[str, Collectives] = {"by messages": "messages", "as one loop": "loop"}


def measure_simulate(progress: Callable[[str], None]) -> FigureTable:
    """Measure all-reduces of ranks on hosts of their own."""
    table = FigureTable(
        "simulate",
        "all-reduces of virtual ranks, each on a host of its own: wall-clock time, s",
        [LINKS, FLOWS],
        notes=[
            f"ring: {2 * (RANKS - 1) * RANKS:,} messages, each timed; every rank with its own torch state.",
            f"steps: of random length, each with an all-reduce of {LARGE:,} float32 without numbers (library).",
            f"{LINKS}: messages queue at links; {FLOWS}: they share ports max-min fairly.",
        ],
    )
    taken: dict[str, dict[str, list[float]]] = {}
    for repetition in range(REPETITIONS):
        progress(f"simulated all-reduces, {repetition + 1} of {REPETITIONS}")
        for column in table.columns:
            for name, collectives in BY.items():
                row = taken.setdefault(f"ring of {RANKS} ranks, {name}", {})
                row.setdefault(column, []).append(_seconds(RANKS, column, collectives, _ring, True))
            row = taken.setdefault(f"{STEPS} steps of {MANY:,} ranks, as one loop", {})
            row.setdefault(column, []).append(_seconds(MANY, column, "loop", _many, False))
    for name, cells in taken.items():
        table.rows[name] = {column: Sample(tuple(values), "s") for column, values in cells.items()}
    return table


def _ring(comm: VirtualCommunicator) -> None:
    comm.all_reduce(np.ones(ELEMENTS, np.float32), algorithm="ring")


def _many(comm: VirtualCommunicator) -> None:
    buffer, random = Phantom(LARGE, np.dtype(np.float32)), np.random.default_rng(comm.rank)
    for _ in range(STEPS):
        comm.sleep(0.01 * random.lognormal(0.0, 0.1))
        comm.all_reduce(buffer)


def _seconds(
    ranks: int, network: str, collectives: Collectives, body: Callable[[VirtualCommunicator], None], isolate: bool
) -> float:
    used: Network | FlowNetwork = LinkNetwork()
    if network == FLOWS:
        used = FlowNetwork(Description(hosts=[HostGroup(count=ranks)]))
    world = World(ranks, range(ranks), used, isolate_torch=isolate, collectives=collectives)
    start = time.perf_counter()
    world.run(body)
    return time.perf_counter() - start
