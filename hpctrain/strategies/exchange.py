"""How gradients, or changes of parameters, get from worker to worker in a round.

On one node, or with equal slices across nodes, gradients lie in node-shared arenas and parameters exist once per node:
rank r sums slice r of all gradients directly from their memory, and one barrier later all ranks have the parameters
that their owners updated (`SharedExchange`). Otherwise messages all-reduce the gradient arena, either whole
(`MessageExchange`) or bucket by bucket while backward still runs (`OverlappedExchange`), and every worker owns all
parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.replica.blocks import add_up, is_finite, sum_of_squares
from hpctrain.replica.layout import slice_bounds
from hpctrain.replica.tensors import as_array, as_tensor
from hpctrain.strategies.contribution import Contribution, nan_error, sum_error

if TYPE_CHECKING:
    from hpctrain.comm.base import Buffer, Communicator, Request
    from hpctrain.errors import NanError
    from hpctrain.strategies.phase import Phase


LOOKS = 64  # at started sums, per call of `poll`: MPI moves only a piece of a long message (about 64 KiB) in each


class Exchange(ABC):
    """The exchange among the workers of a phase. The constructor is collective over them.

    `low`, `high`: the stretch of the arena that this rank owns: `reduce` returns its mean, and this rank updates its
    parameters. `mean`: the last result of `reduce`. `bucket_bytes`: the size of the stretches that `start` takes; 0: it
    takes none.
    """

    low: int
    high: int
    mean: torch.Tensor
    bucket_bytes: int = 0
    _bad: int = 0  # 1 + the index of a parameter whose gradient is not finite and was about to be applied; 0: none

    def __init__(self, phase: Phase) -> None:
        self.phase, self.comm, self.replica = phase, phase.worker_comm, phase.replica

    @abstractmethod
    def synchronise(self) -> None:
        """Give all workers rank 0's parameters. Collective."""

    @abstractmethod
    def gather(self, row: Buffer) -> Buffer:
        """The rows of all workers, float64 of shape (workers, row.size), in rank order. Collective. Comes first in a
        round, when the gradients are in the arenas."""

    def start(self, low: int, high: int) -> None:  # noqa: B027 (most have nothing to start)
        """The stretch [low, high) of this rank's gradient is final. May start sending it; never waits."""

    def settle(self) -> None:  # noqa: B027 (most have started nothing)
        """Wait for what was started, when the round ends with an error instead. Collective."""

    def poll(self) -> None:  # noqa: B027 (most have started nothing)
        """Let what was started go on: MPI moves data only while some call is inside it. Never waits."""

    @abstractmethod
    def reduce(self, divisor: float) -> torch.Tensor:
        """The sum of all workers' gradient arenas over `divisor`, elements [low, high). Collective."""

    def check(self, gradient: torch.Tensor) -> bool:
        """Whether `gradient`, the elements [low, high), is finite and may be applied; if not, `publish` raises
        NanError. Not collective."""
        if gradient is not self.mean:  # `mean` was checked when it was summed
            self._note(gradient, is_finite(gradient))
        return not self._bad

    def _note(self, gradient: torch.Tensor, finite: bool) -> None:
        self._bad = 0 if finite else self.replica.layout.first_not_finite(gradient, self.low)

    @abstractmethod
    def squares(self, part: torch.Tensor) -> float:
        """The squared norm of a vector of which `part` is this rank's stretch. Collective."""

    @abstractmethod
    def publish(self) -> None:
        """End the round: all ranks get the parameters that their owners updated. Collective.

        Raises NanError if the gradient to be applied was not finite.
        """

    @abstractmethod
    def stretches(self) -> list[tuple[int, int]]:
        """The stretch that each worker owns, in rank order."""

    def keepers(self) -> list[int]:
        """The workers whose stretches together cover the arena, rank 0 first."""
        return [0]

    @abstractmethod
    def free(self) -> None:
        """Free memory and communicators. Collective."""


