"""The promises that every strategy must keep: one function per promise.

Each runs on all ranks of a communicator, virtual or real, and raises BrokenPromiseError if the promise is broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from hpctrain.comm.base import Communicator
from hpctrain.conformance import task
from hpctrain.conformance.task import Subject, Tables, Vector, distance, one_process, quietly, vector
from hpctrain.errors import HpctrainError, NanError
from hpctrain.run.api import Result, session
from hpctrain.run.folder import Narrator
from hpctrain.run.scaling import FIRST
from hpctrain.strategies.round import RoundStrategy
from hpctrain.trace.schema import KINDS, Kind, OutcomeCode, is_communication

MOMENTUM = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
ADAM = {"name": "Adam", "lr": 0.01}
EPOCHS = {"epochs": 2.0}  # every sample is reached, on any number of workers, and rounds are not longer than the run


class BrokenPromiseError(HpctrainError):
    """A strategy breaks a promise that every strategy must keep."""


@dataclass(frozen=True)
class Check:
    """A promise. `function(comm, subject, folder)` is collective; `left_out(subject, workers)` returns why the check
    does not apply to a strategy, or None. `ends_all`: the check ends with NanError. With long rounds only one rank
    raises it, so the check can run on virtual ranks only."""

    name: str
    function: Callable[[Communicator, Subject, Path], None]
    left_out: Callable[[Subject, int], str | None]
    ends_all: bool = False
    virtual_only: bool = False  # a server may end the MPI job with it, alone


# -- which strategies a promise applies to -------------------------------------------------------------------------
def always(subject: Subject, workers: int) -> str | None:
    """Applies to all strategies."""
    return None


def if_exact(subject: Subject, workers: int) -> str | None:
    """Applies to exact (synchronous) strategies; with one worker, to all that are then plain training."""
    strategy = subject.strategy()
    if strategy.exact or (workers == 1 and strategy.plain):
        return None
    return "it does not promise to equal one process"


def if_deterministic(subject: Subject, workers: int) -> str | None:
    """Does not apply if the speed of the ranks decides the order of updates, or who computes what."""
    if subject.strategy().deterministic or workers == 1:
        return None
    return "its results depend on how fast the workers are"


def if_rounds_are_long(subject: Subject, workers: int) -> str | None:
    """Applies to strategies whose workers train independently within a round."""
    strategy = subject.strategy()
    if not isinstance(strategy, RoundStrategy) or strategy.length() == 1:
        return "its rounds are one step long"
    if not strategy.quiet:
        return "its exchanges end within the next round"
    return "its islands share every step" if getattr(strategy.options, "island", "worker") == "node" else None


# -- helpers -------------------------------------------------------------------------------------------------------
def hold(condition: bool, sentence: str) -> None:
    """Raise BrokenPromiseError with the sentence unless the condition holds."""
    if not condition:
        raise BrokenPromiseError(sentence)


def equal(comm: Communicator, result: Result) -> Vector:
    """The final parameters, which must be bitwise equal on all ranks. Collective."""
    found = vector(result.model)
    table = comm.gather_rows(found)
    hold(bool((table == table[0]).all()), "the ranks end with different parameters")
    return found


def workers_of(comm: Communicator, subject: Subject) -> int:
    """How many of the ranks are workers."""
    return len(subject.roles(comm.nodes).workers)


def _trained(comm: Communicator, subject: Subject, folder: Path, **tables: Any) -> Vector:
    return equal(comm, quietly(comm, subject.job(folder, **tables)))


# -- equivalence ---------------------------------------------------------------------------------------------------
def equals_one_process(comm: Communicator, subject: Subject, folder: Path) -> None:
    """N workers end with the parameters of one process with N times the batch: with Nesterov momentum, weight decay,
    accumulation, clipping, uneven ends of epochs."""
    recipes: list[tuple[Tables, Tables]] = [
        ({**MOMENTUM, "nesterov": True}, {"accumulate": 2, "batch_size": 3}),
        ({"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}, {"clip_norm": 0.1}),
    ]
    for optimizer, keys in recipes:
        job = subject.job(folder, optimizer=optimizer, train={"steps": task.STEPS, **keys})
        found = equal(comm, quietly(comm, job))
        off = distance(found, one_process(job, workers_of(comm, subject)))
        hold(off < 1e-10, f"with {optimizer['name']} it differs by {off:.1e} from one process with the whole batch")


def equals_one_process_unevenly(comm: Communicator, subject: Subject, folder: Path) -> None:
    """The same if some targets do not count, and some parameters get no gradient in some steps on some workers."""
    optimizer = {"name": "AdamW", "lr": 0.02, "weight_decay": 0.3}
    data = (task.some_count(), task.points(11))
    train = {"steps": task.STEPS, "batch_size": 3}
    job = subject.job(folder, model=task.Sometimes, data=data, optimizer=optimizer, train=train)
    found = equal(comm, quietly(comm, job))
    off = distance(found, one_process(job, workers_of(comm, subject), task.Sometimes, task.some_count()))
    hold(off < 1e-10, f"with ignored targets it differs by {off:.1e} from one process")


def leaves_parameters_without_a_gradient(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Parameters without a gradient are not updated and do not decay."""
    optimizer = {"name": "AdamW", "lr": 0.02, "weight_decay": 0.3}
    job = subject.job(folder, model=task.Sometimes, optimizer=optimizer, train={"steps": task.STEPS})
    result = quietly(comm, job)
    equal(comm, result)
    torch.manual_seed(job.seed)
    begun = task.Sometimes().double().never.weight
    kept = torch.equal(result.model.state_dict()["never.weight"], begun)
    hold(kept, "a parameter without a gradient was changed")


