"""Collectives of device buffers by NCCL, driven through CuPy, where every rank has a GPU of its own.

NOT YET RUN ON A GPU: tested with stand-ins for CuPy and NCCL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from hpctrain.comm.base import BFLOAT16, HALVES, Buffer, Communicator, Operation
from hpctrain.comm.device.gpu import Gpu, SlotPool
from hpctrain.comm.device.staged import StagedCommunicator

# nccl.h: ncclDataType_t and ncclRedOp_t
TYPES = {np.dtype(np.int64): 4, np.dtype(np.float16): 6, np.dtype(np.float32): 7, np.dtype(np.float64): 8, BFLOAT16: 9}
OPERATIONS: dict[Operation, int] = {"sum": 0, "max": 2, "min": 3}


class NcclCommunicator(StagedCommunicator):
    """All-reduce, broadcast and all-gather by NCCL on a stream of their own; messages are staged.

    NCCL sums 16-bit values with a rounding in every rank, so these are widened to float32 first.
    """

    transport = "nccl"

    def __init__(self, inner: Communicator, gpu: Gpu, pool: SlotPool) -> None:
        super().__init__(inner, gpu, pool)
        self._nccl: Any = None
        self._stream = gpu.new_stream()

    def _connected(self) -> Any:
        """NCCL's communicator. Created on first use, which is collective: most communicators never need it."""
        if self._nccl is None:
            name = self.inner.broadcast_json(new_name(self.gpu.nccl()) if self.rank == 0 else None)
            self._nccl = connect(self.gpu.nccl(), self.size, self.rank, name)
        return self._nccl

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        if algorithm != "library" or buffer.dtype not in TYPES:
            super().reduce_when(ready, buffer, operation, algorithm)
        elif buffer.dtype in HALVES:
            ready.synchronize()
            wide = self.gpu.widened(buffer)
            self.reduce_when(self.gpu.mark(), wide, operation, algorithm)
            self.gpu.narrow(wide, buffer)
            self.gpu.mark().synchronize()  # this thread's stream may differ from that of the others
        else:
            with self.span("reduce", buffer.nbytes):
                nccl = self._connected()
                self._stream.wait_event(ready)
                address, kind = buffer.data.ptr, TYPES[buffer.dtype]
                nccl.allReduce(address, address, buffer.size, kind, OPERATIONS[operation], self._stream.ptr)
                self._stream.synchronize()

    def _broadcast(self, buffer: Buffer, root: int) -> None:
        if buffer.dtype not in TYPES:
            super()._broadcast(buffer, root)
            return
        with self.span("send" if self.rank == root else "recv", buffer.nbytes):
            self._stream.wait_event(self.gpu.mark())
            self._spread(buffer, root)
            self._stream.synchronize()

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        if buffer.dtype not in TYPES:
            super()._all_gather(buffer, bounds)
            return
        module = self.gpu.nccl()
        with self.span("recv", buffer.nbytes):
            self._connected()
            self._stream.wait_event(self.gpu.mark())
            module.groupStart()
            for rank in range(self.size):
                self._spread(buffer[bounds[rank] : bounds[rank + 1]], rank)
            module.groupEnd()
            self._stream.synchronize()

    def _spread(self, part: Buffer, root: int) -> None:
        if part.size:
            address = part.data.ptr
            self._connected().broadcast(address, address, part.size, TYPES[part.dtype], root, self._stream.ptr)

    def lane(self, number: int) -> Self:
        other = super().lane(number)
        other._nccl, other._stream = None, self.gpu.new_stream()  # NCCL's communicators are for one thread
        return other

    def release(self) -> None:
        if self._nccl is not None:
            self._nccl.destroy()
        super().release()


def new_name(module: Any) -> list[Any]:
    """NCCL's identifier of a new communicator, as plain values: whether CuPy has it as bytes, as from version 14 on, or
    else as numbers; then the numbers."""
    name = module.get_unique_id()
    return [isinstance(name, bytes), list(name)]


def connect(module: Any, size: int, rank: int, name: list[Any]) -> Any:
    """NCCL's communicator of that name. Collective among its ranks. Raises CuPy's NcclError."""
    as_bytes, numbers = name
    return module.NcclCommunicator(size, bytes(numbers) if as_bytes else tuple(numbers), rank)
