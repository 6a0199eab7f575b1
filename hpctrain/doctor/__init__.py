"""`hpctrain doctor`: check ranks, nodes, MPI, devices, folders and messages, and give advice on every problem.

Importing it imports neither torch nor MPI.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError
from hpctrain.launcher.facts import OPEN_MPI
from hpctrain.launcher.started import has_rank, launched_rank

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.doctor.facts import Facts, MpiFacts
    from hpctrain.doctor.guard import Guard
    from hpctrain.job import Job

PARTING = 0.3  # seconds; Open MPI's launcher reports a rank that exits with non-zero status before the others


def main(as_json: bool = False, path: str | None = None, load: Callable[[], Job] | None = None) -> int:
    """Examine the ranks that a launcher started, or this process alone, and print the result on rank 0.

    `path`: the file of a job to check on these ranks; `load` reads it. Collective. Returns this rank's exit status:
    on rank 0, 1 if a run would not work and 2 if the job cannot be read; else 0.
    """
    from hpctrain.doctor.guard import Guard

    rank = launched_rank(os.environ)
    guard = Guard(f"rank {rank} on {socket.gethostname()}", reports=rank == 0)
    try:
        return _examine(as_json, path, load, guard, rank)
    finally:
        guard.close()


def _examine(as_json: bool, path: str | None, load: Callable[[], Job] | None, guard: Guard, rank: int) -> int:
    from hpctrain.comm.connect import report
    from hpctrain.comm.virtual.world import World
    from hpctrain.doctor.gather import join
    from hpctrain.doctor.machine import remove_segments

    start = time.monotonic()
    comm, mpi = None, _before_mpi(guard, rank)
    if not mpi.troubles:
        guard.stage("starting MPI")
        comm, mpi = join(mpi)
        if comm is None or comm.size == 1:
            remove_segments()
    try:
        if comm is not None:
            return _finish(_diagnose(comm, mpi, path, load, guard), comm.rank, as_json, start, comm)
        if rank != 0:  # each process runs as if it were alone: only one of them reports
            return 0
        facts = World(1).run(lambda alone: _diagnose(alone, mpi, path, load, guard))[0]
        return _finish(facts, rank, as_json, start, None)
    except HpctrainError as mistake:
        status = report(mistake, rank if comm is None else comm.rank)
        time.sleep(PARTING if status else 0.0)
        return status


def _before_mpi(guard: Guard, rank: int) -> MpiFacts:
    """The facts that child processes find: gathered before MPI starts, because forking afterwards is unsafe."""
    from hpctrain.doctor import machine
    from hpctrain.doctor.facts import MpiFacts

    if rank != 0 and OPEN_MPI.size not in os.environ:
        return MpiFacts()
    guard.stage("looking for MPI and its launcher")
    mpi = machine.look_at_launchers(os.environ)
    if not mpi.troubles and not has_rank(os.environ):
        guard.stage("trying to start MPI")
        why = machine.why_mpi_does_not_start(os.environ)
        mpi = replace(mpi, troubles=[why] if why is not None else [])
    return mpi


def _diagnose(
    comm: Communicator, mpi: MpiFacts, path: str | None, load: Callable[[], Job] | None, guard: Guard
) -> Facts:
    """Gather all facts. Collective. Raises HpctrainError, on all ranks, if the job cannot be read."""
    from hpctrain.doctor.gather import collect
    from hpctrain.run.agreement import agreed

    guard.stage("reading the job")
    job = agreed(comm, load) if load is not None else None
    return collect(comm, mpi, job, path or "", guard.stage)


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
