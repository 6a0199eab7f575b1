"""All-reduce through CUDA IPC: each rank sums its slice straight from the device memory of its node's other ranks.

NOT YET RUN ON A GPU: tested with stand-ins for CuPy. Works between devices that reach each other's memory (NVLink,
PCIe peer to peer) and between ranks that share one device. Between nodes the slices are staged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from hpctrain.comm.base import Buffer, Communicator, Operation
from hpctrain.comm.device import kernels
from hpctrain.comm.device.gpu import Gpu, SlotPool
from hpctrain.comm.device.staged import StagedCommunicator

ALIGNED = 64  # bytes; slices begin at multiples of this
KEPT = 2  # allocations that a rank keeps for its neighbours, even if its arenas have been freed
ROW = 11  # 8 words of handle, then offset, bytes of the allocation, and whether to close all handles


class Peer(NamedTuple):
    """Where another rank's buffer lies: its allocation's handle and size, and the buffer's offset in it, in bytes."""

    handle: bytes
    nbytes: int
    offset: int


class Neighbours:
    """The allocations of this node's other ranks, opened once and then kept.

    `here`: the ranks of the node. Both sides must keep an allocation until nobody has it open. So a rank keeps what it
    has shown to others alive; when these are more than `KEPT`, all ranks close what they have opened, at the next
    meeting.
    """

    def __init__(self, here: Communicator, gpu: Gpu) -> None:
        self.here, self._gpu = here, gpu
        self._opened: dict[tuple[int, bytes], int] = {}
        self._shown: dict[int, Any] = {}  # CuPy's owner of each allocation, by address

    def meet(self, buffer: Buffer) -> list[Buffer] | None:
        """The buffers that the node's ranks pass, this rank's own among them, as device arrays. Collective.

        None if one of them is not in memory that can be shown. A rank passes only when its buffer is complete.
        """
        place = self._gpu.place_of(buffer)
        row = np.zeros(ROW, np.int64)
        if place is not None:
            base, row[8], row[9] = place
            row[:8] = np.frombuffer(self._gpu.handle_of(base), np.int64)
            self._shown[base] = buffer.data.mem
        row[10] = len(self._shown) > KEPT
        table = self.here.gather_rows(row)
        if table[:, 10].any():
            self._close()
            self.here.barrier()
            for base in self._shown.keys() - ({place[0]} if place is not None else set()):
                del self._shown[base]
        if not table[:, 9].all():
            return None
        peers = [Peer(row[:8].tobytes(), int(row[9]), int(row[8])) for row in table]
        return [
            buffer if rank == self.here.rank else self._view(rank, peer, buffer) for rank, peer in enumerate(peers)
        ]

    def _view(self, rank: int, peer: Peer, like: Buffer) -> Buffer:
        key = rank, peer.handle
        if key not in self._opened:
            self._opened[key] = self._gpu.open_handle(peer.handle)
        return self._gpu.at(self._opened[key], peer.nbytes, peer.offset, like.size, like.dtype)

    def _close(self) -> None:
        for base in self._opened.values():
            self._gpu.close_handle(base)
        self._opened.clear()

    def free(self) -> None:
        """Collective."""
        self._close()
        self.here.barrier()
        self._shown.clear()
        self.here.free()


class IpcCommunicator(StagedCommunicator):
    """Sums large device buffers through CUDA IPC; everything else is staged. Every node has the same number of ranks.

    With n ranks on a node, rank r sums slice r of all n buffers in one pass, then copies the other slices from their
    owners: each rank reads twice the buffer, however many ranks there are. The sum is in rank order, so all ranks have
    the same bits. 16-bit values are added in float32.
    """

    transport = "ipc"
    least = 1 << 16  # bytes of a buffer; below, three barriers take longer than a staged copy

    def __init__(self, inner: Communicator, gpu: Gpu, pool: SlotPool) -> None:
        super().__init__(inner, gpu, pool)
        counts = {inner.nodes.count(node) for node in inner.nodes}
        self._even = len(counts) == 1 and counts != {1}  # else slices differ between nodes, or there is no neighbour
        self._neighbours: Neighbours | None = None
        self._across: StagedCommunicator | None = None

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        plain = operation == "sum" and algorithm == "library" and buffer.dtype in kernels.TYPES
        if not plain or not self._even or buffer.nbytes < self.least:
            super().reduce_when(ready, buffer, operation, algorithm)
            return
        ready.synchronize()
        neighbours = self._neighbours or self._connect()
        parts = neighbours.meet(buffer)
        if parts is None:
            super().reduce_when(ready, buffer, operation, algorithm)
        else:
            with self.span("reduce", buffer.nbytes):
                self._sum(buffer, parts, neighbours.here)

    def _connect(self) -> Neighbours:
        """On first use, which is collective: most communicators never need it."""
        inner = self.inner
        here = inner.split(inner.nodes[inner.rank], inner.rank)
        assert here is not None
        self._neighbours = Neighbours(here, self.gpu)
        if here.size < inner.size:
            across = inner.split(inner.local_rank, inner.rank)
            assert across is not None
            self._across = StagedCommunicator(across, self.gpu, self.pool)
        return self._neighbours

    def _sum(self, buffer: Buffer, parts: Sequence[Buffer], here: Communicator) -> None:
        bounds = slices(buffer.size, buffer.itemsize, len(parts))
        low, high = bounds[here.rank], bounds[here.rank + 1]
        mine = buffer[low:high]
        self.gpu.add_up([part[low:high] for part in parts], mine)  # others read only their slices of this buffer
        self.gpu.mark().synchronize()
        if self._across is not None:
            self._across.all_reduce(mine)
        here.barrier()
        for rank, part in enumerate(parts):
            if rank != here.rank:
                self.gpu.copy(part[bounds[rank] : bounds[rank + 1]], buffer[bounds[rank] : bounds[rank + 1]])
        self.gpu.mark().synchronize()
        here.barrier()  # nobody may change a slice that another rank still copies

    def lane(self, number: int) -> Self:
        other = super().lane(number)
        other._neighbours = other._across = None  # a thread of its own has connections of its own
        return other

    def release(self) -> None:
        if self._across is not None:
            self._across.free()
        if self._neighbours is not None:
            self._neighbours.free()
        super().release()


def slices(length: int, itemsize: int, count: int) -> list[int]:
    """Where each of `count` slices of `length` elements begins, and where the last ends."""
    step = -(-length // count)
    step = -(-step * itemsize // ALIGNED) * ALIGNED // itemsize
    return [min(length, index * step) for index in range(count + 1)]
