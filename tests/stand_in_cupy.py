"""A stand-in for the few CuPy calls of the device path, over NumPy, for machines without a GPU.

It is lazier than any GPU: work queued on a stream runs only when something waits for it (a stream or an event), so that
a missing wait always reads old data. Fresh memory is filled with 0xa5.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

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

    @classmethod
    def from_external(cls, stream: Stream) -> Stream:
        return stream


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
    """A device array; not a NumPy array, so code that assumes one fails. `memory` is the device's memory."""

    def __init__(self, owner: Cuda, memory: np.ndarray[Any, Any]) -> None:
        self.owner, self.memory = owner, memory
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

    def view(self, dtype: Any) -> Array:
        return Array(self.owner, self.memory.view(dtype))

    def copy(self) -> Array:
        return Array(self.owner, self.memory.copy())

    def astype(self, dtype: Any) -> Array:
        return Array(self.owner, self.memory.astype(dtype))

    def __getitem__(self, key: Any) -> Array:
        return Array(self.owner, self.memory[key])

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


class Cuda:
    """One rank's CuPy and CuPyX. `compute` is the stream on which torch would compute."""

    def __init__(self) -> None:
        self.current: list[Stream] = []
        self.pinned: list[np.ndarray[Any, Any]] = []
        self.compute = Stream(owner=self)
        self.used: list[int] = []
        device = lambda index: SimpleNamespace(use=lambda: self.used.append(index))  # noqa: E731
        self.cuda = SimpleNamespace(
            Stream=Stream, Event=Event, Device=device, Memory=_rubbish, MemoryPointer=lambda m, _: _Pointer(m)
        )

    def gpu(self) -> Gpu:
        return Gpu(0, self, self, lambda: self.compute)

    def ndarray(self, shape: tuple[int], dtype: Any, pointer: _Pointer) -> Array:
        return Array(self, pointer.memory[: shape[0] * np.dtype(dtype).itemsize].view(dtype))

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
        result = Array(self, _rubbish(values.nbytes).view(values.dtype))
        self.compute.add(lambda: np.copyto(result.memory, values))
        return result


class _Pointer:
    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self.memory = memory

    def memset_async(self, value: int, size: int, stream: Stream) -> None:
        self.memory[:size] = value  # at once, as torch's tensors over it are not queued either
