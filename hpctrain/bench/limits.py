"""What bounds the other figures, and what crosses the nodes' links. All functions here are collective."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import psutil
import torch

from hpctrain.bench.comparison import Comparison, Goal
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.steps import BETWEEN_NODES, StepBench
from hpctrain.bench.workload import LARGE
from hpctrain.comm.base import Communicator
from hpctrain.comm.pingpong import follow, lead
from hpctrain.errors import ClusterError

Progress = Callable[[str], None]
COPIED = 2**24  # float32 values per rank: 64 MiB
REPETITIONS = 9
STEPS = 1, 9  # in a short and a long block, whose difference counts
SECONDS = (0.2, 1.0)  # of ping-pongs with small and with large messages
HEADERS = 1.06  # what Ethernet, IP and TCP may add to the bytes of the model
LATENCY, BANDWIDTH, BYTES, SHARE = "latency, us", "GB/s", "MB per step", "of the least"


def measure_limits(comm: Communicator, progress: Progress) -> FigureTable:
    """Stream bandwidth of all ranks together, and the link from rank 0 to the first rank of each other node."""
    table = FigureTable("limits", f"limits of {comm.size} ranks", [BANDWIDTH, LATENCY])
    progress("limits: copies")
    table.rows["copies by all ranks at once, read and written"] = {BANDWIDTH: _streams(comm)}
    peers = [comm.nodes.index(node) for node in sorted(set(comm.nodes))][1:] or list(range(1, comm.size))[:1]
    for peer in peers:
        progress(f"limits: messages between ranks 0 and {peer}")
        row = {}
        if comm.rank == 0:
            found = lead(comm, peer, SECONDS)
            row = {BANDWIDTH: Sample((found.bandwidth / 1e9,), "GB/s"), LATENCY: Sample((found.latency * 1e6,), "us")}
        elif comm.rank == peer:
            follow(comm, 0)
        comm.barrier()
        table.rows[f"messages between ranks 0 and {peer}, one at a time"] = row
    return table


def _streams(comm: Communicator) -> Sample:
    source, target, found = torch.ones(COPIED), torch.ones(COPIED), []
    for _ in range(REPETITIONS):
        comm.barrier()
        start = time.perf_counter()
        target.copy_(source)
        rate = np.array([2 * source.nbytes / (time.perf_counter() - start) / 1e9])
        comm.all_reduce(rate)
        found.append(float(rate[0]))
    return Sample(tuple(found), "GB/s")


def measure_traffic(comm: Communicator, progress: Progress) -> FigureTable:
    """Bytes that a node sends per step, by the counters of its network cards, and as a multiple of what an all-reduce
    between the nodes must send: 2(1 - 1/N) of the model, once per node."""
    nodes = len(set(comm.nodes))
    if nodes < 2:
        raise ClusterError("hpctrain bench traffic: several nodes are needed; use --cluster clusters/lan4.toml")
    short, bench = (StepBench(comm, replace(LARGE, steps=steps)) for steps in STEPS)
    least = 2 * (1 - 1 / nodes) * bench.replica.layout.length * 4
    table = FigureTable(
        "traffic",
        f"bytes sent by each of {nodes} nodes with {comm.size // nodes} ranks each in a step, model of "
        f"{bench.replica.layout.length * 4 / 1e6:.3g} MB; at least {least / 1e6:.3g} MB in float32",
        [BYTES, SHARE],
    )
    for name, way in BETWEEN_NODES.ways.items():
        progress(f"traffic of {name}")
        less, more = (_sent(comm, partial(each.block, way)) for each in (short, bench))
        sent = (more - less) / (STEPS[1] - STEPS[0])  # without the first copy of the model
        table.rows[name] = {BYTES: Sample(tuple(sent / 1e6), "MB"), SHARE: Sample(tuple(sent / least), "")}
        largest = float((sent / least).max())
        target = Goal(HEADERS) if name == "all_reduce" else None
        table.comparisons.append(Comparison(f"{name}, largest", SHARE, largest, float("nan"), float("nan"), 1, target))
    table.notes.append("Including headers and what ends a step.")
    return table


def _sent(comm: Communicator, run: Callable[[], object]) -> np.ndarray:
    """Bytes that each node sent while `run` ran, by its network cards except the loopback."""
    comm.barrier()
    before = _counted()
    run()
    comm.barrier()
    rows = comm.gather_rows(np.array([_counted() - before], np.float64))[:, 0]
    firsts = [comm.nodes.index(node) for node in sorted(set(comm.nodes))]
    sent: np.ndarray = rows[firsts]
    return sent


def _counted() -> int:
    cards = psutil.net_io_counters(pernic=True)
    return sum(card.bytes_sent for name, card in cards.items() if name != "lo")
