"""Latency and bandwidth between ranks: ping-pongs over the communicator, as a run's own messages travel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np

from hpctrain.comm.base import Communicator, Tag
from hpctrain.doctor.facts import Link

MOST_WITHIN, MOST_BETWEEN = 6, 8  # pairs that are measured
LARGE, SMALLER = 4 << 20, 64 << 10  # bytes; slow links get less than LARGE
TRIP = 0.5  # seconds that a large message's round trip may take
SECONDS = 0.05, 0.2  # for the small and the large messages of a pair
POLL = 0.01  # seconds between looks of those who only wait
Pair = tuple[int, int]


def pairs_of(nodes: Sequence[int]) -> tuple[list[list[Pair]], list[Pair], tuple[int, int]]:
    """Who measures with whom, on ranks whose node indices are `nodes`.

    Returns (rounds of pairs within nodes, at most one pair per node in each; pairs between neighbouring nodes; how
    many pairs there would be of both sorts).
    """
    local: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        local.setdefault(node, []).append(rank)
    every = [list(combinations(ranks, 2)) for ranks in local.values()]
    within = [_spread(pairs, MOST_WITHIN) for pairs in every]
    rounds = [[pairs[i] for pairs in within if i < len(pairs)] for i in range(max(map(len, within)))]
    firsts = [ranks[0] for ranks in local.values()]
    neighbours = list(pairwise(firsts)) + ([(firsts[0], firsts[-1])] if len(firsts) > 2 else [])
    between = len(list(combinations(firsts, 2)))
    return rounds, _spread(neighbours, MOST_BETWEEN), (sum(map(len, every)), between)


def _spread(pairs: list[Pair], most: int) -> list[Pair]:
    """At most so many of them, the first and the last included."""
    if len(pairs) <= most:
        return pairs
    return [pairs[round(i * (len(pairs) - 1) / (most - 1))] for i in range(most)]


def measure(comm: Communicator, stage: Callable[[str], None]) -> tuple[list[Link], tuple[int, int]]:
    """(the links, how many pairs there would be within and between nodes). Collective; on all ranks the same.

    Nodes measure within themselves at the same time, one pair of each after another; between nodes one pair after
    another. Takes at most about 20 s however many ranks there are, 0.3 s per pair where links are not slow.
    """
    own = comm.split(0, comm.rank)
    assert own is not None
    rounds, between, pairs = pairs_of(comm.nodes)
    found: list[Link] = []
    for number, turn in enumerate([*rounds, *([pair] for pair in between)]):
        place = "within nodes" if number < len(rounds) else "between nodes"
        stage(f"measuring messages {place}, {number + 1} of {len(rounds) + len(between)}")
        for low, high in turn:
            if own.rank == low:
                found.append(_lead(own, high))
            elif own.rank == high:
                _follow(own, low)
        _idle(own)
    told = own.gather_json([[*link.ranks, link.latency_us, link.bandwidth_gb_s, link.nbytes] for link in found])
    own.free()
    rows = sorted((row for rank in told for row in rank), key=lambda row: row[:2])
    return [Link((a, b), (comm.nodes[a], comm.nodes[b]), lat, wide, n) for a, b, lat, wide, n in rows], pairs


def _lead(comm: Communicator, peer: int) -> Link:
    latency = _trip(comm, peer, 8, SECONDS[0])
    nbytes = SMALLER
    trip = _trip(comm, peer, nbytes, 0.0)
    if trip < TRIP:
        nbytes = min(LARGE, SMALLER * 2 ** int(math.log2(TRIP / trip)))
        trip = _trip(comm, peer, nbytes, SECONDS[1])
    _order(comm, peer, 0, 0)
    nodes = comm.nodes[comm.rank], comm.nodes[peer]
    return Link((comm.rank, peer), nodes, latency / 2 * 1e6, 2 * nbytes / trip / 1e9, nbytes)


def _trip(comm: Communicator, peer: int, nbytes: int, seconds: float) -> float:
    """Seconds of a round trip: the median of as many as there is time for, at least one."""
    _exchange(comm, peer, nbytes, 1)  # the peer may come late, and the first message opens connections
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


def _follow(comm: Communicator, peer: int) -> None:
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


def _idle(comm: Communicator) -> None:
    """A barrier that leaves the cores to those who measure: no MPI library waits so idly."""
    end = comm.start_all_reduce(np.zeros(1))
    while not end.test():
        comm.sleep(POLL)
