"""Ping-pong between two ranks: latency and bandwidth of the communicator's own messages. Not collective."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hpctrain.comm.base import Communicator, Tag

LARGE, SMALLER = 4 << 20, 64 << 10  # bytes; slow links use less than LARGE
TRIP = 0.5  # maximum seconds for the round trip of a large message


class Measured(NamedTuple):
    """A measured link. `latency`: seconds one way; `bandwidth`: bytes per second, for messages of `nbytes`."""

    latency: float
    bandwidth: float
    nbytes: int


def lead(comm: Communicator, peer: int, seconds: tuple[float, float]) -> Measured:
    """Measure the link to `peer`, which must call `follow`; `seconds`: time for small and for large messages."""
    latency = _trip(comm, peer, 8, seconds[0])
    nbytes = SMALLER
    trip = _trip(comm, peer, nbytes, 0.0)
    if trip < TRIP:
        nbytes = min(LARGE, SMALLER * 2 ** int(math.log2(TRIP / trip)))
        trip = _trip(comm, peer, nbytes, seconds[1])
    _order(comm, peer, 0, 0)
    return Measured(latency / 2, 2 * nbytes / trip, nbytes)


def _trip(comm: Communicator, peer: int, nbytes: int, seconds: float) -> float:
    """Seconds per round trip: the median of as many as fit into `seconds`, at least one."""
    _exchange(comm, peer, nbytes, 1)  # the peer may be late, and the first message opens connections
    (first,) = _exchange(comm, peer, nbytes, 1)
    count = int(np.clip(seconds / first, 0, 1000))
    return float(np.median(_exchange(comm, peer, nbytes, count))) if count else first


def _exchange(comm: Communicator, peer: int, nbytes: int, count: int) -> list[float]:
    _order(comm, peer, nbytes, count)
    buffer, taken = np.ones(nbytes, np.uint8), []  # zeros would not be in memory yet
    for _ in range(count):
        start = comm.now()
        comm.send(buffer, peer, Tag.CONTROL)
        comm.recv(buffer, peer, Tag.CONTROL)
        taken.append(max(comm.now() - start, 1) / 1e9)
    return taken


def _order(comm: Communicator, peer: int, nbytes: int, count: int) -> None:
    comm.send(np.array([nbytes, count], np.int64), peer, Tag.CONTROL)


def follow(comm: Communicator, peer: int) -> None:
    """Reply to `peer`, which calls `lead`."""
    order = np.zeros(2, np.int64)
    while True:
        comm.recv(order, peer, Tag.CONTROL)
        nbytes, count = map(int, order)
        if not count:
            return
        buffer = np.ones(nbytes, np.uint8)
        for _ in range(count):
            comm.recv(buffer, peer, Tag.CONTROL)
            comm.send(buffer, peer, Tag.CONTROL)