class SharedExchange(Exchange):
    """Sums gradients slice by slice from node-shared arenas. Nodes all-reduce equal slices with each other, using
    `algorithm`."""

    def __init__(self, phase: Phase, algorithm: str = "library") -> None:
        super().__init__(phase)
        comm = self.comm
        self._algorithm = algorithm
        sizes = [comm.nodes.count(node) for node in sorted(set(comm.nodes))]
        parts = min(sizes)
        self._bounds = slice_bounds(self.replica.layout, parts, elementwise=True)
        owns = comm.local_rank < parts
        self.low, self.high = self._bounds[comm.local_rank : comm.local_rank + 2] if owns else (0, 0)
        self._across = comm.split(comm.local_rank if owns else None, comm.rank) if len(sizes) > 1 else None
        self._arena = self.replica.gradient_arena
        self._slices = [as_tensor(part)[self.low : self.high] for part in self._arena.parts]
        self.mean = torch.zeros_like(self._slices[0])
        width = Contribution.length(len(self.replica.layout.slots))
        self._board: NodeBoard | MessageBoard = NodeBoard(comm, width) if len(sizes) == 1 else MessageBoard(comm)
        self._faults = comm.arena(1, np.dtype(np.float64), "node")  # for each rank: whether its slice is not finite
        nbytes, ranks = self.mean.nbytes, len(self._slices)
        self._reducing = comm.span("reduce", nbytes * ranks, flops=float(self.mean.numel() * ranks))

    def synchronise(self) -> None:
        """Broadcast between nodes; within a node the parameters are already shared."""
        comm, several = self.comm, len(set(self.comm.nodes)) > 1
        leaders = comm.split(0 if comm.local_rank == 0 else None) if several else None
        arena = self.replica.value_arena
        if leaders is not None:
            leaders.broadcast(arena.parts[0])
            leaders.free()
        comm.notify(arena)
        comm.wait(arena)

    def gather(self, row: Buffer) -> Buffer:
        """A row arrives only after its gradient is complete. On one node the board is shared memory, too, so its
        barrier also serves the summing of the gradients."""
        if isinstance(self._board, NodeBoard):
            return self._board.exchange(row)
        self.comm.notify(self._arena)
        table = self._board.exchange(row)
        self.comm.wait(self._arena)
        return table

    def reduce(self, divisor: float) -> torch.Tensor:
        with self._reducing:
            finite = add_up(self._slices, self.mean, divisor if self._across is None else 1.0)
        if self._across is not None:
            self._across.all_reduce(as_array(self.mean), algorithm=self._algorithm)
            finite = add_up([self.mean], self.mean, divisor)
        self._note(self.mean, finite)
        return self.mean

    def squares(self, part: torch.Tensor) -> float:
        table = self._board.exchange(np.array([sum_of_squares(part)]))
        mine = [r for r in range(self.comm.size) if self.comm.nodes[r] == self.comm.nodes[0]]
        return float(table[mine, 0].sum())

    def publish(self) -> None:
        arena = self.replica.value_arena
        self._faults.mine[0] = self._bad > 0
        self.comm.notify(arena)
        self.comm.wait(arena)
        if any(part[0] for part in self._faults.parts):
            raise self._gradient_error()

    def _gradient_error(self) -> NanError:
        """Find the rank and the parameter: every rank searches its own gradient. Collective."""
        phase = self.phase
        table = self.comm.gather_rows(np.array([self.replica.first_not_finite(), self._bad], np.int64))
        guilty = np.flatnonzero(table[:, 0])
        if guilty.size:
            return nan_error(phase, phase.roles.workers[guilty[0]], 0.0, phase.step.number, int(table[guilty[0], 0]))
        return sum_error(phase, int(table[:, 1].max()), phase.step.number)

    def stretches(self) -> list[tuple[int, int]]:
        nodes, parts = self.comm.nodes, len(self._bounds) - 1
        places = [nodes[:rank].count(nodes[rank]) for rank in range(self.comm.size)]
        return [(self._bounds[at], self._bounds[at + 1]) if at < parts else (0, 0) for at in places]

    def keepers(self) -> list[int]:
        """The ranks of the first node that own something; the owners on other nodes hold the same."""
        owned, nodes = self.stretches(), self.comm.nodes
        here = [rank for rank in range(self.comm.size) if nodes[rank] == nodes[0]]
        return [rank for rank in here if rank == 0 or owned[rank][0] < owned[rank][1]]

    def free(self) -> None:
        self._slices = []
        self._faults.free()
        self._board.free()
        if self._across is not None:
            self._across.free()


