"""What happens after a step: update the totals, then evaluate, checkpoint, end the phase or stop, as asked."""

from __future__ import annotations

from typing import Any

from hpctrain.clock.decisions import Ask
from hpctrain.comm.base import Communicator
from hpctrain.run import leaving
from hpctrain.run.active import ActiveRun
from hpctrain.run.folder import PhaseSummary
from hpctrain.run.totals import Ending, TrainingClock
from hpctrain.strategies.base import Outcome, Strategy
from hpctrain.strategies.phase import Phase
from hpctrain.text import escaped

MOST_LOGGED = 4  # values of the program's own in a progress line


class Milestones:
    """The milestones of one phase on a worker. The phase's summary is the latest in the run's totals."""

    def __init__(self, run: ActiveRun, phase: Phase, strategy: Strategy) -> None:
        self._run, self._phase, self._strategy = run, phase, strategy
        self._last = run.totals.phase + 1 >= len(run.job.schedule)
        self._version = strategy.version
        self._clock = TrainingClock(run.comm.now, self._summary)

    # -- after a step ----------------------------------------------------------------------------------------
    def after(self, outcome: Outcome, step: int, loss: float, samples: int) -> bool:
        """Add a step to the totals, and do what it asks for. True if the phase ends here.

        `step`: steps taken so far. `loss`, `samples`: this worker's. Collective over the workers.
        """
        run, phase, totals = self._run, self._phase, self._run.totals
        self._count(outcome, step, loss, samples)
        run.tick()
        if outcome.ask & Ask.LEAVE:
            leaving.agree_to_leave(phase, totals.step, leaves=False)
        if run.asked_to_stop():
            phase.step.wish = Ask.INTERRUPT
        if run.out.due():
            self._show_progress(outcome.loss)
        return self._act_on(outcome.ask, outcome.why, outcome.held) if outcome.ask else False

    def pay(self) -> bool:
        """Do what an interruption left pending, as an uninterrupted run would have done. True if the phase ends here.
        Collective over the workers."""
        totals = self._run.totals
        owed, totals.owed = totals.owed, Ask.NOTHING
        if not owed:
            return False
        return self._act_on(owed | Ask.STOP if totals.cursor >= self._run.prepared.total else owed, totals.why)

    @property
    def _summary(self) -> PhaseSummary:
        return self._run.totals.summaries[-1]

    def _count(self, outcome: Outcome, step: int, loss: float, samples: int) -> None:
        run, phase, totals, summary = self._run, self._phase, self._run.totals, self._summary
        before, totals.cursor = totals.cursor, outcome.cursor
        totals.step = step
        summary.steps += self._updates_until(outcome)
        summary.samples += outcome.cursor - before
        summary.loss = outcome.loss
        recorder, rate = phase.comm.recorder, run.job.optimizer.lr or 0.0
        recorder.step_done(
            outcome.cursor / run.prepared.epoch, loss, samples, rate * phase.updating.rate(before), outcome.result,
            *outcome.staleness, phase.index, outcome.cursor,
        )  # fmt: skip
        recorder.step = step

    def _updates_until(self, outcome: Outcome) -> int:
        """The updates since this worker's last step; if workers do not step together, those of all workers."""
        before, self._version = self._version, outcome.version
        return max(1, outcome.version - before)

    def _show_progress(self, loss: float) -> None:
        run, totals, seconds = self._run, self._run.totals, self._clock.seconds
        rate = self._summary.samples / seconds if seconds > 0 else 0.0
        share, epoch = 100 * totals.cursor / run.prepared.total, totals.cursor / run.prepared.epoch
        logged = "".join(f"  {escaped(name)} {value:.4g}" for name, value in [*run.logged.items()][:MOST_LOGGED])
        text = f"{share:3.0f} %  epoch {epoch:.2f}  step {totals.step}  loss {loss:.4f}{logged}  {rate:,.0f} samples/s"
        run.out.update(text)

    # -- what is asked ---------------------------------------------------------------------------------------
    def _act_on(self, ask: Ask, why: str, held: int = 0) -> bool:
        """Do what is asked for at this cursor. True if the phase ends here."""
        with self._clock.stopped(0 if ask & (Ask.STOP | Ask.END_PHASE) else held):
            if ask & Ask.INTERRUPT:
                self._interrupt(ask, why)
                return True
            return self._carry_out(ask, why)

    def _interrupt(self, ask: Ask, why: str) -> None:
        """Save and leave quickly; anything else due at this cursor is left to the run that resumes here."""
        totals = self._run.totals
        totals.interrupted = True
        self._run.saving()
        totals.owed, totals.why, totals.ending = ask & (Ask.EVALUATE | Ask.END_PHASE), why, Ending.NOTHING
        self._checkpoint(Ending.NOTHING)

    def _carry_out(self, ask: Ask, why: str) -> bool:
        totals, reason = self._run.totals, None
        stops = bool(ask & Ask.STOP) or (self._last and bool(ask & Ask.END_PHASE))
        if ask & Ask.EVALUATE and (measured := self._measured(stops)) is not None:
            if stops:
                self._save_first(ask, why)
            reason, ruled = self._evaluate(*measured)
            if ruled is not None:
                ask, why, stops = ask | Ask.END_PHASE, ruled, stops or self._last
        ends = bool(ask & (Ask.STOP | Ask.END_PHASE)) or reason is not None
        if stops or reason is not None:
            totals.ending = Ending.RUN
        elif ask & Ask.END_PHASE:
            totals.ending, totals.why = Ending.PHASE, why
        if reason is not None:
            self._run.out.say(f"stopped at sample {totals.cursor:,}: {reason}")
        if ask & Ask.CHECKPOINT or (ends and totals.ending is Ending.RUN):
            self._checkpoint(totals.ending if ends and not ask & Ask.STOP else Ending.NOTHING)
        return ends

    def _measured(self, stops: bool) -> tuple[str, Any] | None:
        """(name, data set) to evaluate on: the validation samples or else the test samples. None if there are none, or
        if the run stops anyway and ends with that same evaluation."""
        splits = self._run.prepared.splits
        if stops and (splits.validation is None or splits.test is None):
            return None
        named = {"validation": splits.validation, "test": splits.test}
        return next(((name, dataset) for name, dataset in named.items() if dataset is not None), None)

    def _save_first(self, ask: Ask, why: str) -> None:
        """Save a checkpoint from which the run goes on with the evaluation that is due, should that fail."""
        totals = self._run.totals
        before, totals.owed, totals.why = totals.why, ask & (Ask.EVALUATE | Ask.END_PHASE), why
        self._checkpoint(Ending.NOTHING)
        totals.owed, totals.why = Ask.NOTHING, before

    def _evaluate(self, name: str, dataset: Any) -> tuple[str | None, str | None]:
        """Evaluate. Returns why training should stop, and why the phase should end, each None if it should not.
        Collective over the workers."""
        run, conductor, untrained = self._run, self._phase.conductor, self._run.prepared.untrained
        with self._strategy.settled():
            metric = run.measure(self._workers, name, dataset, untrained.agreed(self._workers)).metric
        ruled = conductor.evaluated(run.totals.cursor, metric)
        return run.totals.stopping.judge(metric), conductor.why if ruled else None

    def _checkpoint(self, ending: Ending) -> None:
        """Write a checkpoint. `ending`: what ends here before the run's samples are used up.

        Collective over the workers; the servers take part.
        """
        run, totals = self._run, self._run.totals
        run.check_hold()
        run.saving()
        own = run.saved(self._strategy.own())
        written = self._phase.replica.values.nbytes if self._workers.rank == 0 else 0  # besides the optimizer's state
        with self._workers.span("checkpoint", written), self._strategy.settled():
            account = {**totals.plain(), "ending": ending.value}
            run.keeper.save(self._phase, self._strategy.state(), own, account, totals.cursor)
        if run.comm.rank == 0 and not totals.interrupted:
            run.works()  # this rank has finished writing; the others may still have to wait

    @property
    def _workers(self) -> Communicator:
        assert self._phase.workers is not None
        return self._phase.workers
