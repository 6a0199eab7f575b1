"""Device transports (for an MPI that is not CUDA-aware) over real ranks and threads, with a stand-in for CuPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpctrain.comm.base import Tag
from hpctrain.comm.device import choice
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.gpu import SlotPool
from hpctrain.comm.device.ipc import IpcCommunicator
from hpctrain.comm.device.staged import StagedCommunicator
from tests import helpers
from tests.helpers_mpi import Join
from tests.stand_in_cupy import Cuda, Memory

pytestmark = pytest.mark.mpi


class Ipc(IpcCommunicator):
    """Uses CUDA IPC for the smallest buffers, too."""

    least = 1


@pytest.fixture(params=[StagedCommunicator, Ipc])
def comm(
    request: pytest.FixtureRequest, join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[DeviceCommunicator]:
    """With slots so small that every message needs several. Device memory lies in files, which ranks map."""
    ranks = join()
    monkeypatch.setattr(Memory, "folder", Path(ranks.broadcast_json(str(tmp_path))))
    gpu = Cuda(ranks).gpu()
    made: DeviceCommunicator = request.param.around(ranks, gpu, SlotPool(gpu, 64))
    yield made
    made.barrier()


@pytest.fixture
def folder(comm: DeviceCommunicator, tmp_path: Path) -> Path:
    return Path(comm.broadcast_json(str(tmp_path)))


@pytest.mark.parametrize("length", [0, 5, 16, 100, 1000])
def test_messages_and_sums(comm: DeviceCommunicator, length: int) -> None:
    size, cuda = comm.size, comm.gpu._cupy
    mine = np.arange(length, dtype=np.float32) + comm.rank
    into = cuda.array(np.zeros(length, np.float32))
    comm.sendrecv(cuda.array(mine), (comm.rank + 1) % size, into, (comm.rank - 1) % size, Tag.PUSH)
    assert (into.memory == np.arange(length) + (comm.rank - 1) % size).all()
    summed = size * np.arange(length) + size * (size - 1) / 2
    started, other = cuda.array(mine), cuda.array(mine)
    requests = [comm.start_all_reduce(started), comm.start_all_reduce(other)]
    assert comm.gather_rows(np.array([comm.rank]))[:, 0].tolist() == list(range(size))
    comm.wait_all(requests)
    cuda.compute.synchronize()
    assert (started.memory == summed).all()
    assert (other.memory == summed).all()


@pytest.mark.parametrize("agree", ["message", "overlap", "server", "colocated", "all_serve"])
def test_training_equals_one_process(comm: DeviceCommunicator, folder: Path, agree: str) -> None:
    if agree == "server" and comm.size == 1:
        pytest.skip("one rank cannot be a server beside a worker")
    assert helpers.equivalence(comm, folder, agree, "all", "float64") < 1e-10


def test_ipc_is_probed_and_measured_between_processes(
    join: Join, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = join()
    monkeypatch.setattr(Memory, "folder", Path(ranks.broadcast_json(str(tmp_path))))
    monkeypatch.setattr(choice.measure, "__defaults__", (2, 1 << 15))
    found = choice.choose(ranks, Cuda(ranks).gpu(), "auto", "no")
    if ranks.size == 1:
        assert found.name == "staged"
    else:
        assert set(found.seconds) == {"ipc", "staged"}
        assert "share a GPU" in found.obstacles["nccl"]
    ranks.barrier()
