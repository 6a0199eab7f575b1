"""Samples the resource use of this process and its node periodically, in a separate thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from hpctrain.trace.events import SamplingStopped
from hpctrain.trace.recorder import Recorder

Gpu = Callable[[], tuple[float, int]]


class Sampler:
    """Records CPU, memory, network and GPU use into `recorder` every `seconds`. Makes no MPI call.

    `gpu`: the UUID of this rank's device (a string beginning "GPU-", which CUDA_VISIBLE_DEVICES does not
    renumber) or its index in the driver's numbering; None: no device. If the driver cannot be queried (no
    pynvml), -1 is recorded.
    """

    def __init__(self, recorder: Recorder, seconds: float = 1.0, gpu: str | int | None = None) -> None:
        self.recorder = recorder
        self.seconds = seconds
        self.gpu = gpu
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start sampling immediately. The thread ends with the process at the latest."""
        if self._thread is None:
            self._ended.clear()
            self._thread = threading.Thread(target=self._run, name="hpctrain-resources", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Take a last sample and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ended.set()
            thread.join(timeout=5.0)

    def _run(self) -> None:
        sample = self._prepare()
        self._ended.wait(min(0.05, self.seconds))
        try:
            while True:
                sample()
                if self._ended.is_set():
                    return
                self._ended.wait(self.seconds)
        except Exception as error:  # a failed measurement must neither end the training nor go unnoticed
            self.recorder.event(SamplingStopped(type(error).__name__, str(error)))

    def _prepare(self) -> Callable[[], None]:
        """Return a function that takes one sample."""
        import psutil

        process = psutil.Process()
        process.cpu_percent()  # the first call always returns 0, with no earlier call to compare with
        return partial(self._sample, psutil, process, _open_gpu(self.gpu))

    def _sample(self, psutil: Any, process: Any, ask_gpu: Gpu) -> None:
        with process.oneshot():
            cpu, resident = process.cpu_percent(), process.memory_info().rss
        net_in = net_out = 0
        for name, card in psutil.net_io_counters(pernic=True, nowrap=False).items():
            if name != "lo":
                net_in += card.bytes_recv
                net_out += card.bytes_sent
        self.recorder.resource(cpu, resident, net_in, net_out, *ask_gpu())


def measure_sample_cost(n: int = 100) -> float:
    """Seconds per sample without a GPU, mean of `n`."""
    sample = Sampler(Recorder())._prepare()
    start = time.perf_counter()
    for _ in range(n):
        sample()
    return (time.perf_counter() - start) / n


def _no_gpu() -> tuple[float, int]:
    return -1.0, -1


def _open_gpu(gpu: str | int | None) -> Gpu:
    """A function that returns (% busy, bytes used) of the device, with -1 for anything unknown."""
    if gpu is None:
        return _no_gpu
    try:
        import pynvml

        pynvml.nvmlInit()
        by_uuid = isinstance(gpu, str)
        handle = pynvml.nvmlDeviceGetHandleByUUID(gpu) if by_uuid else pynvml.nvmlDeviceGetHandleByIndex(gpu)
    except Exception:  # no module, no driver, no such device
        return _no_gpu

    def ask() -> tuple[float, int]:
        try:
            busy = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        except pynvml.NVMLError:  # a MIG slice does not report it
            busy = -1.0
        try:
            return busy, int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
        except pynvml.NVMLError:
            return busy, -1

    return ask
