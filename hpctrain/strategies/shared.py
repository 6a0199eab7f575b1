"""The exchange among workers that share memory with the others of their node.

Gradients lie in node-shared arenas and parameters exist once per node: rank r sums slice r of all gradients directly
from their memory, and one barrier later all ranks have the parameters that their owners updated. Nodes all-reduce equal
slices with each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from hpctrain.codecs.joint import JointCodec
from hpctrain.replica.blocks import add_up, sum_of_squares
from hpctrain.replica.layout import Stretch, slice_bounds
from hpctrain.replica.state import Own
from hpctrain.replica.tensors import as_array, as_tensor
from hpctrain.strategies.contribution import Contribution
from hpctrain.strategies.exchange import Exchange
from hpctrain.strategies.sums import StretchSums

if TYPE_CHECKING:
    from hpctrain.codecs.base import Codec
    from hpctrain.comm.base import Buffer, Communicator
    from hpctrain.strategies.phase import Phase


class SharedExchange(Exchange):
    """Sums gradients slice by slice from node-shared arenas. Nodes all-reduce equal slices with each other, using
    `algorithm`."""

    def __init__(
        self,
        phase: Phase,
        algorithm: str = "library",
        whole: bool = False,
        comm: Communicator | None = None,
        parts: int | None = None,
    ) -> None:
        """`whole`: slices are cut between parameters, so they may be of unequal length or empty. `parts`: how many;
        None: as many as the smallest node has ranks."""
        super().__init__(phase, comm)
        comm = self.comm
        self._algorithm = algorithm
        sizes = [comm.nodes.count(node) for node in sorted(set(comm.nodes))]
        parts = parts or min(sizes)
        self._bounds = slice_bounds(self.replica.layout, parts, elementwise=not whole)
        owns = comm.local_rank < parts
        self.low, self.high = self._bounds[comm.local_rank : comm.local_rank + 2] if owns else (0, 0)
        self._across = comm.split(comm.local_rank if owns else None, comm.rank) if len(sizes) > 1 else None
        self._arena = self.replica.gradient_arena
        self._slices = [as_tensor(part)[self.low : self.high] for part in self._arena.parts]
        self.mean = torch.zeros_like(self._slices[0])
        width = Contribution.length(len(self.replica.layout.slots))
        self._board: NodeBoard | MessageBoard = NodeBoard(comm, width) if len(sizes) == 1 else MessageBoard(comm)
        self._faults = comm.arena(1, np.dtype(np.float64), "board")  # for each rank: whether its slice is not finite
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
            raise self._gradient_error(self.replica.first_not_finite())

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


class SharedBucketExchange(SharedExchange):
    """The same across nodes in buckets of `size` bytes, with a codec between nodes. `early`: as soon as backward has
    completed a bucket on all ranks of the node, the owner of each part of it sums that part and sends it."""

    def __init__(self, phase: Phase, codec: Codec, size: int, early: bool) -> None:
        super().__init__(phase, whole=isinstance(codec, JointCodec))
        self.bucket_bytes = size if early else 0
        slots = [slot.moved(-self.low) for slot in self.replica.layout.slots_in(self.low, self.high)]
        length = size // self.mean.element_size()
        self._sums: StretchSums | None = None
        if self._across is not None:
            self._sums = StretchSums(self._across, codec, self.mean, length, slots, self.low)
        self._due: deque[Stretch] = deque()  # complete on this rank, but perhaps not on the node's others

    def begin(self, position: int, divisor: float) -> None:
        if self._sums is not None:
            self._sums.begin(position, divisor)

    def own(self) -> Own:
        return self._sums.own() if self._sums is not None else Own()

    def load_own(self, own: Own) -> str | None:
        return self._sums.load_own(own) if self._sums is not None else None

    def start(self, low: int, high: int) -> None:
        self._due.append((low, high))
        self.comm.notify(self._arena)

    def poll(self) -> None:
        if self._due:
            self._send(len(self._due) - self.comm.behind(self._arena))
        if self._sums is not None:
            self._sums.poll()

    def gather(self, row: Buffer) -> Buffer:
        """Afterwards all ranks of the node have completed all buckets."""
        self.comm.notify(self._arena)
        request, table = self.comm.start_gather_rows(row)
        if self._sums is not None:
            self._sums.wait_for(request)
        request.wait()
        self.comm.wait(self._arena)
        self._send(len(self._due))
        return table

    def settle(self) -> None:
        if self._sums is not None:
            self._sums.finish()

    def reduce(self, divisor: float) -> torch.Tensor:
        for _ in self.arrivals(divisor):
            pass
        return self.mean

    def arrivals(self, divisor: float) -> Iterator[Stretch]:
        if self._sums is None:
            return iter(())
        if not self.bucket_bytes:
            self._sums.expected = divisor
            for low, high in self._sums.pieces(0, self.high - self.low):
                self._send_part(low, high)
        return self._arriving(self._sums, divisor)

    def publish(self) -> None:
        if self.bucket_bytes:
            self.settle()  # buckets were started, but the round was skipped
        super().publish()

    def _send(self, buckets: int) -> None:
        """Sum and send this rank's parts of the first buckets that are due."""
        for _ in range(buckets):
            low, high = self._due.popleft()
            self._send_part(max(low, self.low) - self.low, min(high, self.high) - self.low)

    def _send_part(self, low: int, high: int) -> None:
        """The same for elements [low, high) of this rank's slice."""
        if low >= high or self._sums is None:
            return
        part, ranks = self.mean[low:high], len(self._slices)
        with self.comm.span("reduce", part.nbytes * ranks, flops=float(part.numel() * ranks)):
            add_up([piece[low:high] for piece in self._slices], part, 1.0)
        self._sums.start(low, high)

    def free(self) -> None:
        if self._sums is not None:
            self._sums.free()
        super().free()


class NodeBoard:
    """A few numbers per rank, visible to all ranks of a node. Two rows alternate, so that one barrier is enough."""

    def __init__(self, comm: Communicator, width: int) -> None:
        """`width`: elements of the longest row."""
        self.comm, self.width = comm, -(-width // 8) * 8  # whole cache lines
        self.arena = comm.arena(2 * self.width, np.dtype(np.float64), "board")
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
