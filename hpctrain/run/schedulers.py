"""Torch's learning-rate schedulers as a course: steps a scheduler on a stand-in optimizer and reads off its values."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from hpctrain.clock.rates import SteppedCourse
from hpctrain.clock.samples import RunClock
from hpctrain.errors import JobError
from hpctrain.job import Job
from hpctrain.replica.optimizer import OptimizerChoice, momentum_of

TAKE_OBJECTS = (ChainedScheduler, LambdaLR, MultiplicativeLR, SequentialLR)
BY_BATCH = (CyclicLR, OneCycleLR)  # torch's documentation steps these after every batch, others after every epoch
TRIED = 100_000  # steps taken before the run begins
Maker = Callable[[torch.optim.Optimizer], LRScheduler]


def stepped_course(
    job: Job, optimizer: OptimizerChoice, clock: RunClock, warmup: int, counts_epochs: bool
) -> SteppedCourse | None:
    """The course of a scheduler, if optimizer.schedule names one (a class, or a function of the optimizer that returns
    one); None if it names a function of the share of the run.

    `clock`: of the first phase. `counts_epochs`: whether the clock knows where epochs end. Raises JobError.
    """
    make = _maker(job, optimizer)
    unit = job.optimizer.schedule.unit
    if make is None:
        if unit is not None:
            raise JobError(
                f'optimizer.schedule.unit = "{unit}": only schedulers are stepped, and "{job.optimizer.schedule.name}" '
                "is a function of the share of the run; leave the key out"
            )
        return None
    factors = Factors(make, optimizer)
    if unit is None:
        unit = "steps" if job.train.steps is not None or isinstance(factors.scheduler, BY_BATCH) else "epochs"
    if unit == "epochs" and not counts_epochs:
        raise JobError('optimizer.schedule.unit = "epochs": the length of the data set is unknown; use "steps"')
    course = SteppedCourse(factors, clock, unit == "epochs", warmup)
    factors.check(course.steps(max(0, clock.total - 1)), unit)
    return course


class Factors:
    """(factor of the learning rate, factor of the momentum) by the scheduler's step: a table that grows on demand.

    Raises JobError if the scheduler cannot be created or stepped, or returns values that cannot be used for training.
    """

    def __init__(self, make: Maker, optimizer: OptimizerChoice) -> None:
        self._optimizer = stand_in(optimizer)
        self._group = self._optimizer.param_groups[0]
        self._rate, self._momentum = float(self._group["lr"]), momentum_of(self._group)
        self._fixed = {key: value for key, value in self._group.items() if key not in ("params", *STEERED)}
        self.scheduler = _tried("cannot be created", lambda: make(self._optimizer))
        if isinstance(self.scheduler, ReduceLROnPlateau):
            raise JobError(_PLATEAU)
        self._optimizer.step()  # otherwise torch warns that step() was not called
        self._rates, self._momenta = array("d"), array("d")
        self._read()

    def __call__(self, steps: int) -> tuple[float, float]:
        while len(self._rates) <= steps:
            _tried(f"fails at its step {len(self._rates)}", self.scheduler.step)
            self._read()
        return self._rates[steps], self._momenta[steps]

    def check(self, last: int, unit: str) -> None:
        """Check that the scheduler can take `last` steps, as the run needs (if very many, only the first)."""
        try:
            self(min(last, TRIED))
        except JobError as error:
            raise JobError(f"{error} (this run steps it {last} times, once per {unit.removesuffix('s')})") from None

    def _read(self) -> None:
        rate, momentum = float(self._group["lr"]) / self._rate, momentum_of(self._group)
        name = type(self.scheduler).__name__
        if not 0 <= rate < float("inf"):
            raise JobError(
                f"optimizer.schedule: {name} sets the learning rate to {float(self._group['lr']):g} at its step "
                f"{len(self._rates)}; expected a number >= 0"
            )
        if momentum != self._momentum and self._momentum == 0:
            raise JobError(
                f"optimizer.schedule: {name} sets a momentum of {momentum:g}, but the optimizer has none; set "
                f"optimizer.momentum = {momentum:g}, or cycle_momentum = false in [optimizer.schedule]"
            )
        changed = [key for key, value in self._fixed.items() if self._group[key] != value]
        if changed:
            raise JobError(
                f"optimizer.schedule: {name} changes the optimizer's {changed[0]}; only its learning rate and its "
                "momentum can be scheduled"
            )
        self._rates.append(rate)
        self._momenta.append(momentum / self._momentum if self._momentum else 1.0)


STEERED = ("lr", "momentum", "betas")
_PLATEAU = (
    "optimizer.schedule: ReduceLROnPlateau needs a metric, and the learning rate here depends on the share of the run "
    "alone; use another scheduler, or a function of that share (0 to 1) that returns the factor of optimizer.lr"
)


def stand_in(optimizer: OptimizerChoice) -> torch.optim.Optimizer:
    """The job's optimizer over a dummy parameter."""
    return optimizer.build([torch.nn.Parameter(torch.zeros(2, 2))])


def _maker(job: Job, optimizer: OptimizerChoice) -> Maker | None:
    """A function that makes the scheduler from the optimizer; None for a function of the share of the run."""
    spec = job.optimizer.schedule
    named = spec.resolve()
    if isinstance(named, LRScheduler):
        raise JobError(
            f'optimizer.schedule = "{spec.name}" is a scheduler object; name its class, with its arguments as keys, '
            "or a function of the optimizer that creates it"
        )
    if isinstance(named, type) and issubclass(named, ReduceLROnPlateau):
        raise JobError(_PLATEAU)
    if isinstance(named, type) and issubclass(named, TAKE_OBJECTS):
        raise JobError(
            f"optimizer.schedule: {named.__name__} takes functions or other schedulers, which a job cannot hold; write "
            f'a function of the optimizer that returns it, and name that ("module:function")'
        )
    function = spec.bind(positional=1)
    if isinstance(named, type) and issubclass(named, LRScheduler):
        return function
    return function if _makes_scheduler(function, optimizer) else None


def _makes_scheduler(function: Callable[..., Any], optimizer: OptimizerChoice) -> bool:
    """Whether a function takes the optimizer and returns a scheduler, rather than a share and returns a factor."""
    try:
        function(0.0)
        return False
    except Exception:  # a function that expects an optimizer may raise anything when given a number
        pass
    try:
        return isinstance(function(stand_in(optimizer)), LRScheduler)
    except Exception:  # it is neither; the course reports what is wrong
        return False


def _tried(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # raised by torch or by the user's own scheduler
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise JobError(f"optimizer.schedule: the scheduler {what}: {text}") from error
