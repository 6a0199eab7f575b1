"""Runs of a study over virtual ranks: what a job reaches, and what its messages take."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.network import FreeNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.job import Job
from hpctrain.run.api import Result, fit_batch, session
from hpctrain.run.folder import Narrator

PASS_NS = 1e7


class Jitter:
    """A forward and backward pass takes about 10 ms of virtual time, another in every step: log-normal, sigma 0.3."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, rank: int, kind: str, nbytes: int, flops: float) -> int:
        return int(PASS_NS * self._random.lognormvariate(0.0, 0.3)) if kind == "forward" else 0


class LinkBytes(NamedTuple):
    """Bytes in both directions."""

    sent: float
    received: float


@dataclass
class CountingNetwork(FreeNetwork):
    """Costs nothing, and counts the bytes that each node has sent to others (`sent`) and received (`received`)."""

    sent: dict[int, int] = field(default_factory=dict)
    received: dict[int, int] = field(default_factory=dict)

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        if source != dest:
            self.sent[source] = self.sent.get(source, 0) + nbytes
            self.received[dest] = self.received.get(dest, 0) + nbytes
        return super().transfer(source, dest, nbytes, start)

    def of(self, node: int) -> LinkBytes:
        """What a node has sent and received so far."""
        return LinkBytes(self.sent.get(node, 0), self.received.get(node, 0))


@dataclass(frozen=True)
class Trained:
    """A run that has ended. `result`: rank 0's. `workers`: the ranks that took steps. `links`: rank -> bytes that its
    node sent and received per step of its own; a server: per step of all workers. `seconds`: of this
    process' processor time, all ranks together."""

    result: Result
    workers: tuple[int, ...]
    links: dict[int, LinkBytes]
    seconds: float


def train_virtually(job: Job, nodes: Sequence[int], seed: int = 0, period: int = 1) -> Trained:
    """Train `job` on virtual ranks on these nodes (rank -> node index), in a temporary run folder.

    Bytes are counted from the first step on over as many whole rounds of `period` steps as end before the last step:
    neither what distributes the model at the start nor what gathers it at the end counts. Several servers are taken to
    have equal shares. Raises HpctrainError as training does.
    """
    network, marks = CountingNetwork(), dict[int, list[LinkBytes]]()

    def body(comm: Communicator) -> Result:
        with session(placed, comm, out=Narrator(enabled=False)) as running:
            for batch in running.batches():
                marks.setdefault(comm.rank, []).append(network.of(nodes[comm.rank]))
                fit_batch(running, batch)
        return running.result

    began = time.process_time()
    with tempfile.TemporaryDirectory(prefix="hpctrain-study-") as folder:
        placed = job.override([f"output={folder}"])
        results = World(len(nodes), nodes, network, Jitter(seed)).run(body)
    links = {rank: per_step(seen, period) for rank, seen in sorted(marks.items())}
    workers, servers = tuple(links), [rank for rank in range(len(nodes)) if rank not in links]
    total = LinkBytes(sum(links[rank].received for rank in workers), sum(links[rank].sent for rank in workers))
    for rank in servers:
        links[rank] = LinkBytes(total.sent / len(servers), total.received / len(servers))
    return Trained(results[0], workers, links, time.process_time() - began)


def per_step(marks: Sequence[LinkBytes], period: int) -> LinkBytes:
    """The bytes per step of a rank. `marks`: its totals when each of its steps began, `period` steps per round. With a
    single round or less, over all that there is."""
    steps = (len(marks) - 1) // period * period or len(marks) - 1
    if steps == 0:
        return LinkBytes(0.0, 0.0)
    first, last = marks[0], marks[steps]
    return LinkBytes((last.sent - first.sent) / steps, (last.received - first.received) / steps)
