"""How deep a simulation goes: with gradients, costs alone, or costs and the losses of an earlier run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import isfinite
from typing import ClassVar

from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch
from hpctrain.data.splits import Splits
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.replica.coupling import Coupling
from hpctrain.run.api import fit_batch
from hpctrain.run.evaluate import Evaluation
from hpctrain.run.folder import name_of
from hpctrain.run.prepare import Measurable, Prepared, prepare, prepare_evaluation
from hpctrain.run.session import Session
from hpctrain.run.totals import Ending
from hpctrain.simulate.curve import Curve
from hpctrain.simulate.numbers import judged, observing, reads_numbers, refuse_losses, refuse_values
from hpctrain.simulate.opened import only_steps
from hpctrain.simulate.phantom import PhantomKeeper, PhantomParts, phantom_loss
from hpctrain.simulate.recording import CostRecorder, FollowingRecorder, KeepingRecorder
from hpctrain.text import shown

UNKNOWN = 1.0  # a loss that nobody observes
Look = Callable[[Measurable], None]


class Depth(ABC):
    """`computes`: whether there are numbers; `recorder`: of ranks that write traces."""

    computes: ClassVar[bool]
    recorder: ClassVar[type[KeepingRecorder]]

    @abstractmethod
    def shortened(self, job: Job, steps: int | None) -> Job:
        """The job as it is simulated, for that many rounds; None: as many as it has. Raises JobError if it cannot be
        simulated at this depth."""

    @abstractmethod
    def build(self, job: Job, comm: Communicator, splits: Splits, look: Look) -> Prepared:
        """The parts of a rank's run, as from `prepare`. `look`: called with the real ones."""

    @abstractmethod
    def begin(self, running: Session) -> Coupling | None:
        """A rank's run has begun. Returns the job's own coupling, if it computes."""

    @abstractmethod
    def step(self, running: Session, batch: Batch) -> None:
        """Process one batch."""

    def explained(self, error: Exception, job: Job) -> Exception:
        """The error to raise instead of this one of a rank; itself, if there is nothing to add."""
        return error


class Gradients(Depth):
    """Everything is computed, on the virtual clock."""

    computes = True
    recorder = KeepingRecorder

    def shortened(self, job: Job, steps: int | None) -> Job:
        return job if steps is None else job.override([f"train.steps={steps}"])

    def build(self, job: Job, comm: Communicator, splits: Splits, look: Look) -> Prepared:
        parts = prepare_evaluation(job, comm, splits)
        look(parts)
        return prepare(job, comm, parts)

    def begin(self, running: Session) -> Coupling:
        return running.prepared.coupling

    def step(self, running: Session, batch: Batch) -> None:
        fit_batch(running, batch)


class Costs(Depth):
    """Nothing is computed, and nothing holds memory."""

    computes = False
    recorder: ClassVar[type[KeepingRecorder]] = CostRecorder
    judged = False  # whether evaluations decide how long the job trains

    def __init__(self) -> None:
        self._parts: PhantomParts | None = None  # the same for all ranks

    def shortened(self, job: Job, steps: int | None) -> Job:
        refuse_values(job)
        refuse_losses(job)
        return only_steps(job, steps, job.output)

    def build(self, job: Job, comm: Communicator, splits: Splits, look: Look) -> Prepared:
        if self._parts is None:
            parts = prepare_evaluation(job, comm, splits)
            look(parts)
            self._parts = PhantomParts(parts, self.judged)
        return self._parts.build(job, comm)

    def begin(self, running: Session) -> None:
        run = running.run
        run.keeper = PhantomKeeper(run.prepared, run.comm, run.folder, run.files)

    def step(self, running: Session, batch: Batch) -> None:
        running.step(phantom_loss(UNKNOWN))

    def explained(self, error: Exception, job: Job) -> Exception:
        if not reads_numbers(error):
            return error
        what = shown(str(error).partition("\n")[0])
        names = " or ".join(sorted({name_of(phase.strategy) for phase in job.schedule}))
        return ClusterError(
            f"strategy {names} or optimizer {job.optimizer.name} reads numbers that a simulation of costs does "
            f"not have ({what}); simulate it with --learn, which computes them"
        )


class Followed(Costs):
    """The same for a job whose rules and early stopping observe the losses and evaluations of an earlier run where they
    would observe its own."""

    recorder = FollowingRecorder

    def __init__(self, curve: Curve) -> None:
        super().__init__()
        self._curve = curve

    def shortened(self, job: Job, steps: int | None) -> Job:
        refuse_values(job)
        self.judged = judged(job)
        return job if self.judged else only_steps(job, steps, job.output)

    def begin(self, running: Session) -> None:
        super().begin(running)
        if not self.judged:
            return
        splits, totals = running.prepared.splits, running.totals
        part = "test" if splits.validation is None else "validation"
        if part not in self._curve.metrics:
            raise self._curve.lacks(part)

        def evaluated(name: str) -> Evaluation:
            over = totals.ending is Ending.RUN
            return Evaluation(None, self._curve.metric(name, totals.cursor, over), {})

        running.run.evaluator = evaluated

    def step(self, running: Session, batch: Batch) -> None:
        totals, prepared = running.totals, running.prepared
        low, workers = totals.cursor, len(prepared.roles[totals.phase].workers)
        loss = self._curve.loss(low, min(low + prepared.batch * workers, prepared.order.epoch_end(low)))
        known, recorder = isfinite(loss), running.comm.recorder
        if not known and observing(running.job.schedule[totals.phase]) is not None:
            raise self._curve.too_short(low, f"phase {totals.phase} still waits for its rule")
        if isinstance(recorder, FollowingRecorder):
            recorder.known = known
        running.step(phantom_loss(loss if known else UNKNOWN))