def takes_optimizers_of_whole_parameters(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Adafactor needs whole parameters: none may be split."""
    found = _trained(comm, subject, folder, optimizer={"name": "Adafactor", "lr": 0.01})
    hold(bool(np.isfinite(found).all()), "with Adafactor the final parameters are not finite")


# -- keys of the job ------------------------------------------------------------------------------------------------
def honours_clip_norm(comm: Communicator, subject: Subject, folder: Path) -> None:
    """No update is longer than train.clip_norm times the learning rate."""
    begun, limit, steps = _begun(subject, folder), 1e-5, task.STEPS
    free = _trained(comm, subject, folder, optimizer={"name": "SGD", "lr": 1.0}, train={"steps": steps})
    clipped = _trained(
        comm, subject, folder, optimizer={"name": "SGD", "lr": 1.0}, train={"steps": steps, "clip_norm": limit}
    )
    most = 1.01 * limit * steps * workers_of(comm, subject)
    hold(float(np.linalg.norm(free - begun)) > 10 * most, "without train.clip_norm the parameters barely change")
    hold(0.0 < float(np.linalg.norm(clipped - begun)) <= most, "train.clip_norm has no effect")


def honours_the_learning_rate(comm: Communicator, subject: Subject, folder: Path) -> None:
    """With a learning-rate schedule of 0, nothing changes."""
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "schedule": _nothing}
    found = _trained(comm, subject, folder, optimizer=optimizer)
    hold(bool((found == _begun(subject, folder)).all()), "optimizer.schedule has no effect")


def _nothing(progress: float) -> float:
    return 0.0


def _begun(subject: Subject, folder: Path) -> Vector:
    job = subject.job(folder)
    return one_process(job, 1, steps=0)


def honours_accumulate(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Two micro-batches of 3 give the result of one batch of 6."""
    whole = _trained(comm, subject, folder, optimizer=MOMENTUM, train={"batch_size": 6})
    halves = _trained(comm, subject, folder, optimizer=MOMENTUM, train={"batch_size": 3, "accumulate": 2})
    hold(distance(halves, whole) < 1e-10, "train.accumulate changes the result")


def stops_for_nan(comm: Communicator, subject: Subject, folder: Path) -> None:
    """A loss that is not finite ends the run with NanError, which names rank and step."""
    _expect_nan(comm, subject.job(folder, data=_bad_data(comm), train=EPOCHS), "loss is nan on rank ")


def stops_for_nan_in_a_gradient(comm: Communicator, subject: Subject, folder: Path) -> None:
    """So does a gradient that is not finite, deep in a large model, while the loss is finite."""
    job = subject.job(folder, model=task.Deep, data=_bad_data(comm, 9.0), train=EPOCHS)
    _expect_nan(comm, job, "the gradient of parameter late")


def _expect_nan(comm: Communicator, job: Any, words: str) -> None:
    try:
        quietly(comm, job)
    except NanError as error:
        hold(words in str(error), f"NanError has an unexpected message: {error}")
        raise
    raise BrokenPromiseError('with train.nan = "stop" training continued')


def skips_nan(comm: Communicator, subject: Subject, folder: Path) -> None:
    """With train.nan = "skip" such steps are skipped, and training continues with finite and equal parameters."""
    for model, value in ((task.net, torch.nan), (task.Deep, 9.0)):
        keys = {"steps": task.STEPS, "nan": "skip"}
        found = _trained(comm, subject, folder, model=model, data=_bad_data(comm, value), train=keys)
        hold(bool(np.isfinite(found).all()), 'with train.nan = "skip" the final parameters are not finite')


def skips_overflows(comm: Communicator, subject: Subject, folder: Path) -> None:
    """With train.precision = "mixed_float16" and train.nan = "stop", steps whose scaled gradient overflows are skipped,
    and the loss scale falls: of all workers if they step together, otherwise of those whose gradient it was."""
    data = task.points()
    data.tensors[0][::20] = 9.0
    job = subject.job(folder, model=task.Steep, data=data, train={**EPOCHS, "precision": "mixed_float16"})
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            with running.autocast():
                loss = running.loss(running.model(batch.inputs), batch.targets)
            running.step(loss)
    hold(bool(np.isfinite(equal(comm, running.result)).all()), "a gradient that overflowed was applied")
    scale, workers = running.run.loss_scale, subject.roles(comm.nodes).workers
    table = comm.gather_rows(np.array([scale.factor if scale is not None else 0.0]))
    found = {float(table[rank, 0]) for rank in workers}
    hold(min(found) < FIRST, "the loss scale does not fall after an overflow")
    hold(len(found) == 1 or not subject.strategy().needs.lockstep, "workers that step together have other loss scales")


def _bad_data(comm: Communicator, value: float = torch.nan) -> Any:
    return task.points(bad=7 * comm.size, value=value), task.points(11)


# -- samples, evaluation, ends ----------------------------------------------------------------------------------
class Counted(Dataset[Any]):
    """Sample i is i."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((1,), float(index)), torch.zeros(1)


def takes_every_sample_once(comm: Communicator, subject: Subject, folder: Path) -> None:
    """In every epoch, all ranks together take each sample once, despite evaluations and phases before and after."""
    epochs, samples = 3, 29
    phases = between(subject, 20, 55)
    for keys in ({"strategy": subject.table}, {"phases": phases}):
        seen = _samples_taken(comm, folder, epochs, samples, keys)
        together = sorted(pair for own in comm.gather_json(seen) for pair in own)
        if subject.strategy().needs.queue:  # a worker may be dealt samples of the next epoch already
            together = sorted([0, index] for _, index in together)
            expected = sorted([0, index] for index in range(samples) for _ in range(epochs))
        else:
            expected = [[epoch, index] for epoch in range(epochs) for index in range(samples)]
        hold(together == expected, "samples of an epoch were skipped or repeated")


def _samples_taken(comm: Communicator, folder: Path, epochs: int, samples: int, keys: Tables) -> list[list[int]]:
    """[epoch, index] of each sample that this rank took. Collective."""
    train = {"epochs": epochs, "batch_size": 3, "evaluate_every": {"samples": 17}, "precision": "float32"}
    job = task.small_job(
        folder, model=_tiny, loss="mse", metric=_no_metric, data=(Counted(samples), Counted(5)),
        train=train, **keys,
    )  # fmt: skip
    seen: list[list[int]] = []
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            epoch = running.totals.cursor // samples
            seen += [[epoch, int(value)] for value in batch.inputs[:, 0]]
            running.step(running.loss(running.model(batch.inputs / samples), batch.targets))
    taken, total = running.result.samples, epochs * samples
    hold(taken == total, f"the run ended after {taken} of {total} samples")
    return seen


def _tiny() -> nn.Module:
    """With a matrix that every codec makes smaller."""
    return nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 8), nn.Linear(8, 1))


def _no_metric(outputs: Any, targets: Any) -> float:
    return 0.0


def between(subject: Subject, begin: int, end: int, **enter: Any) -> list[Tables]:
    """Phases: all-reduce, the strategy from sample `begin` on, all-reduce from sample `end` on."""
    plain = {"name": "all_reduce"}
    return [
        {"strategy": plain, "until": {"rule": "after", "samples": begin}},
        {"strategy": subject.table, "until": {"rule": "after", "samples": end - begin}, "enter": enter},
        {"strategy": plain, "enter": enter},
    ]


def evaluates_without_a_trace(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Evaluations and checkpoints do not change the trained parameters."""
    keys = {"steps": task.STEPS}
    often = {**keys, "evaluate_every": {"samples": 10}, "checkpoint_every": {"samples": 25}}
    plain, watched = (_trained(comm, subject, folder, optimizer=ADAM, train=train) for train in (keys, often))
    hold(bool((plain == watched).all()), "evaluations or checkpoints change the parameters")


def may_be_left_by_all(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Workers that leave the training loop after the same number of steps end the run without an error."""
    taken = 0
    with session(subject.job(folder), comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            if taken == 3:
                break
            running.step(running.loss(running.model(batch.inputs), batch.targets))
            taken += 1


# -- state ----------------------------------------------------------------------------------------------------------
def resumes(comm: Communicator, subject: Subject, folder: Path) -> None:
    """A run resumed from a checkpoint in mid-epoch ends bitwise equal to the uninterrupted one: with momentum, Adam,
    dropout, batch norm."""
    for optimizer in (MOMENTUM, ADAM):
        train = {"steps": 20, "batch_size": 4, "checkpoint_every": {"steps": 3}, "keep_checkpoints": 9}
        # Of every round each worker has two samples at least: batch norm cannot train on one.
        data = task.points(30 * workers_of(comm, subject)), task.points(11)
        keys = {**train, "accumulate": 2}
        job = subject.job(folder, model=task.noisy_net, data=data, optimizer=optimizer, train=keys)
        whole = quietly(comm, job)
        expected = equal(comm, whole)
        if comm.rank == 0:
            task.forget_after(whole.folder, 1)
        comm.barrier()
        again = equal(comm, quietly(comm, job, resume=whole.folder))
        hold(bool((again == expected).all()), f"with {optimizer['name']} a resumed run ends with different parameters")


def hands_its_state_over(comm: Communicator, subject: Subject, folder: Path) -> None:
    """enter.momentum decides whether the strategy, and the one after it, take over the optimizer's state."""
    found = []
    for policy in ("keep", "reset"):
        phases = between(subject, 60, 150, momentum=policy)
        job = task.small_job(folder, optimizer=MOMENTUM, train={"steps": task.STEPS}, phases=phases)
        found.append(equal(comm, quietly(comm, job)))
    hold(not (found[0] == found[1]).all(), "enter.momentum keep and reset give the same parameters")
    job = task.small_job(folder, optimizer=MOMENTUM, train={"steps": task.STEPS})
    if if_exact(subject, workers_of(comm, subject)) is None and workers_of(comm, subject) == comm.size:
        off = distance(found[0], one_process(job, comm.size))
        hold(off < 1e-10, f"with phases before and after, it differs by {off:.1e} from one process")


def exchanges_nothing_within_a_round(comm: Communicator, subject: Subject, folder: Path) -> None:
    """Between the ends of long rounds, ranks send no messages and wait for nothing. Needs a traced communicator."""
    comm.recorder.drain()
    quietly(comm, subject.job(folder, train={"steps": task.STEPS, "evaluate_every": {"fraction": 1.0}}))
    found = comm.recorder.drain()
    rows, spans = found["steps"], found["spans"]
    within = rows["step"][rows["outcome"] == OutcomeCode.LOCAL]
    hold(len(within) > 0, "no step was traced as a step within a round")
    spans = spans[np.flatnonzero(spans["kind"] == Kind.DATA)[0] :]  # training has begun
    busy = spans[is_communication(spans) & np.isin(spans["step"], within)]
    kinds = ", ".join(sorted({KINDS[kind - 1] for kind in busy["kind"]}))
    hold(len(busy) == 0, f"it communicates within rounds: {kinds}")


CHECKS: tuple[Check, ...] = (
    Check("equals one process", equals_one_process, if_exact),
    Check("equals one process when workers' shares differ", equals_one_process_unevenly, if_exact),
    Check("leaves parameters without a gradient unchanged", leaves_parameters_without_a_gradient, always),
    Check("supports optimizers that need whole parameters", takes_optimizers_of_whole_parameters, always),
    Check("honours train.clip_norm", honours_clip_norm, always),
    Check("honours optimizer.schedule", honours_the_learning_rate, always),
    Check("honours train.accumulate", honours_accumulate, if_deterministic),
    Check("stops on a NaN loss", stops_for_nan, always, ends_all=True),
    Check("stops on a NaN gradient", stops_for_nan_in_a_gradient, always, ends_all=True, virtual_only=True),
    Check("skips NaN steps", skips_nan, always),
    Check("skips steps that overflow under the loss scale", skips_overflows, always),
    Check("uses every sample once", takes_every_sample_once, always),
    Check("is not changed by evaluations and checkpoints", evaluates_without_a_trace, if_deterministic),
    Check("lets all workers leave together", may_be_left_by_all, always),
    Check("resumes bit for bit", resumes, if_deterministic),
    Check("hands over the optimizer's state", hands_its_state_over, always),
    Check("exchanges nothing within a round", exchanges_nothing_within_a_round, if_rounds_are_long),
)
