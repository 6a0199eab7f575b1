"""Jobs of the run folders in tests/fixtures/runs_0.1, written by hpctrain 0.1: models, data and tables.

Do not change this file: the folders were made with it and name its functions. They were made by

    hpctrain run -n 3 python -m tests.old_runs FOLDER

without the checkpoints after the mid-run one, so that a test can resume from that; with small chunks in their traces,
and without the machine's name.
"""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import hpctrain
from hpctrain.comm.connect import connect
from hpctrain.run.folder import Narrator
from hpctrain.trace import writer

SAMPLES, BATCH = 48, 4
LOSSES = {"rule": "loss_stable", "window": 2, "rounds": 1, "threshold": 0.03, "armed": 1.5}
COMMON: dict[str, Any] = {
    "model": "tests.old_runs:net",
    "data": "tests.old_runs:samples",
    "output": "runs",
    "threads": 1,
    "seed": 3,
}
JOBS: dict[str, dict[str, Any]] = {
    "all_reduce": {"optimizer": {"name": "Adam", "lr": 0.01}, "strategy": "all_reduce"},
    "parameter_server_sync": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "strategy": {"name": "parameter_server", "mode": "sync"},
    },
    "parameter_server_async": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "strategy": {"name": "parameter_server", "mode": "async"},
    },
    "switch": {
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "phases": [
            {"strategy": "all_reduce", "until": LOSSES},
            {"strategy": {"name": "parameter_server", "mode": "sync"}, "enter": {"momentum": "keep"}},
        ],
    },
}


def net() -> nn.Module:
    """For samples of three numbers."""
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def samples() -> tuple[TensorDataset, TensorDataset]:
    """Training and test samples, computed by a formula so that they do not depend on the version of torch."""
    numbers = torch.arange(SAMPLES * 3, dtype=torch.float32).reshape(SAMPLES, 3)
    inputs = torch.sin(numbers * 0.7)
    labels = (inputs.sum(1) > 0).long()
    return TensorDataset(inputs, labels), TensorDataset(inputs[:12], labels[:12])


def job(name: str, **tables: Any) -> hpctrain.Job:
    """One of `JOBS`; `tables` replace the job's own."""
    train = {"epochs": 4, "batch_size": BATCH, "checkpoint_every": {"epochs": 2}, "keep_checkpoints": 9}
    return hpctrain.Job(**{**COMMON, "name": name, "train": train, **JOBS[name], **tables})


def make(name: str, folder: Path) -> None:
    """Write the run of that name into `folder`, without files that no test needs. Collective."""
    comm = connect(job(name))
    result = hpctrain.train(job(name), comm=comm, out=Narrator(enabled=False))
    if comm.rank == 0:
        for path in sorted(result.folder.glob("checkpoints/*"))[1:]:
            path.unlink()
        target = folder / name
        shutil.move(result.folder, target)
        (target / "trace.h5").unlink(missing_ok=True)  # links to files of the folder as it was
    comm.barrier()


if __name__ == "__main__":
    socket.gethostname = lambda: "host0"
    writer.CHUNK_ROWS = {"spans": 256, "steps": 32, "resources": 8, "events": 16, "clock": 4}
    for each in JOBS:
        make(each, Path(sys.argv[1]))
