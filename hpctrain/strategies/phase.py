"""What a strategy is given for a phase, in parts that belong together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hpctrain.clock.decisions import Ask, Conductor
from hpctrain.cluster import Roles

if TYPE_CHECKING:
    import torch

    from hpctrain.comm.base import Communicator
    from hpctrain.replica.replica import Replica
    from hpctrain.replica.update import Update


@dataclass(frozen=True)
class Members:
    """The ranks of a phase."""

    comm: Communicator  # all of them, servers included
    workers: Communicator | None  # the workers alone, in rank order; None on a dedicated server
    roles: Roles
    shared: bool = False  # the replica's arenas are node-shared
    # All ranks hold the same parameters before the phase, as where all were workers of the phase before (on one node:
    # unlike processors may round unlike).
    equal: bool = False


@dataclass(frozen=True)
class Dealing:
    """How a phase's samples are dealt."""

    batch: int  # samples per worker and step at most; a gradient is the sum over the samples divided by this
    queue: Literal["static", "shared"] = "static"  # by which queue, where workers do not step together
    epoch: int | None = None  # samples per epoch; None: not known yet
    ahead: int = 0  # how many stretches of samples a worker gets in advance


@dataclass(frozen=True)
class Updating:
    """How a phase's updates are made."""

    make: Callable[[torch.Tensor, int, int], Update]  # of the arena's stretch [low, high), of these values
    elementwise: bool = True  # each element's update depends on no other: the arena may be cut anywhere
    adaptive: bool = False  # updates do not grow with gradients (Adam and its like)
    rate: Callable[[int], float] = field(default=lambda cursor: 1.0)  # factor of the learning rate at a cursor
    momentum: Callable[[int], float] = field(default=lambda cursor: 1.0)  # factor of the momentum at a cursor
    per_update: bool = True  # the strategy may scale the rate of one worker's update
    clip_norm: float | None = None  # the longest gradient; None: any
    nan: Literal["stop", "skip"] = "stop"  # what becomes of a step that is not finite


def _nothing() -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Watching:
    """What a dedicated server calls, as trainers do by themselves."""

    tick: Callable[[], None] = _nothing  # now and then: its trace is written
    saving: Callable[[], None] = _nothing  # when the workers write a checkpoint, which may take long


@dataclass
class StepState:
    """What trainer and strategy tell each other about the step in progress."""

    number: int = 0  # of the run, from 0
    round_end: int = 0  # where the run's clock will stand after it, in samples
    weight: float | None = None  # what its mean loss is taken over; None: its samples
    bad: int = 0  # 1 + the index of a parameter whose gradient is not finite; 0: none was found
    wish: Ask = Ask.NOTHING  # what this rank asks of all, sent with the step


@dataclass
class Phase:
    """All that a strategy gets: its ranks, its replica, its samples, how to update, and who decides."""

    index: int
    members: Members
    replica: Replica
    updating: Updating
    dealing: Dealing
    conductor: Conductor
    cursor: int = 0  # the run's clock, in samples; kept by the strategy
    watching: Watching = field(default_factory=Watching)
    step: StepState = field(default_factory=StepState)

    @property
    def comm(self) -> Communicator:
        """All ranks of the phase, servers included."""
        return self.members.comm

    @property
    def workers(self) -> Communicator | None:
        """The workers alone, in rank order; None on a dedicated server."""
        return self.members.workers

    @property
    def worker_comm(self) -> Communicator:
        """`workers`, for what only workers do. Raises RuntimeError on a dedicated server."""
        if self.workers is None:
            raise RuntimeError(
                f"rank {self.comm.rank} is a dedicated server in phase {self.index}, so it is in no communicator of "
                "workers; only workers may ask for it"
            )
        return self.workers

    @property
    def roles(self) -> Roles:
        """Who is a worker and who a server, as ranks of `comm`."""
        return self.members.roles

    @property
    def worker_index(self) -> int:
        """This rank's place among the workers."""
        return self.roles.workers.index(self.comm.rank)
