"""Builds from a job what every rank needs before the first phase: data, model, replica, optimizer, clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hpctrain.clock.decisions import Conductor
from hpctrain.clock.rates import FunctionCourse, Pace, RateCourse, SteppedCourse
from hpctrain.clock.rules import Rule
from hpctrain.clock.samples import RunClock, interval, run_total
from hpctrain.cluster import Roles, device_for, threads_for
from hpctrain.codecs import CodecChoice, CodecTable, codec_by
from hpctrain.comm.base import Communicator
from hpctrain.comm.device.gpu import usable_gpus
from hpctrain.data.generators import seed_run
from hpctrain.data.loader import Batch, Collate, Loader, fetches_ahead
from hpctrain.data.moving import casts, move
from hpctrain.data.order import FixedOrder, Order
from hpctrain.data.splits import Splits, load_data, make_order
from hpctrain.errors import ClusterError, DataError, JobError, ModelError
from hpctrain.job import Job, registry
from hpctrain.job.phases import Enter
from hpctrain.job.roles import roles_of
from hpctrain.models import losses, metrics
from hpctrain.models.forward import Forward
from hpctrain.models.measures import Measure
from hpctrain.models.wrappers import check_model
from hpctrain.replica.batchnorm import BatchNorms
from hpctrain.replica.coupling import Coupling
from hpctrain.replica.optimizer import OptimizerChoice
from hpctrain.replica.replica import Replica
from hpctrain.run.evaluate import Judge, OwnJudge, StandardJudge
from hpctrain.run.lastround import check_batchnorm, whole_rounds
from hpctrain.run.precision import bring
from hpctrain.run.schedulers import stepped_course
from hpctrain.run.untrained import Untrained
from hpctrain.strategies.base import Strategy
from hpctrain.trace.events import Event

MOST_AHEAD = 4
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
MIXED = {"mixed_bfloat16": torch.bfloat16, "mixed_float16": torch.float16}


@dataclass
class Measurable:
    """The parts of a job that an evaluation needs: data, model, loss and metric, the arithmetic and the device.
    `evaluation`: the job's own, or None."""

    job: Job
    device: torch.device
    splits: Splits
    model: nn.Module
    loss: Callable[..., Any]
    metric: Measure
    evaluation: Measure | None

    @cached_property
    def forward(self) -> Forward:
        """Calls model and loss as the standard loop does."""
        return Forward(self.model, self.loss)

    @cached_property
    def judge(self) -> Judge:
        """What an evaluation computes of each batch."""
        if self.evaluation is not None:
            return OwnJudge(self.model, self.evaluation, self.autocast)
        return StandardJudge(self.model, self.loss, self.metric, self.autocast)

    @cached_property
    def collate(self) -> Collate | None:
        """What makes batches of samples; None: the default."""
        spec = self.job.data.collate
        return spec.bind(positional=1) if spec is not None else None

    def move(self, batch: Batch) -> Batch:
        """The batch on the device, in dtypes that suit the job's precision and torch's losses; see `casts`."""
        inputs, targets = casts(DTYPES.get(self.job.train.precision, torch.float32))
        return Batch(move(batch.inputs, self.device, inputs), move(batch.targets, self.device, targets), batch.size)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context with the arithmetic that train.precision selects."""
        dtype = MIXED.get(self.job.train.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


@dataclass
class Prepared(Measurable):
    """The parts of a run, the same on all ranks. `roles[i]`: the roles of phase i; `batch`: samples per worker and
    round; `coupling`: couples the workers' models within a step."""

    order: Order
    replica: Replica
    untrained: Untrained
    optimizer: OptimizerChoice
    roles: list[Roles]
    batch: int
    total: int
    course: RateCourse
    coupling: Coupling

    def notes(self) -> Iterator[str]:
        """Notes for the user before the run begins, one sentence each; none of them is an error."""
        if isinstance(self.course, SteppedCourse) and self.job.optimizer.schedule.unit is None:
            yield (
                f"optimizer.schedule is stepped after every {'epoch' if self.course.by_epoch else 'round'}; "
                f"optimizer.schedule.unit changes that"
            )
        if self.job.optimizer.scaling != "none" and self.job.optimizer.schedule.warmup is None:
            yield (
                "optimizer.scaling multiplies the learning rate from the first step on; optimizer.schedule.warmup = "
                "{epochs = 5} would let it rise (Goyal et al. 2017)"
            )
        for index, phase in enumerate(self.job.schedule):
            rule = self.rule(index, 0)
            if rule is not None and (why := rule.too_short()) is not None:
                yield (
                    f"{self.job.key(index, 'until')} cannot end phase {index} in this run, so "
                    f"{phase.strategy.name} trains until the run ends: {why}"
                )

    def clock(self, phase: int) -> RunClock:
        """The clock of that phase, which converts between units."""
        return RunClock(self.epoch, self.batch * len(self.roles[phase].workers), self.total)

    @property
    def epoch(self) -> int:
        """Samples per epoch; for a stream of unknown length, samples in the whole run."""
        return self.order.length or self.total

    def strategy(self, phase: int) -> Strategy:
        """A new worker half of that phase's strategy."""
        spec = self.job.schedule[phase].strategy
        made: Strategy = spec.resolve()(spec.options)
        return made

    def conductor(self, phase: int, start: int, notify: Callable[[Event], None]) -> Conductor:
        """The conductor of that phase, which began at the cursor `start`; `notify` receives the events of its rule."""
        clock, train = self.clock(phase), self.job.train
        evaluate_every, every = interval(clock, train.evaluate_every), train.checkpoint_every
        checkpoint_every = interval(clock, every) if every else 0
        higher = self.job.metric.goal == "max"
        rule = self.rule(phase, start)
        return Conductor(self.total, evaluate_every, checkpoint_every, rule, notify=notify, higher_is_better=higher)

    def rule(self, phase: int, start: int) -> Rule | None:
        """The rule that ends that phase, which began at the cursor `start`; None: it lasts until the end of the run."""
        until = self.job.schedule[phase].until
        made: Rule | None = until.resolve()(until.options, self.clock(phase), start) if until is not None else None
        return made

    def pace(self, phase: int, start: int) -> Pace:
        """Learning rate and momentum in that phase, which began at the cursor `start`."""
        enter, workers = self.job.schedule[phase].enter or Enter(), len(self.roles[phase].workers)
        scale = enter.scale if enter.scale is not None else 1.0 / workers
        ramp = self.clock(phase).samples(enter.ramp)
        factor = {"none": 1.0, "linear": float(workers), "sqrt": math.sqrt(workers)}[self.job.optimizer.scaling]
        return Pace(self.course, start, enter.learning_rate, enter.momentum, scale, ramp, factor)

    @property
    def ahead(self) -> int:
        """How many stretches of samples a worker gets in advance: one per fetching thread, but few, since all samples
        dealt are finished before an evaluation or the end of a phase."""
        data = self.job.data
        work = [*data.augment, *([] if data.collate is None else [data.collate])]
        fetches = fetches_ahead(self.splits.train, data.threads, data.prefetch, work)
        return min(data.threads, data.prefetch, MOST_AHEAD) if fetches else 0

    def loader(self, phase: int, threads: int | None = None, workers: Communicator | None = None) -> Loader:
        """A loader of this rank's training batches. `workers`: the phase's workers."""
        data = self.job.data
        augment = [registry.resolve("augmentation", name) for name in data.augment]
        return Loader(
            self.splits.train,
            self.order,
            threads=data.threads if threads is None else threads,
            prefetch=data.prefetch,
            augment=augment,
            seed=self.job.seed,
            workers=workers,
            collate=self.collate,
        )


