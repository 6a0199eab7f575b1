"""Islands: those who share every step while they train by themselves between a round's agreements.

An island is one worker (local SGD), or the workers of a node (as DASO, Coquelin et al. 2022): these average their
gradients in every step, and what a strategy exchanges per round goes between nodes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from hpctrain.codecs.joint import JointCodec
from hpctrain.errors import NanError
from hpctrain.replica.blocks import add_up, sum_of_squares
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.contribution import Contribution, RoundTotals
from hpctrain.strategies.exchange import Exchange, MessageExchange
from hpctrain.strategies.shared import SharedBucketExchange, SharedExchange

if TYPE_CHECKING:
    from hpctrain.codecs.base import Codec
    from hpctrain.comm.base import Communicator
    from hpctrain.strategies.interval import IslandChoice
    from hpctrain.strategies.phase import Phase



class Island(ABC):
    """The workers that share every step with this one. `gradient`: after `average`, the mean gradient of their samples,
    the stretch that this rank owns; it may be changed."""

    def __init__(self, phase: Phase, gradient: torch.Tensor) -> None:
        self.phase, self.gradient = phase, gradient

    @property
    @abstractmethod
    def members(self) -> list[int]:
        """Their ranks among the workers, in order."""

    @abstractmethod
    def average(self, part: Contribution) -> tuple[Contribution, RoundTotals]:
        """Compute `gradient`. Returns this worker's contribution, with what was found in its gradient, and the island's
        totals; if these say `skip`, there is no gradient. Collective over the island."""

    def clip(self) -> None:
        """Scale `gradient` as train.clip_norm says. Collective over the island."""
        limit = self.phase.updating.clip_norm
        if limit is not None:
            self.gradient.mul_(clip_factor(self._squares(), limit))

    @abstractmethod
    def _squares(self) -> float:
        """The squared norm of the whole gradient."""

    @property
    def finite(self) -> bool:
        """Whether `gradient` may be applied; if not, `publish` raises NanError."""
        return True

    def publish(self) -> None:  # noqa: B027 (a worker alone has nothing to publish)
        """All ranks of the island get the parameters that their owners updated. Collective over the island. Raises
        NanError, on these ranks alone, if the gradient was not finite."""

    def free(self) -> None:  # noqa: B027 (a worker alone has nothing to free)
        """Free memory and communicators. Collective over the island."""


class WorkerIsland(Island):
    """One worker."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase, phase.replica.gradient)

    @property
    def members(self) -> list[int]:
        return [self.phase.worker_comm.rank]

    def average(self, part: Contribution) -> tuple[Contribution, RoundTotals]:
        replica = self.phase.replica
        mean = part.weight / self.phase.dealing.batch or 1.0
        if part.samples and part.finite and not add_up([self.gradient], self.gradient, mean):
            part = replace(part, bad=replica.first_not_finite())
        return part, RoundTotals.of([part])

    def _squares(self) -> float:
        return sum_of_squares(self.gradient)


class NodeIsland(Island):
    """The workers of this node. `inside`: the exchange of their gradients."""

    def __init__(self, phase: Phase, inside: Exchange) -> None:
        super().__init__(phase, inside.mean)
        self._inside = inside

    @property
    def members(self) -> list[int]:
        return list(self.phase.worker_comm.local_ranks)

    def average(self, part: Contribution) -> tuple[Contribution, RoundTotals]:
        slots, inside = len(self.phase.replica.layout.slots), self._inside
        table = inside.gather(part.encode(slots))
        found = RoundTotals.of_rows(table, slots)
        if not found.skip:
            self.gradient = inside.reduce(found.divisor(self.phase.dealing.batch))
        return part, found

    def _squares(self) -> float:
        return self._inside.squares(self.gradient)

    @property
    def finite(self) -> bool:
        return self._inside.check(self._inside.mean)

    def publish(self) -> None:
        try:
            self._inside.publish()
        except NanError as error:
            error.everywhere = False
            raise

    def free(self) -> None:
        self._inside.free()


class IslandExchange(SharedBucketExchange):
    """The exchange between islands whose ranks share memory: each owns a slice of its island's parameters, and `reduce`
    sums `mean` over the ranks that own the same slice. `inside`: the exchange of gradients within the island."""

    def __init__(self, phase: Phase, codec: Codec, size: int) -> None:
        super().__init__(phase, codec, size, early=False)
        whole, parts = isinstance(codec, JointCodec), len(self._bounds) - 1
        self._node = _node_of(self.comm)
        self.inside = SharedExchange(phase, whole=whole, comm=self._node, parts=parts)

    @property
    def peers(self) -> Communicator | None:
        return self._across

    @property
    def island(self) -> Sequence[int]:
        return self.comm.local_ranks

    def start(self, low: int, high: int) -> None:
        """Start the sum of this part of `mean`."""
        self._send_part(low - self.low, high - self.low)

    def _send_part(self, low: int, high: int) -> None:
        if self._sums is not None:
            self._sums.start(low, high)

    def free(self) -> None:
        """Free memory and communicators, after those of `inside`. Collective."""
        self._node.free()
        super().free()


class MessagesInside(MessageExchange):
    """The exchange of gradients within an island whose ranks do not share memory: each owns all parameters."""

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase, comm=_node_of(phase.worker_comm))

    def free(self) -> None:
        self.comm.free()


def island_of(choice: IslandChoice, exchange: Exchange) -> Island:
    """This worker's island. `exchange`: the one between islands. Collective over the workers."""
    if choice == "worker":
        return WorkerIsland(exchange.phase)
    inside = exchange.inside if isinstance(exchange, IslandExchange) else MessagesInside(exchange.phase)
    return NodeIsland(exchange.phase, inside)


def _node_of(comm: Communicator) -> Communicator:
    """The ranks of this node. Collective."""
    node = comm.split(comm.nodes[comm.rank], comm.rank)
    assert node is not None
    return node
