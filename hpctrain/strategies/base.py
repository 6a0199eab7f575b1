"""The contract between a strategy and the rest of hpctrain: how replicas agree, and who decides what.

This file imports neither torch nor a communicator, so that a job can be checked before they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel

from hpctrain.clock.decisions import Ask
from hpctrain.cluster import Roles
from hpctrain.replica.state import Own

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.replica.arenas import Placement
    from hpctrain.replica.state import State
    from hpctrain.strategies.phase import Phase

Result = Literal["applied", "dropped", "local", "skipped"]


@dataclass(frozen=True)
class Needs:
    """A strategy's requirements, known before it joins."""

    parameters: Placement = "rank"  # where parameters and gradients lie, if the ranks of a node can share memory
    across: Placement | None = None  # the same where the ranks are on several nodes; None: as on one
    lockstep: bool = True  # all workers take every step together, as train.sync_batchnorm requires
    queue: bool = False  # samples are dealt from a queue, not by rounds of all workers

    def placement(self, nodes: Sequence[int]) -> Placement:
        """Where parameters and gradients should lie, if rank r is on node `nodes[r]`."""
        return self.across if self.across is not None and len(set(nodes)) > 1 else self.parameters


class Outcome(NamedTuple):
    """The result of a step. `loss` and `samples` cover the whole round (all workers) if there is one; `cursor` is the
    run's clock after the step; `version` and `staleness` (min, max over shards) count updates; `held` is the time in
    nanoseconds that this worker waited until all workers had reached the point where something is asked; `overflow`:
    the step was skipped because a gradient overflowed under the loss scale, on any of the workers that step together.
    """

    result: Result
    cursor: int
    loss: float
    samples: int
    ask: Ask = Ask.NOTHING
    version: int = 0
    staleness: tuple[int, int] = (0, 0)
    why: str = ""
    held: int = 0
    overflow: bool = False


class Strategy:
    """How replicas agree; owns when parameters change. This is the worker half; `Server` is the other.

    A minimal strategy defines `join`, `step` and `leave`. One instance is built per phase and worker, from its
    `Options`.
    """

    Options: ClassVar[type[BaseModel]]
    Server: ClassVar[type[Server] | None] = None
    needs: Needs = Needs()
    exact: bool = False  # N workers with batch b give the same parameters as one process with batch N*b
    plain: bool = True  # one worker does what one process does
    deterministic: bool = True  # on virtual ranks, or with ordered sums, the same job gives the same bits
    measured: ClassVar[Sequence[str]] = ()  # the options that `tune` sets where they are "auto"
    tested_with: ClassVar[Sequence[dict[str, Any]]] = ({},)  # options that `hpctrain test-strategy` tries
    version: int = 0  # updates so far in the phase

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def balances(self) -> bool:
        """Whether the workers' shares follow their speeds: a strategy that can do this has the option `balance`."""
        return getattr(self.options, "balance", "none") != "none"

    @staticmethod
    def roles(options: Any) -> tuple[int, bool]:
        """(number of servers, whether they are colocated with workers)."""
        return 0, False

    @staticmethod
    def check(options: Any, roles: Roles) -> None:
        """Refuse options that these roles cannot satisfy (HpctrainError), before anything is allocated."""

    def unfit(self, epoch: int | None, size: int, total: int) -> str | None:
        """Why an option does not suit a run of `total` samples, with `epoch` per epoch (None: not known yet) and `size`
        per step of all workers; in words that begin with its key. None: nothing is wrong. Called before the run."""
        return None

    @staticmethod
    def tune(options: Any, comm: Communicator) -> dict[str, Any]:
        """Values for options that are "auto", measured on the ranks of a new run. A resumed run keeps them; none need
        be given. Collective."""
        return {}

    def join(self, phase: Phase, state: State | None = None) -> None:
        """Join the phase. Collective over its ranks, servers included. Afterwards all replicas hold rank 0's parameters
        and the optimizer state is `state` (whole on rank 0, None elsewhere; None on all ranks: a fresh start)."""
        raise NotImplementedError

    def before(self) -> None:
        """Called before parameters are read: pull, enforce the staleness bound, wait per layer."""

    def slices(self) -> Sequence[tuple[int, int]] | None:
        """If workers do not step together: the positions of the next step's samples and, as far as known, of the steps
        after it. None: this worker's share of the round at `phase.cursor`."""
        return None

    def ready(self, low: int, high: int) -> None:
        """The gradient's stretch [low, high) is final (called from hooks during the last micro-batch's backward). May
        start communication, never waits."""

    def poll(self) -> None:
        """Called often during that backward, if `ready` is: communication that was started may go on. Never waits."""

    @property
    def bucket_bytes(self) -> int:
        """The size of the stretches passed to `ready`; 0: `ready` is not called."""
        return 0

    def step(self, samples: int, loss: float) -> Outcome:
        """Take a step: the replica's arena holds the gradients of `samples` samples, with mean loss `loss`. On return
        the next step may begin. Raises NanError if the loss of any worker is not finite (and nan = "stop"). A gradient
        that overflowed under the loss scale (`phase.step.bad` is negative) is no error: it must not be applied, and the
        outcome has `overflow`."""
        raise NotImplementedError

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside the context, parameters are consistent and equal on all workers, for evaluating or saving."""
        yield

    def state(self) -> State | None:
        """The state, whole on rank 0, None elsewhere. Collective over the workers (servers take part in `serve`)."""
        return None

    def own(self) -> Own:
        """This worker's own state, for a checkpoint. Contains views, valid until the next step. Not collective."""
        return Own()

    def load_own(self, own: Own) -> str | None:
        """Continue from the result of `own`, after `join`; an empty one means a fresh start. Returns a sentence about
        what could not be taken, if anything. Collective over the workers."""
        return None

    def leave(self) -> State | None:
        """Finish pending work; all replicas hold equal, final parameters. Returns the same as `state`. Collective."""
        return self.state()

    def withdraw(self) -> Ask:
        """This worker's program has left the training loop: send the wish `Ask.LEAVE`, set in `phase.step.wish`, when
        the others take their next step or do the same. Returns what is then asked of all workers."""
        return self.step(0, 0.0).ask


class Server:
    """A strategy's server half. Built on dedicated server ranks, or by the worker half on its own rank."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def join(self, phase: Phase, state: State | None = None) -> None:
        """The server's part of `Strategy.join`."""
        raise NotImplementedError

    def serve(self) -> None:
        """Handle pushes, pulls, snapshots and state requests; return when all workers have left."""
        raise NotImplementedError


