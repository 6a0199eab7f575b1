"""Sizes of the servers' shards by the bandwidth of their links (`shard_sizes = "bandwidth"`).

When a phase begins, all workers together push some bytes to each server in turn, and pull as many at the same time, as
they will in training. The size of a server's shard is then in proportion to the bytes per second that it has reached,
so that all servers need the same time for a round.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.base import Tag
from hpctrain.strategies.balance import apportioned
from hpctrain.trace.events import ShardsSized

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.strategies.phase import Phase

FIRST, FACTOR, LAST = 2**16, 4, 2**22  # bytes of a message to or from each worker
LONG = 0.05  # seconds; longer messages are not tried once one took this long
TRIES = 3
PERCENT = 100  # a weight of 100 is an equal share
LEAST, MOST = 25, 400
DIFFERENT = 1.2  # shards stay equal unless the slowest server needs this many times the time of the fastest


def shard_weights(phase: Phase, comm: Communicator) -> list[int] | None:
    """A weight for each server, the same on all ranks; None if shards are to be equal: where nothing is sent, or all
    servers are equally fast. `comm`: all ranks of the phase. Collective; takes less than a second on usual networks."""
    servers = phase.roles.servers
    pace = _measured(phase, comm) if len(servers) > 1 else [0.0]
    slowest = max(pace)
    if slowest < DIFFERENT * min(pace) or not slowest:
        return None
    quick = slowest * LEAST / MOST  # a server that gets no messages is not infinitely fast
    speeds = [1 / max(each, quick) for each in pace]
    weights = apportioned(PERCENT * len(servers), speeds, LEAST, MOST)
    if comm.rank == servers[0]:
        rank = servers[pace.index(slowest)]
        phase.conductor.notify(ShardsSized(" ".join(map(str, weights)), rank, min(speeds), max(speeds)))
    return weights


def _measured(phase: Phase, comm: Communicator) -> list[float]:
    """Seconds per byte of each server, 0 for those that get no messages."""
    size, servers = FIRST, list(phase.roles.servers)
    while True:
        mine = 0.0
        for server in servers:
            taken = min(_exchange(phase, comm, server, size) for _ in range(TRIES))
            mine = taken if server == comm.rank else mine
        found = [float(row[0]) for row in comm.gather_rows(np.array([mine]))]
        if max(found) > LONG or size >= LAST:
            return [found[server] / size for server in servers]
        size *= FACTOR


def _exchange(phase: Phase, comm: Communicator, server: int, size: int) -> float:
    """All workers that share no memory with the server send it `size` bytes and receive as many. Returns the seconds
    until it has all of them and they have theirs, on the server. Collective."""
    peers = [worker for worker in phase.roles.workers if _apart(phase, worker, server)]
    comm.barrier()
    begun = comm.now()
    if comm.rank != server:
        peers = [server] if comm.rank in peers else []
    into, out = np.zeros((len(peers), size), np.uint8), np.zeros(size, np.uint8)
    requests = [comm.start_recv(room, peer, Tag.PUSH) for room, peer in zip(into, peers, strict=True)]
    requests += [comm.start_send(out, peer, Tag.PUSH) for peer in peers]
    comm.wait_all(requests)
    return (comm.now() - begun) / 1e9 if peers else 0.0


def _apart(phase: Phase, other: int, rank: int) -> bool:
    """Whether those two ranks of the phase reach each other by messages."""
    nodes = phase.comm.nodes
    return other != rank and not (phase.members.shared and nodes[other] == nodes[rank])
