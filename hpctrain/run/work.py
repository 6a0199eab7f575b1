"""A worker's part in one phase: takes steps, and does what they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from hpctrain.data.loader import Batch, Loader
from hpctrain.run import folder as runfolder
from hpctrain.run import leaving
from hpctrain.run.active import ActiveRun
from hpctrain.run.folder import PhaseSummary
from hpctrain.run.milestones import Milestones
from hpctrain.run.trainer import Trainer
from hpctrain.strategies.base import Outcome, Strategy
from hpctrain.strategies.phase import Phase


class Work:
    """The strategy joins `phase` in the constructor, with the state that the run hands over. Collective over all ranks
    of the phase."""

    def __init__(self, run: ActiveRun, phase: Phase) -> None:
        self._run, self._phase = run, phase
        self._strategy = run.prepared.strategy(phase.index)
        self._strategy.join(phase, run.take_state())
        if (own := run.take_own()) is not None:
            for lost in filter(None, phase.worker_comm.gather_json(self._strategy.load_own(own))):
                run.warn(lost)
        self._acting = False  # whether it is doing what a step asked for
        self._loader = self._make_loader()
        self._make_summary()
        self._milestones = Milestones(run, phase, self._strategy)
        phase.comm.recorder.step = run.totals.step
        run.tick()
        self._trainer = _trainer(run, phase, self._strategy, self._loader)
        self._ended = run.totals.cursor >= run.prepared.total

    @property
    def inside(self) -> bool:
        """Whether the other workers wait for what this one is doing; otherwise the program may leave."""
        return self._acting or self._trainer.inside

    @property
    def ended(self) -> bool:
        """Whether the phase has ended."""
        return self._ended

    def end(self) -> None:
        """Mark the phase as ended: there is nothing to do in it."""
        self._ended = True

    def batches(self) -> Iterator[Batch]:
        """This worker's micro-batches until the phase ends; call `step` once for each. Collective over the workers."""
        self._ended = self._milestones.pay() or self._ended
        while not self._ended:
            own = False
            for batch in self._trainer.batches():
                own = True
                yield batch
            if not own:
                self._follow(self._trainer.finish())

    def step(self, loss: Tensor | tuple[Tensor, Any]) -> None:
        """Run backward for a micro-batch's loss; after a round's last one, everything that follows."""
        outcome = self._trainer.step(loss)
        if outcome is not None:
            self._follow(outcome)

    def withdraw(self, error: BaseException | None) -> None:
        """The program has left the loop, with `error` if any: all workers do, or LeftError is raised. Collective over
        the workers, together with the next step of those that continue."""
        run, phase = self._run, self._phase
        assert phase.workers is not None
        if run.prepared.coupling.waits_in_forward and not leaving.all_come(phase.workers):
            where, how = f"at step {run.totals.step} {leaving.ALONE}", leaving.words(error)
            raise leaving.left_alone([run.comm.rank], how, where, leaving.status_of(error))
        self._trainer.withdraw()
        self._ended = True
        run.totals.cursor = phase.cursor
        leaving.agree_to_leave(phase, run.totals.step, True, error)
        run.totals.left = True

    def leave(self) -> None:
        """Leave the phase, and store the next phase's state in the run. Collective over all ranks of the phase."""
        self._trainer.close()
        self._loader.close()
        state = self._strategy.leave()
        self._run.prepared.coupling.leave()
        if state is not None:  # drop what only this phase's strategy and rule understand
            self._run.totals.summaries[-1].dropped = int(state.counters.get("dropped", 0))
            state.keep_optimizer_only()
        self._run.state = state

    def _follow(self, outcome: Outcome) -> None:
        self._acting = True  # stays True if this fails
        trainer = self._trainer
        self._ended = self._milestones.after(outcome, trainer.steps, trainer.loss, trainer.samples)
        self._acting = False

    def _make_loader(self) -> Loader:
        threads = None if self._run.comm.concurrent else 0
        loader = self._run.prepared.loader(self._phase.index, threads, self._phase.workers)
        self._run.closing.callback(loader.close)
        return loader

    def _make_summary(self) -> None:
        summaries, index = self._run.totals.summaries, self._phase.index
        if not summaries or summaries[-1].index != index:
            summaries.append(PhaseSummary(index, runfolder.name_of(self._run.job.schedule[index].strategy)))


def _trainer(run: ActiveRun, phase: Phase, strategy: Strategy, loader: Loader) -> Trainer:
    train = run.job.train
    return Trainer(
        phase=phase,
        strategy=strategy,
        loader=loader,
        batch_size=train.batch_size,
        move=run.prepared.move,
        warn=run.warn,
        coupling=run.prepared.coupling,
        slow=run.job.debug.slow.get(run.comm.rank, 1.0),
        check_gradient=train.nan == "skip",
        loss_scale=run.loss_scale,
        steps=run.totals.step,
    )
