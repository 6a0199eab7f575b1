"""Torch's learning-rate schedulers as optimizer.schedule: stepped as in torch, on any number of ranks."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs
from torch.optim.lr_scheduler import LRScheduler

from hpctrain.clock.rates import Pace, SteppedCourse
from hpctrain.clock.samples import RunClock
from hpctrain.comm.virtual.world import World
from hpctrain.data.order import Order
from hpctrain.errors import JobError
from hpctrain.job import Job
from hpctrain.replica.optimizer import OptimizerChoice
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.run.schedulers import Factors, stepped_course
from tests import helpers
from tests.marks import mostly_slow

HERE = __name__
CLOCK = RunClock(epoch=100, round=32, total=1000)  # rounds end at 32, 64, 96, 100 of each epoch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def warm_then_cosine(optimizer: Optimizer, length: int = 6) -> LRScheduler:
    """A scheduler composed of others, which a job file can name."""
    parts = [torchs.LinearLR(optimizer, 0.25, total_iters=2), torchs.CosineAnnealingLR(optimizer, length, eta_min=0.01)]
    return torchs.SequentialLR(optimizer, parts, milestones=[2])


def plateau(optimizer: Optimizer) -> torchs.ReduceLROnPlateau:
    return torchs.ReduceLROnPlateau(optimizer)


class Wild(LRScheduler):
    """A user's scheduler; `what` it does wrong at its third step."""

    def __init__(self, optimizer: Optimizer, what: str) -> None:
        self.what = what
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        if self.last_epoch == 3 and self.what == "raises":
            raise ZeroDivisionError("no more")
        if self.last_epoch == 3 and self.what == "weight_decay":
            self.optimizer.param_groups[0]["weight_decay"] = 0.5
        return [-1.0 if self.last_epoch == 3 and self.what == "negative" else 0.1]


def choice(lr: float = 0.1, momentum: float = 0.9) -> OptimizerChoice:
    return OptimizerChoice.of(torch.optim.SGD, {"lr": lr, "momentum": momentum})


def course_of(schedule: Any, optimizer: OptimizerChoice | None = None, **keys: Any) -> SteppedCourse | None:
    warmup, counts = keys.pop("warmup", 0), keys.pop("counts_epochs", True)
    job = Job(optimizer={"name": "SGD", "schedule": schedule}, **keys)
    return stepped_course(job, optimizer or choice(), CLOCK, warmup, counts)


# -- against torch -----------------------------------------------------------------------------------------------
def plain(job: Job, workers: int, make: Callable[[Optimizer], LRScheduler], by_epoch: bool) -> np.ndarray[Any, Any]:
    """One process with the whole batch, in torch alone, the scheduler stepped as its documentation says."""
    torch.manual_seed(job.seed)
    model = helpers.net().double()
    cls = getattr(torch.optim, job.optimizer.name)
    optimizer = cls(model.parameters(), lr=job.optimizer.lr, **job.optimizer.options)
    scheduler = make(optimizer)
    inputs, targets = helpers.points().tensors
    order = Order(len(targets), job.seed)
    cursor = 0
    for _ in range(job.train.steps or 0):
        stop = min(cursor + job.train.batch_size * workers, order.epoch_end(cursor))
        chosen = torch.from_numpy(order.indices(cursor, stop))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[chosen].double()), targets[chosen]).backward()
        optimizer.step()
        if not by_epoch or stop == order.epoch_end(cursor):
            scheduler.step()
        cursor = stop
    return helpers.vector(model)


SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
ADAM = {"name": "Adam", "lr": 0.02}
AGAINST: dict[str, tuple[helpers.Tables, Any, Callable[[Optimizer], LRScheduler], bool]] = {
    "cosine by round": (SGD, {"name": "torch.optim.lr_scheduler:CosineAnnealingLR", "T_max": 7, "eta_min": 0.001},
                        lambda o: torchs.CosineAnnealingLR(o, 7, 0.001), False),
    "milestones by epoch": (ADAM, {"name": torchs.MultiStepLR, "milestones": [1, 3], "gamma": 0.3, "unit": "epochs"},
                            lambda o: torchs.MultiStepLR(o, [1, 3], 0.3), True),
    "one cycle, momentum too": (SGD, {"name": torchs.OneCycleLR, "max_lr": 0.2, "total_steps": 30},
                                lambda o: torchs.OneCycleLR(o, 0.2, total_steps=30), False),
    "one cycle, first beta too": (ADAM, {"name": torchs.OneCycleLR, "max_lr": 0.05, "total_steps": 30},
                                  lambda o: torchs.OneCycleLR(o, 0.05, total_steps=30), False),
    "a factory function": (SGD, f"{HERE}:warm_then_cosine", warm_then_cosine, False),
    "a factory lambda": (SGD, lambda given: torchs.LambdaLR(given, lambda n: 0.9**n),
                                lambda o: torchs.LambdaLR(o, lambda n: 0.9**n), False),
}  # fmt: skip
SERVER = {"name": "parameter_server", "mode": "sync", "servers": 1}


