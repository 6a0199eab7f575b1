"""Whole runs for benches: without output, and with temporary run folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.job import Job
from hpctrain.run.api import Session, session
from hpctrain.run.folder import Narrator


@contextmanager
def quiet_session(job: Job, comm: Communicator) -> Iterator[Session]:
    """A run of `job` without output, in a temporary folder. Collective."""
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as folder:
        job = job.override([f"output={folder}"])
        with session(job, comm, out=Narrator(enabled=False)) as running:
            yield running
        comm.barrier()  # all ranks use rank 0's folder


def random_samples(shape: tuple[int, ...], samples: int) -> TensorDataset:
    """Random float32 inputs of that shape in ten classes, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(samples, *shape, generator=generator)
    return TensorDataset(inputs, torch.randint(10, (samples,), generator=generator))
