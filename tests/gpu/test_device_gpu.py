"""The device path on a real GPU. NOT YET RUN: no GPU was available when it was written."""

from __future__ import annotations

import glob
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.comm.base import BFLOAT16, Tag
from hpctrain.comm.device import cuda_aware
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.direct import DirectCommunicator
from hpctrain.comm.device.gpu import Gpu, SlotPool
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.comm.mpi import library
from hpctrain.comm.virtual.world import World
from hpctrain.replica.tensors import as_array, as_tensor
from tests.conftest import Ended, Mpirun

DTYPES = [np.dtype(kind) for kind in (np.float16, np.float32, np.float64)] + [BFLOAT16]
SLOT = 1 << 16  # bytes
LENGTHS = [0, 1, SLOT // 4 - 1, SLOT // 4, SLOT // 4 + 1, 20 * SLOT // 4 + 7]
KINDS: list[type[DeviceCommunicator]] = [StagedCommunicator, DirectCommunicator]
TRAINING = Path(__file__).with_name("training.py")


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu.open(0)


def values(length: int, dtype: np.dtype[Any], rank: int = 0) -> np.ndarray[Any, Any]:
    """Small whole numbers, different on every rank, whose sums are exact in every dtype."""
    return ((np.arange(length) * 7 + rank * 3) % 11 - 5).astype(dtype)


def on_gpu(gpu: Gpu, wanted: np.ndarray[Any, Any]) -> Any:
    """A device array whose values are still being computed when this returns."""
    array = gpu.zeros(wanted.size, wanted.dtype)
    busy = torch.ones(2000, 2000, device="cuda")
    for _ in range(20):
        busy = busy @ busy * 5e-4
    numbers = torch.from_numpy(wanted.astype(np.float64)).cuda()
    as_tensor(array).copy_(numbers + 0 * busy[0, 0].double().nan_to_num(0, 0, 0))
    return array


def host(array: Any) -> np.ndarray[Any, Any]:
    """Its values as a float64 array."""
    copied: np.ndarray[Any, Any] = as_tensor(array).double().cpu().numpy()
    return copied


def run(size: int, kind: type[DeviceCommunicator], gpu: Gpu, body: Callable[[DeviceCommunicator], Any]) -> list[Any]:
    """Run on virtual ranks, which share the device and this process."""
    return World(size).run(lambda inner: body(kind.around(inner, gpu, SlotPool(gpu, SLOT))))


# -- memory --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_torch_and_cupy_share_memory(gpu: Gpu, dtype: np.dtype[Any]) -> None:
    array = gpu.zeros(1000, dtype)
    tensor = as_tensor(array)
    assert tensor.device == torch.device("cuda:0")
    assert tensor.data_ptr() == array.data.ptr
    assert not tensor.any()
    assert tensor.shape == (1000,)
    tensor[10:20] = 3
    part = array[10:20]
    assert part.dtype == dtype
    assert as_tensor(part).data_ptr() == tensor[10:].data_ptr()
    assert as_tensor(part).tolist() == [3.0] * 10
    again = as_array(tensor)
    assert again.data.ptr == array.data.ptr
    assert again.dtype == dtype
    assert as_tensor(gpu.zeros(0, dtype)).numel() == 0


def test_arena_has_its_own_allocation(gpu: Gpu) -> None:
    import cupy

    used = cupy.get_default_memory_pool().used_bytes()
    arrays = [gpu.zeros(1000, np.dtype(np.float32)) for _ in range(3)]
    assert cupy.get_default_memory_pool().used_bytes() == used
    for array in arrays:
        assert len(cupy.cuda.runtime.ipcGetMemHandle(array.data.ptr)) == 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 2, 8])
def test_addition_in_one_pass(gpu: Gpu, dtype: np.dtype[Any], count: int) -> None:
    for length in (0, 1, 1000, 3_000_001):
        parts = [on_gpu(gpu, values(length, dtype, rank)) for rank in range(count)]
        gpu.add_up(parts, parts[0])
        wanted = np.sum([values(length, dtype, rank).astype(np.float64) for rank in range(count)], axis=0)
        np.testing.assert_array_equal(host(parts[0]), wanted)


def test_addition_rounds_like_torch(gpu: Gpu) -> None:
    """Also NaN, infinities, subnormal values and ties."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype, kind in ((BFLOAT16, torch.bfloat16), (np.dtype(np.float16), torch.float16)):
        first, second = gpu.zeros(1 << 16, dtype), gpu.zeros(1 << 16, dtype)
        as_tensor(first).copy_(bits.view(kind))
        as_tensor(second).copy_(bits.flip(0).roll(77).view(kind))
        wanted = (as_tensor(first).float() + as_tensor(second).float()).to(kind)
        gpu.add_up([first, second], first)
        assert torch.equal(as_tensor(first).isnan(), wanted.isnan())
        assert torch.equal(as_tensor(first).nan_to_num(), wanted.nan_to_num())


SANITIZED = """
import numpy as np
from hpctrain.comm.base import BFLOAT16
from hpctrain.comm.device.gpu import Gpu
gpu = Gpu.open(0)
for dtype in (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64), BFLOAT16):
    for length in (1, 255, 256, 100_003):
        parts = [gpu.zeros(length, dtype) for _ in range(3)]
        gpu.add_up(parts, parts[1])
