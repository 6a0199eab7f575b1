"""A stand-in for the few CuPy calls of the device path, over NumPy, for machines without a GPU.

It is lazier than any GPU: work queued on a stream runs only when something waits for it (a stream or an event), so that
a missing wait always reads old data. Fresh memory is filled with 0xa5.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from hpctrain.comm.base import BFLOAT16
from hpctrain.comm.device.gpu import Gpu

RUBBISH = 0xA5


class Stream:
    """Work in order, run when it is waited for."""

    def __init__(self, non_blocking: bool = False, owner: Cuda | None = None) -> None:
        self.queued: list[Callable[[], None]] = []
        self.ran = 0
        self.owner = owner
        self._lock = threading.RLock()

    def add(self, work: Callable[[], None]) -> None:
        self.queued.append(work)

    def run(self, until: int) -> None:
        """Run all work up to the `until`-th item ever queued."""
        with self._lock:
            while self.ran < until:
                work = self.queued[self.ran]
                self.ran += 1
                work()

    def synchronize(self) -> None:
        self.run(len(self.queued))

    def wait_event(self, event: Event) -> None:
        stream, place = event.stream, event.place  # as recorded now: it may be recorded again
        if stream is not None:
            self.add(lambda: stream.run(place))

    def __enter__(self) -> Stream:
        assert self.owner is not None
        self.owner.current.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self.owner is not None
        self.owner.current.pop()

    @property
    def ptr(self) -> int:
        return id(self)


class Event:
    """Complete when the stream has run all work that was queued when the event was recorded."""

    def __init__(self, disable_timing: bool = False) -> None:
        self.stream: Stream | None = None
        self.place = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.place = stream, len(stream.queued)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.place)

    @property
    def done(self) -> bool:
        """Each query lets the device run one more item."""
        if self.stream is None or self.stream.ran >= self.place:
            return True
        self.stream.run(self.stream.ran + 1)
        return False


class Array:
    """A device array; not a NumPy array, so code that assumes one fails. `memory` is the device's memory, `base` the
    allocation that it is part of, if `Memory` or a handle of one gave it."""

    def __init__(self, owner: Cuda, memory: np.ndarray[Any, Any], base: Any = None) -> None:
        self.owner, self.memory, self.base = owner, memory, base
        self.dtype, self.size, self.shape = memory.dtype, memory.size, memory.shape
        self.nbytes, self.itemsize = memory.nbytes, memory.itemsize

    def get(self, stream: Stream, out: np.ndarray[Any, Any], blocking: bool = True) -> None:
        assert out.dtype == self.dtype
        assert out.shape == self.shape
        assert self.owner.is_pinned(out), "an asynchronous copy needs pinned memory"
        stream.add(lambda: np.copyto(out, self.memory))
        if blocking:
            stream.synchronize()

    def set(self, array: np.ndarray[Any, Any], stream: Stream) -> None:
        assert array.dtype == self.dtype
        assert array.shape == self.shape
        assert self.owner.is_pinned(array), "an asynchronous copy needs pinned memory"
        stream.add(lambda: np.copyto(self.memory, array))

    @property
    def data(self) -> _Pointer:
        address = self.memory.__array_interface__["data"][0]
        mem = self.base if self.base is not None else SimpleNamespace(ptr=address, size=self.nbytes)
        return _Pointer(mem, address - mem.ptr, self)

    def view(self, dtype: Any) -> Array:
        return Array(self.owner, self.memory.view(dtype), self.base)

    def copy(self) -> Array:
        return Array(self.owner, self.memory.copy())

    def astype(self, dtype: Any) -> Array:
        return Array(self.owner, self.memory.astype(dtype))

    def __getitem__(self, key: Any) -> Array:
        return Array(self.owner, self.memory[key], self.base)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.memory[key] = value.memory if isinstance(value, Array) else value

    def __len__(self) -> int:
        return len(self.memory)

    def __dlpack__(self, **arguments: Any) -> Any:
        self.owner.compute.synchronize()  # torch, whose stream that is, continues after the work queued there
        return self.memory.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.memory.__dlpack_device__()

    def __array__(self, *arguments: Any, **named: Any) -> Any:
        raise TypeError("a device array does not become a NumPy array by itself")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **named: Any) -> Any:
        assert method == "__call__"
        assert len(out) == 1, "the device path computes in place"
        plain = [i.memory if isinstance(i, Array) else i for i in inputs]
        into = out[0].memory
        self.owner.launch(lambda: ufunc(*plain, out=into, **named))
        return out[0]

    def __array_function__(self, function: Any, types: Any, inputs: Any, named: Any) -> Any:
        assert function is np.empty_like
        return Array(self.owner, _rubbish(named["shape"][0] * self.itemsize).view(self.dtype))


def _rubbish(nbytes: int) -> np.ndarray[Any, Any]:
    return np.full(nbytes, RUBBISH, np.uint8)


class Memory:
    """An allocation of its own. `handles`: of all living ones of this process. `folder`: None if all ranks share this
    process's memory; else where allocations are files that other processes can map."""

    folder: ClassVar[Path | None] = None
    handles: ClassVar[weakref.WeakValueDictionary[bytes, Memory]] = weakref.WeakValueDictionary()
    count: ClassVar[int] = 0

    def __init__(self, nbytes: int) -> None:
        Memory.count += 1
        name = f"{os.getpid()}-{Memory.count}"
        self.bytes, self.size = _rubbish(nbytes), nbytes
        if self.folder is not None:
            self.bytes = np.memmap(self.folder / name, np.uint8, "w+", shape=(nbytes,))
            self.bytes[:] = RUBBISH
        self.ptr = self.bytes.__array_interface__["data"][0]
        self.handle = name.encode().ljust(64, b"\0")
        Memory.handles[self.handle] = self