class MessageExchange(Exchange):
    """All-reduces the whole gradient arena by messages, using `algorithm`; every worker owns all of it."""

    def __init__(self, phase: Phase, algorithm: str = "library") -> None:
        super().__init__(phase)
        self._algorithm = algorithm
        self.low, self.high, self.mean = 0, self.replica.layout.length, self.replica.gradient

    def synchronise(self) -> None:
        if not self.phase.members.equal:
            self.comm.broadcast(self.replica.value_arena.mine)

    def gather(self, row: Buffer) -> Buffer:
        return self.comm.gather_rows(row)

    def reduce(self, divisor: float) -> torch.Tensor:
        self._sum()
        self._note(self.mean, add_up([self.mean], self.mean, divisor))
        return self.mean

    def _sum(self) -> None:
        """Sum the arenas in place. A codec would encode here."""
        self.comm.all_reduce(self.replica.gradient_arena.mine, algorithm=self._algorithm)

    def squares(self, part: torch.Tensor) -> float:
        return sum_of_squares(part)

    def publish(self) -> None:
        """All workers raise the same error, because all have the same sum."""
        if self._bad:
            raise sum_error(self.phase, self._bad, self.phase.step.number)

    def stretches(self) -> list[tuple[int, int]]:
        return [(self.low, self.high)] * self.comm.size

    def free(self) -> None:
        return None


class OverlappedExchange(MessageExchange):
    """The same in buckets of `bucket_bytes`, each started as soon as backward has completed it."""

    def __init__(self, phase: Phase, bucket_bytes: int) -> None:
        super().__init__(phase)
        self.bucket_bytes = bucket_bytes
        self._started: deque[Request] = deque()

    def start(self, low: int, high: int) -> None:
        self._started.append(self.comm.start_all_reduce(self.replica.gradient_arena.mine[low:high]))

    def poll(self) -> None:
        for _ in range(LOOKS if self.comm.concurrent else 1):
            if not self._started:
                return
            if self._started[0].test():
                self._started.popleft()

    def settle(self) -> None:
        while self._started:
            self._started.popleft().wait()

    def _sum(self) -> None:
        self.settle()

    def publish(self) -> None:
        self.settle()  # buckets were started, but the round was skipped
        super().publish()


class NodeBoard:
    """A few numbers per rank, visible to all ranks of a node. Two rows alternate, so that one barrier is enough."""

    def __init__(self, comm: Communicator, width: int) -> None:
        """`width`: elements of the longest row."""
        self.comm, self.width = comm, -(-width // 8) * 8  # whole cache lines
        self.arena = comm.arena(2 * self.width, np.dtype(np.float64), "node")
        self.turn = 0

    def exchange(self, row: Buffer) -> Buffer:
        """The rows of all ranks, in rank order. Collective."""
        self.turn = 1 - self.turn
        here = slice(self.turn * self.width, self.turn * self.width + row.size)
        self.arena.mine[here] = row
        self.comm.notify(self.arena)
        self.comm.wait(self.arena)
        return np.array([part[here] for part in self.arena.parts])

    def free(self) -> None:
        """Free the memory. Collective."""
        self.arena.free()


class MessageBoard:
    """The same across several nodes."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def exchange(self, row: Buffer) -> Buffer:
        """The rows of all ranks, in rank order. Collective."""
        return self.comm.gather_rows(row)

    def free(self) -> None:
        """Nothing to free."""
