"""Chooses the transport of device buffers at the start of a run: which ones work here, and which is the fastest.

NOT YET RUN ON A GPU. No transport is used before it has given a right sum here. Device pointers are passed to an MPI
library that does not say that it is CUDA-aware in a child process first, for that could end the process.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hpctrain.comm.base import Buffer, Communicator
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.cuda_aware import cuda_aware
from hpctrain.comm.device.direct import DirectCommunicator
from hpctrain.comm.device.gpu import Gpu
from hpctrain.comm.device.ipc import IpcCommunicator
from hpctrain.comm.device.nccl import NcclCommunicator, connect, new_name
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.errors import ClusterError
from hpctrain.trace.events import TransportChosen

# In order of preference, for those that are equally fast.
TRANSPORTS: dict[str, type[DeviceCommunicator]] = {
    each.transport: each for each in (IpcCommunicator, NcclCommunicator, DirectCommunicator, StagedCommunicator)
}
WORDS = {
    "ipc": "summed through CUDA IPC",
    "nccl": "summed by NCCL",
    "mpi": "passed directly to MPI",
    "staged": "staged through pinned memory",
}
LENGTH = 1 << 22  # float32 elements of the all-reduce that is timed: 16 MiB
ROUNDS = 5
CLEARLY = 0.9  # a transport is preferred to an earlier one if it takes less than this share of its time


@dataclass
class TransportChoice:
    """The chosen transport. `obstacles`: why each of the others cannot be used here. `seconds`: for an all-reduce of
    16 MiB, for those that were measured. `asked`: the job names it."""

    name: str
    obstacles: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked: bool = False

    def __str__(self) -> str:
        times = [f"{name} {1000 * each:.1f} ms" for name, each in self.seconds.items()]
        measured = [f"16 MiB in {', '.join(times)}"] if times else []
        asked = [f'communicator.device_transport = "{self.name}"'] if self.asked else []
        obstacles = [f"not {name}, because {why}" for name, why in self.obstacles.items()]
        return f"device buffers are {WORDS[self.name]} ({'; '.join(asked + measured + obstacles) or 'one rank'})"


def open_device(comm: Communicator, index: int, wanted: str = "auto", aware: str = "auto") -> tuple[Communicator, str]:
    """The communicator for arenas on cuda:`index`, and what was chosen, as a sentence. Collective over `comm`.

    `wanted`: `communicator.device_transport`; `aware`: `communicator.cuda_aware`. The choice is an event in the trace.
    Raises ClusterError, on all ranks, if the wanted transport cannot be used here.
    """
    gpu = Gpu.open(index)
    choice = choose(comm, gpu, wanted, aware)
    comm.recorder.event(TransportChosen(choice.name, str(choice)))
    return TRANSPORTS[choice.name].around(comm, gpu), str(choice)


def choose(comm: Communicator, gpu: Gpu, wanted: str, aware: str) -> TransportChoice:
    """Which transport to use. The same on all ranks. Collective. Raises ClusterError like `open_device`."""
    if comm.size == 1:  # it copies nothing
        return TransportChoice("staged")
    if wanted == "staged":
        return TransportChoice(wanted, asked=True)
    if wanted != "auto":
        why = checks(comm, gpu, aware)[wanted]()
        if why is None:
            measure(TRANSPORTS[wanted].around(comm, gpu), rounds=1)
            return TransportChoice(wanted, asked=True)
        raise _everywhere(
            f'communicator.device_transport = "{wanted}" cannot be used here: {why}; use "auto" or another transport'
        )
    found = {name: check() for name, check in checks(comm, gpu, aware).items()}
    usable = [name for name, why in found.items() if why is None]
    obstacles = {name: why for name, why in found.items() if why is not None}
    if len(usable) == 1:
        return TransportChoice(usable[0], obstacles)
    seconds: dict[str, float] = {}
    for name in usable:
        try:
            seconds[name] = measure(TRANSPORTS[name].around(comm, gpu))
        except WrongSumError:
            if name == "staged":
                raise
            obstacles[name] = "its sums were wrong"
    best = next(iter(seconds))
    for name in seconds:
        if seconds[name] < CLEARLY * seconds[best]:
            best = name
    return TransportChoice(best, obstacles, seconds)


def checks(comm: Communicator, gpu: Gpu, aware: str = "auto") -> dict[str, Callable[[], str | None]]:
    """For each transport, why it cannot be used here, as a clause; None if it can. Each is collective."""
    return {
        "ipc": lambda: why_not_ipc(comm, gpu),
        "nccl": lambda: why_not_nccl(comm, gpu),
        "mpi": lambda: why_not_mpi(comm, gpu, aware),
        "staged": lambda: None,
    }


class WrongSumError(ClusterError):
    """A transport gave a wrong sum. All ranks raise it."""

    everywhere = True


def measure(comm: DeviceCommunicator, rounds: int = ROUNDS, length: int = LENGTH) -> float:
    """Seconds that an all-reduce of `length` float32 takes on the slowest rank: the median of `rounds`, after one that
    is checked. Releases `comm`. Collective. Raises WrongSumError."""
    arena = comm.arena(length, np.dtype(np.float32))
    times = np.zeros(rounds)
    try:  # any other error is one rank's alone: then nothing collective may follow
        comm.gpu.fill(arena.mine, comm.rank + 1)
        comm.all_reduce(arena.mine)
        right = comm.gpu.all_equal(arena.mine, comm.size * (comm.size + 1) / 2)
        if not all(comm.gather_json(right)):
            comm.release()
            raise WrongSumError(
                f"the transport {comm.transport} gave a wrong sum of device buffers; choose another "
                "one with communicator.device_transport, and please report this"
            )
        for index in range(rounds):
            comm.barrier()
            began = comm.now()
            comm.all_reduce(arena.mine)
            times[index] = (comm.now() - began) / 1e9
    finally:
        arena.free()
    taken = float(statistics.median(comm.gather_rows(times).max(axis=0)))
    comm.release()
    return taken


def why_not_ipc(comm: Communicator, gpu: Gpu) -> str | None:
    """Why the node's ranks cannot read each other's device memory, as a clause; None if they can. Collective."""
    if not comm.concurrent:
        return "virtual ranks share one process"
    counts = {comm.nodes.count(node) for node in comm.nodes}
    if len(counts) > 1:
        return "the nodes have different numbers of ranks"
    if counts == {1}:
        return "there is one rank on each node"
    return _try_ipc(comm, gpu)


def _try_ipc(comm: Communicator, gpu: Gpu) -> str | None:
    """Open what each neighbour has allocated, and read its rank. No step that may fail on one rank alone waits for
    others."""
    arena = gpu.zeros(64, np.dtype(np.float32))
    mine = _attempt(lambda: _show(gpu, arena, comm.rank))
    handles = comm.gather_json(mine)
    wrong = [text for done, text in handles if not done]
    if not wrong:
        opened: list[int] = []
        here = [rank for rank in range(comm.size) if comm.nodes[rank] == comm.nodes[comm.rank] and rank != comm.rank]
        seen = _attempt(lambda: _look(gpu, {rank: bytes.fromhex(handles[rank][1]) for rank in here}, opened))
        wrong = [text for done, text in comm.gather_json(seen) if not done]
        for base in opened:
            gpu.close_handle(base)
        comm.barrier()  # nobody has it open any more
    return f"a rank cannot open another's device memory ({wrong[0]})" if wrong else None


def _show(gpu: Gpu, arena: Buffer, rank: int) -> str:
    """Its handle. Also compiles and tries the kernel, which needs NVRTC."""
    gpu.fill(arena, rank / 2)
    gpu.add_up([arena, arena], arena)
    gpu.mark().synchronize()
    return gpu.handle_of(arena.data.mem.ptr).hex()


def _look(gpu: Gpu, handles: dict[int, bytes], opened: list[int]) -> str:
    for rank, handle in handles.items():
        opened.append(gpu.open_handle(handle))
        view = gpu.at(opened[-1], 256, 0, 64, np.dtype(np.float32))
        if not gpu.all_equal(view, rank):
            raise ValueError(f"the memory of rank {rank} has other contents")
    return ""


def _attempt(action: Callable[[], str]) -> tuple[bool, str]:
    """(True, its result), or (False, the error): CuPy raises exceptions of many classes."""
    try:
        return True, action()
    except Exception as error:
        return False, f"{type(error).__name__}: {error}"


def why_not_nccl(comm: Communicator, gpu: Gpu) -> str | None:
    """Why NCCL cannot be used, as a clause; None if it can. Collective."""
    if not comm.concurrent:
        return "virtual ranks share one process"
    if not all(comm.gather_json(gpu.nccl() is not None)):
        return "CuPy finds no NCCL"
    devices = list(zip(comm.nodes, comm.gather_json(gpu.identity()), strict=True))
    for rank, device in enumerate(devices):
        first = devices.index(device)
        if first != rank:
            return f"ranks {comm.members[first]} and {comm.members[rank]} share a GPU"
    return _try_nccl(comm, gpu.nccl())


def _try_nccl(comm: Communicator, module: Any) -> str | None:
    """Connect the ranks and part again: NCCL needs shared memory, a network interface, and one version."""
    made = _attempt(lambda: json.dumps(new_name(module)) if comm.rank == 0 else "")
    named, name = comm.broadcast_json(made)
    if not named:
        return f"NCCL does not start ({name})"
    ended = _attempt(lambda: str(connect(module, comm.size, comm.rank, json.loads(name)).destroy()))
    wrong = [text for done, text in comm.gather_json(ended) if not done]
    return f"NCCL does not connect the ranks ({wrong[0]})" if wrong else None


def why_not_mpi(comm: Communicator, gpu: Gpu, aware: str) -> str | None:
    """Why MPI must not get device pointers, as a clause; None if it may. Collective. Raises like `cuda_aware`."""
    may, why = cuda_aware(comm, aware, gpu.index)
    return None if may else why


def _everywhere(text: str) -> ClusterError:
    error = ClusterError(text)
    error.everywhere = True
    return error
