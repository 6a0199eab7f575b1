"""The facts of `hpctrain doctor`, as plain values: gathered from the ranks, used by `problems` and `report`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class MpiFacts:
    """The MPI library and the launchers found.

    `kind`: mpich, openmpi, intel, other, or "" if no library can be loaded. `cuda_aware`: None if the library does not
    say; `cuda_how`: how this was determined. `transport`: of buffers in GPU memory, if all ranks have a GPU;
    `transport_why`: the choice as a sentence; `transport_trouble`: why the job's own choice is impossible. `mpiexec`:
    the one on the path; `mpiexec_kind`: its kind; `belongs`: whether it belongs to this library. `runs_with`: the
    mpiexec that `hpctrain run` uses; `runs_not`: why there is none. `troubles`: sentences that say what does not work
    and what to do.
    """

    library: str = ""
    kind: str = ""
    standard: str = ""
    thread_level: str = ""
    cuda_aware: bool | None = None
    cuda_how: str = ""
    transport: str = ""
    transport_why: str = ""
    transport_trouble: str = ""
    launched: int = 1
    launcher: str = ""
    mpiexec: str | None = None
    mpiexec_kind: str = ""
    belongs: bool = False
    runs_with: str | None = None
    runs_not: str | None = None
    srun_needs: str = ""
    troubles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RankFacts:
    """One rank. `cores`: logical CPUs that it may use; `threads`: torch threads that it would use."""

    rank: int
    node: int
    host: str
    cores: list[int]
    threads: int
    device: str = "cpu"
    gpus: int = 0
    gpu_trouble: str | None = None
    torch_trouble: str | None = None
    torch_cuda: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeFacts:
    """One node, as its first rank sees it. Memory in bytes; None or empty: unknown or absent.

    `cpus`: logical CPUs; `quota`: cores that a container may use on average; `load`: average number of running
    processes in the last minute; `memory_limit`: a container's limit; `not_shared`: a sentence that says why the ranks
    cannot share memory; `nvidia`: GPUs that the driver shows; `memlock`: memory that a process may pin.
    """

    index: int
    host: str
    ranks: list[int]
    cpus: int
    quota: float | None = None
    load: float = 0.0
    memory_total: int = 0
    memory_free: int = 0
    memory_limit: int | None = None
    shm_total: int = 0
    shm_free: int = 0
    not_shared: str | None = None
    nvidia: int = 0
    infiniband: list[str] = field(default_factory=list)
    memlock: int | None = None

    @property
    def shared_parameters(self) -> int:
        """Number of float32 parameters of the largest model whose arenas (parameters, gradients) fit for every rank.

        A run makes the same check before it shares memory; it leaves a tenth free.
        """
        return int(0.9 * self.shm_free / (8 * max(1, len(self.ranks))))


@dataclass(frozen=True)
class FolderFacts:
    """The output folder, as a node's first rank sees it.

    `seen`: whether the file that rank 0 created is visible. `trace`: why no trace can be written; `locking`: why HDF5
    cannot lock files; both are None if it works.
    """

    node: int
    path: str
    type: str
    source: str
    network: bool
    free: int
    seen: bool = True
    trace: str | None = None
    locking: str | None = None


@dataclass(frozen=True)
class Link:
    """A ping-pong of two ranks. Latency: half a round trip of 8 bytes, us; bandwidth: `nbytes` each way, 10^9 B/s."""

    ranks: tuple[int, int]
    nodes: tuple[int, int]
    latency_us: float
    bandwidth_gb_s: float
    nbytes: int

    @property
    def within(self) -> bool:
        """Whether both ranks are on one node."""
        return self.nodes[0] == self.nodes[1]


@dataclass(frozen=True)
class JobFacts:
    """A job on these ranks. `phases`: strategy, workers and servers of each; `nbytes`: size of one parameter arena.

    `arenas`: the maximum number of arenas of this size on a worker; `troubles`: why the job cannot run here.
    """

    path: str
    output: str
    threads: int | str = "auto"
    phases: list[dict[str, Any]] = field(default_factory=list)
    parameters: int = 0
    nbytes: int = 0
    arenas: int = 0
    samples: int | None = None
    troubles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """All facts. `pairs`: numbers of pairs of ranks (within, between nodes); `links`: results of the measured pairs."""

    mpi: MpiFacts
    ranks: list[RankFacts]
    nodes: list[NodeFacts]
    folders: list[FolderFacts]
    links: list[Link] = field(default_factory=list)
    pairs: tuple[int, int] = (0, 0)
    slurm: dict[str, str] = field(default_factory=dict)
    plugins: list[str] = field(default_factory=list)
    job: JobFacts | None = None
    seconds: float = 0.0

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.ranks)

    def on(self, node: NodeFacts) -> list[RankFacts]:
        """The ranks on `node`."""
        return [self.ranks[rank] for rank in node.ranks]

    def plain(self) -> dict[str, Any]:
        """The facts as plain values for JSON."""
        plain = asdict(self)
        for node, values in zip(self.nodes, plain["nodes"], strict=True):
            values["shared_parameters"] = node.shared_parameters
        return plain


def ranges(numbers: list[int]) -> str:
    """Numbers as ranges: "0-3, 7" for [0, 1, 2, 3, 7]."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def named(ranks: list[int]) -> str:
    """Ranks in words: "rank 3" or "ranks 0-3, 7"."""
    return f"rank{'s' * (len(ranks) > 1)} {ranges(ranks)}"
