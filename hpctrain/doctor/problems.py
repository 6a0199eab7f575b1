"""Problems in the facts of `hpctrain doctor`, and advice: pure functions of the facts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hpctrain.doctor import network
from hpctrain.doctor.facts import GIB, Facts, NodeFacts, RankFacts, named, ranges
from hpctrain.doctor.problem import SEVERITIES, Problem, Severity, at, counted, gpus, mib, millions
from hpctrain.launcher.facts import SLURM

FEW_PARAMETERS = 25_000_000  # about a ResNet-50: reported if not even that fits into shared memory
LITTLE_DISK = GIB  # the size of a few checkpoints and traces
BIND_VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def problems(facts: Facts) -> list[Problem]:
    """All problems, the worst first."""
    found = [problem for judge in JUDGES for problem in judge(facts)]
    return sorted(found, key=lambda problem: SEVERITIES.index(problem.severity))


def _mpi(facts: Facts) -> Iterator[Problem]:
    mpi = facts.mpi
    for trouble in mpi.troubles:
        what, _, do = trouble.rpartition("; ")
        yield Problem("error", "MPI", what or trouble, do if what else "see above")
    if not mpi.library:
        return
    if mpi.mpiexec is not None and not mpi.belongs:
        use = f"use {mpi.runs_with} or `hpctrain run`" if mpi.runs_with else "put the right one first on the path"
        yield Problem(
            "warning", "mpiexec",
            f"{mpi.mpiexec}, the first on the path, belongs to {mpi.mpiexec_kind}, but mpi4py loads {mpi.library}: "
            "every rank that it starts would run as if it were alone", use,
        )  # fmt: skip
    if mpi.runs_not is not None:
        started = facts.size > 1 or bool(facts.slurm)
        what, _, do = mpi.runs_not.rpartition("; ")
        yield Problem(
            "note" if started else "error", "mpiexec", f"`hpctrain run` cannot start ranks: {what or mpi.runs_not}",
            do or "put the MPI library's own mpiexec on the path",
        )  # fmt: skip


def _cores(facts: Facts) -> Iterator[Problem]:
    for node in facts.nodes:
        ranks = facts.on(node)
        crowded = list(_crowded(node, ranks))
        yield from crowded or _threads(node, ranks)
        if node.quota is not None and sum(rank.threads for rank in ranks) > node.quota + 0.5:
            yield Problem(
                "warning", at(node),
                f"its container or job may use {node.quota:g} cores on average, but {named(node.ranks)} would run "
                f"{sum(rank.threads for rank in ranks)} threads in total",
                "start fewer ranks, set threads = 1 in the job, or raise the limit (--cpus)",
            )  # fmt: skip
    counts = {len(node.ranks) for node in facts.nodes}
    if len(counts) > 1:
        yield Problem(
            "note", "ranks", f"nodes have different numbers of ranks ({min(counts)} to {max(counts)})",
            "start the same number on each (srun --ntasks-per-node, mpiexec -ppn): nodes exchange rank by rank",
        )  # fmt: skip


def _split_hosts(facts: Facts) -> Iterator[Problem]:
    """Hosts whose ranks MPI places on different nodes."""
    parts = defaultdict(list)
    for node in facts.nodes:
        parts[node.host].append(node)
    for host, nodes in parts.items():
        if len(nodes) == 1:
            continue
        ranks = [rank for node in nodes for rank in facts.on(node)]
        cores, threads = len(set().union(*(rank.cores for rank in ranks))), sum(rank.threads for rank in ranks)
        yield Problem(
            "warning", host, f"MPI counts it as {len(nodes)} nodes: {named([rank.rank for rank in ranks])} do not all "
            f"share memory, and would run {threads} torch threads in total on {counted(cores, 'core')}",
            "check that launcher and library match (srun --mpi=list, the PMIx version), or start ranks with the "
            "library's own mpiexec; if these are several hosts, give them different names",
        )  # fmt: skip


def _crowded(node: NodeFacts, ranks: list[RankFacts]) -> Iterator[Problem]:
    """Groups of ranks that share fewer cores than there are ranks."""
    union = set().union(*(rank.cores for rank in ranks))
    if len(ranks) > len(union):
        yield Problem(
            "warning", at(node), f"{len(ranks)} ranks share {len(union)} core{'s' * (len(union) > 1)} "
            f"({ranges(list(union))} of {node.cpus})",
            f"start at most {len(union)} ranks there, or give the job more cores: otherwise ranks take turns",
        )  # fmt: skip
        return
    reported: set[int] = set()
    for cores in sorted({tuple(rank.cores) for rank in ranks}, key=len):
        inside = [rank.rank for rank in ranks if set(rank.cores) <= set(cores)]
        if len(inside) > len(cores) and not reported & set(inside):
            reported |= set(inside)
            yield Problem(
                "warning", at(node), f"{named(inside)} are bound to the same core{'s' * (len(cores) > 1)} "
                f"{ranges(list(cores))}, while the node has {node.cpus}",
                "let the launcher bind ranks to different cores (srun --cpu-bind=cores --cpus-per-task=..., mpiexec "
                "-bind-to core), or do not bind them (srun --cpu-bind=none, mpirun --bind-to none)",
            )  # fmt: skip


def _threads(node: NodeFacts, ranks: list[RankFacts]) -> Iterator[Problem]:
    union = set().union(*(rank.cores for rank in ranks))
    total = sum(rank.threads for rank in ranks)
    if total > len(union):
        yield Problem(
            "warning", at(node), f"its {len(ranks)} rank{'s' * (len(ranks) > 1)} would run {total} torch "
            f"threads on {len(union)} cores",
            f'set threads = {len(union) // len(ranks)} in the job, or "auto"',
        )  # fmt: skip
    idle = [rank for rank in ranks if _exclusive(rank, ranks) and rank.threads < len(rank.cores)]
    if idle and len(ranks) > 1:
        first = idle[0]
        yield Problem(
            "warning", at(node), f"{named([rank.rank for rank in idle])} would run {first.threads} torch "
            f"thread{'s' * (first.threads > 1)} per rank, although each has {len(first.cores)} cores to itself",
            f"set threads = {len(first.cores)} in the job",
        )  # fmt: skip


def _exclusive(rank: RankFacts, ranks: list[RankFacts]) -> bool:
    return all(other is rank or not set(other.cores) & set(rank.cores) for other in ranks)


def _thread_variables(facts: Facts) -> Iterator[Problem]:
    for node in facts.nodes:
        ranks = facts.on(node)
        share = max(1, len(set().union(*(rank.cores for rank in ranks))) // len(ranks))
        for name in THREAD_VARIABLES:
            value = ranks[0].environment.get(name, "")
            if value and (not value.isdigit() or int(value) < 1):
                yield Problem("warning", name, f'is "{value}"; expected a positive whole number', f"set {name}={share}")
            elif value and int(value) > share:
                yield Problem(
                    "warning", name, f"is {value}, but each rank's share of {at(node)} is {share} "
                    f"core{'s' * (share > 1)}: libraries beside torch (NumPy in a data set) start that many threads",
                    f"set {name}={share} (hpctrain sets the number of torch's own threads)",
                )  # fmt: skip
        bound = [name for name in BIND_VARIABLES if ranks[0].environment.get(name, "").lower() not in ("false", "")]
        if bound and len(ranks) > 1 and len({tuple(rank.cores) for rank in ranks}) == 1:
            yield Problem(
                "warning", bound[0], f"binds threads to cores, while the ranks of {at(node)} are not bound: the "
                "threads of all ranks may run on the same cores",
                f"unset {', '.join(bound)}, or let the launcher bind ranks",
            )  # fmt: skip


def _busy(facts: Facts) -> Iterator[Problem]:
    for node in facts.nodes:
        cores = len(set().union(*(rank.cores for rank in facts.on(node))))
        if node.load > cores / 2 + 1:
            yield Problem(
                "note", at(node), f"other processes are running there (load {node.load:.1f} on {cores} "
                f"core{'s' * (cores > 1)}): the measured figures are those of a busy node",
                "repeat on an idle node, or request it exclusively (sbatch --exclusive)",
            )  # fmt: skip


def _memory(facts: Facts) -> Iterator[Problem]:
    for node in facts.nodes:
        if node.not_shared is not None and len(node.ranks) > 1:
            what, _, do = node.not_shared.rpartition("; ")
            yield Problem(
                "warning", at(node), f"its ranks cannot share memory, and exchange messages instead: "
                f"{what or node.not_shared}", do if what else "check /dev/shm",
            )  # fmt: skip
        elif len(node.ranks) > 1 and node.shared_parameters < FEW_PARAMETERS:
            yield Problem(
                "warning", at(node), f"/dev/shm has {mib(node.shm_free)} free: its {len(node.ranks)} ranks can share "
                f"models of up to {millions(node.shared_parameters)} parameters, and exchange messages for larger ones",
                "give the node or container more (docker run --shm-size, mount -o remount,size=), or delete "
                "leftover files in /dev/shm",
            )  # fmt: skip
        limit = node.memory_limit
        if limit is not None and limit < 0.5 * node.memory_total:
            yield Problem(
                "note", at(node), f"the container or job may use {limit / GIB:.1f} of its "
                f"{node.memory_total / GIB:.0f} GiB, including what is in /dev/shm",
                "request more (sbatch --mem) if ranks are killed",
            )  # fmt: skip
        if min(node.memory_free, limit or node.memory_free) < GIB * len(node.ranks):
            yield Problem(
                "warning", at(node), f"{mib(node.memory_free)} of memory is free for {len(node.ranks)} "
                f"rank{'s' * (len(node.ranks) > 1)}; each needs about 500 MiB once it has imported torch",
                "start fewer ranks there, or request more memory",
            )  # fmt: skip


def _devices(facts: Facts) -> Iterator[Problem]:
    for rank in facts.ranks:
        if rank.torch_trouble is not None:
            yield Problem("error", f"rank {rank.rank}", rank.torch_trouble, "reinstall torch for this Python")
            return
    for node in facts.nodes:
        first = facts.ranks[node.ranks[0]]
        if first.gpu_trouble is not None:
            what, _, do = first.gpu_trouble.rpartition("; ")
            yield Problem(
                "warning", at(node), f"its GPUs cannot be used: {what or first.gpu_trouble}",
                do if what else "check the driver with nvidia-smi",
            )  # fmt: skip
        elif node.nvidia and not any(rank.gpus for rank in facts.on(node)):
            hidden = first.environment.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
            why = "CUDA_VISIBLE_DEVICES hides them" if hidden else (
                "this torch is built without CUDA" if first.torch_cuda is None else "torch does not find them"
            )  # fmt: skip
            do = "unset it, or request GPUs (srun --gpus-per-node)" if hidden else "install torch for the driver's CUDA"
            yield Problem("warning", at(node), f"it has {gpus(node.nvidia)}, but {why}", do)
        yield from _shared_devices(node, facts.on(node))
    with_gpu = [rank.rank for rank in facts.ranks if rank.device != "cpu"]
    if 0 < len(with_gpu) < facts.size:
        without = [rank.rank for rank in facts.ranks if rank.device == "cpu"]
        yield Problem(
            "error", named(without), f"no GPU that torch and CuPy can use, unlike {named(with_gpu)}",
            'use nodes of the same kind, or device = "cpu" in the job',
        )  # fmt: skip
    mpi = facts.mpi
    if mpi.transport_trouble:
        what, _, do = mpi.transport_trouble.rpartition("; ")
        yield Problem("error", "GPU memory", what, do)
    elif mpi.transport == "staged" and facts.size > 1:
        yield Problem(
            "note", "GPU memory", f"exchanged data passes through pinned host memory ({mpi.cuda_how})",
            "use the site's CUDA-aware MPI, if there is one, or one GPU per rank with NCCL",
        )  # fmt: skip


def _shared_devices(node: NodeFacts, ranks: list[RankFacts]) -> Iterator[Problem]:
    users = defaultdict(list)
    for rank in ranks:
        if rank.device != "cpu":
            users[rank.device, rank.environment.get("CUDA_VISIBLE_DEVICES")].append(rank.rank)
    shared = {device: on for (device, _), on in users.items() if len(on) > 1}
    if shared:
        device, on = next(iter(shared.items()))
        yield Problem(
            "warning", at(node), f"{named(on)} compute on the same GPU ({device})",
            f"start {counted(ranks[0].gpus, 'rank')} there, one per GPU",
        )  # fmt: skip
    if users and (idle := max(rank.gpus for rank in ranks) - len(users)) > 0:
        yield Problem("note", at(node), f"{gpus(idle)} would be idle", "start one rank per GPU")


def _versions(facts: Facts) -> Iterator[Problem]:
    names = dict.fromkeys(name for rank in facts.ranks for name in rank.versions)
    for name in names:
        found = defaultdict(list)
        for rank in facts.ranks:
            found[rank.versions.get(name, "not installed")].append(rank.rank)
        if len(found) > 1:
            by_version = "; ".join(f"{version} on {named(ranks)}" for version, ranks in found.items())
            severity: Severity = "error" if name in ("hpctrain", "MPI") else "warning"
            yield Problem(
                severity, name, f"ranks have different versions: {by_version}",
                "use one environment that all nodes share, or install the same version on each",
            )  # fmt: skip


def _folders(facts: Facts) -> Iterator[Problem]:
    for folder in facts.folders:
        node = at(facts.nodes[folder.node])
        if folder.trace is not None:
            what, _, do = folder.trace.rpartition("; ")
            yield Problem("error", folder.path, f"on {node}: {what or folder.trace}", do if what else "see above")
            continue
        if not folder.seen:
            yield Problem(
                "error", folder.path, f"{node} does not see what rank 0 writes there: each node has its own folder "
                f"({folder.type or 'unknown file system'})", "set output to a folder that all nodes share",
            )  # fmt: skip
        if folder.locking is not None and facts.ranks[0].environment.get("HDF5_USE_FILE_LOCKING") != "FALSE":
            yield Problem(
                "note", folder.path, f"HDF5 cannot lock files there ({folder.type}): hpctrain writes and reads its "
                "traces without locks, but other programs (h5dump, h5py) may fail to open them",
                "export HDF5_USE_FILE_LOCKING=FALSE for those programs",
            )  # fmt: skip
        if folder.free < LITTLE_DISK:
            yield Problem(
                "warning", folder.path, f"only {mib(folder.free)} is free there for traces and checkpoints",
                "free some space, or set output to another folder",
            )  # fmt: skip
    first = facts.folders[0] if facts.folders else None
    if first is not None and first.network and facts.size > 1 and first.trace is None:
        yield Problem(
            "note", first.path, f"a network file system ({first.type} from {first.source}): {facts.size} ranks write "
            "traces to it every trace.flush_seconds", "raise trace.flush_seconds if it is slow; a reader on another "
            "node may see rows late",
        )  # fmt: skip


def _slurm(facts: Facts) -> Iterator[Problem]:
    granted = facts.slurm
    if not granted:
        return
    tasks, nodes, per_task = (
        int(text) if (text := granted.get(name, "")).isdigit() else None
        for name in (SLURM.tasks, SLURM.nodes, SLURM.cores_per_task)
    )
    plugin = facts.mpi.srun_needs
    if facts.plugins and plugin and not any(name.startswith(plugin) for name in facts.plugins):
        yield Problem(
            "warning", "Slurm", f"srun has no --mpi={plugin}, which {facts.mpi.kind} needs (it has "
            f"{', '.join(facts.plugins)})", "start ranks with that library's mpiexec inside the batch script",
        )  # fmt: skip
    if facts.mpi.troubles:
        return
    if tasks is not None and facts.size == 1 and tasks > 1:
        yield Problem(
            "note", "Slurm", f"the job has {tasks} tasks, but this is one process",
            f"check all of them: srun --mpi={plugin or '...'} hpctrain doctor",
        )  # fmt: skip
    elif tasks is not None and tasks != facts.size:
        yield Problem(
            "warning", "Slurm", f"{SLURM.tasks} is {tasks}, but {counted(facts.size, 'rank')} were started",
            f"start {tasks}, or pass --ntasks={facts.size} to sbatch",
        )  # fmt: skip
    if nodes is not None and facts.size > 1 and nodes > len(facts.nodes):
        yield Problem(
            "warning", "Slurm", f"the job has {counted(nodes, 'node')}, but its ranks are on {len(facts.nodes)}",
            "spread them (srun --nodes, --ntasks-per-node), or ask for fewer nodes",
        )  # fmt: skip
    few = [rank.rank for rank in facts.ranks if per_task is not None and len(rank.cores) < per_task]
    if few:
        yield Problem(
            "warning", "Slurm", f"{SLURM.cores_per_task} is {per_task}, but {named(few)} may use "
            f"{counted(len(facts.ranks[few[0]].cores), 'core')}: since Slurm 22.05, srun ignores sbatch's value",
            f"pass srun --cpus-per-task={per_task}, or export SRUN_CPUS_PER_TASK={per_task}",
        )  # fmt: skip


def _job(facts: Facts) -> Iterator[Problem]:
    job = facts.job
    if job is None:
        return
    for trouble in job.troubles:
        what, _, do = trouble.rpartition("; ")
        yield Problem("error", job.path, what or trouble, do if what else "change the job, or the ranks")
    for node in facts.nodes:
        needed, count = 2 * job.nbytes * len(node.ranks), len(node.ranks)
        if count > 1 and job.nbytes and needed > 0.9 * node.shm_free:
            yield Problem(
                "warning", job.path, f"{at(node)}: sharing the arenas of {count} ranks needs {mib(needed)}, "
                f"but /dev/shm has {mib(node.shm_free)} free: ranks will exchange messages instead",
                "give the node or container more shared memory (docker run --shm-size), or start fewer ranks there",
            )  # fmt: skip
        free = min(node.memory_free, node.memory_limit or node.memory_free)
        if job.nbytes * job.arenas * count > 0.8 * free:
            yield Problem(
                "warning", job.path, f"{at(node)}: parameters, gradients and optimizer state of {count} "
                f"rank{'s' * (count > 1)} need about {mib(job.nbytes * job.arenas * count)}, but {mib(free)} is free",
                "start fewer ranks there, or request more memory",
            )  # fmt: skip


JUDGES = (
    _mpi, _versions, _devices, _job, _slurm, _split_hosts, _cores, _thread_variables, _memory, _folders, network.links,
    network.slow_pairs, network.fork, _busy,
)  # fmt: skip
