"""What a strategy gets for a phase, grouped by purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from hpctrain.clock.decisions import Ask, Conductor
from hpctrain.cluster import Roles

if TYPE_CHECKING:
    import torch

    from hpctrain.comm.base import Communicator
    from hpctrain.replica.arenas import Placement
    from hpctrain.replica.replica import Replica
    from hpctrain.replica.update import Update


@dataclass(frozen=True)
class Members:
    """The ranks of a phase."""

    comm: Communicator  # all ranks, servers included
    workers: Communicator | None  # the workers only, in rank order; None on a dedicated server
    roles: Roles
    placement: Placement = "rank"  # of the replica's arenas
    # All ranks hold the same parameters before the phase, as after a phase in which all were workers (on one node only,
    # because different processors may round differently).
    equal: bool = False

    @property
    def shared(self) -> bool:
        """Whether the replica's arenas are memory that the ranks of a node share."""
        return self.placement != "rank"


@dataclass(frozen=True)
class Dealing:
    """How a phase's samples are dealt."""

    batch: int  # maximum samples per worker and step; a gradient is the sum over the samples divided by this
    queue: Literal["static", "shared"] = "static"  # the kind of queue, if workers do not step together
    epoch: int | None = None  # samples per epoch; None: not known yet
    ahead: int = 0  # how many stretches of samples a worker gets in advance


@dataclass(frozen=True)
class Updating:
    """How a phase's updates are made."""

    make: Callable[[torch.Tensor, int, int], Update]  # for the arena's stretch [low, high), with these values
    elementwise: bool = True  # each element's update is independent of the others: the arena may be cut anywhere
    adaptive: bool = False  # updates do not grow with gradients (Adam and similar)
    rate: Callable[[int], float] = field(default=lambda cursor: 1.0)  # factor of the learning rate at a cursor
    momentum: Callable[[int], float] = field(default=lambda cursor: 1.0)  # factor of the momentum at a cursor
    per_update: bool = True  # the strategy may scale the rate of one worker's update
    clip_norm: float | None = None  # maximum norm of the gradient; None: no limit
    nan: Literal["stop", "skip"] = "stop"  # what to do with a step that is not finite
    scaled: bool = False  # losses are scaled, so that gradients may overflow

    @property
    def skips(self) -> bool:
        """Whether a step may turn out, after backward, to be one that is skipped."""
        return self.nan == "skip" or self.scaled


def _nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Watching:
    """Callbacks for a dedicated server, matching what trainers do themselves."""

    tick: Callable[[], None] = _nothing  # called regularly: writes the trace
    saving: Callable[[], None] = _nothing  # called when the workers write a checkpoint, which may take long


@dataclass
class StepState:
    """What trainer and strategy exchange about the current step."""

    number: int = 0  # in the run, from 0
    round_end: int = 0  # the run's clock after the step, in samples
    weight: float | None = None  # what its mean loss is taken over; None: its samples
    # 1 + the index of a parameter whose gradient is not finite, negative if the loss scale may be the cause: the step
    # is then skipped, which is no error. 0: none was found.
    bad: int = 0
    wish: Ask = Ask.NOTHING  # what this rank asks of all, sent with the step
    seconds: float = 0.0  # that this worker computed its samples in, without waiting for others
    # Samples, at most, of each worker in this step, and in the step after it as far as known; None: all alike.
    shares: tuple[int, ...] | None = None
    later: tuple[int, ...] | None = None


@dataclass
class Phase:
    """Everything a strategy gets: its ranks, replica, samples, updates and conductor."""

    index: int
    members: Members
    replica: Replica
    updating: Updating
    dealing: Dealing
    conductor: Conductor
    cursor: int = 0  # the run's clock, in samples; maintained by the strategy
    watching: Watching = field(default_factory=Watching)
    step: StepState = field(default_factory=StepState)
    seed: int = 0  # the job's

    @property
    def comm(self) -> Communicator:
        """All ranks of the phase, servers included."""
        return self.members.comm

    @property
    def workers(self) -> Communicator | None:
        """The workers only, in rank order; None on a dedicated server."""
        return self.members.workers

    @property
    def worker_comm(self) -> Communicator:
        """`workers`, for code that only workers run. Raises RuntimeError on a dedicated server."""
        if self.workers is None:
            raise RuntimeError(
                f"rank {self.comm.rank} is a dedicated server in phase {self.index}, so it is not in the communicator "
                "of workers; only workers may use it"
            )
        return self.workers

    @property
    def roles(self) -> Roles:
        """Which ranks of `comm` are workers and which are servers."""
        return self.members.roles

    @property
    def worker_index(self) -> int:
        """This rank's index among the workers."""
        return self.roles.workers.index(self.comm.rank)
