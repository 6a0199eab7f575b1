"""Benches of GPUs: all-reduces by transport, a training step, and the optimizer's pass over an arena.

NOT YET RUN ON A GPU. All functions here are collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from importlib import metadata

import numpy as np
import torch
from torch import nn

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.together import Progress, interleaved
from hpctrain.bench.workload import Load, Workload
from hpctrain.cluster import device_for
from hpctrain.comm.base import Buffer, Communicator
from hpctrain.comm.device.choice import TRANSPORTS, checks
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.gpu import Gpu, SlotPool, usable_gpus
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.errors import ClusterError
from hpctrain.models.resnet18 import resnet18
from hpctrain.replica.optimizer import OptimizerChoice
from hpctrain.replica.replica import Replica
from hpctrain.run.phase import updating
from hpctrain.strategies.all_reduce import AllReduce, AllReduceOptions

SIZES = {"64 KiB": 1 << 16, "1 MiB": 1 << 20, "16 MiB": 1 << 24, "256 MiB": 1 << 28, "1 GiB": 1 << 30}
ON_DEVICE, TO_HOST = "all copy it on the device at once", "all copy it to pinned memory and back at once"
TARGETS = {"ipc": (ON_DEVICE, 50), "staged": (TO_HOST, 80)}  # % of what copies alone reach, for the largest size
RESNET = Load(lambda: resnet18(), (3, 32, 32), 512, 10, 8)
PLAIN, OURS = "plain torch", "hpctrain, one rank"
ELEMENTS = 500_000_000
COPY = "copy"
PASSES = {  # the optimizers, and how many arenas their update reads and writes
    "SGD with momentum": (torch.optim.SGD, {"lr": 1e-4, "momentum": 0.9}, 5),
    "Adam": (torch.optim.Adam, {"lr": 1e-4}, 7),
}


# -- all-reduce ----------------------------------------------------------------------------------------------
def measure_all_reduce(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure float32 all-reduces of device buffers by transport and size, beside what copies alone reach."""
    gpu = Gpu.open(_device(comm).index)
    found = {name: check() for name, check in checks(comm, gpu).items()}
    table = all_reduce_table(comm, gpu, [name for name, why in found.items() if why is None], progress)
    table.notes += [f"{name} is left out: {why}." for name, why in found.items() if why is not None]
    table.notes.append(_about())
    return table


