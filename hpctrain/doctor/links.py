"""Latency and bandwidth between ranks: ping-pongs over the communicator, on the same path as a run's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np

from hpctrain.comm.base import Communicator
from hpctrain.comm.pingpong import follow, lead
from hpctrain.doctor.facts import Link

MOST_WITHIN, MOST_BETWEEN = 6, 8  # maximum numbers of pairs to measure
SECONDS = 0.05, 0.2  # measuring time of a pair's small and large messages
POLL = 0.01  # seconds between polls of ranks that only wait
Pair = tuple[int, int]


def pairs_of(nodes: Sequence[int]) -> tuple[list[list[Pair]], list[Pair], tuple[int, int]]:
    """The pairs to measure, on ranks whose node indices are `nodes`.

    Returns (rounds of pairs within nodes, with at most one pair per node in each; pairs between neighbouring nodes;
    the total numbers of possible pairs of both kinds).
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
    """At most `most` of the pairs, evenly spread, including the first and the last."""
    if len(pairs) <= most:
        return pairs
    return [pairs[round(i * (len(pairs) - 1) / (most - 1))] for i in range(most)]


def measure(comm: Communicator, stage: Callable[[str], None]) -> tuple[list[Link], tuple[int, int]]:
    """(the links, numbers of possible pairs within and between nodes). Collective; the same on all ranks.

    All nodes measure internally at the same time, one pair per node at a time; between nodes, one pair at a time.
    Takes at most about 20 s for any number of ranks, 0.3 s per pair if links are not slow.
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
                follow(own, low)
        _idle(own)
    measured = own.gather_json([[*link.ranks, link.latency_us, link.bandwidth_gb_s, link.nbytes] for link in found])
    own.free()
    rows = sorted((row for rank in measured for row in rank), key=lambda row: row[:2])
    return [Link((a, b), (comm.nodes[a], comm.nodes[b]), lat, wide, n) for a, b, lat, wide, n in rows], pairs


def _lead(comm: Communicator, peer: int) -> Link:
    latency, bandwidth, nbytes = lead(comm, peer, SECONDS)
    nodes = comm.nodes[comm.rank], comm.nodes[peer]
    return Link((comm.rank, peer), nodes, latency * 1e6, bandwidth / 1e9, nbytes)


def _idle(comm: Communicator) -> None:
    """A barrier that leaves the cores to the measuring ranks: MPI libraries' own barriers use CPU while they wait."""
    end = comm.start_all_reduce(np.zeros(1))
    while not end.test():
        comm.sleep(POLL)
