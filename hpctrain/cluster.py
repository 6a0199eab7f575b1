"""Maps ranks to nodes, roles, shards and devices: pure functions of (rank, size, hosts, job), testable without MPI."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

from hpctrain.errors import ClusterError


class Role(Enum):
    """The role of a rank in a phase."""

    WORKER = "worker"
    SERVER = "server"


@dataclass(frozen=True)
class Roles:
    """The ranks of each role in one phase, in increasing order. A rank with a colocated server has both roles."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]

    def of(self, rank: int) -> Role:
        """The role of `rank`. A rank with a colocated server is a worker; the server runs beside it."""
        return Role.WORKER if rank in self.workers else Role.SERVER


def assign_roles(nodes: Sequence[int], servers: int, colocated: bool) -> Roles:
    """Assign `servers` servers to ranks whose node indices are `nodes`.

    Dedicated servers take the last rank of each node in turn, beginning with the last node, so that shards are spread
    over the nodes' links; rank 0 always keeps a replica. Colocated servers share their ranks with workers. Raises
    ClusterError if there are too few ranks.
    """
    return _assigned(tuple(nodes), servers, colocated)


@lru_cache(maxsize=4)  # thousands of virtual ranks ask for the same
def _assigned(nodes: tuple[int, ...], servers: int, colocated: bool) -> Roles:
    size = len(nodes)
    limit = size if colocated else size - 1
    if servers > limit:
        limited = "can have a server beside it" if colocated else "can be servers, since rank 0 is always a worker"
        raise ClusterError(
            f"strategy.servers = {servers}: of {size} rank{'s' * (size > 1)} at most {limit} {limited}; "
            "start more ranks or lower strategy.servers"
        )
    candidates = _last_of_each_node_in_turn(nodes)
    if not colocated:
        candidates.remove(0)
    chosen = tuple(sorted(candidates[:servers]))
    workers = tuple(range(size)) if colocated else tuple(r for r in range(size) if r not in chosen)
    return Roles(workers, chosen)


def _last_of_each_node_in_turn(nodes: Sequence[int]) -> list[int]:
    left: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        left.setdefault(node, []).append(rank)
    order: list[int] = []
    while any(left.values()):
        order += [left[node].pop() for node in sorted(left, reverse=True) if left[node]]
    return order


def share_of_cores(mine: Collection[int], all_cores: Sequence[Collection[int]]) -> float:
    """A rank's share of the cores (`mine`) that it may use. `all_cores`: the cores that each rank of its node may
    use, including this one. A launcher may have bound each rank to its own cores, or bound none."""
    return len(mine) / max(1, sum(not set(mine).isdisjoint(cores) for cores in all_cores))


def threads_for(cores: float, threads: int | str) -> int:
    """Number of torch threads for a rank: `threads`, or with "auto" its share of cores (at least 1)."""
    return max(1, int(cores)) if threads == "auto" else int(threads)


def device_for(wanted: str, local_rank: int, gpus: int) -> str:
    """The name "cpu" or "cuda:i": ranks of a node take its GPUs in turn. Raises ClusterError if "cuda" finds no GPU."""
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return "cpu"
    if gpus == 0:
        raise ClusterError('device = "cuda": torch finds no GPU on this node; use device = "auto" or "cpu"')
    return f"cuda:{local_rank % gpus}"
