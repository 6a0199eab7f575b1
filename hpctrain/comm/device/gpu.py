"""A rank's GPU: device memory shared by torch and CuPy, and the pinned memory used to copy it.

NOT YET RUN ON A GPU: tested with stand-ins for CuPy. CuPy and torch are imported when a GPU is opened or detected.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpctrain.comm.base import BFLOAT16, Arena, Buffer
from hpctrain.comm.device import kernels

SLOT_BYTES = 4 << 20  # of pinned memory; a longer message is sent in pieces


class Gpu:
    """This rank's device: all the CuPy and torch calls that are needed, in one place.

    `cupy`, `cupyx`: the modules (tests pass stand-ins); `current`: torch's current stream in the calling thread, as an
    object of the CUDA stream protocol. Copies run on two separate streams, one for each direction.
    """

    def __init__(self, index: int, cupy: Any, cupyx: Any, current: Callable[[], Any]) -> None:
        self.index, self._cupy, self._cupyx, self._current = index, cupy, cupyx, current
        self._kernels: dict[str, Any] = {}
        cupy.cuda.Device(index).use()
        self.down, self.up = self.new_stream(), self.new_stream()

    @classmethod
    def open(cls, index: int) -> Gpu:
        """The device that torch calls cuda:`index`. Not collective."""
        import cupy
        import cupyx
        import torch

        return cls(index, cupy, cupyx, lambda: _TorchStream(torch.cuda.current_stream(index).cuda_stream))

    def use(self) -> None:
        """Make it the current device of this thread: new threads start with device 0."""
        import torch

        self._cupy.cuda.Device(self.index).use()
        if torch.cuda.is_available():
            torch.cuda.set_device(self.index)

    def zeros(self, length: int, dtype: np.dtype[Any]) -> Buffer:
        """`length` zeros in a separate allocation: arrays from a memory pool share one and have no IPC handle."""
        nbytes = max(length * dtype.itemsize, 256)
        pointer = self._cupy.cuda.MemoryPointer(self._cupy.cuda.Memory(nbytes), 0)
        pointer.memset_async(0, nbytes, self.stream())
        return self._array(pointer, length, dtype)

    def _array(self, pointer: Any, length: int, dtype: np.dtype[Any]) -> Buffer:
        kept = np.dtype(np.uint16) if dtype == BFLOAT16 else dtype
        array = self._cupy.ndarray((length,), kept, pointer)
        return array.view(BFLOAT16) if dtype == BFLOAT16 else array

    def pinned(self, nbytes: int) -> np.ndarray[Any, Any]:
        """Pinned host memory (uint8), which the device can copy to and from asynchronously."""
        memory: np.ndarray[Any, Any] = self._cupyx.empty_pinned(nbytes, np.uint8)
        return memory

    def to_host(self, source: Buffer, target: np.ndarray[Any, Any]) -> None:
        """Start copying from the device to pinned memory, on the stream `down`."""
        _bits(source).get(stream=self.down, out=_bits(target), blocking=False)

    def from_host(self, source: np.ndarray[Any, Any], target: Buffer) -> None:
        """Start copying from pinned memory to the device, on the stream `up`."""
        _bits(target).set(_bits(source), stream=self.up)

    def stream(self) -> Any:
        """Torch's current stream, as a CuPy stream."""
        return self._cupy.cuda.Stream.from_external(self._current())

    def event(self) -> Any:
        """An event that is not recorded yet, which counts as passed."""
        return self._cupy.cuda.Event(disable_timing=True)

    def mark(self) -> Any:
        """An event that passes once all work that torch has queued so far is done."""
        event = self.event()
        event.record(self.stream())
        return event

    # -- arithmetic on torch's current stream ----------------------------------------------------------------
    def widened(self, buffer: Buffer) -> Buffer:
        """A bfloat16 or float16 array as float32."""
        return self._cupy.from_dlpack(self._halves(buffer).float())

    def narrow(self, wide: Buffer, buffer: Buffer) -> None:
        """The inverse, into `buffer`."""
        import torch

        self._halves(buffer).copy_(torch.utils.dlpack.from_dlpack(wide))

    @staticmethod
    def _halves(buffer: Buffer) -> Any:
        """A torch tensor over the same memory; DLPack knows bfloat16 only in recent versions of CuPy."""
        import torch

        if buffer.dtype != BFLOAT16:
            return torch.utils.dlpack.from_dlpack(buffer)
        return torch.utils.dlpack.from_dlpack(buffer.view(np.int16)).view(torch.bfloat16)

    def add_up(self, parts: Sequence[Buffer], out: Buffer) -> None:
        """`out` = parts[0] + parts[1] + ..., in that order, in one pass; `out` may be one of them."""
        if out.size:
            source = kernels.addition(len(parts), out.dtype)
            kernel = self._kernels.get(source)
            if kernel is None:
                kernel = self._kernels[source] = self._cupy.RawKernel(source, kernels.ADDITION)
            blocks = min(-(-out.size // kernels.THREADS), kernels.BLOCKS)
            with self.stream():
                kernel((blocks,), (kernels.THREADS,), (*map(_bits, parts), _bits(out), np.int64(out.size)))

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Copy between device arrays, of which one may belong to another process or device."""
        if target.size:
            target.data.copy_from_device_async(source.data, target.nbytes, self.stream())

    def fill(self, buffer: Buffer, value: float) -> None:
        """Set all elements of a float array that CuPy and torch know (not bfloat16)."""
        import torch

        torch.utils.dlpack.from_dlpack(buffer).fill_(value)

    def all_equal(self, buffer: Buffer, value: float) -> bool:
        """Whether all elements have that value. Waits for the device."""
        import torch

        return bool((torch.utils.dlpack.from_dlpack(buffer) == value).all())

    # -- memory of other processes -----------------------------------------------------------------------------
    def place_of(self, buffer: Buffer) -> tuple[int, int, int] | None:
        """(address of its allocation, offset in it in bytes, bytes of the allocation) of an array in memory that
        `zeros` has made. None for other arrays: whoever opens their handle does not learn their offset."""
        memory = buffer.data.mem
        if type(memory) is not self._cupy.cuda.Memory:  # a pool's, torch's, or another process's
            return None
        return int(memory.ptr), int(buffer.data.ptr - memory.ptr), int(memory.size)

    def handle_of(self, base: int) -> bytes:
        """64 bytes by which another process on this node can open that allocation."""
        return bytes(self._cupy.cuda.runtime.ipcGetMemHandle(base))

    def open_handle(self, handle: bytes) -> int:
        """The address of another process's allocation in this process. Raises CuPy's CUDARuntimeError if its device
        cannot be reached, or the processes are in containers that do not share IPC."""
        return int(self._cupy.cuda.runtime.ipcOpenMemHandle(handle))

    def close_handle(self, base: int) -> None:
        """Give up an opened allocation; its owner may free it only then."""
        self._cupy.cuda.runtime.ipcCloseMemHandle(base)

    def at(self, base: int, nbytes: int, offset: int, length: int, dtype: np.dtype[Any]) -> Buffer:
        """`length` elements of an opened allocation of `nbytes`."""
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(base, nbytes, self, self.index)
        return self._array(cuda.MemoryPointer(memory, offset), length, dtype)

    def identity(self) -> str:
        """The device's PCI address: equal for two ranks of a node if they compute on the same device."""
        return str(self._cupy.cuda.runtime.deviceGetPCIBusId(self.index))

    def nccl(self) -> Any:
        """CuPy's module for NCCL; None if it was built without."""
        module = getattr(self._cupy.cuda, "nccl", None)
        return module if getattr(module, "available", False) else None

    def new_stream(self) -> Any:
        """A stream of its own, which does not wait for torch's."""
        return self._cupy.cuda.Stream(non_blocking=True)


class _TorchStream:
    """A stream owned by torch, in the CUDA stream protocol, which older torch streams do not implement."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


class DeviceArena(Arena):
    """Device memory of this rank alone: a CuPy array, shared with torch through DLPack."""

    def __init__(self, gpu: Gpu, length: int, dtype: np.dtype[Any]) -> None:
        self.mine = gpu.zeros(length, dtype)
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None


class PinnedArray(np.ndarray[Any, Any]):
    """Of a `PinnedArena`, or a slice of one: a message to or from it is cut like that of a device buffer."""


class PinnedArena(Arena):
    """Pinned host memory of this rank alone, zeroed."""

    def __init__(self, gpu: Gpu, length: int, dtype: np.dtype[Any]) -> None:
        memory = gpu.pinned(max(1, length * dtype.itemsize))
        memory[:] = 0
        self.mine = memory[: length * dtype.itemsize].view(dtype).view(PinnedArray)
        self.parts = [self.mine]

    def free(self) -> None:
        self.parts = []
        self.mine = None


class PinnedSlot:
    """A stretch of pinned memory. `event`: the last copy to or from it that was started."""

    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        self._gpu, self._memory, self.event = gpu, gpu.pinned(nbytes), gpu.event()

    def host(self, size: int, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Its first `size` elements."""
        return self._memory[: size * dtype.itemsize].view(dtype)

    def load(self, part: Buffer) -> None:
        """Start copying from the device."""
        if part.size:
            self._gpu.to_host(part, self.host(part.size, part.dtype))
            self.event.record(self._gpu.down)

    def store(self, part: Buffer) -> None:
        """Start copying to the device."""
        if part.size:
            self._gpu.from_host(self.host(part.size, part.dtype), part)
            self.event.record(self._gpu.up)


class SlotPool:
    """A rank's slots, reused for later messages. Thread-safe. `made`: how many slots exist."""

    def __init__(self, gpu: Gpu, nbytes: int = SLOT_BYTES) -> None:
        self.gpu, self.nbytes, self.made = gpu, nbytes, 0
        self._free: list[PinnedSlot] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> list[PinnedSlot]:
        """Take `count` slots; missing ones are allocated."""
        with self._lock:
            ready = [self._free.pop() for _ in range(min(count, len(self._free)))]
            self.made += count - len(ready)
        return ready + [PinnedSlot(self.gpu, self.nbytes) for _ in range(count - len(ready))]

    def give(self, slots: Sequence[PinnedSlot]) -> None:
        """Return slots, after waiting for copies to and from them."""
        for slot in slots:
            slot.event.synchronize()
        with self._lock:
            self._free.extend(slots)

    def cut(self, buffer: Buffer) -> list[Buffer]:
        """The buffer in pieces that fit a slot: at least one, which is empty if the buffer is empty."""
        step = self.nbytes // buffer.itemsize
        return [buffer[low : low + step] for low in range(0, buffer.size, step)] or [buffer]


def _bits(buffer: Buffer) -> Buffer:
    return buffer.view(np.uint16) if buffer.dtype == BFLOAT16 else buffer


def usable_gpus() -> tuple[int, str | None]:
    """(number of GPUs that both torch and CuPy see, why CuPy sees none although torch does)."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if seen == 0:
        return 0, None
    try:
        import cupy

        return (seen, None) if cupy.cuda.is_available() else (0, "torch sees a GPU, but CuPy finds no CUDA driver")
    except Exception as error:  # CuPy raises various exceptions if it cannot load CUDA's libraries
        return 0, (
            f"torch sees a GPU, but CuPy cannot be imported ({error}); pip install 'hpctrain[cuda13]' (or cuda12, to "
            "match torch.version.cuda)"
        )
