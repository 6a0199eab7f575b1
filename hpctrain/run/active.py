"""The parts of a run on this rank, between its beginning and its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch
from hpctrain.errors import HpctrainError, ModelError
from hpctrain.job import Job
from hpctrain.launcher.signals import StopSignals
from hpctrain.replica.state import Own, State
from hpctrain.run.claim import Claim
from hpctrain.run.evaluate import Evaluation, evaluate
from hpctrain.run.files import RunFiles
from hpctrain.run.folder import Narrator, metrics_row
from hpctrain.run.keeper import Keeper
from hpctrain.run.prepare import Prepared
from hpctrain.run.scaling import LossScale
from hpctrain.run.totals import Totals
from hpctrain.run.tracing import Tracing
from hpctrain.trace.events import Failure, Logged

LOSS_SCALE = "loss_scale"  # key in a worker's own numbers
Evaluator = Callable[[str], Evaluation]
"""By the name of the part of the data. Collective over the workers."""


@dataclass
class ActiveRun:
    """A run in progress, as `begin` creates it.

    `comm`: all ranks. `out`: writes on rank 0 only. `claim`, `files`: on rank 0 only. `signals`: None if stop signals
    are not caught. `closing`: what to undo when the session ends, however it ends. `state`: the state that the next
    phase takes over, whole on rank 0. `own`: what this worker's strategy continues from; None unless the phase is
    resumed. `loss_scale`: this rank's; None: losses are not scaled. `evaluator`: what evaluates a part of the data in
    place of the model, if anything. `logged`: the latest of what this rank's program has logged.
    """

    job: Job
    comm: Communicator
    prepared: Prepared
    folder: Path
    totals: Totals
    out: Narrator
    claim: Claim | None
    files: RunFiles | None
    keeper: Keeper
    tracing: Tracing
    closing: ExitStack
    signals: StopSignals | None = None
    state: State | None = None
    own: Own | None = None
    loss_scale: LossScale | None = None
    evaluator: Evaluator | None = None
    logged: dict[str, float] = field(default_factory=dict)
    _warned: set[str] = field(default_factory=set)
    _names: list[str] | None = None  # of the values of earlier evaluations, if they have names

    def take_state(self) -> State | None:
        """The state for the phase; not kept any longer, since it is as large as the model or larger."""
        state, self.state = self.state, None
        return state

    def take_own(self) -> Own | None:
        """What this worker's strategy continues from; available once. None on all ranks or on none."""
        own, self.own = self.own, None
        return own

    def saved(self, own: Own) -> Own:
        """What a checkpoint keeps of this worker: `own`, its strategy's, and the loss scale."""
        if self.loss_scale is None:
            return own
        return Own(own.arrays, {**own.numbers, LOSS_SCALE: self.loss_scale.plain()})

    def restore_scale(self, own: Own) -> None:
        """Continue with the loss scale in `own`, a result of `saved`, and remove it there."""
        known = own.numbers.pop(LOSS_SCALE, None)  # a checkpoint that is older or of another precision has none
        if known is not None and self.loss_scale is not None:
            self.loss_scale.take(known)

    def tick(self) -> None:
        """This rank has taken or served a step."""
        self.tracing.tick()
        self.works()

    def works(self) -> None:
        """This rank is not stuck."""
        if self.signals is not None:
            self.signals.stepped()

    def saving(self) -> None:
        """Until the next step ends, this rank, or one that it waits for, writes files."""
        if self.signals is not None:
            self.signals.saving()

    def asked_to_stop(self) -> bool:
        """Whether this rank has received a stop signal."""
        return self.signals is not None and bool(self.signals.asked)

    def check_hold(self) -> None:
        """Raise RunInUseError, on rank 0, if another process has taken over the run folder."""
        if self.claim is not None:
            self.claim.lock.check()

    def warn(self, text: str) -> None:
        """Issue a warning on rank 0, once for each text."""
        if text not in self._warned:
            self._warned.add(text)
            self.out.say(f"warning: {text}")

    def log(self, values: Mapping[str, Any]) -> None:
        """Record numbers that the program logs. Raises HpctrainError for a value that is no number."""
        for name, value in values.items():
            try:
                if isinstance(value, (str, bytes)):
                    raise TypeError
                number = float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise HpctrainError(
                    f"log({name}=...) got a {type(value).__name__}; it takes numbers and tensors with one element"
                ) from None
            self.logged[str(name)] = number
            self.comm.recorder.event(Logged(str(name), number, self.totals.step, self.totals.cursor))

    def note_failure(self, error: Exception) -> None:
        """Record the failure in the trace."""
        self.comm.recorder.event(Failure(type(error).__name__, str(error)))

    def measure(
        self, workers: Communicator, name: str, dataset: Any, buffers: AbstractContextManager[Any]
    ) -> Evaluation:
        """Evaluate on `dataset`, inside the context `buffers`; adds a row to metrics.csv and prints a line.

        `name`: the part of the data. Collective over the workers.
        """
        prepared, totals = self.prepared, self.totals
        self.works()  # any earlier checkpoint has been written
        with workers.span("evaluate"), buffers, self._known_to(workers):
            found = self.evaluator(name) if self.evaluator is not None else self._evaluate(workers, dataset)
            self._check_names(found)
            self._note(name, found)
            if self.evaluator is None:
                self._keep_best(name, found)
        epoch = totals.cursor / prepared.epoch
        first, *others = found.text(name, self.job.measured)
        self.out.say(f"epoch {epoch:.2f}: {', '.join([first, *(text.removeprefix(f'{name} ') for text in others)])}")
        return found

    def _check_names(self, found: Evaluation) -> None:
        """Raise ModelError, on all workers, unless the values have the same names as in earlier evaluations."""
        if self._names is not None and list(found.entries) != self._names:
            now, before = (", ".join(names) or "one without a name" for names in (found.entries, self._names))
            error = ModelError(f"the evaluation gives {now}, but earlier {before}; it must give the same every time")
            error.everywhere = True
            raise error
        self._names = list(found.entries)

    def _note(self, name: str, found: Evaluation) -> None:
        """Write what was found into the run folder."""
        totals, epoch = self.totals, self.totals.cursor / self.prepared.epoch
        if self.files is not None:
            self.files.add_row(metrics_row(totals.step, totals.cursor, epoch, totals.seconds, name, found.plain()))
            about = {"split": name, "epoch": epoch, "samples": totals.cursor}
            self.files.write_examples(found.examples, about)

    def _keep_best(self, split: str, found: Evaluation) -> None:
        """Save the model if this evaluation is the best of those during training."""
        best, cursor = self.totals.best, self.totals.cursor
        during = "validation" if self.prepared.splits.validation is not None else "test"
        if best is not None and split == during and best.improves(found, cursor):
            about = {"epoch": cursor / self.prepared.epoch, "split": split, **best.plain()}
            self.keeper.save_best(about)

    def _evaluate(self, workers: Communicator, dataset: Any) -> Evaluation:
        made, job = self.prepared, self.job
        batch, monitor = job.train.evaluation_batch, job.metric.monitor
        return evaluate(made.judge, dataset, workers, batch, self._move_measured, made.collate, monitor)

    @contextmanager
    def _known_to(self, workers: Communicator) -> Iterator[None]:
        """Dedicated servers, if any, do not know of an error that all `workers` raise, and would wait forever."""
        try:
            yield
        except HpctrainError as error:
            error.everywhere = error.everywhere and workers.size == self.comm.size
            raise

    def _move_measured(self, batch: Batch) -> Batch:
        self.works()
        return self.prepared.move(batch)
