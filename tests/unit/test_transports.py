"""Device all-reduce through CUDA IPC and NCCL, and the choice of a transport, with stand-ins for CuPy and NCCL.

The stand-in runs nothing before it is waited for, so a missing wait gives wrong values.
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.comm.base import BFLOAT16, Communicator
from hpctrain.comm.device import choice
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.gpu import Gpu
from hpctrain.comm.device.ipc import KEPT, IpcCommunicator, slices
from hpctrain.comm.device.nccl import NcclCommunicator
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError
from hpctrain.trace.events import TransportChosen, from_json
from hpctrain.trace.recorder import Recorder
from tests import helpers
from tests.device_ranks import read, run, same, total, values
from tests.stand_in_cupy import Array, Cuda, Memory


class Ipc(IpcCommunicator):
    """Uses CUDA IPC for the smallest buffers, too."""

    least = 1


KINDS: list[type[DeviceCommunicator]] = [Ipc, NcclCommunicator]
DTYPES = [np.dtype(kind) for kind in (np.float16, np.float32, np.float64, np.int64)] + [BFLOAT16]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- all-reduce ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [(0,), (0, 0), (0, 0, 0), (0, 0, 1, 1)])
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000])
def test_sum_of_every_length(kind: type[DeviceCommunicator], nodes: tuple[int, ...], length: int) -> None:
    size = len(nodes)
    wanted = total(length, np.float32, range(size))

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(length, np.dtype(np.float32), comm.rank))
        for factor in (1, size):
            comm.all_reduce(buffer)
            same(read(cuda, buffer), factor * wanted)

    run(size, kind, body, nodes=nodes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["sum", "max"])
def test_reduction_of_every_dtype(kind: type[DeviceCommunicator], dtype: np.dtype[Any], operation: Any) -> None:
    rows = np.array([values(75, dtype, rank).astype(np.float64) for rank in range(4)])
    wanted = getattr(rows, operation)(axis=0).astype(dtype)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(75, dtype, comm.rank))
        comm.all_reduce(buffer, operation)
        same(read(cuda, buffer), wanted)

    run(4, kind, body, nodes=(0, 0, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
def test_sixteen_bit_values_are_added_in_float32(kind: type[DeviceCommunicator], dtype: np.dtype[Any]) -> None:
    """256 + 0.5 + 0.5: in bfloat16 the halves would be lost one by one."""
    large, small = (256.0, 0.5) if dtype == BFLOAT16 else (2048.0, 0.5)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        mine = large if comm.rank == 0 else small
        buffer = cuda.array(np.full(40, mine).astype(dtype))
        comm.all_reduce(buffer)
        wanted = np.full(40, large + 4 * small).astype(dtype)
        same(read(cuda, buffer), wanted)

    run(5, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_started_sums_keep_their_order(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        for _ in range(2):
            buffers = [cuda.array(values(n, np.dtype(np.float32), comm.rank)) for n in (40, 70, 90)]
            requests = [comm.start_all_reduce(buffer) for buffer in buffers]
            other = cuda.array(values(33, np.dtype(np.float32), comm.rank))
            comm.all_reduce(other)
            comm.wait_all(requests)
            for buffer in [*buffers, other]:
                same(read(cuda, buffer), total(buffer.size, np.float32, range(3)))

    run(3, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_other_collectives(kind: type[DeviceCommunicator]) -> None:
    bounds, kind_of = [0, 40, 40, 100], np.dtype(np.float32)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(100, kind_of, comm.rank))
        comm.broadcast(buffer, root=2)
        same(read(cuda, buffer), values(100, kind_of, 2))
        gathered = cuda.array(values(100, kind_of, comm.rank))
        comm.all_gather(gathered, bounds)
        parts = [values(100, kind_of, rank)[bounds[rank] : bounds[rank + 1]] for rank in range(3)]
        same(read(cuda, gathered), np.concatenate(parts))

    run(3, kind, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("agree", ["message", "overlap", "server", "colocated"])
def test_training_equals_one_process(tmp_path: Path, kind: type[DeviceCommunicator], agree: str) -> None:
    found = run(4, kind, lambda comm, _: helpers.equivalence(comm, tmp_path, agree, "all", "float64"), (0, 0, 1, 1))
    assert max(found) < 1e-10


# -- CUDA IPC ------------------------------------------------------------------------------------------------
def test_ipc_reads_each_neighbour_in_place_with_one_launch() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(200, np.dtype(np.float32), comm.rank))
        for _ in range(3):
            comm.all_reduce(buffer[20:180])
        assert len(cuda.compiled) == 1, "one kernel, compiled once"
        assert len(cuda.runtime.opened) == 2, "each neighbour's memory is opened once"
        assert not cuda.pinned, "nothing passed through the host"
        comm.free()
        assert cuda.runtime.opened == []

    run(3, Ipc, body)


@pytest.mark.parametrize("kind", KINDS)
def test_connections_of_the_thread_are_released(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        comm.start_all_reduce(cuda.array(values(90, np.dtype(np.float32)))).wait()
        assert cuda.runtime.opened or cuda.cuda.nccl.living
        comm.release()
        assert cuda.runtime.opened == []
        assert cuda.cuda.nccl.living == 0

    run(3, kind, body)


def test_part_with_unequal_nodes_is_staged() -> None:
    """A split of equal nodes may have unequal ones, whose slices would differ."""

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        part = comm.split(0 if comm.rank != 3 else None, comm.rank)
        if part is not None:
            buffer = cuda.array(values(50, np.dtype(np.float32), comm.rank))
            part.all_reduce(buffer)
            same(read(cuda, buffer), total(50, np.float32, range(3)))

    run(4, Ipc, body, nodes=(0, 0, 1, 1))


def test_ipc_keeps_memory_until_neighbours_have_closed_it_and_not_forever() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        for count in range(3 * KEPT):
            arena = comm.arena(64, np.dtype(np.float32))
            arena.mine.memory[:] = comm.rank + count
            comm.all_reduce(arena.mine)
            assert read(cuda, arena.mine).tolist() == [2.0 * count + 1] * 64
            arena.free()
            assert len(comm._neighbours._shown) <= KEPT  # type: ignore[attr-defined]
            assert len(cuda.runtime.opened) <= KEPT
            comm.barrier()

    run(2, Ipc, body)


def test_buffers_that_cannot_be_shown_are_staged_on_all_ranks() -> None:
    """Memory of torch or of a pool, on one rank only."""

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        mine = values(50, np.dtype(np.float32), comm.rank)
        buffer = cuda.array(mine) if comm.rank else Array(cuda, mine.copy())
        comm.all_reduce(buffer)
        same(read(cuda, buffer), total(50, np.float32, range(3)))
        assert cuda.pinned

    run(3, Ipc, body)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("length", [0, 1, 16, 17, 1000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_slices_cover_the_buffer(length: int, count: int, itemsize: int) -> None:
    bounds = slices(length, itemsize, count)
    assert (len(bounds), bounds[0], bounds[-1]) == (count + 1, 0, length)
    assert bounds == sorted(bounds)
    assert all(bound * itemsize % 64 == 0 for bound in bounds if bound < length)


def test_nccl_connects_only_communicators_that_reduce() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        part = comm.split(comm.rank % 2)
        assert part is not None
        assert cuda.cuda.nccl.living == 0
        comm.all_reduce(cuda.array(values(10, np.dtype(np.float32))))
        assert cuda.cuda.nccl.living == 1
        part.free()
        comm.free()
        assert cuda.cuda.nccl.living == 0

    run(4, NcclCommunicator, body)


# -- choice --------------------------------------------------------------------------------------------------
class Real:
    """Virtual ranks that claim to run in processes of their own."""

    concurrent = True

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str = "auto",
    nodes: tuple[int, ...] = (0, 0),
    times: dict[str, float] | None = None,
    devices: bool = False,
    aware: bool = False,
) -> list[choice.TransportChoice]:
    """What each virtual rank chooses. `times`: in place of measurements; `devices`: whether each has its own GPU."""
    if times is not None:
        monkeypatch.setattr(choice, "measure", lambda comm, rounds=5: times[comm.transport])
    monkeypatch.setattr(choice, "cuda_aware", lambda comm, wanted, index: (aware, "the library says so"))

    def rank(inner: Communicator) -> choice.TransportChoice:
        cuda = Cuda(inner)
        gpu = cuda.gpu()
        if devices:
            monkeypatch.setattr(cuda.runtime, "deviceGetPCIBusId", lambda index: f"device {inner.rank}")
        comm: Any = Real(inner)
        return choice.choose(comm, gpu, wanted, "auto")

    return World(len(nodes), nodes=nodes).run(rank)


def test_fastest_transport_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ipc": 2.0, "nccl": 1.0, "mpi": 3.0, "staged": 4.0}
    found = chosen(monkeypatch, times=times, devices=True, aware=True)
    assert [each.name for each in found] == ["nccl", "nccl"]
    assert "summed by NCCL (16 MiB in ipc 2000.0 ms, nccl 1000.0 ms" in str(found[0])


def test_small_differences_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"ipc": 1.0, "nccl": 0.95, "mpi": 0.95, "staged": 0.92}
    assert chosen(monkeypatch, times=times, devices=True, aware=True)[0].name == "ipc"


def test_obstacles_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = chosen(monkeypatch, times={"ipc": 1.0, "staged": 2.0})[0]
    assert found.name == "ipc"
    assert "not nccl, because ranks 0 and 1 share a GPU" in str(found)
    assert "not mpi, because the library says so" in str(found)
    apart = chosen(monkeypatch, nodes=(0, 1), times={"nccl": 1.0, "staged": 2.0}, devices=False)[0]
    assert (apart.name, apart.obstacles["ipc"]) == ("nccl", "there is one rank on each node")
    uneven = chosen(monkeypatch, nodes=(0, 0, 1))[0]
    assert (uneven.name, uneven.obstacles["ipc"]) == ("staged", "the nodes have different numbers of ranks")
    assert uneven.seconds == {}, "there was nothing to compare"


def test_measurement_runs_each_transport_and_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.measure, "__defaults__", (2, 1 << 15))
    gc.collect()
    living = set(Memory.handles)
    found = chosen(monkeypatch, devices=True)[0]
    assert set(found.seconds) == {"ipc", "nccl", "staged"}
    gc.collect()
    assert set(Memory.handles) == living


@pytest.mark.parametrize("kind", [*KINDS, StagedCommunicator])
def test_transport_with_a_wrong_sum_is_refused(kind: type[DeviceCommunicator], monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(comm: DeviceCommunicator, cuda: Cuda) -> str:
        monkeypatch.setattr(type(comm), "reduce_when", lambda self, ready, buffer, operation, algorithm: None)
        with pytest.raises(ClusterError) as caught:
            choice.measure(comm, 1, 100)
        assert caught.value.everywhere
        return str(caught.value)

    assert all("gave a wrong sum" in text for text in run(2, kind, rank))


def test_transport_with_a_wrong_sum_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice.measure, "__defaults__", (2, 1 << 15))
    monkeypatch.setattr(IpcCommunicator, "_sum", lambda self, buffer, parts, here: None)
    for found in chosen(monkeypatch):
        assert (found.name, found.obstacles["ipc"]) == ("staged", "its sums were wrong")


@pytest.mark.parametrize("call", ["get_unique_id", "NcclCommunicator"])
def test_nccl_that_fails_is_an_obstacle_on_all(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("NCCL_ERROR_SYSTEM_ERROR")

    def body(inner: Communicator) -> str | None:
        cuda = Cuda(inner)
        monkeypatch.setattr(cuda.runtime, "deviceGetPCIBusId", lambda index: f"device {inner.rank}")
        if inner.rank == 0:
            setattr(cuda.cuda.nccl, call, fail)
        comm: Any = Real(inner)
        return choice.why_not_nccl(comm, cuda.gpu())

    found = World(2).run(body)
    assert found[0] == found[1]
    assert "RuntimeError: NCCL_ERROR_SYSTEM_ERROR" in str(found[0])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("call", ["ipcGetMemHandle", "ipcOpenMemHandle"])
def test_ipc_that_fails_on_one_rank_is_an_obstacle_on_all(
    monkeypatch: pytest.MonkeyPatch, call: str, rank: int
) -> None:
    def fail(argument: Any) -> Any:
        raise RuntimeError("cudaErrorPeerAccessUnsupported")

    def body(inner: Communicator) -> tuple[str | None, list[int]]:
        cuda = Cuda(inner)
        if inner.rank == rank:
            setattr(cuda.runtime, call, fail)
        comm: Any = Real(inner)
        return choice.why_not_ipc(comm, cuda.gpu()), cuda.runtime.opened

    for why, opened in World(3).run(body):
        assert why == "a rank cannot open another's device memory (RuntimeError: cudaErrorPeerAccessUnsupported)"
        assert opened == []


def test_wanted_transport_that_cannot_work_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ClusterError, match=r'device_transport = "nccl" cannot be used here: ranks 0 and 1 share a GPU'):
        chosen(monkeypatch, wanted="nccl")
    found = chosen(monkeypatch, wanted="ipc", times={"ipc": 1.0})[0]
    assert str(found) == 'device buffers are summed through CUDA IPC (communicator.device_transport = "ipc")'
    assert chosen(monkeypatch, wanted="staged")[0].name == "staged"


def test_choice_is_in_the_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def rank(comm: Communicator) -> None:
        comm.recorder = Recorder(comm.now)
        cuda = Cuda(comm)
        monkeypatch.setattr(Gpu, "open", lambda index: cuda.gpu())
        wrapped, why = choice.open_device(comm, 0)
        assert isinstance(wrapped, StagedCommunicator)
        (row,) = comm.recorder.drain()["events"]
        found = from_json(row["kind"].decode(), row["json"].decode())
        assert found == TransportChosen("staged", why)

    World(2).run(rank)
