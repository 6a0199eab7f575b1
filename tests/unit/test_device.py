"""The device path without a device: the transfer paths, over virtual ranks and a stand-in for CuPy.

The stand-in runs nothing before it is waited for, so a missing wait gives wrong values.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hpctrain
from hpctrain.comm.base import BFLOAT16, Communicator, Tag
from hpctrain.comm.connect import place_arenas
from hpctrain.comm.device import cuda_aware
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.direct import DirectCommunicator
from hpctrain.comm.device.gpu import Gpu, SlotPool
from hpctrain.comm.device.staged import SLOTS, StagedCommunicator
from hpctrain.comm.mpi import library
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.replica.tensors import as_tensor
from tests import helpers
from tests.device_ranks import SLOT, read, run, same, total, values
from tests.marks import mostly_slow, slow
from tests.stand_in_cupy import Array, Cuda

DTYPES = [np.dtype(kind) for kind in (np.float16, np.float32, np.float64, np.int64)] + [BFLOAT16]
PER_SLOT = SLOT // 4
LENGTHS = [0, 1, PER_SLOT - 1, PER_SLOT, PER_SLOT + 1, 2 * PER_SLOT, 3 * PER_SLOT, 4 * PER_SLOT + 3, 9 * PER_SLOT]
KINDS: list[type[DeviceCommunicator]] = [StagedCommunicator, DirectCommunicator]
ALGORITHMS = ["library", "ring", "halving_doubling", "tree", "hierarchical"]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# -- messages ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("receive", ["recv", "start_recv", "polled"])
@pytest.mark.parametrize("send", ["send", "start_send"])
@pytest.mark.parametrize("length", LENGTHS)
def test_messages_of_every_length(kind: type[DeviceCommunicator], send: str, receive: str, length: int) -> None:
    wanted = values(length, np.dtype(np.float32))

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        if comm.rank == 0:
            buffer = cuda.array(wanted)
            if send == "send":
                comm.send(buffer, 1, Tag.PUSH)
            else:
                comm.start_send(buffer, 1, Tag.PUSH).wait()
            return
        buffer = cuda.array(values(length, np.dtype(np.float32), 5))
        if receive == "recv":
            elements = comm.recv(buffer, 0, Tag.PUSH)
        else:
            request = comm.start_recv(buffer, 0, Tag.PUSH)
            if receive == "polled":
                comm.wait_any([request])
            elements = request.wait()
        same(buffer.memory, wanted)
        assert elements == length

    run(2, kind, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_messages_of_every_dtype(kind: type[DeviceCommunicator], dtype: np.dtype[Any]) -> None:
    wanted = values(100, dtype)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        if comm.rank == 0:
            comm.send(cuda.array(wanted), 1, Tag.PUSH)
        else:
            buffer = cuda.array(np.zeros_like(wanted))
            comm.recv(buffer, 0, Tag.PUSH)
            same(buffer.memory, wanted)

    run(2, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_receive_waits_for_pending_reads_of_its_buffer(kind: type[DeviceCommunicator]) -> None:
    old, new = values(50, np.dtype(np.float32), 1), values(50, np.dtype(np.float32), 2)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        verbs: list[Callable[[Array], Any]] = [
            lambda b: comm.recv(b, 0, Tag.PUSH),
            lambda b: comm.start_recv(b, 0, Tag.PUSH).wait(),
            lambda b: comm.broadcast(b),
        ]
        for index, verb in enumerate(verbs):
            if comm.rank == 0:
                array = cuda.array(new)
                comm.broadcast(array) if index == 2 else comm.send(array, 1, Tag.PUSH)
                continue
            buffer, seen = cuda.array(old), np.zeros_like(old)
            cuda.compute.add(partial(np.copyto, seen, buffer.memory))
            verb(buffer)
            same(seen, old)
            same(buffer.memory, new)

    run(2, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_a_sender_keep_their_order(kind: type[DeviceCommunicator]) -> None:
    lengths = [100, 3, 50, 0, 17]

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        arrays = [cuda.array(values(n, np.dtype(np.float32), i + comm.rank)) for i, n in enumerate(lengths)]
        if comm.rank == 0:
            comm.wait_all([comm.start_send(array, 1, Tag.PUSH) for array in arrays])
            return
        requests = [comm.start_recv(array, 0, Tag.PUSH) for array in arrays]
        for request in reversed(requests):
            request.wait()
        for index, array in enumerate(arrays):
            same(array.memory, values(lengths[index], np.dtype(np.float32), index))

    run(2, kind, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_ranks_send_and_receive_at_once(kind: type[DeviceCommunicator], size: int) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        left, right = (comm.rank - 1) % size, (comm.rank + 1) % size
        out = cuda.array(values(60 + comm.rank, np.dtype(np.float64), comm.rank))
        into = cuda.array(np.zeros(60 + left))
        elements = comm.sendrecv(out, right, into, left, Tag.PUSH)
        same(into.memory, values(60 + left, np.dtype(np.float64), left))
        assert elements == 60 + left

    run(size, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_message_may_be_shorter_than_its_buffer(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        if comm.rank == 1:
            comm.send(cuda.array(values(5, np.dtype(np.float32))), 0, Tag.PUSH)
        else:
            buffer = cuda.array(np.zeros(9, np.float32))
            assert comm.recv(buffer, 1, Tag.PUSH) == 5
            same(buffer.memory[:5], values(5, np.dtype(np.float32)))
            same(buffer.memory[5:], np.zeros(4, np.float32))

    run(2, kind, body)


def test_long_staged_message_needs_a_buffer_of_its_length() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(np.zeros(5 * PER_SLOT, np.float32))
        if comm.rank == 0:
            comm.send(buffer[: PER_SLOT + 4], 1, Tag.PUSH)
        else:
            with pytest.raises(ValueError, match="its own length"):
                comm.recv(buffer[: 2 * PER_SLOT], 0, Tag.PUSH)

    run(2, StagedCommunicator, body)


@pytest.mark.parametrize("kind", KINDS)
def test_host_and_device_messages_are_waited_for_together(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        if comm.rank == 0:
            comm.sleep(1e-3)
            comm.send(cuda.array(values(70, np.dtype(np.float32))), 1, Tag.PUSH)
            comm.sleep(1e-3)
            comm.send(np.ones(3), 1, Tag.CONTROL)
            return
        host, device = np.zeros(3), cuda.array(np.zeros(70, np.float32))
        requests = [comm.start_recv(host, 0, Tag.CONTROL), comm.start_recv(device, 0, Tag.PUSH)]
        assert comm.wait_any(requests) == 1
        same(device.memory, values(70, np.dtype(np.float32)))
        assert comm.wait_any(requests[:1]) == 0
        assert host.tolist() == [1, 1, 1]

    run(2, kind, body)


def test_testing_a_request_does_not_wait_for_its_copy() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        if comm.rank == 0:
            comm.send(cuda.array(values(3 * PER_SLOT, np.dtype(np.float32))), 1, Tag.PUSH)
            return
        buffer = cuda.array(np.zeros(3 * PER_SLOT, np.float32))
        cuda.compute.synchronize()
        request = comm.start_recv(buffer, 0, Tag.PUSH)
        answers = [request.test()]
        while not answers[-1]:
            comm.sleep(1e-6)
            answers.append(request.test())
        assert len(answers) > 3
        same(buffer.memory, values(3 * PER_SLOT, np.dtype(np.float32)))

    run(2, StagedCommunicator, body)


@pytest.mark.parametrize("kind", KINDS)
def test_receive_can_be_cancelled(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(np.zeros(100, np.float32))
        if comm.rank == 0:
            comm.start_recv(buffer, 1, Tag.PUSH).cancel()
            comm.barrier()
            comm.recv(buffer, 1, Tag.PUSH)
            same(buffer.memory, values(100, np.dtype(np.float32)))
        else:
            comm.barrier()
            comm.send(cuda.array(values(100, np.dtype(np.float32))), 0, Tag.PUSH)

    run(2, kind, body)


# -- collectives ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("algorithm", ["library", "ring"])
def test_all_reduce_of_every_length(kind: type[DeviceCommunicator], size: int, length: int, algorithm: str) -> None:
    wanted = total(length, np.float32, range(size))

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(length, np.dtype(np.float32), comm.rank))
        comm.all_reduce(buffer, algorithm=algorithm)
        same(read(cuda, buffer), wanted)

    run(size, kind, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["sum", "max", "min"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_reduce_of_every_dtype(
    kind: type[DeviceCommunicator], dtype: np.dtype[Any], operation: Any, algorithm: str
) -> None:
    rows = np.array([values(75, dtype, rank).astype(np.float64) for rank in range(4)])
    wanted = getattr(rows, operation)(axis=0).astype(dtype)

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(75, dtype, comm.rank))
        comm.all_reduce(buffer, operation, algorithm)
        same(read(cuda, buffer), wanted)

    run(4, kind, body, nodes=(0, 0, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_collectives(kind: type[DeviceCommunicator], dtype: np.dtype[Any]) -> None:
    bounds = [0, 40, 40, 100]
    summed = total(100, dtype, range(3))

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        mine = slice(bounds[comm.rank], bounds[comm.rank + 1])
        buffer = cuda.array(values(100, dtype, comm.rank))
        comm.broadcast(buffer, root=2)
        same(read(cuda, buffer), values(100, dtype, 2))
        gathered = cuda.array(np.zeros(100, dtype))
        gathered.owner.compute.add(lambda: np.copyto(gathered.memory[mine], summed[mine]))
        comm.all_gather(gathered, bounds)
        same(read(cuda, gathered), summed)

    run(3, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_host_arrays_pass_through_unchanged(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = np.full(3, comm.rank + 1.0)
        comm.all_reduce(buffer)
        assert buffer.tolist() == [3, 3, 3]
        request = comm.start_all_reduce(buffer)
        request.wait()
        assert buffer.tolist() == [6, 6, 6]
        assert comm.gather_json({"rank": comm.rank}) == [{"rank": 0}, {"rank": 1}]
        assert comm.broadcast_json("hello") == "hello"
        assert not cuda.pinned

    run(2, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_started_all_reduces_keep_their_order_among_other_collectives(kind: type[DeviceCommunicator]) -> None:
    """Only work queued before the start is waited for, and no other collective comes in between."""

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        for _ in range(2):
            buffers = [cuda.array(values(n, np.dtype(np.float32), comm.rank)) for n in (40, 7, 90)]
            requests = []
            for buffer in buffers:
                requests.append(comm.start_all_reduce(buffer))
                assert comm.gather_rows(np.array([comm.rank])).tolist() == [[0], [1], [2]]
            if comm.rank == 1:
                requests.reverse()
            comm.wait_any(requests)
            comm.wait_all(requests)
            assert all(request.test() for request in requests)
            for buffer in buffers:
                same(buffer.memory, total(buffer.size, np.float32, range(3)))

    run(3, kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_started_all_reduce_does_not_wait_for_later_work(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        later: list[str] = []
        buffer = cuda.array(values(20, np.dtype(np.float32)))
        request = comm.start_all_reduce(buffer)
        cuda.compute.add(lambda: later.append("the rest of backward"))
        request.wait()
        assert later == []
        same(buffer.memory, 2 * values(20, np.dtype(np.float32)))

    run(2, kind, body)


def test_blocking_verbs_use_few_slots() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> int:
        buffer = cuda.array(np.zeros(50 * PER_SLOT, np.float32))
        comm.all_reduce(buffer)
        comm.broadcast(buffer)
        if comm.rank == 0:
            comm.send(buffer, 1, Tag.PUSH)
        else:
            comm.recv(buffer, 0, Tag.PUSH)
        return len(cuda.pinned)

    assert run(2, StagedCommunicator, body) == [SLOTS, SLOTS]


@pytest.mark.parametrize("kind", KINDS)
def test_single_rank_copies_nothing(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        buffer = cuda.array(values(100, np.dtype(np.float32)))
        comm.all_reduce(buffer)
        assert comm.start_all_reduce(buffer).test()
        assert comm.start_all_reduce(buffer).wait() == 0
        comm.broadcast(buffer)
        comm.all_gather(buffer, [0, 100])
        same(read(cuda, buffer), values(100, np.dtype(np.float32)))
        assert not cuda.pinned

    run(1, kind, body)


def test_copies_overlap_mpi() -> None:
    """While one piece is with MPI, the next is already being copied, and the previous one copied back."""

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        seen: list[tuple[int, int]] = []
        inner, down, up = comm.inner, comm.gpu.down, comm.gpu.up
        all_reduce = inner.all_reduce

        def watched(*arguments: Any) -> None:
            seen.append((len(down.queued), len(up.queued)))
            all_reduce(*arguments)

        setattr(inner, "all_reduce", watched)  # noqa: B010 (mypy)
        comm.all_reduce(cuda.array(np.zeros(6 * PER_SLOT, np.float32)))
        started = [piece for piece, _ in seen]
        assert started[0] == SLOTS
        assert [stored for _, stored in seen] == [0, 1, 2, 3, 4, 5]

    run(2, StagedCommunicator, body)


# -- the rest of a communicator ------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_parts_lanes_and_threads_keep_the_transfer_path(kind: type[DeviceCommunicator]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        assert comm.split(None) is None if comm.rank == 2 else isinstance(comm.split(0), kind)
        lane = comm.lane(1)
        assert type(lane) is kind
        assert lane.inner is not comm.inner
        used = len(cuda.used)
        assert comm.spawn(lambda: comm.rank * 10).join() == comm.rank * 10
        assert cuda.used[used:] == [0], "a thread begins with another device"
        part = comm.split(comm.rank % 2, -comm.rank)
        assert part is not None
        buffer = cuda.array(values(30, np.dtype(np.float32), comm.rank))
        part.all_reduce(buffer)
        same(read(cuda, buffer), total(30, np.float32, range(comm.rank % 2, 3, 2)))
        part.free()

    run(3, kind, body)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
def test_private_arenas_are_on_the_device_and_visible_to_torch(dtype: np.dtype[Any]) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        arena = comm.arena(10, dtype)
        assert isinstance(arena.mine, Array)
        assert arena.mine.dtype == dtype
        tensor = as_tensor(arena.mine)
        assert tensor.tolist() == [0.0] * 10
        tensor[3] = 7
        assert float(arena.mine.memory[3]) == 7
        assert as_tensor(comm.arena(0, dtype).mine).numel() == 0
        comm.notify(arena)
        comm.wait(arena)
        arena.free()

    run(2, StagedCommunicator, body)


def test_node_shared_memory_is_on_the_host() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        arena = comm.arena(2, np.dtype(np.float64), "node")
        arena.mine[:] = comm.rank
        comm.notify(arena)
        comm.wait(arena)
        assert [part[0] for part in arena.parts] == [0, 1]

    run(2, StagedCommunicator, body)


# -- strategies ----------------------------------------------------------------------------------------------
AGREE = ["message", "ring", "tree", "overlap", "server", "servers", "colocated", "all_serve"]


@pytest.mark.parametrize("agree", mostly_slow(AGREE, AGREE[::3]))
@pytest.mark.parametrize("recipe", ["all", slow("momentum")])
def test_staged_training_equals_one_process(tmp_path: Path, agree: str, recipe: str) -> None:
    found = run(4, StagedCommunicator, lambda comm, _: helpers.equivalence(comm, tmp_path, agree, recipe, "float64"))
    assert max(found) < 1e-10


@pytest.mark.parametrize("agree", ["message", "server", "colocated"])
def test_direct_training_equals_one_process(tmp_path: Path, agree: str) -> None:
    found = run(3, DirectCommunicator, lambda comm, _: helpers.equivalence(comm, tmp_path, agree, "all", "float64"))
    assert max(found) < 1e-10


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "all_reduce", "exchange": "message"},
        {"name": "parameter_server", "mode": "sync"},
        {"name": "parameter_server", "mode": "async", "delay_compensation": "adaptive"},
    ],
)
def test_staged_training_has_the_same_bits_as_on_the_host(
    tmp_path: Path, strategy: dict[str, Any], precision: str
) -> None:
    job = helpers.make_job(tmp_path, strategy=strategy, train={"precision": precision})
    host = World(2).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
    staged = run(2, StagedCommunicator, lambda comm, _: helpers.vector(helpers.quiet_train(comm, job).model))
    np.testing.assert_array_equal(host, staged)


@pytest.mark.parametrize("colocated", [False, True])
def test_shards_in_pinned_memory_give_the_same_bits(tmp_path: Path, colocated: bool) -> None:
    def parameters(shards: str) -> Any:
        strategy = {"name": "parameter_server", "mode": "sync", "colocated": colocated, "shards": shards}
        job = helpers.make_job(tmp_path, strategy=strategy, optimizer={"name": "Adam", "lr": 0.01})
        return run(2, StagedCommunicator, lambda comm, _: helpers.vector(helpers.quiet_train(comm, job).model))

    np.testing.assert_array_equal(parameters("host"), parameters("device"))


@pytest.mark.parametrize("way", ["blocking", "started", "polled"])
@pytest.mark.parametrize("length", LENGTHS)
def test_messages_between_device_and_pinned_memory(way: str, length: int) -> None:
    wanted = values(length, np.dtype(np.float32))

    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        pinned = comm.arena(length, np.dtype(np.float32), "host").mine
        if comm.rank == 0:
            comm.send(cuda.array(wanted), 1, Tag.PUSH)
            buffer = cuda.array(values(length, np.dtype(np.float32), 5))
            assert comm.recv(buffer, 1, Tag.PULL) == length
            same(read(cuda, buffer), wanted)
        elif way == "blocking":
            assert comm.recv(pinned, 0, Tag.PUSH) == length
            comm.send(pinned, 0, Tag.PULL)
        else:
            request = comm.start_recv(pinned, 0, Tag.PUSH)
            if way == "polled":
                comm.wait_any([request])
            assert request.wait() == length
            comm.start_send(pinned, 0, Tag.PULL).wait()
        if comm.rank == 1:
            same(np.asarray(pinned), wanted)

    run(2, StagedCommunicator, body)


def test_receive_into_pinned_memory_can_be_cancelled() -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        pinned = comm.arena(100, np.dtype(np.float32), "host").mine
        if comm.rank == 0:
            comm.start_recv(pinned, 1, Tag.PUSH).cancel()
            comm.barrier()
            comm.recv(pinned, 1, Tag.PUSH)
            same(np.asarray(pinned), values(100, np.dtype(np.float32)))
        else:
            comm.barrier()
            comm.send(cuda.array(values(100, np.dtype(np.float32))), 0, Tag.PUSH)

    run(2, StagedCommunicator, body)


def test_run_on_the_device_resumes_to_the_same_bits(tmp_path: Path) -> None:
    strategy = {"name": "parameter_server", "mode": "sync"}
    optimizer = {"name": "Adam", "lr": 0.01}
    run(3, StagedCommunicator, lambda comm, _: helpers.resumed_bits(comm, tmp_path, strategy, optimizer))


# -- whether MPI is CUDA-aware -------------------------------------------------------------------------------
class Ranks:
    """A communicator of which only the set-up is used."""

    rank, concurrent = 0, True

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers

    def gather_json(self, value: Any) -> list[Any]:
        return self.answers

    def broadcast_json(self, value: Any) -> Any:
        return value


@pytest.mark.parametrize(
    ("answers", "wanted", "worked", "aware"),
    [
        ([True, True], "auto", None, True),
        ([True, False], "auto", None, False),
        ([None, None], "auto", True, True),
        ([True, None], "auto", False, False),
        ([False, False], "yes", True, True),
        ([True, True], "yes", None, True),
        ([True, True], "no", None, False),
    ],
)
def test_whether_mpi_gets_device_pointers(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], wanted: str, worked: bool | None, aware: bool
) -> None:
    def probe(index: int) -> bool:
        assert worked is not None, "tried out although the answer was known"
        return worked

    monkeypatch.setattr(cuda_aware, "probe", probe)
    comm: Any = Ranks(answers)
    found, why = cuda_aware.cuda_aware(comm, wanted, 0)
    assert found is aware
    assert why


def test_wrong_claim_of_cuda_awareness_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_aware, "probe", lambda index: False)
    comm: Any = Ranks([False, None])
    with pytest.raises(ClusterError, match=r'cuda_aware = "yes", but a process that passed GPU memory .* failed; use'):
        cuda_aware.cuda_aware(comm, "yes", 0)


@pytest.mark.parametrize(
    ("program", "survives"),
    [
        ("from hpctrain.comm.mpi import start; print({index})", True),
        ("raise SystemExit(1)", False),
        ("import ctypes; ctypes.string_at(0)", False),
        ("import time; time.sleep(60)", False),
    ],
)
def test_crashing_trial_kills_only_itself(program: str, survives: bool) -> None:
    assert cuda_aware.probe(0, program, seconds=10.0 if survives else 2.0) is survives


def test_trial_fails_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda_aware.probe(0) is False


def test_trial_sends_the_memory_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda()
    monkeypatch.setattr(Gpu, "open", lambda index: cuda.gpu())
    monkeypatch.setattr(Array, "fill", lambda self, value: self.memory.fill(value), raising=False)
    monkeypatch.setattr(Array, "sum", lambda self: self.memory.sum(), raising=False)
    monkeypatch.setattr(library, "try_on_self", lambda out, into: np.copyto(into.memory, 2 * out.memory))
    cuda_aware.trial(0)
    monkeypatch.setattr(library, "try_on_self", lambda out, into: None)
    with pytest.raises(SystemExit):
        cuda_aware.trial(0)


def test_wheels_report_no_cuda_awareness() -> None:
    if not any(name in library.name() for name in ("MPICH Version:      5.0.2", "Open MPI v5.0.11")):
        pytest.skip("another MPI")
    assert library.cuda_support() is False
    out, into = np.ones(4), np.zeros(4)
    library.try_on_self(out, into)
    assert into.tolist() == [2, 2, 2, 2]


def test_mixing_ranks_with_and_without_a_gpu_is_refused() -> None:
    job = Job(trace={"enabled": False})

    def rank(comm: Communicator) -> str:
        device = torch.device("cuda:0" if comm.rank else "cpu")
        with pytest.raises(ClusterError) as caught:
            place_arenas(job, comm, device)
        assert caught.value.everywhere
        return str(caught.value)

    assert all(r"ranks [0] have no GPU" in text for text in World(3).run(rank))


def test_communicator_is_not_wrapped_on_the_cpu() -> None:
    job = Job(device="cpu")
    assert all(World(2).run(lambda comm: place_arenas(job, comm, torch.device("cpu")) == (comm, None)))


def test_importing_device_loads_neither_cupy_nor_torch() -> None:
    code = "import sys, hpctrain.comm.device.choice; print(*sorted({'cupy', 'torch', 'mpi4py'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(Path(hpctrain.__file__).parents[1])}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


def test_slots_are_shared_by_threads() -> None:
    cuda = Cuda()
    pool = SlotPool(cuda.gpu(), SLOT)

    def take_and_give() -> None:
        for _ in range(200):
            pool.give(pool.take(2))

    threads = [threading.Thread(target=take_and_give) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pool._free) == pool.made <= 8
