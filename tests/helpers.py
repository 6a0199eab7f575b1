"""Bodies that run unchanged over virtual ranks and under MPI, and the plain torch loop they are held against.

Models and data that a job can name are here too ("tests.helpers:noisy_net").
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.data.order import Order
from hpctrain.data.splits import Splits
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.launch import Result, session, train
from hpctrain.runfolder import Narrator

SAMPLES = 103  # prime: the last round of an epoch is uneven for every number of workers
Tables = dict[str, Any]

# How replicas may agree synchronously: [strategy], and how many ranks are servers.
SYNCHRONOUS: dict[str, tuple[Tables, int]] = {
    "shared": ({"name": "all_reduce", "exchange": "shared"}, 0),
    "message": ({"name": "all_reduce", "exchange": "message"}, 0),
    "ring": ({"name": "all_reduce", "exchange": "message", "algorithm": "ring"}, 0),
    "halving": ({"name": "all_reduce", "exchange": "message", "algorithm": "halving_doubling"}, 0),
    "tree": ({"name": "all_reduce", "exchange": "message", "algorithm": "tree"}, 0),
    "hierarchical": ({"name": "all_reduce", "exchange": "message", "algorithm": "hierarchical"}, 0),
    "overlap": ({"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.0005}, 0),
    "server": ({"name": "parameter_server", "mode": "sync", "servers": 1}, 1),
    "servers": ({"name": "parameter_server", "mode": "sync", "servers": 2}, 2),
    "colocated": ({"name": "parameter_server", "mode": "sync", "servers": 1, "colocated": True}, 0),
    "all_serve": ({"name": "parameter_server", "mode": "sync", "servers": -1, "colocated": True}, 0),
}
# What is trained with: [optimizer], and keys of [train] that change the arithmetic.
RECIPES: dict[str, tuple[Tables, Tables]] = {
    "momentum": ({"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {}),
    "adam": ({"name": "Adam", "lr": 0.01, "weight_decay": 0.1}, {}),
    "clip": ({"name": "SGD", "lr": 0.3, "momentum": 0.5}, {"clip_norm": 0.05}),
    "accumulate": ({"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"accumulate": 3, "batch_size": 2}),
    "all": (
        {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        {"accumulate": 2, "batch_size": 3, "clip_norm": 0.1},
    ),
}


# -- what a job can name -----------------------------------------------------------------------------------------
def net() -> nn.Module:
    """Small, smooth, of shapes that fill no cache line."""
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy_net() -> nn.Module:
    """With batch norm and dropout, for images (1, 8, 8)."""
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(108, 3)
    )


def points(samples: int = SAMPLES, nan: int = -1) -> TensorDataset:
    """Inputs (7,) float32 and classes 0..2; sample `nan`, if any, is not finite."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 7, generator=generator)
    if nan >= 0:
        inputs[nan] = torch.nan
    return TensorDataset(inputs, torch.randint(3, (samples,), generator=generator))


def pictures(samples: int = 75) -> Splits:
    """Inputs (1, 8, 8) float32 and classes 0..2, with a validation and a test part."""
    generator = torch.Generator().manual_seed(6)
    parts = [
        TensorDataset(
            torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)
        )
        for n in (samples, 11, 13)
    ]
    return Splits(*parts)


class Counted(Dataset[Any]):
    """Sample i says that it is i."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((1,), float(index)), torch.zeros(1)


# -- jobs --------------------------------------------------------------------------------------------------------
def make_job(folder: Path | str, **tables: Any) -> Job:
    """A small job: `net` on `points`, 8 steps of 6 samples per worker; tables are merged into it."""
    base: Tables = {
        "output": str(folder),
        "model": {"name": "tests.helpers:net"},
        "data": {"name": "tests.helpers:points"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "train": {"steps": 8, "batch_size": 6},
        "trace": {"enabled": False},
        "threads": 1,
    }
    for key, table in tables.items():
        if isinstance(table, dict) and isinstance(base.get(key), dict) and "name" not in table:
            base[key] = {**base[key], **table}
        else:
            base[key] = table
    if "epochs" in base["train"] and "steps" not in tables.get("train", {}):
        del base["train"]["steps"]
    return Job(**base)


def equivalence_job(folder: Path | str, agree: str, recipe: str, precision: str, size: int) -> Job:
    """50 steps, for `size` ranks, over uneven ends of epochs."""
    strategy, _ = SYNCHRONOUS[agree]
    if strategy.get("servers") == -1:
        strategy = {**strategy, "servers": size}
    optimizer, keys = RECIPES[recipe]
    return make_job(
        folder,
        optimizer=optimizer,
        strategy=strategy,
        train={"steps": 50, "batch_size": 6, **keys, "precision": precision},
    )


def workers_of(agree: str, size: int) -> int:
    """How many of `size` ranks compute gradients."""
    return size - SYNCHRONOUS[agree][1]


def quiet_train(comm: Communicator, job: Job, **arguments: Any) -> Result:
    """`train` without a word."""
    return train(job, comm=comm, out=Narrator(enabled=False), **arguments)


def vector(model: nn.Module) -> np.ndarray[Any, Any]:
    """The trainable parameters, flat, in float64."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