def all_reduce_table(
    comm: Communicator, gpu: Gpu, transports: list[str], progress: Progress, sizes: dict[str, int] | None = None
) -> FigureTable:
    """The table for these transports. Collective."""
    sizes = sizes or SIZES
    table = FigureTable("device_all_reduce", f"all-reduce of {comm.size} ranks' GPU memory, float32, ms", list(sizes))
    table.rows = {name: {} for name in (*transports, ON_DEVICE, TO_HOST)}
    made: list[DeviceCommunicator] = [TRANSPORTS[name].around(comm, gpu, SlotPool(gpu)) for name in transports]
    length = max(sizes.values()) // 4
    arena, other = gpu.zeros(length, np.dtype(np.float32)), gpu.zeros(length, np.dtype(np.float32))
    pinned = [gpu.pinned(length * 4).view(np.float32) for _ in range(2)]
    for label, nbytes in sizes.items():
        progress(f"all-reduce of {label} on GPUs")
        here = slice(0, nbytes // 4)
        ways: dict[str, Callable[[], None]] = {each.transport: partial(each.all_reduce, arena[here]) for each in made}
        ways[ON_DEVICE] = partial(_copy_on_device, gpu, arena[here], other[here])
        ways[TO_HOST] = partial(_copy_to_host, gpu, arena[here], other[here], pinned[0][here], pinned[1][here])
        for name, values in interleaved(comm, ways).items():
            table.rows[name][label] = Sample(tuple(v * 1e3 for v in values), "ms")
    for each in made:
        each.release()
    table.notes += list(_reached(table, list(sizes)[-1]))
    return table


def _copy_on_device(gpu: Gpu, source: Buffer, target: Buffer) -> None:
    gpu.copy(source, target)
    gpu.mark().synchronize()


def _copy_to_host(gpu: Gpu, source: Buffer, target: Buffer, out: Buffer, back: Buffer) -> None:
    gpu.to_host(source, out)
    gpu.from_host(back, target)
    gpu.down.synchronize()
    gpu.up.synchronize()


def _reached(table: FigureTable, label: str) -> list[str]:
    """What the transports reach of what copies alone do, against the targets."""
    lines = []
    for name, (limit, target) in TARGETS.items():
        if name in table.rows:
            share = 100 * table.rows[limit][label].median / table.rows[name][label].median
            lines.append(f"{name}, {label}: {share:.0f} % of the speed at which {limit} (target: {target} %).")
    return lines


# -- step ----------------------------------------------------------------------------------------------------
def measure_step(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure a step of resnet18 in mixed bfloat16 on rank 0 alone, with hpctrain and with plain torch."""
    return _on_rank_0(comm, lambda alone, device: step_table(alone, device, RESNET, progress))


def step_table(comm: Communicator, device: torch.device, load: Load, progress: Progress) -> FigureTable:
    """The table for one rank; blocks of both alternate."""
    table = FigureTable("device_step", "step of resnet18, 32x32, batch 512, bfloat16 autocast, one rank, ms", ["step"])
    plain, ours = PlainStep(comm, load, device), Workload(comm, load, 0.9, device, torch.bfloat16)
    taken: dict[str, list[float]] = {PLAIN: [], OURS: []}
    strategy = AllReduce(AllReduceOptions.model_validate({"exchange": "message"}))
    phase = ours.begin(strategy)
    strategy.join(phase)

    def step() -> None:
        phase.step.round_end = phase.cursor + load.batch
        strategy.before()
        strategy.step(load.batch, ours.compute())

    for block in range(load.blocks + 1):  # the first warms up
        progress(f"step of resnet18, block {block} of {load.blocks}")
        for name, run in {PLAIN: plain.step, OURS: step}.items():
            seconds = _timed(device, run, load.steps)
            taken[name] += [seconds] if block else []
    strategy.leave()
    ours.end(phase)
    table.rows = {name: {"step": Sample(tuple(v * 1e3 for v in values), "ms")} for name, values in taken.items()}
    over = np.median([b / a - 1 for a, b in zip(taken[PLAIN], taken[OURS], strict=True)])
    table.notes.append(f"hpctrain takes {100 * over:+.1f} % (median of pairs; target: at most +3 %).")
    return table


class PlainStep:
    """The same step as one would write it with torch alone."""

    def __init__(self, comm: Communicator, load: Load, device: torch.device) -> None:
        self._work = Workload(comm, load, 0.9, device, torch.bfloat16)
        model = self._work.replica.model
        fused = {"fused": True} if device.type == "cuda" else {}
        self._optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, **fused)

    def step(self) -> None:
        """Forward, backward and update; reads the loss, as hpctrain does."""
        self._optimizer.zero_grad()
        loss = self._work.loss()
        loss.backward()
        self._optimizer.step()
        float(loss.detach())


# -- update --------------------------------------------------------------------------------------------------
def measure_update(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure the optimizer's update of an arena of 500 M elements on rank 0 alone, beside a copy."""

    def table(alone: Communicator, device: torch.device) -> FigureTable:
        fits = int(torch.cuda.mem_get_info(device)[0] // (4 * 8))  # arenas, moments, and the model's own copy
        return update_table(alone, device, min(ELEMENTS, fits), progress)

    return _on_rank_0(comm, table)


def update_table(comm: Communicator, device: torch.device, elements: int, progress: Progress) -> FigureTable:
    """The table for one rank."""
    title = f"update of an arena of {elements / 1e6:.0f} M float32, one rank"
    table = FigureTable("device_update", title, ["ms", "GB/s"])
    _add_row(table, COPY, _copies(device, elements), 2 * 4 * elements)
    for name, (cls, options, arenas) in PASSES.items():
        progress(f"update by {name}")
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(elements, device=device))
        replica = Replica(model)
        replica.place(comm, "rank")
        choice = OptimizerChoice.of(cls, options, True, device)
        update = updating(choice, replica.layout).make(replica.values, 0, replica.layout.length)
        _add_row(table, name, _repeated(device, partial(update.apply, replica.gradient, 1.0)), arenas * 4 * elements)
        replica.release()
        del model, replica, update
    limit = table.rows[COPY]["GB/s"].median
    for name in PASSES:
        share = 100 * table.rows[name]["GB/s"].median / limit
        table.notes.append(f"{name}: {share:.0f} % of the copy's bandwidth (target: 70 %).")
    return table


def _copies(device: torch.device, elements: int) -> list[float]:
    source, target = torch.zeros(elements, device=device), torch.empty(elements, device=device)
    return _repeated(device, partial(target.copy_, source))


def _add_row(table: FigureTable, name: str, seconds: list[float], nbytes: int) -> None:
    table.rows[name] = {
        "ms": Sample(tuple(1e3 * each for each in seconds), "ms"),
        "GB/s": Sample(tuple(nbytes / each / 1e9 for each in seconds), "GB/s"),
    }


def _repeated(device: torch.device, action: Callable[[], object], times: int = 10) -> list[float]:
    _timed(device, action, 2)
    return [_timed(device, action, 3) for _ in range(times)]


def _timed(device: torch.device, action: Callable[[], object], count: int) -> float:
    """Seconds per call, over `count` calls and until the device has finished."""
    _finish(device)
    began = time.perf_counter()
    for _ in range(count):
        action()
    _finish(device)
    return (time.perf_counter() - began) / count


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _on_rank_0(comm: Communicator, make: Callable[[Communicator, torch.device], FigureTable]) -> FigureTable:
    """The table that rank 0 makes on its GPU, alone; empty on other ranks, which wait."""
    device = _device(comm)
    alone = comm.split(comm.rank, 0)
    assert alone is not None
    table = FigureTable("", "", [])
    if comm.rank == 0:
        table = make(StagedCommunicator.around(alone, Gpu.open(device.index)), device)
        table.notes.append(_about())
    comm.barrier()
    return table


# -- what was measured ---------------------------------------------------------------------------------------
def _device(comm: Communicator) -> torch.device:
    """This rank's GPU. Raises ClusterError, on all ranks, if a rank has none."""
    gpus, why = usable_gpus()
    if 0 in comm.gather_json(gpus):
        error = ClusterError(f"hpctrain bench device: {why or 'a rank has no GPU that torch can use'}")
        error.everywhere = True
        raise error
    device = torch.device(device_for("cuda", comm.local_rank, gpus))
    torch.cuda.set_device(device)
    return device


def _about() -> str:
    """The device and the software, in one sentence with the date."""
    cupy = next((each for each in ("cupy-cuda13x", "cupy-cuda12x", "cupy") if _version(each)), "cupy")
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__} for CUDA {torch.version.cuda}, {cupy} "
        f"{_version(cupy) or 'of unknown version'}, {time.strftime('%-d %B %Y')}."
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