gpu.mark().synchronize()
"""


def test_compute_sanitizer_finds_nothing_in_the_kernel() -> None:
    places = [shutil.which("compute-sanitizer"), *glob.glob("/usr/local/cuda*/bin/compute-sanitizer")]
    tool = next((place for place in places if place), None)
    if tool is None:
        pytest.skip("no compute-sanitizer here")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    argv = [tool, "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# -- transfers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_messages(gpu: Gpu, kind: type[DeviceCommunicator], dtype: np.dtype[Any], length: int) -> None:
    def body(comm: DeviceCommunicator) -> None:
        out, into = on_gpu(gpu, values(length, dtype, comm.rank)), on_gpu(gpu, values(length, dtype, 9))
        if comm.rank == 0:
            comm.send(out, 1, Tag.PUSH)
            comm.start_send(out, 1, Tag.PULL).wait()
        else:
            request = comm.start_recv(into, 0, Tag.PUSH)
            comm.wait_any([request])
            assert request.wait() == length
            np.testing.assert_array_equal(host(into), values(length, dtype).astype(np.float64))
            assert comm.recv(out, 0, Tag.PULL) == length
            np.testing.assert_array_equal(host(out), host(into))

    run(2, kind, gpu, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_collectives(gpu: Gpu, kind: type[DeviceCommunicator], dtype: np.dtype[Any], length: int) -> None:
    summed = np.sum([values(length, dtype, rank).astype(np.float64) for rank in range(3)], axis=0)

    def body(comm: DeviceCommunicator) -> None:
        for algorithm in ("library", "ring"):
            buffer = on_gpu(gpu, values(length, dtype, comm.rank))
            comm.all_reduce(buffer, algorithm=algorithm)
            np.testing.assert_array_equal(host(buffer), summed)
        buffer = on_gpu(gpu, values(length, dtype, comm.rank))
        comm.start_all_reduce(buffer).wait()
        np.testing.assert_array_equal(host(buffer), summed)
        comm.broadcast(other := on_gpu(gpu, values(length, dtype, comm.rank)), root=1)
        np.testing.assert_array_equal(host(other), values(length, dtype, 1).astype(np.float64))
        bounds = [0, length // 3, length // 2, length]
        gathered = on_gpu(gpu, values(length, dtype, comm.rank))
        comm.all_gather(gathered, bounds)
        parts = [values(length, dtype, rank)[bounds[rank] : bounds[rank + 1]] for rank in range(3)]
        np.testing.assert_array_equal(host(gathered), np.concatenate(parts).astype(np.float64))

    run(3, kind, gpu, body)


def test_other_torch_streams_are_waited_for(gpu: Gpu) -> None:
    def body(comm: DeviceCommunicator) -> None:
        buffer = gpu.zeros(1 << 20, np.dtype(np.float32))
        with torch.cuda.stream(torch.cuda.Stream()):
            busy = torch.ones(4000, 4000, device="cuda")
            for _ in range(50):
                busy = busy @ busy * 2.5e-4
            as_tensor(buffer).fill_(comm.rank + 1).mul_((busy[0, 0] > -1).float())
            comm.all_reduce(buffer)
        assert (host(buffer) == 3).all()

    run(2, StagedCommunicator, gpu, body)


# -- MPI -----------------------------------------------------------------------------------------------------
def test_mpi_without_cuda_awareness_is_detected_in_a_subprocess() -> None:
    if library.cuda_support():
        assert cuda_aware.probe(0) is True
    else:
        assert cuda_aware.probe(0) is False


@pytest.mark.parametrize("transport", ["ipc", "staged", "mpi"])
@pytest.mark.parametrize("what", ["equivalence", "bfloat16", "resumes"])
def test_two_ranks_sharing_a_gpu(mpirun: Mpirun, tmp_path: Path, what: str, transport: str) -> None:
    if transport == "mpi" and not library.cuda_support():
        pytest.skip("this MPI is not CUDA-aware")
    ended = mpirun(2, TRAINING, what, str(tmp_path), transport, timeout=110)
    print(ended.out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("what", ["equivalence", "bfloat16", "resumes"])
def test_two_ranks_with_nccl(mpirun: Mpirun, tmp_path: Path, what: str) -> None:
    mpirun(2, TRAINING, what, str(tmp_path), "nccl", timeout=110)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("communicator.device_transport=nccl", "share a GPU; use"),
        ("communicator.cuda_aware=yes", "a process that passed GPU memory to the MPI library"),
    ],
)
def test_wrong_override_is_a_message(mpirun: Mpirun, tmp_path: Path, key: str, words: str) -> None:
    if "nccl" in key and torch.cuda.device_count() > 1:
        pytest.skip("each rank has a GPU of its own")
    if "cuda_aware" in key and library.cuda_support():
        pytest.skip("this MPI is CUDA-aware")
    ended = _train(mpirun, tmp_path, key, status=None)
    assert ended.status
    assert words in ended.err
    assert "Traceback" not in ended.err


def test_command_line_reports_the_device(mpirun: Mpirun, tmp_path: Path) -> None:
    ended = _train(mpirun, tmp_path)
    assert "device buffers are" in ended.out
    assert "test accuracy" in ended.out


def _train(mpirun: Mpirun, folder: Path, *keys: str, status: int | None = 0) -> Ended:
    """Train the main all-reduce job for an epoch on two ranks, on GPUs."""
    program = "import sys; from hpctrain.cli import main; sys.exit(main(sys.argv[1:]))"
    job = Path(__file__).resolve().parents[2] / "jobs" / "all_reduce.toml"
    more = ["device=cuda", "train.epochs=1", f"output={folder}", *keys]
    return mpirun(2, program, "train", str(job), *more, timeout=110, status=status)