@pytest.mark.parametrize("what", mostly_slow(AGAINST, list(AGAINST)[::3]))
@pytest.mark.parametrize(("strategy", "size"), [({"name": "all_reduce"}, 3), (SERVER, 3)])
def test_scheduler_trains_as_in_torch(tmp_path: Path, what: str, strategy: helpers.Tables, size: int) -> None:
    optimizer, schedule, make, by_epoch = AGAINST[what]
    job = helpers.make_job(
        tmp_path, optimizer={**optimizer, "schedule": schedule}, strategy=strategy,
        train={"steps": 30, "batch_size": 6, "precision": "float64"},
    )  # fmt: skip
    found = helpers.vector(World(size).run(lambda comm: helpers.quiet_train(comm, job))[0].model)
    assert helpers.difference(found, plain(job, size - (strategy is SERVER), make, by_epoch)) < 1e-12


def test_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    schedule = {"name": "torch.optim.lr_scheduler:OneCycleLR", "max_lr": 0.2, "total_steps": 9}
    optimizer = {**SGD, "schedule": schedule}
    World(2).run(lambda comm: helpers.resumed_bits(comm, tmp_path, {"name": "all_reduce"}, optimizer))


# -- the clock ---------------------------------------------------------------------------------------------------
def test_unit_of_the_schedule() -> None:
    step_lr = {"name": torchs.StepLR, "step_size": 2, "gamma": 0.5}
    one_cycle = {"name": torchs.OneCycleLR, "max_lr": 0.1, "total_steps": 99}
    by_epoch: dict[str, Any] = {"train": {"epochs": 10}}
    in_steps: dict[str, Any] = {"train": {"steps": 40}}
    for schedule, keys, epochs in [
        (step_lr, by_epoch, True), (step_lr, in_steps, False), (one_cycle, by_epoch, False),
        ({**step_lr, "unit": "steps"}, by_epoch, False), ({**step_lr, "unit": "epochs"}, in_steps, True),
    ]:  # fmt: skip
        course = course_of(schedule, **keys)
        assert course is not None
        assert course.by_epoch == epochs
    halving = course_of(step_lr)
    assert halving is not None
    assert [halving.factor(cursor) for cursor in (0, 199, 200, 399, 400, 999)] == [1, 1, 0.5, 0.5, 0.25, 1 / 16]


def test_rounds_are_counted_as_they_end_and_in_any_order() -> None:
    course = course_of({"name": torchs.ExponentialLR, "gamma": 0.5, "unit": "steps"})
    assert course is not None
    found = {cursor: course.factor(cursor) for cursor in (999, 100, 0, 31, 96, 32, 99)}  # a pure function: any order
    assert {cursor: found[cursor] for cursor in (0, 31, 32, 96, 99, 100)} == {
        0: 1, 31: 1, 32: 0.5, 96: 0.125, 99: 0.125, 100: 0.0625,
    }  # fmt: skip


def test_warm_up_multiplies_the_schedule_and_reset_restarts_it() -> None:
    course = course_of({"name": torchs.StepLR, "step_size": 1, "gamma": 0.5}, warmup=150)
    assert course is not None
    assert [course.factor(cursor) for cursor in (0, 99, 100, 149, 150)] == pytest.approx(
        [1 / 151, 100 / 151, 0.5 * 101 / 151, 0.5 * 150 / 151, 0.5]
    )
    restarted = Pace(course, 250, "reset", "keep", 1.0, 0)
    assert [restarted.rate(cursor) for cursor in (350, 449, 450)] == pytest.approx([0.5 * 101 / 113, 0.5, 0.25])
    cycle = course_of({"name": torchs.OneCycleLR, "max_lr": 0.1, "total_steps": 50})
    assert cycle is not None
    again, on = Pace(cycle, 500, "reset", "keep", 1.0, 0), Pace(cycle, 500, "auto", "scale", 0.5, 0)
    assert again.momentum_factor(500) == cycle.momentum(0) == pytest.approx(0.95 / 0.9)
    assert on.momentum_factor(532) == 0.5 * cycle.momentum(532)