class Opened:
    """Another rank's allocation, opened by its handle; it does not keep it alive."""

    def __init__(self, ptr: int, size: int, owner: Any, device: int) -> None:
        self.ptr, self.size, self.device = ptr, size, device
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(ptr))


class Runtime:
    """CUDA IPC. `opened`: addresses of what is open, with repetitions; `own`: handles that this rank has given."""

    def __init__(self) -> None:
        self.opened: list[int] = []
        self.own: set[bytes] = set()
        self._maps: dict[int, Any] = {}

    def ipcGetMemHandle(self, base: int) -> bytes:
        handle = next(handle for handle, memory in Memory.handles.items() if memory.ptr == base)
        self.own.add(handle)
        return handle

    def ipcOpenMemHandle(self, handle: bytes) -> int:
        assert handle not in self.own, "a process must not open its own handle"
        if Memory.folder is None:
            self.opened.append(Memory.handles[handle].ptr)
        else:
            mapped = np.memmap(Memory.folder / handle.rstrip(b"\0").decode(), np.uint8, "r+")
            self.opened.append(mapped.__array_interface__["data"][0])
            self._maps[self.opened[-1]] = mapped
        return self.opened[-1]

    def ipcCloseMemHandle(self, base: int) -> None:
        self.opened.remove(base)
        self._maps.pop(base, None)

    def deviceGetPCIBusId(self, index: int) -> str:
        return f"0000:{index:02x}:00.0"


class Nccl:
    """NCCL between the ranks of `inner`, of which each of its communicators gets a copy. Operations run when their
    stream is waited for."""

    available = True

    def __init__(self, cuda: Cuda, inner: Any) -> None:
        self._cuda, self.living, self._names = cuda, 0, 0
        self._copies = [inner.split(0, inner.rank) for _ in range(8)] if inner is not None else []

    def get_unique_id(self) -> bytes:
        self._names += 1
        return self._names.to_bytes(128, "little")

    def NcclCommunicator(self, size: int, name: bytes, rank: int) -> NcclGroup:
        self.living += 1
        group = NcclGroup(self, self._cuda, self._copies[int.from_bytes(name, "little")])
        assert (group.inner.size, group.inner.rank) == (size, rank)
        return group

    def groupStart(self) -> None:
        return None

    def groupEnd(self) -> None:
        return None


class NcclGroup:
    """One of its communicators, which exchanges over `inner`."""

    TYPES: ClassVar[dict[int, Any]] = {4: np.int64, 7: np.float32, 8: np.float64}

    def __init__(self, nccl: Nccl, cuda: Cuda, inner: Any) -> None:
        self._nccl, self._cuda, self.inner = nccl, cuda, inner

    def _queue(self, stream: int, address: int, count: int, kind: int, verb: Callable[[Any], None]) -> None:
        found = next(each for each in self._cuda.streams if each.ptr == stream)
        flat = np.ctypeslib.as_array((ctypes.c_uint8 * (count * 8)).from_address(address))
        array = flat[: count * np.dtype(self.TYPES[kind]).itemsize].view(self.TYPES[kind])
        found.add(lambda: verb(array))

    def allReduce(self, send: int, into: int, count: int, kind: int, operation: int, stream: int) -> None:
        name = {0: "sum", 2: "max", 3: "min"}[operation]
        self._queue(stream, into, count, kind, lambda array: self.inner.all_reduce(array, name))

    def broadcast(self, send: int, into: int, count: int, kind: int, root: int, stream: int) -> None:
        self._queue(stream, into, count, kind, lambda array: self.inner.broadcast(array, root))

    def destroy(self) -> None:
        self._nccl.living -= 1