def prepare_evaluation(job: Job, comm: Communicator, splits: Splits | None = None) -> Measurable:
    """Build what an evaluation needs, for any schedule; with `splits`, if given. Not collective; raises the same errors
    as `prepare`."""
    device = _device(job, comm)
    seed_run(job.seed, device)  # so that code that draws while building data or model draws the same on all ranks
    splits = splits or load_data(job)
    model = _model(job, device)
    loss = losses.bind(job.loss, device)
    own = metrics.bind_evaluation(job.evaluate) if job.evaluate is not None else None
    metric = metrics.bind(job.metric, loss)
    for part in (splits.train, splits.validation, splits.test):
        metric.check_data(getattr(part, "dataset", part))  # `dataset`: of a share that is held back
    parts = Measurable(job, device, splits, model, loss, metric, own)
    _ = parts.collate  # a mistake there shows now
    return parts


def prepare(job: Job, comm: Communicator, parts: Measurable | None = None) -> Prepared:
    """Build everything, but for `parts` if given. Not collective, but all ranks do the same. Raises HpctrainErrors of
    every kind."""
    roles = roles_of(job, comm.nodes)
    parts = parts or prepare_evaluation(job, comm)
    device, splits, model = parts.device, parts.splits, parts.model
    coupling = BatchNorms(model) if job.train.sync_batchnorm else Coupling()
    groups = job.optimizer.groups
    replica = Replica(model, groups.bind(positional=1)(model) if groups is not None else None)
    untrained = Untrained(model, job.train.buffer_policies)
    tried_on = device if device.type != "meta" else torch.device("cpu")  # without memory nothing can be tried
    optimizer = _optimizer(job, tried_on)
    optimizer.check(replica.layout, tried_on)
    _check_strategies(job, optimizer)
    order = make_order(splits.train, job.seed, job.data.shuffle)
    _check_codecs(job, replica, optimizer, order.length)
    batch = job.train.batch_size * job.train.accumulate
    if job.data.last == "drop":
        whole = whole_rounds(order.length, batch * max(len(each.workers) for each in roles))
        order = Order(whole, job.seed, order.shuffle, of=order.length)
    if job.data.partition == "fixed":
        order = _fixed(job, order, roles, batch)
    epoch = order.length
    if epoch is None and job.train.steps is None:
        raise DataError(
            f"data.name = {job.data.name!r} is a stream of unknown length, so train.epochs cannot be counted; "
            "set train.steps, or define __len__ in the data set"
        )
    total = run_total(job.train, epoch or 2**62, batch * len(roles[0].workers))
    schedule = job.optimizer.schedule
    clock = RunClock(epoch or total, batch * len(roles[0].workers), total)
    warmup = clock.samples(schedule.warmup) if schedule.warmup is not None else 0
    course = stepped_course(job, optimizer, clock, warmup, counts_epochs=epoch is not None) or FunctionCourse(
        schedule.bind(positional=1), {}, warmup, total
    )
    prepared = Prepared(
        job, device, splits, model, parts.loss, parts.metric, parts.evaluation, order, replica, untrained, optimizer,
        roles, batch, total, course, coupling,
    )  # fmt: skip
    _check_schedule(prepared)
    check_batchnorm(prepared)
    return prepared


