"""Ranks to nodes, roles, shards and devices: pure functions of (rank, size, hosts, job), testable without MPI."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from hpctrain.errors import ClusterError


class Role(Enum):
    """What a rank does in a phase."""

    WORKER = "worker"
    SERVER = "server"


@dataclass(frozen=True)
class Roles:
    """Who does what in one phase. Ranks in increasing order; with colocated servers a rank is in both."""

    workers: tuple[int, ...]
    servers: tuple[int, ...]

    def of(self, rank: int) -> Role:
        """A colocated server's rank is a worker: its server runs beside."""
        return Role.WORKER if rank in self.workers else Role.SERVER


def assign_roles(nodes: Sequence[int], servers: int, colocated: bool) -> Roles:
    """`servers` servers on ranks whose node indices are `nodes`.

    Dedicated servers are the last rank of each node in turn, beginning with the last node, so that shards are
    spread over the nodes' links; rank 0 always keeps a replica. Colocated ones sit beside the workers of the
    same ranks. Raises ClusterError where there are too few ranks.
    """
    size = len(nodes)
    limit = size if colocated else size - 1
    if servers > limit:
        who = "can have a server beside it" if colocated else "can be servers, since rank 0 is always a worker"
        raise ClusterError(
            f"strategy.servers = {servers}: of {size} rank{'s' * (size > 1)} at most {limit} {who}; "
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


def share_of_cores(mine: Collection[int], everybodys: Sequence[Collection[int]]) -> float:
    """How many cores are a rank's own, of those (`mine`) that it may use; `everybodys`: what the ranks of its node may
    use, itself included. A launcher may have bound each to cores of its own, or none of them to any."""
    return len(mine) / max(1, sum(not set(mine).isdisjoint(cores) for cores in everybodys))


def threads_for(cores: float, threads: int | str) -> int:
    """Torch threads for a rank: as asked for, or as many as it has cores of its own (at least 1)."""
    return max(1, int(cores)) if threads == "auto" else int(threads)


def device_for(wanted: str, local_rank: int, gpus: int) -> str:
    """The name "cpu" or "cuda:i": ranks of a node take its GPUs in turn. Raises ClusterError where there is none."""
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return "cpu"
    if gpus == 0:
        raise ClusterError('device = "cuda": this node shows no GPU to torch; use device = "auto" or "cpu"')
    return f"cuda:{local_rank % gpus}"


SIZE_VARIABLES = {
    "OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun",
    "PMI_SIZE": "an MPICH-like mpiexec, or srun --mpi=pmi2",
    "SLURM_STEP_NUM_TASKS": "srun",
}
RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def launched_rank(environment: Mapping[str, str]) -> int:
    """The rank that the launcher gave this process, as far as one can know before MPI starts; else 0."""
    for name in RANK_VARIABLES:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def launched_size(environment: Mapping[str, str]) -> tuple[int, str]:
    """(how many ranks the launcher started as far as it says, the launcher in words)."""
    for name, launcher in SIZE_VARIABLES.items():
        if environment.get(name, "").isdigit() and int(environment[name]) > 1:
            return int(environment[name]), launcher
    return 1, ""


def check_singleton(size: int, library: str, environment: Mapping[str, str]) -> None:
    """ClusterError if this process believes it is alone while its launcher started several."""
    launched, launcher = launched_size(environment)
    if size > 1 or launched == 1:
        return
    if "OMPI_COMM_WORLD_SIZE" in environment and "Open MPI" not in library:
        cure = "use the mpiexec that belongs to that library (`hpctrain run` finds it)"
    elif launcher == "srun":
        cure = "pass srun --mpi=pmi2 for MPICH, --mpi=pmix for Open MPI"
    else:
        cure = "use the mpiexec that belongs to that library (`hpctrain run` finds it), or under srun another --mpi"
    raise ClusterError(
        f"{launcher} started {launched} processes, but each is alone for the MPI library that mpi4py loads "
        f"({library}): launcher and library do not belong together; {cure}"
    )


def netmod_for(library: str, environment: Mapping[str, str]) -> dict[str, str]:
    """What MPICH has to be told before it starts, so that it always comes up under `srun --mpi=pmi2`.

    `library`: MPICH's long description of itself. Slurm's plug-in reads a PMI request in one piece of at most 1024
    bytes. What ranks tell each other there of UCX is longer now and then, as it depends on chance, and then all of
    them wait for ever; of OFI it is always short. Nothing where the user has chosen, or there is no choice.
    """
    device = next((line for line in library.splitlines() if line.startswith("MPICH Device")), "")
    by_srun = {"SLURM_STEP_ID", "PMI_FD"} <= environment.keys() and "MPI_LOCALNRANKS" not in environment
    choice = "ucx" in device and "ofi" in device and "MPIR_CVAR_CH4_NETMOD" not in environment
    return {"MPIR_CVAR_CH4_NETMOD": "ofi"} if by_srun and choice else {}
