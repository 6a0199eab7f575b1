"""The contract between a strategy and the rest: how replicas agree, and who decides what.

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

    from hpctrain.replica.state import State
    from hpctrain.strategies.phase import Phase

Result = Literal["applied", "dropped", "local", "skipped"]


@dataclass(frozen=True)
class Needs:
    """What a strategy needs, before it joins."""

    parameters: Literal["node", "rank"] = "rank"  # node: works with parameters that exist once per node
    lockstep: bool = True  # all workers take every step together, as train.sync_batchnorm needs it
    queue: bool = False  # samples are dealt from a queue, not by rounds of all workers


class Outcome(NamedTuple):
    """What became of a step. `loss` and `samples` are of the whole round (all workers) where there is one;
    `cursor` is the run's clock after it; `version` and `staleness` (min, max over shards) count updates; `held`: for
    how long, in nanoseconds, this worker was kept waiting until all had come to where something is asked."""

    result: Result
    cursor: int
    loss: float
    samples: int
    ask: Ask = Ask.NOTHING
    version: int = 0
    staleness: tuple[int, int] = (0, 0)
    why: str = ""
    held: int = 0


class Strategy:
    """How replicas agree: owns when parameters change. The worker half; `Server` is the other.

    A minimal strategy writes `join`, `step` and `leave`. One is built per phase and worker, from its `Options`.
    """

    Options: ClassVar[type[BaseModel]]
    Server: ClassVar[type[Server] | None] = None
    needs: Needs = Needs()
    exact: bool = False  # N workers with batch b give the parameters of one process with batch N*b
    deterministic: bool = True  # on virtual ranks, or where sums have an order, the same job gives the same bits
    tested_with: ClassVar[Sequence[dict[str, Any]]] = ({},)  # options that `hpctrain test-strategy` tries
    version: int = 0  # updates so far in the phase

    def __init__(self, options: Any) -> None:
        self.options = options

    @staticmethod
    def roles(options: Any) -> tuple[int, bool]:
        """(how many servers, whether they sit beside workers)."""
        return 0, False

    @staticmethod
    def check(options: Any, roles: Roles) -> None:
        """Refuse options that these roles cannot satisfy (HpctrainError), before anything is allocated."""

    @staticmethod
    def fills(options: Any, roles: Roles, rank: int) -> float:
        """How many times the model's size this rank allocates, roughly, when a phase of it follows another."""
        return 0.0

    def join(self, phase: Phase, state: State | None = None) -> None:
        """Collective over the phase's ranks, servers included. Afterwards all replicas hold rank 0's parameters
        and the optimizer state is `state` (whole on rank 0, None elsewhere; nowhere: a fresh start)."""
        raise NotImplementedError

    def before(self) -> None:
        """Parameters may be read after this: pull, staleness bound, per-layer wait."""

    def slices(self) -> Sequence[tuple[int, int]] | None:
        """Where workers do not step together: the positions of the next step's samples and, as far as they are known,
        of those of the steps after it. None: this worker's share of the round at `phase.cursor`."""
        return None

    def ready(self, low: int, high: int) -> None:
        """The gradient's stretch [low, high) is final (called from hooks during the last micro-batch's backward).
        May start communication, never waits."""

    @property
    def bucket_bytes(self) -> int:
        """The size of the stretches that `ready` is given; 0: it is not called."""
        return 0

    def step(self, samples: int, loss: float) -> Outcome:
        """Gradients of `samples` samples, of mean loss `loss`, are in the replica's arena. On return the next
        step may begin. Raises NanError if the loss of any worker is not finite (and nan = "stop")."""
        raise NotImplementedError

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, parameters are consistent and equal on all workers, to be evaluated or saved."""
        yield

    def state(self) -> State | None:
        """Whole on rank 0, None elsewhere. Collective over the workers (servers take part in `serve`)."""
        return None

    def own(self) -> Own:
        """What belongs to this worker alone, for a checkpoint; views, good until the next step. Not collective."""
        return Own()

    def load_own(self, own: Own) -> None:
        """Go on from what `own` gave, after `join`; empty where there is nothing to go on from. Not collective."""

    def leave(self) -> State | None:
        """Drain what is in flight; all replicas hold equal, final parameters. Returns like `state`. Collective."""
        return self.state()

    def withdraw(self) -> Ask:
        """This worker's program has left the training loop: send the wish `Ask.LEAVE`, which is in `phase.step.wish`,
        where the others take their next step or do the same. Returns what is asked of all of them then."""
        return self.step(0, 0.0).ask


class Server:
    """A strategy's server half: built on dedicated server ranks, or by the worker half beside itself."""

    def __init__(self, options: Any) -> None:
        self.options = options

    def join(self, phase: Phase, state: State | None = None) -> None:
        """The server's part of `Strategy.join`."""
        raise NotImplementedError

    def serve(self) -> None:
        """Push, pull, snapshot, state; returns when all workers have left."""
        raise NotImplementedError