def _fixed(job: Job, order: Order, roles: list[Roles], batch: int) -> Order:
    """The same samples in shards of the workers' own. Raises JobError if the phases deal samples in different ways."""
    where, workers = 'data.partition = "fixed"', {len(each.workers) for each in roles}
    if order.length is None:
        raise JobError(f"{where}: a stream of unknown length has no shards; leave the key out")
    for spec in [phase.strategy for phase in job.schedule]:
        strategy = spec.resolve()(spec.options)
        if strategy.needs.queue:
            raise JobError(
                f"{where}: under strategy {spec.name} samples come from one queue; leave the key out, or choose a "
                "strategy whose workers take rounds together"
            )
        if strategy.balances:
            raise JobError(f"{where}: with balance workers take more or fewer samples than a shard has; leave one out")
    if len(workers) > 1:
        raise JobError(f"{where}: the phases have {' and '.join(map(str, sorted(workers)))} workers; leave the key out")
    return FixedOrder(order.length, job.seed, order.shuffle, workers.pop(), batch, of=order.samples)


def _check_strategies(job: Job, optimizer: OptimizerChoice) -> None:
    """Refuse strategies that do not fit the options of the model and the optimizer."""
    if len(job.schedule) > 1:
        optimizer.check_movable()
    for spec in [phase.strategy for phase in job.schedule]:
        needs = spec.resolve()(spec.options).needs
        if job.train.sync_batchnorm and not needs.lockstep:
            raise ModelError(
                f"train.sync_batchnorm = true: under strategy {spec.name} workers do not step together, "
                "so they share no batch; leave the key out"
            )


