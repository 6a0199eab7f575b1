"""Device buffers passed directly to MPI. Not yet run on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hpctrain.comm import algorithms
from hpctrain.comm.base import HALVES, Buffer, Operation, Request
from hpctrain.comm.device.communicator import DeviceCommunicator


class DirectCommunicator(DeviceCommunicator):
    """For a CUDA-aware MPI, which accepts device pointers. It does not use streams, so this class waits for them."""

    transport = "mpi"

    def _start_send(self, buffer: Buffer, dest: int, tag: int) -> Request:
        self.gpu.mark().synchronize()
        return self.inner.start_send(buffer, dest, tag)

    def _start_recv(self, buffer: Buffer, source: int, tag: int) -> Request:
        self.gpu.mark().synchronize()
        return self.inner.start_recv(buffer, source, tag)

    def _send(self, buffer: Buffer, dest: int, tag: int) -> None:
        self.gpu.mark().synchronize()
        self.inner.send(buffer, dest, tag)

    def _recv(self, buffer: Buffer, source: int, tag: int) -> int:
        self.gpu.mark().synchronize()
        return self.inner.recv(buffer, source, tag)

    def _broadcast(self, buffer: Buffer, root: int) -> None:
        self.gpu.mark().synchronize()
        self.inner.broadcast(buffer, root)

    def reduce_when(self, ready: Any, buffer: Buffer, operation: Operation, algorithm: str) -> None:
        ready.synchronize()
        if buffer.dtype in HALVES:  # MPI has no sum of bfloat16, and adds float16 in float16
            wide = self.gpu.widened(buffer)
            self.reduce_when(self.gpu.mark(), wide, operation, algorithm)
            self.gpu.narrow(wide, buffer)
            self.gpu.mark().synchronize()  # this thread's stream may differ from that of the others
        elif algorithm == "library":
            self.inner.all_reduce(buffer, operation)
        else:
            with self.span("reduce"), self.gpu.stream():  # its messages record the bytes
                algorithms.all_reduce_by(algorithm)(self, buffer, operation, self._all_ranks)

    def _all_gather(self, buffer: Buffer, bounds: Sequence[int]) -> None:
        self.gpu.mark().synchronize()
        self.inner.all_gather(buffer, bounds)