class Cuda:
    """One rank's CuPy and CuPyX. `compute` is the stream on which torch would compute. `inner`: the ranks that NCCL
    connects; creation is collective over them."""

    def __init__(self, inner: Any = None) -> None:
        self.runtime = Runtime()
        self.streams: list[Stream] = []
        self.compiled: list[str] = []
        self.current: list[Stream] = []
        self.pinned: list[np.ndarray[Any, Any]] = []
        self.compute = Stream(owner=self)
        self.used: list[int] = []
        device = lambda index: SimpleNamespace(use=lambda: self.used.append(index))  # noqa: E731
        self.cuda = SimpleNamespace(
            Stream=_Streams(self), Event=Event, Device=device, Memory=Memory, MemoryPointer=_Pointer,
            UnownedMemory=Opened, runtime=self.runtime, nccl=Nccl(self, inner),
        )  # fmt: skip

    def gpu(self) -> Gpu:
        return Gpu(0, self, self, lambda: self.compute)

    def ndarray(self, shape: tuple[int], dtype: Any, pointer: _Pointer) -> Array:
        nbytes = shape[0] * np.dtype(dtype).itemsize
        part = pointer.mem.bytes[pointer.offset : pointer.offset + nbytes]
        assert part.size == nbytes
        return Array(self, part.view(dtype), pointer.mem)

    def RawKernel(self, source: str, name: str) -> Callable[..., None]:
        """The one kernel there is. Source and arguments must belong together."""
        self.compiled.append(source)

        def launch(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            *parts, out, length = arguments
            assert f"part_{len(parts) - 1}" in source and f"part_{len(parts)}" not in source
            assert name == "add_up" and out.size == length and grid[0] >= 1
            half = {"cvt.rn.f16": np.dtype(np.float16), "0x7fff": BFLOAT16}
            kind = next((half[mark] for mark in half if mark in source), out.dtype)
            wide = np.float32 if kind in half.values() else kind
            arrays = [part.memory.view(kind) for part in parts]

            def run() -> None:
                total = arrays[0].astype(wide)
                for array in arrays[1:]:
                    total += array.astype(wide)
                out.memory.view(kind)[...] = total

            self.launch(run)

        return launch

    def empty_pinned(self, size: int, dtype: Any) -> np.ndarray[Any, Any]:
        assert dtype == np.uint8
        self.pinned.append(_rubbish(size))
        return self.pinned[-1]

    def from_dlpack(self, tensor: Any) -> Array:
        return Array(self, tensor.numpy())

    def launch(self, kernel: Callable[[], Any]) -> None:
        """Queue on the current stream; run at once if there is none (the MPI library's own arithmetic)."""
        if self.current:
            self.current[-1].add(kernel)
        else:
            kernel()

    def is_pinned(self, array: np.ndarray[Any, Any]) -> bool:
        return any(np.may_share_memory(array, memory) for memory in self.pinned)

    def array(self, values: np.ndarray[Any, Any]) -> Array:
        """A device array of these values, still being computed: complete once `compute` has been waited for."""
        memory = Memory(max(values.nbytes, 256))
        result = Array(self, memory.bytes[: values.nbytes].view(values.dtype), memory)
        self.compute.add(lambda: np.copyto(result.memory, values))
        return result


class _Streams:
    """CuPy's class of streams, which remembers those that it has made."""

    def __init__(self, owner: Cuda) -> None:
        self._owner = owner

    def __call__(self, non_blocking: bool = False) -> Stream:
        self._owner.streams.append(Stream(non_blocking, self._owner))
        return self._owner.streams[-1]

    def from_external(self, stream: Stream) -> Stream:
        return stream


class _Pointer:
    def __init__(self, mem: Any, offset: int, array: Array | None = None) -> None:
        self.mem, self.offset, self.ptr, self._array = mem, offset, mem.ptr + offset, array

    def memset_async(self, value: int, size: int, stream: Stream) -> None:
        self.mem.bytes[:size] = value  # at once, as torch's tensors over it are not queued either

    def copy_from_device_async(self, source: _Pointer, size: int, stream: Stream) -> None:
        here, there = self._array, source._array
        assert here is not None and there is not None and here.nbytes == there.nbytes == size
        stream.add(lambda: np.copyto(here.memory, there.memory))
