"""A run for the loop that trains: its batches and steps, and the walk through its phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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

LEAVING = GeneratorExit, SystemExit, KeyboardInterrupt  # with which a program ends that has not failed


class Session:
    """A run in progress, on one rank. Use `session(job)`."""

    def __init__(self, run: ActiveRun) -> None:
        self.run = run
        self._entrance = Entrance(run)
        self._phase: Phase | None = None
        self._work: Work | None = None  # while this rank is a worker
        self._phase_over = run.totals.ending is not Ending.NOTHING  # the phase that is resumed had ended
        self._begun = self._over = False
        self._result: Result | None = None

    # -- what a user's loop uses -----------------------------------------------------------------------------
    @property
    def job(self) -> Job:
        """What is run."""
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
        """Where the run stands: `cursor` (samples), `step`, `phase`. Read only."""
        return self.run.totals

    @property
    def prepared(self) -> Prepared:
        """What all ranks built alike: data, model, optimizer."""
        return self.run.prepared

    @property
    def model(self) -> nn.Module:
        """The model, its parameters in the arena."""
        return self.prepared.model

    @property
    def replica(self) -> Replica:
        """The model's arenas."""
        return self.prepared.replica

    @property
    def loss(self) -> Callable[..., Tensor]:
        """The job's loss of (outputs, targets). Of torch's cross entropy and negative log likelihood it knows which
        targets count: give what it returns to `step` as it is, or give a pair (sum, weight)."""
        return self.prepared.loss

    def autocast(self) -> AbstractContextManager[Any]:
        """The arithmetic that train.precision asks for; put the forward pass in it."""
        return self.prepared.autocast()

    @property
    def result(self) -> Result:
        """What the run gave; once the session has ended."""
        if self._result is None:
            where = f" (left at sample {self.totals.cursor:,})" if self.totals.left else ""
            raise HpctrainError(f"the session has no result: its batches() were not run to the end{where}")
        return self._result

    def step(self, loss: Tensor | tuple[Tensor, Any]) -> None:
        """Backward of the last batch's `loss`, and after a round's last batch the strategy's step.

        `loss`: a scalar, the mean over the batch's samples (or what `loss` of this session returned), or a pair (sum,
        weight): the mean of the round is then the sum of its sums over the sum of its weights.
        """
        if self._work is None:
            raise HpctrainError("step(loss) was called outside of batches()")
        self._work.step(loss)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, phase after phase, while it is a worker; serving in between. Collective."""
        if self._begun:
            raise HpctrainError("batches() was called twice; a session is one run: open another one")
        self._begun = True
        leaving.agree_to_begin(self.comm, None)
        yield from self._course()

    # -- phases ----------------------------------------------------------------------------------------------
    def _course(self) -> Iterator[Batch]:
        """Phase after phase, from the one that is entered next."""
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
        if self._over:  # left, and a batch asked for after all
            raise HpctrainError("batches() was asked for a batch after its session had ended")
        self._leave(work)

    def _leave(self, work: Work) -> None:
        work.leave()
        self._work = None  # and its memory, which the next phase may need

    def _conclude(self, phase: Phase) -> bool:
        """What follows a phase. True if that is another. Collective over all ranks."""
        if self._next_phase(phase):
            if self.prepared.pace(self.totals.phase, self.totals.phase_start).resets:
                self.run.state = None
            return True
        self._finish(phase)
        return False

    def _next_phase(self, phase: Phase) -> bool:
        """Whether another phase follows. Collective over all ranks; rank 0, always a worker, knows."""
        self._phase_over, totals = False, self.totals
        account = totals.plain(newest=1) if self.comm.rank == 0 else None
        told = self.comm.gather_json([totals.step, totals.interrupted, totals.left, account])
        _, totals.interrupted, totals.left, account = told[0]
        totals.take(account)
        totals.step = max(row[0] for row in told)  # where workers do not step together, some took more
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
        """This rank's program leaves before the run has ended. If all do, the run ends here; else raises LeftError.
        Collective, with what those do who go on."""
        phase, work = self._phase, self._work
        if not self._begun:
            leaving.agree_to_begin(self.comm, leaving.words(error))
            self._over = True
            return
        if phase is None or work is None or work.inside or isinstance(error, KeyboardInterrupt):
            self._over = True
            if self.comm.size > 1:  # within what all take part in nobody can leave together with others
                where = (
                    f"in step {self.totals.step}, where the others wait for it; leave it between steps, on all ranks"
                )
                raise leaving.left_alone([self.comm.rank], leaving.words(error), where, leaving.status_of(error))
            return
        if not work.ended:
            work.withdraw(error)
        self._leave(work)
        del work
        if self._conclude(phase):  # the loop was left where the phase had ended
            for _ in self._course():
                self._depart(error)
                return

    def _finish(self, phase: Phase) -> None:
        """Save the model, test, tell. Collective over all ranks. Raises UnwrittenError if files are missing."""
        ended = finish.end(self.run, phase, self._entrance)
        self._over = True
        self._result = ended.result
        finish.tell(self.run, ended)
