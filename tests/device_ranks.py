"""Virtual ranks with stand-in GPUs, and arrays to send between them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hpctrain.comm.base import Communicator
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.gpu import SlotPool
from hpctrain.comm.virtual.world import World
from tests.stand_in_cupy import Array, Cuda

SLOT = 64  # bytes
Body = Callable[[DeviceCommunicator, Cuda], Any]


def run(size: int, kind: type[DeviceCommunicator], body: Body, nodes: tuple[int, ...] | None = None) -> list[Any]:
    """Run `body(communicator, stand-in)` on every virtual rank; no slot may stay in use."""

    def rank(inner: Communicator) -> Any:
        cuda = Cuda(inner)
        gpu = cuda.gpu()
        comm = kind.around(inner, gpu, SlotPool(gpu, SLOT))
        result = body(comm, cuda)
        assert len(comm.pool._free) == comm.pool.made, "slots were not given back"
        return result

    return World(size, nodes=nodes).run(rank)


def values(length: int, dtype: np.dtype[Any], rank: int = 0) -> np.ndarray[Any, Any]:
    """Small whole numbers, different on every rank, whose sums are exact in every dtype."""
    return ((np.arange(length) * 7 + rank * 3) % 11 - 5).astype(dtype)


def total(length: int, dtype: Any, ranks: Iterable[int]) -> np.ndarray[Any, Any]:
    """The sum of these ranks' `values`."""
    rows = [values(length, np.dtype(np.float64), rank) for rank in ranks]
    summed: np.ndarray[Any, Any] = np.sum(rows, axis=0)
    return summed.astype(dtype)


def read(cuda: Cuda, array: Array) -> np.ndarray[Any, Any]:
    """What torch would read on the same stream."""
    cuda.compute.synchronize()
    return array.memory


def same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> None:
    assert found.dtype == wanted.dtype
    np.testing.assert_array_equal(found.astype(np.float64), wanted.astype(np.float64))
