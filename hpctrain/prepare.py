"""From a job to what every rank builds alike before the first phase: data, model, replica, optimizer, clock."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain import registry
from hpctrain.batchnorm import BatchNorms
from hpctrain.cluster import Roles, device_for, local_cores
from hpctrain.comm.base import Communicator
from hpctrain.comm.gpu import usable_gpus
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import Splits, load_data, make_order
from hpctrain.errors import ClusterError, DataError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.optimizer import OptimizerChoice
from hpctrain.replica import Replica
from hpctrain.schedule import Conductor, Course, RunClock, interval, run_total
from hpctrain.strategies.base import Strategy, roles_of

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass
class Prepared:
    """The parts of a run, the same on all ranks. `roles[i]`: of phase i; `batch`: samples per worker and round."""

    job: Job
    device: torch.device
    splits: Splits
    order: Order
    model: nn.Module
    replica: Replica
    optimizer: OptimizerChoice
    loss: Callable[..., Any]
    metric: Callable[..., Any]
    roles: list[Roles]
    batch: int
    total: int
    course: Course
    norms: BatchNorms | None = None

    def clock(self, phase: int) -> RunClock:
        """The units of that phase."""
        return RunClock(self.epoch, self.batch * len(self.roles[phase].workers), self.total)

    @property
    def epoch(self) -> int:
        """Samples per epoch (of a stream of unknown length: of the whole run)."""
        return self.order.length or self.total

    def strategy(self, phase: int) -> Strategy:
        """The worker half for that phase, fresh."""
        spec = self.job.schedule[phase].strategy
        made: Strategy = spec.resolve()(spec.options)
        return made

    def conductor(self, phase: int, start: int) -> Conductor:
        """What decides in that phase, which began at the cursor `start`."""
        clock, train = self.clock(phase), self.job.train
        until = self.job.schedule[phase].until
        rule = until.resolve()(until.options, clock, start) if until is not None else None
        every = train.checkpoint_every
        return Conductor(
            self.total, interval(clock, train.evaluate_every), interval(clock, every) if every else 0, rule
        )

    def loader(self, phase: int, threads: int | None = None) -> Loader:
        """Fetches this rank's training batches."""
        data = self.job.data
        augment = [registry.resolve("augmentation", name) for name in data.augment]
        return Loader(
            self.splits.train,
            self.order,
            threads=data.threads if threads is None else threads,
            prefetch=data.prefetch,
            augment=augment,
            seed=self.job.seed,
        )

    def move(self, batch: Batch) -> Batch:
        """The batch on the device, floating-point inputs in the job's precision."""
        dtype = DTYPES.get(self.job.train.precision, torch.float32)
        if self.device.type == "cpu" and dtype is torch.float32:
            return batch
        return Batch(_to(batch.inputs, self.device, dtype), _to(batch.targets, self.device, None), batch.size)

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic that train.precision asks for."""
        if self.job.train.precision == "mixed_bfloat16":
            return torch.autocast(self.device.type, torch.bfloat16)
        return nullcontext()


def prepare(job: Job, comm: Communicator) -> Prepared:
    """Build everything. Not collective, but done by all ranks alike; raises HpctrainErrors of every kind."""
    if job.data.queue == "shared":
        raise JobError(
            'data.queue = "shared": the strategies of today are synchronous and deal out every round by rank; '
            'use "auto" or "static"'
        )
    device = _device(job, comm)
    roles = roles_of(job, comm.nodes)
    splits = load_data(job)
    model = _model(job, device)
    norms = BatchNorms(model) if job.train.sync_batchnorm else None
    groups = job.optimizer.groups
    replica = Replica(model, groups.bind(positional=1)(model) if groups is not None else None)
    optimizer = _optimizer(job, device)
    optimizer.check(replica.layout, device)
    for spec in [phase.strategy for phase in job.schedule]:
        needs = spec.resolve()(spec.options).needs
        if norms is not None and not needs.lockstep:
            raise ModelError(
                f"train.sync_batchnorm = true: under strategy {spec.name} workers do not take their steps together, "
                "so they have no batch in common; leave the key out"
            )
        if needs.optimizer == "elementwise" and not optimizer.elementwise:
            raise ModelError(
                f"optimizer.name = {job.optimizer.name!r}: strategy {spec.name} needs an elementwise optimizer, "
                "such as SGD or Adam (if this one is, set optimizer.elementwise = true)"
            )
    order = make_order(splits.train, job.seed, job.data.shuffle)
    batch = job.train.batch_size * job.train.accumulate
    epoch = order.length
    if epoch is None and job.train.steps is None:
        raise DataError(
            f"data.name = {job.data.name!r} is a stream that does not tell its length, so train.epochs cannot be "
            "counted; give train.steps, or let the data set define __len__"
        )
    total = run_total(job.train, epoch or 2**62, batch * len(roles[0].workers))
    schedule = job.optimizer.schedule
    clock = RunClock(epoch or total, batch * len(roles[0].workers), total)
    warmup = clock.samples(schedule.warmup) if schedule.warmup is not None else 0
    course = Course(schedule.bind(positional=1), {}, warmup, total)
    loss, metric = job.loss.bind(positional=2), job.metric.bind(positional=2)
    return Prepared(
        job, device, splits, order, model, replica, optimizer, loss, metric, roles, batch, total, course,
        norms,
    )  # fmt: skip


def _device(job: Job, comm: Communicator) -> torch.device:
    gpus, why = usable_gpus() if job.device != "cpu" else (0, None)
    if job.device == "cuda" and why is not None:
        raise ClusterError(f'device = "cuda": {why}')
    device = torch.device(device_for(job.device, comm.local_rank, gpus))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if comm.concurrent:  # virtual ranks share one process, whose owner chooses
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(local_cores(cores, len(comm.local_ranks), job.threads))
    return device


def _model(job: Job, device: torch.device) -> nn.Module:
    torch.manual_seed(job.seed)
    given = job.model.resolve()
    model = given if isinstance(given, nn.Module) else job.model.bind()()
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model.name = {job.model.name!r} gave a {type(model).__name__}; expected a torch.nn.Module"
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ModelError(
            f"model.name = {job.model.name!r} has lazy parameters whose shapes are not known yet; "
            "give the layers their sizes"
        )
    return model.to(device=device, dtype=DTYPES.get(job.train.precision, torch.float32)).train()


def _optimizer(job: Job, device: torch.device) -> OptimizerChoice:
    optimizer = job.optimizer
    options = {"lr": optimizer.lr, **optimizer.options}
    return OptimizerChoice.of(optimizer.resolve(), options, optimizer.elementwise, device)


def _to(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        floating = dtype is not None and value.is_floating_point()
        return value.to(device=device, dtype=dtype if floating else None, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to(item, device, dtype) for item in value]
    return value
