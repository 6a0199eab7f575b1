"""Small training tasks for testing strategies, and the same training in one process with torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain.cluster import Roles
from hpctrain.comm.base import Communicator
from hpctrain.data.order import Order
from hpctrain.job import Job
from hpctrain.job.roles import roles_of
from hpctrain.run.api import Result, train
from hpctrain.run.folder import Narrator
from hpctrain.strategies.base import Strategy
from hpctrain.strategies.round import RoundStrategy

STEPS = 24  # per run that is compared with one process
SAMPLES = 103  # prime: the last round of an epoch is uneven for every number of workers
Tables = dict[str, Any]
Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Subject:
    """A strategy as a job names it, with the options to test."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def table(self) -> Tables:
        """The [strategy] table of the job."""
        return {"name": self.name, **self.options}

    @property
    def label(self) -> str:
        """The name and the options, for messages."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def job(self, folder: Path | str, **tables: Any) -> Job:
        """A job that trains `net` on `points`: 8 steps of 6 samples per worker; `tables` replace or add keys."""
        return small_job(folder, **{"strategy": self.table, **tables})

    def strategy(self) -> Strategy:
        """A new instance of the strategy, not joined. Raises JobError."""
        spec = self.job("unused").schedule[0].strategy
        strategy: Strategy = spec.resolve()(spec.options)
        return strategy

    @property
    def trains_by_itself(self) -> bool:
        """Whether its workers take steps whose effect other workers see only later."""
        strategy = self.strategy()
        return isinstance(strategy, RoundStrategy) and strategy.local is not None

    def roles(self, nodes: Sequence[int]) -> Roles:
        """The roles of ranks with these node indices. Raises ClusterError if there are too few ranks."""
        return roles_of(self.job("unused"), nodes)[0]


def small_job(folder: Path | str, **tables: Any) -> Job:
    """A small job; `tables` replace or add keys."""
    base: Tables = {
        "output": str(folder),
        "model": net,
        "data": (points(), points(11)),
        "optimizer": {"name": "SGD", "lr": 0.1},
        "train": {"steps": 8, "batch_size": 6, "precision": "float64"},
        "trace": {"enabled": False},
        "threads": 1,
    }
    for key, table in tables.items():
        merges = isinstance(table, dict) and isinstance(base.get(key), dict) and "name" not in table
        base[key] = {**base[key], **table} if merges else table
    if "epochs" in base["train"]:
        base["train"].pop("steps", None)
    return Job(**base)


def quietly(comm: Communicator, job: Job, **arguments: Any) -> Result:
    """Run `hpctrain.train` without output. Collective."""
    return train(job, comm=comm, out=Narrator(enabled=False), **arguments)


def forget_after(folder: Path, index: int) -> None:
    """Reset a finished run to the checkpoint with that index, as if it had been killed after it."""
    (folder / "model.safetensors").unlink()
    files = sorted((folder / "checkpoints").iterdir())
    cursors = sorted({file.name.partition(".")[0] for file in files if file.name[0].isdigit()})
    for file in files:
        if file.name.partition(".")[0] in cursors[index + 1 :]:
            file.unlink()


# -- models and data ---------------------------------------------------------------------------------------------
def net() -> nn.Module:
    """A small, smooth model whose parameters do not fill whole cache lines."""
    return nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5), nn.Tanh(), nn.Linear(5, 3))


def noisy_net() -> nn.Module:
    """A small model with batch norm and dropout."""
    return nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Dropout(0.3), nn.Linear(13, 3))


class Sometimes(nn.Module):
    """The loss never depends on `never`, and on `seldom` only if a sample of the batch has a large first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.never, self.seldom, self.last = (nn.Linear(7, n) for n in (7, 5, 7, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(inputs))
        large = inputs[:, :1] > 1.2
        if large.any():
            hidden = hidden + self.seldom(inputs) * large
        return self.last(hidden)


class Late(nn.Module):
    """Adds a parameter to its inputs; the gradient is NaN, though no output is, for rows marked True."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3))

    def forward(self, inputs: Tensor, marked: Tensor) -> Tensor:
        root = torch.sqrt(self.value * 0.0)  # 0, of slope infinity times 0
        return inputs + torch.where(marked, root, self.value)


class Deep(nn.Module):
    """The gradient of the last of some 27,000 parameters is NaN, and no loss, where a sample's first feature is 9."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.last, self.late = nn.Linear(7, 2500), nn.Linear(2500, 3), Late()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.late(self.last(torch.tanh(self.wide(inputs))) / 50.0, inputs[:, :1] == 9.0)


class Steep(nn.Module):
    """The gradient of samples whose first feature is 9 overflows float16 at the first loss scale and the next few."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(inputs)
        return out + 1000.0 * (inputs[:, :1] == 9.0) * (out - out.detach())


def points(samples: int = SAMPLES, bad: int = -1, value: float = torch.nan) -> TensorDataset:
    """Inputs (7,) float32 and classes 0..2; the features of sample `bad`, if any, are `value`."""
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples, 7, generator=generator)
    if bad >= 0:
        inputs[bad] = value
    return TensorDataset(inputs, torch.randint(3, (samples,), generator=generator))


def some_count() -> TensorDataset:
    """`points`, but only about a third of the targets count; in some batches none does."""
    inputs, targets = points().tensors
    drawn = torch.rand(len(targets), generator=torch.Generator().manual_seed(3))
    return TensorDataset(inputs, torch.where(drawn < 0.35, targets, -100))


# -- one process -------------------------------------------------------------------------------------------------
def one_process(
    job: Job,
    workers: int,
    build: Callable[[], nn.Module] = net,
    data: TensorDataset | None = None,
    loss: Callable[..., Tensor] = nn.functional.cross_entropy,
    cursor: int = 0,
    steps: int | None = None,
) -> Vector:
    """The final parameters of one process that uses torch alone, with `workers` times the job's batch on `data`
    (default `points`), from `cursor` on, for `steps` steps (default: the job's)."""
    dtype = getattr(torch, job.train.precision)
    torch.manual_seed(job.seed)
    model = build().to(dtype)
    optimizer = getattr(torch.optim, job.optimizer.name)(
        model.parameters(), lr=job.optimizer.lr, **dict(job.optimizer.options)
    )
    inputs, targets = (data or points()).tensors
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    order = Order(len(targets), job.seed)
    size = job.train.batch_size * job.train.accumulate * workers
    for _ in range(job.train.steps or 0 if steps is None else steps):
        stop = min(cursor + size, order.epoch_end(cursor))
        chosen = torch.from_numpy(order.indices(cursor, stop))
        optimizer.zero_grad()
        loss(model(inputs[chosen]), targets[chosen]).backward()
        if job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.train.clip_norm)
        optimizer.step()
        cursor = stop
    return vector(model)


def vector(model: nn.Module) -> Vector:
    """The trainable parameters as a flat float64 vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach().double().numpy()


def distance(found: Vector, expected: Vector) -> float:
    """The relative error of `found` in the Euclidean norm."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
