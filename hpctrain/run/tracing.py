"""A run's trace on this rank: recorder, file, sampler, device times and clock measurements, started and stopped
together."""

from __future__ import annotations

import platform
import socket
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.comm.base import Communicator, Tag
from hpctrain.comm.pingpong import follow, lead
from hpctrain.errors import TraceError
from hpctrain.trace.device import DeviceTimes, time_on_cuda
from hpctrain.trace.events import MeasuredLink
from hpctrain.trace.resources import Sampler
from hpctrain.trace.writer import TraceWriter, link_ranks, trace_files, trace_path

if TYPE_CHECKING:
    from hpctrain.job import Job
    from hpctrain.run.prepare import Prepared

LIBRARIES = ("torch", "numpy", "mpi4py", "h5py", "cupy")
PINGS = 8
LINK_SECONDS = 0.002, 0.01  # for small and for large messages


class Tracing:
    """Call open, begin, tick, finish and close, in this order. Without traces every method does nothing."""

    def __init__(self, comm: Communicator, folder: Path) -> None:
        self._comm, self._folder = comm, folder
        self._writer: TraceWriter | None = None
        self._sampler: Sampler | None = None
        self._device: DeviceTimes | None = None

    def open(self, job: Job, prepared: Prepared, attempt: int) -> None:
        """Open this rank's file. Not collective; raises TraceError. Virtual ranks only record, unless they simulate a
        cluster."""
        comm = self._comm
        if job.trace.enabled and comm.recorder.keeps and (comm.concurrent or comm.simulates):
            path = trace_path(self._folder, comm.rank, attempt)
            attributes = _attributes(job, comm, prepared, attempt)
            comm.recorder.drain()  # discard the start-up, most of it torch's import
            self._writer = TraceWriter(path, comm.recorder, attributes, job.trace.flush_seconds)
            if comm.concurrent:
                self._sampler = Sampler(comm.recorder, job.trace.resources_seconds, _gpu(prepared))
            if prepared.device.type == "cuda":
                self._device = time_on_cuda(comm.recorder)

    def begin(self) -> None:
        """Begin sampling, and measure clocks and links. Collective, once all ranks have opened their files."""
        if self._sampler is not None:
            self._sampler.start()
            measure_clock(self._comm)
            measure_links(self._comm)

    def tick(self) -> None:
        """Flush if due; cheap otherwise."""
        if self._writer is not None:
            self._writer.maybe_flush(self._comm.now())

    def settle(self) -> None:
        """A phase has ended: record what the device did in it, and compare its clock with the host's. Not collective.
        """
        if self._device is not None:
            self._device.settle()

    def finish(self) -> str | None:
        """Measure clocks again, and join the ranks' files in trace.h5. Collective.

        Returns, on all ranks, which traces ended before the run did, and why; None if none did.
        """
        if self._writer is None and not self._comm.simulates:  # in a simulation other ranks may have one
            return None
        if self._comm.concurrent:
            measure_clock(self._comm)
        self.settle()
        self.close()
        own = self._writer.stopped if self._writer is not None else None
        stopped = self._comm.gather_json(own)  # now all ranks have closed their files
        if self._comm.rank == 0 and trace_files(self._folder):  # false if the run folder was removed in the meantime
            try:
                link_ranks(self._folder)
            except TraceError as error:
                with suppress(OSError):
                    print(f"hpctrain: {error}", file=sys.stderr, flush=True)
        ranks = [rank for rank, text in enumerate(stopped) if text is not None]
        if not ranks:
            return None
        others = f" (and those of {len(ranks) - 1} other ranks)" if len(ranks) > 1 else ""
        return f"{stopped[ranks[0]]}{others}"

    def close(self) -> None:
        """Write what is pending and close the file. Does nothing if already closed. Not collective."""
        if self._sampler is not None:
            self._sampler.stop()
        if self._device is not None:
            self._device.read()
        if self._writer is not None:
            self._writer.close()


def measure_clock(comm: Communicator) -> None:
    """Record this rank's offset to rank 0's clock, from the fastest of a few round trips (Cristian 1989). Collective.

    The ranks of one node share a clock: `now` is the operating system's.
    """
    stamp, answer = np.zeros(1, np.int64), np.zeros(1, np.int64)
    if comm.rank == 0:
        for rank in [rank for rank in range(comm.size) if comm.nodes[rank] != comm.nodes[0]]:
            for _ in range(PINGS):
                comm.recv(stamp, rank, Tag.CLOCK)
                answer[0] = comm.now()
                comm.send(answer, rank, Tag.CLOCK)
    if comm.nodes[comm.rank] == comm.nodes[0]:
        comm.recorder.clock(0, 0)
        return
    best = (2**62, 0)
    for _ in range(PINGS):
        before = comm.now()
        comm.send(stamp, 0, Tag.CLOCK)
        comm.recv(answer, 0, Tag.CLOCK)
        after = comm.now()
        best = min(best, (after - before, int(answer[0]) - (before + after) // 2))
    comm.recorder.clock(best[1], best[0] // 2)


def measure_links(comm: Communicator) -> None:
    """Record latency and bandwidth between neighbouring ranks, every second pair at a time. Collective.

    They serve as the reference for what a run achieves.
    """
    for turn in (0, 1):
        if comm.rank % 2 == turn and comm.rank + 1 < comm.size:
            peer = comm.rank + 1
            latency, bandwidth, _ = lead(comm, peer, LINK_SECONDS)
            comm.recorder.event(MeasuredLink(peer, comm.nodes[comm.rank] == comm.nodes[peer], latency, bandwidth))
        elif comm.rank % 2 != turn and comm.rank > 0:
            follow(comm, comm.rank - 1)


def _attributes(job: Job, comm: Communicator, prepared: Prepared, attempt: int) -> dict[str, Any]:
    from hpctrain.comm.mpi import library

    versions = {name: _version(name) for name in LIBRARIES}
    return {
        "rank": comm.rank,
        "size": comm.size,
        "host": f"node{comm.nodes[comm.rank] + 1}" if comm.simulates else socket.gethostname(),
        "node": comm.nodes[comm.rank],
        "cores": float(comm.cores),
        **({"simulated": comm.simulates} if comm.simulates else {}),
        "role": prepared.roles[0].of(comm.rank).value,
        "device": str(prepared.device),
        "parameters": prepared.replica.layout.parameters,
        "job": job.dump(),
        "attempt": attempt,
        "python": platform.python_version(),
        "mpi": library.name(),
        **{name: text for name, text in versions.items() if text},
    }


def _gpu(prepared: Prepared) -> str | None:
    """The UUID of this rank's GPU, which does not depend on CUDA_VISIBLE_DEVICES; None on the CPU."""
    if prepared.device.type != "cuda":
        return None
    import torch

    return f"GPU-{torch.cuda.get_device_properties(prepared.device).uuid}"


@cache  # many virtual ranks ask
def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
