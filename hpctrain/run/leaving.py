"""Leaving the training loop early: together, which ends the run, or alone, which ends the job. Ranks agree on which."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.base import Communicator
from hpctrain.errors import LeftError

if TYPE_CHECKING:
    from hpctrain.strategies.phase import Phase

PATIENCE = 30.0  # seconds until a waiting rank reports that it waits, or gives up if it cannot ask the others


ALONE = "while others continue; leave it on all ranks after the same step, or on none"


def words(error: BaseException | None) -> str:
    """How a program left the loop, for people. `error`: the exception it left with, if any."""
    if isinstance(error, SystemExit):
        return f"sys.exit({'' if error.code is None else repr(error.code)[:200]})"
    return "break or return" if error is None or isinstance(error, GeneratorExit) else type(error).__name__


def ended_alone(error: SystemExit) -> LeftError:
    """The error that ends the job because a program called sys.exit() before it trained."""
    left = LeftError(f"{words(error)} was called before the training began")
    left.status = status_of(error)
    return left


def left_alone(ranks: Sequence[int], how: str, where: str, status: int) -> LeftError:
    """The error that ends the job, with that exit status."""
    names = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
    left = LeftError(f"{names} left the training loop {where} ({how})")
    left.status = status
    return left


def status_of(error: BaseException | None) -> int:
    """The exit status of a job that a program ended by leaving its loop: the program's own unless that is 0."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    code = error.code if isinstance(error, SystemExit) else None
    return code if isinstance(code, int) and 0 < code < 256 else LeftError.status


def agree_to_begin(comm: Communicator, how: str | None) -> None:
    """All ranks of the run begin their batches (`how` is None), or all leave before. Raises LeftError. Collective."""
    reasons = comm.gather_json(how)
    left = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if left and len(left) < len(reasons):
        where = "before its first step, for which the others wait; run batches() on all ranks, servers too, or on none"
        raise left_alone(left, reasons[left[0]], where, LeftError.status)


def agree_to_leave(phase: Phase, step: int, leaves: bool, error: BaseException | None = None) -> None:
    """All workers leave the loop, or LeftError is raised. Collective over the workers."""
    rows = phase.worker_comm.gather_json([words(error), step, status_of(error)] if leaves else None)
    left = [worker for worker, row in enumerate(rows) if row is not None]
    if len(left) < len(rows):
        how, at, status = rows[left[0]] if left else ("", step, LeftError.status)
        ranks = [phase.comm.members[phase.roles.workers[worker]] for worker in left]
        raise left_alone(ranks, how, f"at step {at} {ALONE}", status)


def all_come(workers: Communicator) -> bool:
    """Whether all workers leave in time; workers that continue wait for this one within their forward pass."""
    met, ends = workers.start_all_reduce(np.zeros(1)), workers.now() + int(PATIENCE * 1e9)
    while not met.test() and workers.now() < ends:
        workers.sleep(0.01)
    return met.test()


@contextmanager
def says_that_it_waits(comm: Communicator, step: int, error: BaseException | None) -> Iterator[None]:
    """Inside the context, ranks that leave wait for the others; after a while they report this."""
    text = (
        f"hpctrain: rank {comm.rank} left the training loop at step {step} ({words(error)}) and is waiting for the "
        "others to leave it or to take their next step\n"
    )
    timer = threading.Timer(PATIENCE, sys.stderr.write, [text])
    timer.daemon = True
    if comm.concurrent and comm.size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
