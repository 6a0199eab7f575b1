"""Bench of all-reduces by algorithm and size, beside other libraries. All functions here are collective."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
import torch.distributed

from hpctrain.bench.comparison import Comparison, Goal, difference, ratio
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.rivals import process_group
from hpctrain.comm.base import Arena, Communicator
from hpctrain.replica.layout import Layout, slice_bounds
from hpctrain.replica.tensors import as_tensor

Progress = Callable[[str], None]
SIZES = {"64 KiB": 2**16, "1 MiB": 2**20, "8 MiB": 2**23, "64 MiB": 2**26}
ALGORITHMS = ("library", "ring", "halving_doubling", "tree", "hierarchical")
SHARED = "shared windows"
PLAIN, GLOO = "the MPI library, called plainly", "gloo"
LONGER, SLACK_US, LARGE = 1.05, 5.0, 2**20  # what `library` may take against PLAIN: from LARGE bytes on; below it
SECONDS = 6.0  # per size, for all algorithms together
STRETCH = 0.02  # seconds of calls measured as one, because ranks do not start at exactly the same time
FEWEST = 5


# -- all-reduce ------------------------------------------------------------------------------------------------
def measure_all_reduce(comm: Communicator, progress: Progress) -> FigureTable:
    """Measure float32 all-reduces by algorithm and size."""
    table = FigureTable("all_reduce", f"all-reduce of {comm.size} ranks, float32, ms", list(SIZES))
    rivals = (PLAIN, GLOO) if comm.concurrent else ()
    table.rows = {name: {} for name in (SHARED, *ALGORITHMS, *rivals)}
    if not _one_node(comm):
        del table.rows[SHARED]
        table.notes.append("Shared windows are left out: the ranks are on several nodes.")
    with process_group(comm) if comm.concurrent else nullcontext():
        for label, nbytes in SIZES.items():
            progress(f"all-reduce of {label}")
            with _all_reduces(comm, nbytes) as ways:
                for name, values in interleaved(comm, ways).items():
                    table.rows[name][label] = Sample(tuple(v * 1e3 for v in values), "ms")
    table.comparisons = [each for label in SIZES for each in _against_rivals(table, label)]
    return table


def _against_rivals(table: FigureTable, label: str) -> Iterator[Comparison]:
    """How `library` compares with the same library called plainly, and the first row with gloo."""
    samples = {name: row[label] for name, row in table.rows.items()}
    first = next(iter(samples))
    if PLAIN in samples:
        own, plain = samples["library"], samples[PLAIN]
        large = SIZES[label] >= LARGE
        yield ratio(f"library / {PLAIN}", label, own, plain, Goal(LONGER) if large else None)
        if not large:
            yield difference(f"library - {PLAIN}, us", label, own, plain, 1e3, Goal(SLACK_US))
        yield ratio(f"{first} / {GLOO}", label, samples[first], samples[GLOO])


@contextmanager
def _all_reduces(comm: Communicator, nbytes: int) -> Iterator[dict[str, Callable[[], None]]]:
    """Yield name -> function that runs one all-reduce of `nbytes` bytes. Values may overflow, at no cost in time."""
    buffer = np.zeros(nbytes // 4, np.float32)
    ways: dict[str, Callable[[], None]] = {}
    window = SharedSum(comm, nbytes // 4) if _one_node(comm) else None
    if window is not None:
        ways[SHARED] = window.run
    for name in ALGORITHMS:
        ways[name] = lambda name=name: comm.all_reduce(buffer, algorithm=name)  # type: ignore[misc]
    if comm.concurrent:
        from hpctrain.comm.mpi.start import MPI

        tensor = torch.zeros(nbytes // 4)
        ways[PLAIN] = lambda: MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, buffer)
        ways[GLOO] = lambda: torch.distributed.all_reduce(tensor) and None
    yield ways
    if window is not None:
        window.free()


class SharedSum:
    """The strategy all_reduce's method on one node: every rank sums its slice from the memory of all ranks."""

    def __init__(self, comm: Communicator, length: int) -> None:
        self.comm = comm
        self.given = comm.arena(length, np.dtype(np.float32), "node")
        self.summed = comm.arena(length if comm.local_rank == 0 else 0, np.dtype(np.float32), "node")
        layout = Layout((), (), length, np.dtype(np.float32))
        low, high = slice_bounds(layout, comm.size, elementwise=True)[comm.rank : comm.rank + 2]
        self._parts = [as_tensor(part)[low:high] for part in self.given.parts]
        self._sum = as_tensor(self.summed.parts[0])[low:high]

    def run(self) -> None:
        """Sum `given` of all ranks into `summed.parts[0]`."""
        self._agree(self.given)
        if len(self._parts) == 1:
            self._sum.copy_(self._parts[0])
        else:
            torch.add(self._parts[0], self._parts[1], out=self._sum)
        for part in self._parts[2:]:
            self._sum.add_(part)
        self._agree(self.summed)

    def _agree(self, arena: Arena) -> None:
        self.comm.notify(arena)
        self.comm.wait(arena)

    def free(self) -> None:
        """Free the shared memory. Collective."""
        self._parts, self._sum = [], torch.empty(0)
        self.given.free()
        self.summed.free()


def interleaved(comm: Communicator, ways: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Seconds per call of each way, measured in turn for as long as time allows. A call before each measurement brings
    the way's buffers back into the caches: otherwise what follows a way with other buffers takes longer."""
    counts = {}
    for name, way in ways.items():
        seconds_per_call(comm, way, 2)
        counts[name] = int(np.clip(STRETCH / seconds_per_call(comm, way, 3), 1, 300))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    start, seconds = comm.now(), np.zeros(1)
    while len(taken[next(iter(ways))]) < FEWEST or seconds[0] < SECONDS:
        for name, way in ways.items():
            way()
            taken[name].append(seconds_per_call(comm, way, counts[name]))
        seconds[0] = (comm.now() - start) / 1e9
        comm.broadcast(seconds)
    return taken


def seconds_per_call(comm: Communicator, way: Callable[[], None], count: int) -> float:
    """Seconds per call, over `count` successive calls, on the slowest rank."""
    comm.barrier()
    start = comm.now()
    for _ in range(count):
        way()
    seconds = np.array([(comm.now() - start) / 1e9 / count])
    comm.all_reduce(seconds, "max")
    return max(float(seconds[0]), 1e-9)


def _one_node(comm: Communicator) -> bool:
    return len(set(comm.nodes)) == 1
