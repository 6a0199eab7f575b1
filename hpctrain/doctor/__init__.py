"""`hpctrain doctor`: look at ranks, nodes, MPI, devices, folders and messages, and say what to do about what is wrong.

Importing it imports neither torch nor MPI.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hpctrain.cluster import launched_rank
from hpctrain.errors import HpctrainError

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.doctor.facts import Facts, MpiFacts
    from hpctrain.doctor.watch import Watch
    from hpctrain.job import Job

PARTING = 0.3  # seconds; Open MPI's launcher tells of ranks that end with a status before others do


def main(as_json: bool = False, path: str | None = None, load: Callable[[], Job] | None = None) -> int:
    """Examine the ranks that a launcher started, or this process alone, and print what was found on rank 0.

    `path`: of the job to check against them, which `load` reads. Collective. Returns the exit status of this rank:
    on rank 0 1 if a run would not work and 2 if the job cannot be read, else 0.
    """
    from hpctrain.doctor.watch import Watch

    rank = launched_rank(os.environ)
    watch = Watch(f"rank {rank} on {socket.gethostname()}", tells=rank == 0)
    try:
        return _examine(as_json, path, load, watch, rank)
    finally:
        watch.close()


def _examine(as_json: bool, path: str | None, load: Callable[[], Job] | None, watch: Watch, rank: int) -> int:
    from hpctrain.comm.connect import report
    from hpctrain.comm.virtual.world import World
    from hpctrain.doctor.gather import join
    from hpctrain.doctor.machine import remove_segments

    start = time.monotonic()
    comm, mpi = None, _before_mpi(watch, rank)
    if not mpi.troubles:
        watch.stage("starting MPI")
        comm, mpi = join(mpi)
        if comm is None or comm.size == 1:
            remove_segments()
    try:
        if comm is not None:
            return _finish(_diagnose(comm, mpi, path, load, watch), comm.rank, as_json, start, comm)
        if rank != 0:  # each process believes that it is alone: one of them speaks
            return 0
        facts = World(1).run(lambda alone: _diagnose(alone, mpi, path, load, watch))[0]
        return _finish(facts, rank, as_json, start, None)
    except HpctrainError as mistake:
        status = report(mistake, rank if comm is None else comm.rank)
        time.sleep(PARTING if status else 0.0)
        return status


def _before_mpi(watch: Watch, rank: int) -> MpiFacts:
    """What child processes find out: best before MPI starts, which does not like processes that fork."""
    from hpctrain.cluster import RANK_VARIABLES
    from hpctrain.doctor import machine
    from hpctrain.doctor.facts import MpiFacts

    if rank != 0 and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return MpiFacts()
    watch.stage("looking for MPI and its launcher")
    mpi = machine.look_at_launchers(os.environ)
    launched = any(name in os.environ for name in RANK_VARIABLES)
    if not mpi.troubles and not launched:
        watch.stage("trying to start MPI")
        why = machine.why_mpi_does_not_start(os.environ)
        mpi = replace(mpi, troubles=[why] if why is not None else [])
    return mpi


def _diagnose(
    comm: Communicator, mpi: MpiFacts, path: str | None, load: Callable[[], Job] | None, watch: Watch
) -> Facts:
    """Collective. Raises HpctrainError, on all ranks, if the job cannot be read."""
    from hpctrain.doctor.gather import collect
    from hpctrain.run.agreement import agreed

    watch.stage("reading the job")
    job = agreed(comm, load) if load is not None else None
    return collect(comm, mpi, job, path or "", watch.stage)


def _finish(facts: Facts, rank: int, as_json: bool, start: float, comm: Communicator | None) -> int:
    from hpctrain.doctor import report
    from hpctrain.doctor.problems import problems

    if rank != 0:
        return 0
    facts = replace(facts, seconds=round(time.monotonic() - start, 3))
    found = problems(facts)
    print((report.as_json if as_json else report.as_text)(facts, found), flush=True)
    failed = any(problem.severity == "error" for problem in found)
    time.sleep(PARTING if failed and comm is not None else 0.0)
    return int(failed)