def test_default_unit_is_reported_at_the_start(tmp_path: Path) -> None:
    out = io.StringIO()
    schedule = {"name": torchs.ExponentialLR, "gamma": 0.9}
    job = helpers.make_job(tmp_path, optimizer={**SGD, "schedule": schedule}, train={"epochs": 0.1})
    World(1).run(lambda comm: train(job, comm, out=Narrator(out=out)))
    assert "note: optimizer.schedule is stepped after every epoch; optimizer.schedule.unit" in out.getvalue()


# -- refused schedulers ---------------------------------------------------------------------------------------------
REFUSED: dict[str, tuple[Any, str]] = {
    "a metric": ({"name": torchs.ReduceLROnPlateau}, "ReduceLROnPlateau needs a metric"),
    "a metric, by a function": (f"{HERE}:plateau", "ReduceLROnPlateau needs a metric"),
    "objects": ({"name": torchs.LambdaLR}, "write a function of the optimizer that returns it"),
    "several": ({"name": torchs.ChainedScheduler}, "write a function of the optimizer that returns it"),
    "a missing argument": ({"name": torchs.CosineAnnealingLR}, "missing a required argument: 'T_max'"),
    "a wrong argument": ({"name": torchs.CosineAnnealingLR, "tmax": 3}, "no keyword tmax (did you mean T_max?)"),
    "a wrong value": ({"name": torchs.CosineAnnealingLR, "T_max": "ten"}, "optimizer.schedule: the scheduler fails"),
    "too few steps": (
        {"name": torchs.OneCycleLR, "max_lr": 0.1, "total_steps": 12},
        "(this run steps it 39 times, once per step)",
    ),
    "a later failure": ({"name": Wild, "what": "raises"}, "the scheduler fails at its step 3: no more"),
    "a negative rate": ({"name": Wild, "what": "negative"}, "sets the learning rate to -1 at its step 3"),
    "another key": ({"name": Wild, "what": "weight_decay"}, "changes the optimizer's weight_decay"),
    "a needless unit": ({"name": "cosine", "unit": "epochs"}, "only schedulers are stepped"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_with_one_message(what: str) -> None:
    schedule, words = REFUSED[what]
    with pytest.raises(JobError) as caught:
        course_of(schedule)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_momentum_schedule_for_an_optimizer_without_momentum() -> None:
    schedule = {"name": torchs.OneCycleLR, "max_lr": 0.1, "total_steps": 40}
    with pytest.raises(JobError, match=r"set optimizer.momentum = 0.95, or cycle_momentum = false"):
        course_of(schedule, choice(momentum=0.0))
    assert course_of({**schedule, "cycle_momentum": False}, choice(momentum=0.0)) is not None


def test_epochs_of_a_stream_of_unknown_length() -> None:
    schedule = {"name": torchs.ExponentialLR, "gamma": 0.9}
    with pytest.raises(JobError, match="length of the data set is unknown"):
        course_of(schedule, counts_epochs=False)
    assert course_of({**schedule, "unit": "steps"}, counts_epochs=False) is not None


def test_scheduler_object_in_place_of_a_class_is_refused() -> None:
    made = torchs.ExponentialLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1), 0.9)
    with pytest.raises(JobError, match="must be the scheduler's class"):
        Job(optimizer={"schedule": made})


def test_course_functions_are_not_called_with_an_optimizer() -> None:
    given: list[Any] = []

    def course(share: Any) -> float:
        given.append(share)
        return 1.0

    assert course_of(course) is None
    assert given == [0.0]


def test_table_of_factors_grows_on_demand() -> None:
    factors = Factors(lambda optimizer: torchs.ExponentialLR(optimizer, 0.5), choice())
    assert factors(3)[0] == pytest.approx(1 / 8)
    assert factors.scheduler.last_epoch == 3
    assert factors(1)[0] == pytest.approx(0.5)
    assert factors(1)[1] == 1.0
    assert factors.scheduler.last_epoch == 3