def difference(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> float:
    """Relative error in the norm."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def plain(job: Job, workers: int) -> np.ndarray[Any, Any]:
    """The same training by one process with `workers` times the batch, in torch alone."""
    dtype = getattr(torch, job.train.precision)
    torch.manual_seed(job.seed)
    model = net().to(dtype)
    options = dict(job.optimizer.options)
    optimizer = getattr(torch.optim, job.optimizer.name)(model.parameters(), lr=job.optimizer.lr, **options)
    inputs, targets = points().tensors
    order = Order(len(targets), job.seed)
    cursor, size = 0, job.train.batch_size * job.train.accumulate * workers
    for _ in range(job.train.steps or 0):
        stop = min(cursor + size, order.epoch_end(cursor))
        chosen = torch.from_numpy(order.indices(cursor, stop))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen].to(dtype)), targets[chosen]).backward()
        if job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.train.clip_norm)
        optimizer.step()
        cursor = stop
    return vector(model)


# -- bodies ------------------------------------------------------------------------------------------------------
def equivalence(comm: Communicator, folder: Path | str, agree: str, recipe: str, precision: str) -> float:
    """How far `comm.size` ranks end from one process; every rank holds the same bits."""
    job = equivalence_job(folder, agree, recipe, precision, comm.size)
    found = vector(quiet_train(comm, job).model)
    table = comm.gather_rows(found)
    assert (table == table[0]).all(), "the ranks hold different parameters"
    return difference(found, plain(job, workers_of(agree, comm.size)))


def resumed_bits(comm: Communicator, folder: Path | str, strategy: Tables, optimizer: Tables) -> None:
    """A run goes on from its checkpoint in mid-epoch: bit for bit the model of the uninterrupted one.

    Momentum or Adam, dropout, batch norm, augmentation, accumulation.
    """
    job = make_job(
        folder,
        model="tests.helpers:noisy_net",
        data={"name": "tests.helpers:pictures", "augment": ["shift", "flip"]},
        optimizer=optimizer,
        strategy=strategy,
        train={"steps": 9, "batch_size": 4, "accumulate": 2, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9},
    )
    whole = quiet_train(comm, job)
    model = whole.folder / "model.safetensors"
    first = model.read_bytes() if comm.rank == 0 else b""
    if comm.rank == 0:
        forget_after(whole.folder, 0)
    comm.barrier()
    again = quiet_train(comm, Job.load(whole.folder / "job.toml"), resume=whole.folder)
    assert again.samples == whole.samples
    assert [p.steps for p in again.phases] == [p.steps for p in whole.phases]
    assert again.metrics == whole.metrics
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    if comm.rank == 0:
        assert model.read_bytes() == first


def forget_after(folder: Path, index: int) -> None:
    """Put a finished run back to its checkpoint of that index, as if it had been killed after it."""
    (folder / "model.safetensors").unlink()
    for path in sorted((folder / "checkpoints").iterdir())[index + 1 :]:
        path.unlink()


def every_sample_once(comm: Communicator, folder: Path | str, epochs: int = 3, **tables: Any) -> None:
    """In every epoch, all ranks together see each sample exactly once."""
    samples = 29
    train_keys = {"epochs": epochs, "batch_size": 3, **tables.pop("train", {})}
    job = make_job(
        folder, model=nn.Linear(1, 1), loss="mse", data=Counted(samples), train=train_keys,
        metric="tests.helpers:no_metric", **tables,
    )  # fmt: skip
    seen: list[list[int]] = []
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            epoch = running.books.cursor // samples
            seen += [[epoch, int(value)] for value in batch.inputs[:, 0]]
            running.step(running.loss(running.model(batch.inputs / samples), batch.targets))
    together = sorted(pair for own in comm.gather_json(seen) for pair in own)
    assert together == [[epoch, index] for epoch in range(epochs) for index in range(samples)]
    assert running.result.samples == epochs * samples


def no_metric(outputs: Tensor, targets: Tensor) -> float:
    """Of nothing."""
    return 0.0


def nan_told(comm: Communicator, folder: Path | str, strategy: Tables) -> str:
    """A sample that is not finite in the third round: the error that every rank raises."""
    job = make_job(
        folder, data={"name": "tests.helpers:points", "nan": 12 * comm.size, "shuffle": False}, strategy=strategy
    )
    try:
        quiet_train(comm, job)
    except HpctrainError as error:
        assert error.everywhere
        return str(error)
    raise AssertionError("training went on")


def nan_skipped(comm: Communicator, folder: Path | str, strategy: Tables) -> None:
    """With train.nan = "skip" that round is left out, and the parameters stay finite and equal."""
    job = make_job(
        folder,
        data={"name": "tests.helpers:points", "nan": 12, "shuffle": False},
        strategy=strategy,
        train={"nan": "skip"},
    )
    found = vector(quiet_train(comm, job).model)
    assert np.isfinite(found).all()
    table = comm.gather_rows(found)
    assert (table == table[0]).all()