def _check_codecs(job: Job, replica: Replica, optimizer: OptimizerChoice, epoch: int | None) -> None:
    """Refuse codecs that are of no use for the model, or have a momentum beside another. Raises ModelError, and
    JobError where the length of an epoch is needed but not known."""
    for index, phase in enumerate(job.schedule):
        spec, key = phase.strategy, job.key(index, "strategy")
        codec: CodecChoice = getattr(spec.options, "codec", "none")
        if (why := codec_by(codec, epoch=epoch).unfit(replica.layout.slots)) is not None:
            raise ModelError(f'{key}.codec = "{codec}": {why}')
        if not isinstance(codec, CodecTable) or not codec.own_momentum[1]:
            continue
        what, momentum = codec.own_momentum
        start = f"{key}.codec.{what} gives the codec a momentum of its own, {momentum:g}, beside"
        if outer := getattr(spec.options, "outer_momentum", 0.0):
            raise ModelError(f"{start} {key}.outer_momentum = {outer:g}; set that to 0, or leave codec.{what} out")
        sends_gradients = getattr(spec.resolve(), "local", None) is None
        if sends_gradients and (inner := optimizer.momentum(replica.layout)):
            raise ModelError(
                f'{start} that of optimizer "{job.optimizer.name}", {inner:g}; use an optimizer without momentum, such '
                f"as SGD with momentum = 0, or leave codec.{what} out"
            )


def _check_schedule(prepared: Prepared) -> None:
    """Refuse rules that could never end their phase, strategies that need more steps than the run has, and data that
    cannot be divided among workers."""
    job, schedule = prepared.job, prepared.job.schedule
    queued = any(prepared.strategy(index).needs.queue for index in range(len(schedule)))
    if job.data.queue == "shared" and not queued:
        raise JobError(
            'data.queue = "shared": all phases are synchronous and divide rounds by rank; use "auto" or "static"'
        )
    if prepared.order.length is None and queued:
        raise DataError(
            f"data.name = {job.data.name!r} is a stream of unknown length, so it cannot be divided among workers "
            "that do not step together; define its __len__, or use synchronous strategies"
        )
    for index in range(len(schedule)):
        rule = prepared.rule(index, 0)
        if rule is not None and (why := rule.unfit(_evaluates(prepared, index))) is not None:
            raise JobError(f"{job.key(index, 'until')}: {why}")
        size = prepared.batch * len(prepared.roles[index].workers)
        if (why := prepared.strategy(index).unfit(prepared.order.length, size, prepared.total)) is not None:
            raise JobError(f"{job.key(index, 'strategy')}.{why}")


def _evaluates(prepared: Prepared, phase: int) -> bool:
    """Whether there is an evaluation before the end of the run."""
    every = interval(prepared.clock(phase), prepared.job.train.evaluate_every)
    first = every if isinstance(every, int) else every.next(0)
    splits = prepared.splits
    return (splits.validation is not None or splits.test is not None) and first < prepared.total


def _device(job: Job, comm: Communicator) -> torch.device:
    gpus, why = usable_gpus() if job.device != "cpu" else (0, None)
    if job.device == "cuda" and why is not None:
        raise ClusterError(f'device = "cuda": {why}')
    device = torch.device(device_for(job.device, comm.local_rank, gpus))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if comm.concurrent:  # virtual ranks share one process, whose owner sets the number of threads
        torch.set_num_threads(threads_for(comm.cores, job.threads))
    return device


def _model(job: Job, device: torch.device) -> nn.Module:
    seed_run(job.seed, device)
    given = job.model.resolve()
    model = given if isinstance(given, nn.Module) else job.model.bind()()
    if not isinstance(model, nn.Module):
        raise ModelError(f"model.name = {job.model.name!r} gave a {type(model).__name__}; expected a torch.nn.Module")
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ModelError(
            f"model.name = {job.model.name!r} has lazy parameters whose shapes are not known yet; "
            "specify the layers' sizes"
        )
    check_model(f"model.name = {job.model.name!r}", model)
    return bring(model, device, DTYPES.get(job.train.precision, torch.float32)).train()


def _optimizer(job: Job, device: torch.device) -> OptimizerChoice:
    optimizer = job.optimizer
    options = {"lr": optimizer.lr, **optimizer.options}
    return OptimizerChoice.of(optimizer.resolve(), options, optimizer.elementwise, device)
