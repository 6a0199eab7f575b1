"""Checks the promises that every strategy must keep, on all registered strategies and on users' own.

A strategy is tested with each set of options that it lists (`Strategy.tested_with`), on virtual ranks or on the ranks
of an MPI job.
"""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import torch

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.checks import CHECKS, BrokenPromiseError, Check, if_exact
from hpctrain.conformance.pairs import TRAINS_WITH_ITS_CODEC, Pair, RefusedPairError, pairs_of, registered_pairs
from hpctrain.conformance.task import Subject
from hpctrain.errors import ClusterError, HpctrainError, JobError, NanError
from hpctrain.job import registry
from hpctrain.strategies.base import Strategy
from hpctrain.trace.recorder import Recorder

__all__ = [
    "CHECKS",
    "TRAINS_WITH_ITS_CODEC",
    "Check",
    "Nodes",
    "Pair",
    "Subject",
    "Verdict",
    "over_real_ranks",
    "over_virtual_ranks",
    "pairs_of",
    "registered",
    "registered_pairs",
    "subjects_of",
    "verdicts",
    "why_left_out",
    "worlds",
]
Nodes = tuple[int, ...]  # the node index of each rank


@dataclass(frozen=True)
class Verdict:
    """The result of one check. `broken`: how the promise is broken; `left_out`: why it was not tested; with neither,
    the promise is kept."""

    subject: Subject
    check: Check
    ranks: int
    broken: str | None = None
    left_out: str | None = None


def subjects_of(name: str) -> list[Subject]:
    """One subject per set of options with which the strategy `name` is tested. Raises JobError."""
    kind = registry.resolve("strategy", name)
    if not (isinstance(kind, type) and issubclass(kind, Strategy)):
        raise JobError(f"{name} is not a class derived from hpctrain.strategies.base.Strategy; it cannot be tested")
    return [Subject(name, dict(options)) for options in kind.tested_with]


def registered() -> list[Subject]:
    """Every built-in strategy with each of its sets of options; without `switch`, which consists of two others."""
    return [subject for name in registry.STRATEGIES if name != "switch" for subject in subjects_of(name)]


def worlds(subject: Subject, check: Check) -> list[Nodes]:
    """The sets of virtual ranks for a check: four ranks on two nodes; for equality with one process also three on one
    node, and a single worker."""
    strategy = subject.strategy()
    servers, beside = strategy.roles(strategy.options)
    alone = (0,) * (1 if beside else 1 + servers)
    return [(0, 0, 1, 1), (0, 0, 0), alone] if check.left_out is if_exact else [(0, 0, 1, 1)]


def _unequal(rank: int, kind: str, nbytes: int, flops: float) -> int:
    """Ranks of different speed, so that strategies that balance have something to do."""
    return 1000 * (1 + 2 * (rank % 3)) if kind == "forward" else 0


def over_virtual_ranks(subject: Subject, check: Check, nodes: Nodes, folder: Path) -> Verdict:
    """Run one check on virtual ranks on these nodes."""
    world = World(len(nodes), nodes=nodes, compute=_unequal if "balance" in subject.options else None)
    world.recorders = [Recorder(lambda: world.time) for _ in nodes]

    def run() -> str | None:
        left_out = why_left_out(subject, check, nodes)
        if left_out is None:
            world.run(lambda comm: check.function(comm, subject, folder))
        return left_out

    return _verdict(subject, check, len(nodes), run)


def over_real_ranks(subject: Subject, check: Check, comm: Communicator, folder: Path) -> Verdict:
    """Run one check on the ranks of an MPI job. Collective; returns this rank's verdict."""

    def run() -> str | None:
        if check.virtual_only or (check.ends_all and subject.trains_by_itself):
            return "it ends the MPI job, so it is tested on virtual ranks only"
        left_out = why_left_out(subject, check, comm.nodes)
        if left_out is None:
            check.function(traced, subject, folder)
        return left_out

    traced = copy(comm)
    traced.recorder = Recorder()
    return _verdict(subject, check, comm.size, run)


def why_left_out(subject: Subject, check: Check, nodes: Sequence[int]) -> str | None:
    """Why a check does not apply to a strategy on ranks with these nodes; None if it does."""
    try:
        return check.left_out(subject, len(subject.roles(nodes).workers))
    except ClusterError as error:
        return str(error)


def _verdict(subject: Subject, check: Check, ranks: int, run: Callable[[], str | None]) -> Verdict:
    try:
        left_out = run()
    except RefusedPairError as error:
        return Verdict(subject, check, ranks, left_out=f"it refuses the codec: {error}")
    except BrokenPromiseError as error:
        return Verdict(subject, check, ranks, broken=str(error))
    except NanError as error:
        return Verdict(subject, check, ranks, broken=None if check.ends_all else str(error))
    except HpctrainError as error:
        return Verdict(subject, check, ranks, broken=f"{type(error).__name__}: {error}")
    except Exception as error:  # a strategy under test may raise anything
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({where.filename}:{where.lineno} in {where.name})"
        return Verdict(subject, check, ranks, broken=text)
    return Verdict(subject, check, ranks, left_out=left_out)


def verdicts(
    subjects: Sequence[Subject], comm: Communicator | None = None, checks: Sequence[Check] = CHECKS
) -> Iterator[Verdict]:
    """Run the checks on these strategies: on the ranks of `comm`, or (None) on virtual ranks."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpctrain-conformance-") as own:
        folder = Path(own if comm is None else comm.broadcast_json(own))
        for subject in subjects:
            for check in checks:
                if comm is not None:
                    yield over_real_ranks(subject, check, comm, folder)
                else:
                    yield from (over_virtual_ranks(subject, check, nodes, folder) for nodes in worlds(subject, check))
        if comm is not None:
            comm.barrier()
