"""Builds what a strategy gets for a phase: for runs, and for benches and tests that train without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hpctrain.cluster import Roles
from hpctrain.comm.base import Communicator
from hpctrain.optimizer import OptimizerChoice, make_update
from hpctrain.replica import Replica
from hpctrain.schedule import Conductor
from hpctrain.strategies.base import Phase


@dataclass(frozen=True)
class Members:
    """The ranks of a phase.

    `comm`: all of them; `workers`: the workers alone (None on a dedicated server). `shared`: whether the replica's
    arenas are node-shared. `equal`: whether all hold the same parameters before the phase.
    """

    comm: Communicator
    workers: Communicator | None
    roles: Roles
    shared: bool = False
    equal: bool = False


@dataclass(frozen=True)
class Dealing:
    """How a phase's samples are dealt: from `cursor` on, `batch` per worker and round at most.

    Where workers do not step together: by which `queue`, and how many stretches `ahead`. `epoch`: samples per epoch.
    """

    batch: int
    cursor: int = 0
    queue: Literal["static", "shared"] = "static"
    epoch: int | None = None
    ahead: int = 0


@dataclass(frozen=True)
class Updating:
    """How a phase's updates are made: factors of the learning rate and the momentum at a cursor, whether the strategy
    may scale the rate of one worker's update, clipping by global norm, and what becomes of a step with a NaN."""

    optimizer: OptimizerChoice
    rate: Callable[[int], float] = field(default=lambda cursor: 1.0)
    momentum: Callable[[int], float] = field(default=lambda cursor: 1.0)
    per_update: bool = True
    clip_norm: float | None = None
    nan: Literal["stop", "skip"] = "stop"


def _nothing() -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Watching:
    """What a phase's ranks call: `tick` after a step or service, `saving` when workers write a checkpoint."""

    tick: Callable[[], None] = _nothing
    saving: Callable[[], None] = _nothing


def build_phase(
    index: int,
    members: Members,
    replica: Replica,
    updating: Updating,
    dealing: Dealing,
    conductor: Conductor,
    watching: Watching = Watching(),
) -> Phase:
    """The phase number `index` of a run; a strategy is to join it. Not collective: the replica's arenas are placed."""
    optimizer, layout = updating.optimizer, replica.layout
    return Phase(
        index=index,
        comm=members.comm,
        roles=members.roles,
        workers=members.workers,
        replica=replica,
        shared=members.shared,
        elementwise=optimizer.elementwise,
        make_update=lambda values, low, high: make_update(optimizer, layout, values, low, high),
        rate=updating.rate,
        conductor=conductor,
        batch=dealing.batch,
        clip_norm=updating.clip_norm,
        nan=updating.nan,
        cursor=dealing.cursor,
        momentum=updating.momentum,
        per_update=updating.per_update,
        adaptive=optimizer.adaptive,
        queue=dealing.queue,
        epoch=dealing.epoch,
        ahead=dealing.ahead,
        equal=members.equal,
        tick=watching.tick,
        saving=watching.saving,
    )


def split_by_role(comm: Communicator, roles: Roles) -> tuple[Communicator, Communicator | None]:
    """Communicators of a phase's own: of all ranks, and of the workers (None on a dedicated server). Collective."""
    everybody = comm.split(0, comm.rank)
    assert everybody is not None
    return everybody, everybody.split(0 if comm.rank in roles.workers else None, comm.rank)
