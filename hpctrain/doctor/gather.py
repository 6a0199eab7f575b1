"""Gathers the facts of all ranks. Functions that take a communicator are collective over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.cluster import device_for
from hpctrain.comm.base import Communicator
from hpctrain.doctor import machine
from hpctrain.doctor.facts import Facts, FolderFacts, JobFacts, MpiFacts, NodeFacts, RankFacts
from hpctrain.doctor.links import measure
from hpctrain.errors import ClusterError, HpctrainError

if TYPE_CHECKING:
    from hpctrain.job import Job

Stage = Callable[[str], None]
SMALL = 1 << 20  # bytes of shared memory in the test


def join(known: MpiFacts) -> tuple[Communicator | None, MpiFacts]:
    """Start MPI; return the communicator over all ranks and facts from the library. Collective.

    The communicator is None if MPI does not load or if launcher and library do not match; `troubles` says why.
    """
    try:
        from hpctrain.comm.connect import connect
        from hpctrain.comm.mpi import library
    except Exception as error:  # mpi4py raises various types when it cannot load a library
        why = f"mpi4py cannot start MPI ({type(error).__name__}: {str(error).splitlines()[0]}); install an MPI library"
        return None, replace(known, troubles=known.troubles or [why])
    loaded = replace(known, library=library.name(), standard=library.standard(), thread_level=library.thread_level())
    try:
        return connect(), loaded
    except ClusterError as error:
        return None, replace(loaded, troubles=[*loaded.troubles, str(error)])


def collect(comm: Communicator, mpi: MpiFacts, job: Job | None, path: str, stage: Stage) -> Facts:
    """All facts, the same on all ranks. Collective. `mpi`: the library's facts so far; rank 0's are used.

    `job`: the job to check on these ranks, from the file `path`. `stage` is called with a description of each stage.
    """
    stage("importing torch")
    environment, threads = os.environ, job.threads if job is not None else "auto"
    mine = machine.look_at_rank(comm.rank, comm.nodes[comm.rank], comm.cores, mpi.library, environment, threads)
    ranks = [RankFacts(**values) for values in comm.gather_json(asdict(mine))]
    stage("checking devices")
    ranks = _devices(ranks, comm, job)
    mpi = MpiFacts(**comm.broadcast_json(asdict(_cuda(mpi, comm, ranks, job))))
    stage("testing shared memory")
    nodes = _nodes(comm)
    stage("writing to the output folder")
    folders = look_at_output(comm, Path(job.output if job is not None else "runs"))
    links, pairs = measure(comm, stage) if comm.size > 1 else ([], (0, 0))
    slurm = comm.broadcast_json(machine.slurm_variables(environment))
    plugins = comm.broadcast_json(machine.srun_plugins(environment) if slurm and comm.rank == 0 else [])
    stage("preparing the job")
    about = look_at_job(comm, job, path) if job is not None else None
    return Facts(mpi, ranks, nodes, folders, links, pairs, slurm, plugins, about)


def _devices(ranks: list[RankFacts], comm: Communicator, job: Job | None) -> list[RankFacts]:
    """The ranks, with the device on which each would compute."""
    wanted = job.device if job is not None else "auto"
    found = []
    for rank in ranks:
        place = [other.rank for other in ranks if other.node == rank.node].index(rank.rank)
        with contextlib.suppress(ClusterError):  # device = "cuda" without a GPU is reported with the job
            rank = replace(rank, device=device_for(wanted, place, rank.gpus))
        found.append(rank)
    return found


def _cuda(mpi: MpiFacts, comm: Communicator, ranks: list[RankFacts], job: Job | None) -> MpiFacts:
    """With whether MPI is CUDA-aware, and, if all ranks have a GPU, how their memory reaches other ranks."""
    if not comm.concurrent:
        return replace(mpi, cuda_how="MPI is not in use")
    from hpctrain.comm.mpi import library

    answers = comm.gather_json(library.cuda_support())
    known = None if None in answers else all(answers)
    says = "does not say" if known is None else f"says that it is {'' if known else 'not '}CUDA-aware"
    mpi = replace(mpi, cuda_aware=known, cuda_how=f"the MPI library {says}")
    if any(rank.device == "cpu" for rank in ranks):
        return mpi
    return _transport(mpi, comm, int(ranks[comm.rank].device.split(":")[1]), job)


def _transport(mpi: MpiFacts, comm: Communicator, index: int, job: Job | None) -> MpiFacts:
    """Choose the transport as a run would."""
    from hpctrain.comm.device.choice import choose
    from hpctrain.comm.device.gpu import Gpu
    from hpctrain.job.tables import CommunicatorTable

    table = job.communicator if job is not None else CommunicatorTable()
    try:
        choice = choose(comm, Gpu.open(index), table.device_transport, table.cuda_aware)
    except ClusterError as error:  # the same on all ranks
        return replace(mpi, transport_trouble=str(error))
    return replace(mpi, transport=choice.name, transport_why=str(choice))


def _nodes(comm: Communicator) -> list[NodeFacts]:
    """The facts of each node as its first rank sees it."""
    not_shared = try_shared_memory(comm)
    first = comm.local_rank == 0
    mine = machine.look_at_node(comm.nodes[comm.rank], list(comm.local_ranks), not_shared) if first else None
    found = comm.gather_json(asdict(mine) if mine is not None else None)
    return [NodeFacts(**values) for values in found if values is not None]


def try_shared_memory(comm: Communicator) -> str | None:
    """Why this node's ranks cannot share memory, as a sentence; None if they can. Collective."""
    why = comm.can_share(SMALL)
    can = comm.gather_json(why)
    if any(other is not None for other in can):
        return why
    arena = comm.arena(SMALL // 8, np.dtype(np.int64), "node")
    arena.mine[:] = comm.rank
    comm.notify(arena)
    comm.wait(arena)
    right = all((part == rank).all() for part, rank in zip(arena.parts, comm.local_ranks, strict=True))
    comm.barrier()
    arena.free()
    return None if right else "what a rank writes is not seen by others; set communicator.shared = false in the job"


def look_at_output(comm: Communicator, path: Path) -> list[FolderFacts]:
    """The output folder as seen by each node. Collective. Leaves no files in the folder."""
    probe, made = None, None
    if comm.rank == 0:
        with contextlib.suppress(OSError):
            made = machine.existing_folder(path) / machine.probe_name()
            made.touch()
            probe = made.name
    try:
        probe = comm.broadcast_json(probe)
        first = comm.local_rank == 0
        mine = machine.look_at_folder(comm.nodes[comm.rank], path, probe) if first else None
        found = comm.gather_json(asdict(mine) if mine is not None else None)
    finally:
        if made is not None:
            made.unlink(missing_ok=True)
    return [FolderFacts(**values) for values in found if values is not None]


def look_at_job(comm: Communicator, job: Job, path: str) -> JobFacts:
    """Check that the job would start on these ranks: roles, then data, model and optimizer, built as in a run."""
    facts = JobFacts(path, job.output, job.threads)
    try:
        from hpctrain.job.roles import roles_of

        roles = roles_of(job, comm.nodes)
        names = [phase.strategy.name for phase in job.schedule]
        facts = replace(facts, phases=[
            {"strategy": name, "workers": list(role.workers), "servers": list(role.servers)}
            for name, role in zip(names, roles, strict=True)
        ])  # fmt: skip
        from hpctrain.run.prepare import prepare

        prepared = prepare(job, comm)
        layout = prepared.replica.layout
        facts = replace(
            facts, parameters=layout.parameters, nbytes=layout.length * layout.dtype.itemsize,
            arenas=4, samples=prepared.order.length,
        )  # fmt: skip
    except HpctrainError as error:
        facts = replace(facts, troubles=[str(error)])
    found = comm.gather_json(facts.troubles)
    every = dict.fromkeys(trouble for troubles in found for trouble in troubles)
    return replace(facts, troubles=list(every))
