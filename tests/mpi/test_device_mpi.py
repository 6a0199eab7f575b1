"""The staged device path (for an MPI that is not CUDA-aware) over real ranks and threads, with a stand-in for CuPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hpctrain.comm.base import Tag
from hpctrain.comm.device.gpu import SlotPool
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.comm.mpi.communicator import world
from tests import helpers
from tests.stand_in_cupy import Cuda

pytestmark = pytest.mark.mpi


@pytest.fixture
def staged() -> StagedCommunicator:
    """A staged communicator with slots so small that every message needs several."""
    torch.set_num_threads(1)
    gpu = Cuda().gpu()
    return StagedCommunicator.around(world(), gpu, SlotPool(gpu, 64))


@pytest.fixture
def folder(staged: StagedCommunicator, tmp_path: Path) -> Path:
    return Path(staged.broadcast_json(str(tmp_path)))


@pytest.mark.parametrize("length", [0, 5, 16, 100, 1000])
def test_messages_and_sums(staged: StagedCommunicator, length: int) -> None:
    comm, size, cuda = staged, staged.size, staged.gpu._cupy
    mine = np.arange(length, dtype=np.float32) + comm.rank
    into = cuda.array(np.zeros(length, np.float32))
    comm.sendrecv(cuda.array(mine), (comm.rank + 1) % size, into, (comm.rank - 1) % size, Tag.PUSH)
    assert (into.memory == np.arange(length) + (comm.rank - 1) % size).all()
    summed = size * np.arange(length) + size * (size - 1) / 2
    started, other = cuda.array(mine), cuda.array(mine)
    requests = [comm.start_all_reduce(started), comm.start_all_reduce(other)]
    assert comm.gather_rows(np.array([comm.rank]))[:, 0].tolist() == list(range(size))
    comm.wait_all(requests)
    assert (started.memory == summed).all()
    assert (other.memory == summed).all()


@pytest.mark.parametrize("agree", ["message", "overlap", "server", "colocated", "all_serve"])
def test_staged_training_equals_one_process(staged: StagedCommunicator, folder: Path, agree: str) -> None:
    if agree == "server" and staged.size == 1:
        pytest.skip("one rank cannot be a server beside a worker")
    assert helpers.equivalence(staged, folder, agree, "all", "float64") < 1e-10
