"""A run as the training loop sees it: batches and steps, phase after phase."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from hpctrain.cluster import Role
from hpctrain.comm.base import Communicator
from hpctrain.data.loader import Batch
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.replica.replica import Replica
from hpctrain.run import finish, leaving
from hpctrain.run.active import ActiveRun
from hpctrain.run.entrance import Entrance
from hpctrain.run.prepare import Prepared
from hpctrain.run.result import Result
from hpctrain.run.serve import serve
from hpctrain.run.totals import Ending, Totals
from hpctrain.run.work import Work
from hpctrain.strategies.phase import Phase
from hpctrain.trace.events import PhaseSwitch

LEAVING = GeneratorExit, SystemExit, KeyboardInterrupt  # raised when a program ends without having failed


class Session:
    """A run in progress, on one rank. Use `session(job)`."""

    def __init__(self, run: ActiveRun) -> None:
        self.run = run
        self._entrance = Entrance(run)
        self._phase: Phase | None = None
        self._work: Work | None = None  # while this rank is a worker
        self._phase_over = run.totals.ending is not Ending.NOTHING  # the phase being resumed had already ended
        self._begun = self._over = False
        self._result: Result | None = None

    # -- used by a user's loop ---------------------------------------------------------------------------------
    @property
    def job(self) -> Job:
        """The job being run."""
        return self.run.job

    @property
    def comm(self) -> Communicator:
        """All ranks of the run."""
        return self.run.comm

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.run.folder

    @property
    def totals(self) -> Totals:
        """The progress of the run: `cursor` (samples), `step`, `phase`. Read only."""
        return self.run.totals

    @property
    def prepared(self) -> Prepared:
        """What all ranks built alike: data, model, optimizer."""
        return self.run.prepared

    @property
    def model(self) -> nn.Module:
        """The model; its parameters are in the arena."""
        return self.prepared.model

    @property
    def replica(self) -> Replica:
        """The model's arenas."""
        return self.prepared.replica

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The job's loss of (outputs, targets). For torch's cross entropy and negative log likelihood it accounts for
        targets that do not count: pass its result to `step` unchanged, or pass a pair (sum, weight)."""
        return self.prepared.loss

    def autocast(self) -> AbstractContextManager[Any]:
        """A context with the arithmetic that train.precision selects; run the forward pass in it."""
        return self.prepared.autocast()

    @property
    def result(self) -> Result:
        """The result of the run, once the session has ended."""
        if self._result is None:
            where = f" (left at sample {self.totals.cursor:,})" if self.totals.left else ""
            raise HpctrainError(f"the session has no result: its batches() was not run to the end{where}")
        return self._result

    def step(self, loss: Tensor | tuple[Tensor, Any]) -> None:
        """Run backward for the last batch's `loss`, and after a round's last batch the strategy's step.

        `loss`: a scalar, the mean over the batch's samples (or the result of this session's `loss`), or a pair (sum,
        weight): the mean of the round is then the total of its sums over the total of its weights.
        """
        if self._work is None:
            raise HpctrainError("step(loss) was called outside of batches()")
        self._work.step(loss)

    def log(self, values: Mapping[str, Any] | None = None, /, **named: Any) -> None:
        """Record numbers by name, such as parts of a loss: `s.log(boxes=0.3)` or `s.log({"loss/boxes": 0.3})`.

        They go into this rank's trace (`Analysis.logged`, a figure of the report); rank 0's latest are shown with the
        progress. Not collective: ranks may log different names at different times. A value is a number, or a tensor
        with one element. Raises HpctrainError for anything else.
        """
        self.run.log({**(values or {}), **named})

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, phase after phase, while it is a worker; serves in between. Collective."""
        if self._begun:
            raise HpctrainError("batches() was called twice; a session is one run: open another one")
        self._begun = True
        leaving.agree_to_begin(self.comm, None)
        yield from self._course()

    # -- phases ----------------------------------------------------------------------------------------------
    def _course(self) -> Iterator[Batch]:
        """Run the phases, starting with the next one to enter."""
        going = True
        while going:
            self._phase = phase = self._entrance.enter()
            if phase.roles.of(self.comm.rank) is Role.WORKER:  # the role branch: there is no other
                yield from self._train(phase)
            else:
                serve(self.run, phase)
            going = self._conclude(phase)

    def _train(self, phase: Phase) -> Iterator[Batch]:
        self._work = work = Work(self.run, phase)
        if self._phase_over:
            work.end()
        yield from work.batches()
        if self._over:  # the loop was left, but another batch was requested
            raise HpctrainError("a batch was requested after the session had ended")
        self._leave(work)

    def _leave(self, work: Work) -> None:
        work.leave()
        self._work = None  # frees its memory, which the next phase may need

    def _conclude(self, phase: Phase) -> bool:
        """Conclude a phase. True if another phase follows. Collective over all ranks."""
        self.run.tracing.settle()
        if self._next_phase(phase):
            if self.prepared.pace(self.totals.phase, self.totals.phase_start).resets:
                self.run.state = None
            return True
        self._finish(phase)
        return False

    def _next_phase(self, phase: Phase) -> bool:
        """Whether another phase follows. Collective over all ranks; rank 0, always a worker, decides."""
        self._phase_over, totals = False, self.totals
        account = totals.plain(newest=1) if self.comm.rank == 0 else None
        rows = self.comm.gather_json([totals.step, totals.interrupted, totals.left, account])
        _, totals.interrupted, totals.left, account = rows[0]
        totals.take(account)
        totals.step = max(row[0] for row in rows)  # if workers do not step together, some took more steps
        if totals.left or totals.interrupted or totals.ending is not Ending.PHASE:
            return False
        if phase.index + 1 >= len(self.job.schedule):
            return False
        totals.phase, totals.phase_start = phase.index + 1, totals.cursor
        self.run.out.say(f"switched at sample {totals.cursor:,}: {totals.why}")
        self.comm.recorder.event(PhaseSwitch(totals.why))
        return True

    # -- the end ---------------------------------------------------------------------------------------------
    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception):
            self.run.note_failure(error)
        elif not self._over and (error is None or isinstance(error, LEAVING)):
            try:
                with leaving.says_that_it_waits(self.comm, self.totals.step, error):
                    self._depart(error)
            except Exception as failure:
                self.run.note_failure(failure)
                raise

    def _depart(self, error: BaseException | None) -> None:
        """This rank's program leaves before the run has ended. If all programs do, the run ends here; otherwise raises
        LeftError. Collective, with whatever the ranks that continue do."""
        phase, work = self._phase, self._work
        if not self._begun:
            leaving.agree_to_begin(self.comm, leaving.words(error))
            self._over = True
            return
        if phase is None or work is None or work.inside or isinstance(error, KeyboardInterrupt):
            self._over = True
            if self.comm.size > 1:  # within a collective operation, ranks cannot leave together
                where = (
                    f"in step {self.totals.step}, where the others wait for it; leave the loop between steps, "
                    "on all ranks"
                )
                raise leaving.left_alone([self.comm.rank], leaving.words(error), where, leaving.status_of(error))
            return
        if not work.ended:
            work.withdraw(error)
        self._leave(work)
        del work
        if self._conclude(phase):  # the loop was left at the end of the phase
            for _ in self._course():
                self._depart(error)
                return

    def _finish(self, phase: Phase) -> None:
        """Save the model, test it and report. Collective over all ranks. Raises UnwrittenError if files are missing."""
        ended = finish.end(self.run, phase, self._entrance)
        self._over = True
        self._result = ended.result
        finish.announce(self.run, ended)
