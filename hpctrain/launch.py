"""From a job to a trained model: builds cluster and replica, walks the schedule; each phase trains or serves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpctrain import claim, leaving, runfolder
from hpctrain.agreement import agreed
from hpctrain.alike import check_alike, data_topic, job_topic, model_topic
from hpctrain.batchnorm import sync_layers
from hpctrain.cluster import Role, Roles
from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import place_arenas
from hpctrain.data.generators import seed_run
from hpctrain.data.loader import Batch
from hpctrain.errors import CheckpointError, ClusterError, HpctrainError, UnwrittenError
from hpctrain.evaluate import Evaluation, evaluate
from hpctrain.interrupt import StopSignals
from hpctrain.job import Job
from hpctrain.keeper import Keeper
from hpctrain.optimizer import make_update
from hpctrain.prepare import Prepared, prepare
from hpctrain.replica import Replica
from hpctrain.reserve import reserve
from hpctrain.resume import Resume
from hpctrain.runfiles import RunFiles
from hpctrain.runfolder import Narrator, PhaseSummary
from hpctrain.schedule import Ask, Progress
from hpctrain.state import Own, State
from hpctrain.strategies.base import Outcome, Phase, Strategy
from hpctrain.trace.events import Failure, PhaseEntered, Switch
from hpctrain.trace.writer import next_attempt
from hpctrain.tracing import Tracing
from hpctrain.trainer import Trainer, fit

LEAVING = GeneratorExit, SystemExit, KeyboardInterrupt  # with which a program ends that has not failed


@dataclass
class Result:
    """What a run gave. `model`: trained, as in model.safetensors, on every rank, in memory of its own (after an
    interruption: on ranks that were workers).

    `metrics`: {"loss": ..., "metric": ...} of the test part (or validation, without one), and "metric.NAME" of each
    entry of a metric that returns a dictionary; empty where there is neither part, and after an interruption. `folder`:
    the run folder. `phases`: what became of each.
    """

    model: nn.Module
    folder: Path
    metrics: dict[str, float]
    phases: list[PhaseSummary]
    samples: int
    interrupted: bool


def train(
    job: Job,
    comm: Communicator | None = None,
    resume: Resume | Path | str | None = None,
    out: Narrator | None = None,
) -> Result:
    """Run a job on all ranks of the MPI job (or of `comm`), by its own model, data and loss. Collective.

    `resume`: the run folder to go on in, or a `Resume`, which says what may differ. Raises HpctrainError, on all
    ranks, for a user's mistakes; another exception on one rank ends all ranks, its traceback first. So does sys.exit()
    on one rank; called on all ranks in the same step it ends the run, and the program. Where files of the run cannot be
    written it goes on to its end, and then raises UnwrittenError, on all ranks, which has the result.
    """
    with session(job, comm, resume, out) as running:
        fit(running)
    return running.result


@contextmanager
def session(
    job: Job,
    comm: Communicator | None = None,
    resume: Resume | Path | str | None = None,
    out: Narrator | None = None,
) -> Iterator[Session]:
    """For a loop of your own: `for batch in s.batches(): ...; s.step(loss)`. Collective; all ranks run the body.

    On a server rank `s.batches()` serves, and yields nothing until its role changes. `s.result` is there after.
    Ranks that leave the loop early (`break`, `return`, sys.exit()) all do so after the same number of steps: then the
    run ends there, without a result. One that leaves alone ends the job, and is named (LeftError).
    """
    if comm is None:
        from hpctrain.comm.connect import connect

        comm = connect(job)
    with _whole_job_fails_together(comm), Session(job, comm, resume, out) as running:
        yield running


@contextmanager
def _whole_job_fails_together(comm: Communicator) -> Iterator[None]:
    """What this rank raises and the others cannot know of ends them too; told first."""
    try:
        yield
    except (GeneratorExit, SystemExit):  # all ranks leave the loop, or another error would have come of it
        raise
    except BaseException as error:
        known = isinstance(error, HpctrainError) and error.everywhere
        if comm.concurrent and comm.size > 1 and not known:
            from hpctrain.comm.connect import end_all_ranks

            end_all_ranks(comm, error)
        raise


@dataclass
class Books:
    """The counters of a run: what a checkpoint keeps besides tensors. The same on all workers of a phase."""

    cursor: int = 0
    step: int = 0
    phase: int = 0
    phase_start: int = 0
    summaries: list[PhaseSummary] = field(default_factory=list)


class Session:
    """A run in progress, on one rank. Use `session(job)`."""

    def __init__(
        self, job: Job, comm: Communicator, resume: Resume | Path | str | None, out: Narrator | None = None
    ) -> None:
        self.job, self.comm = job, comm
        self.out = (out or Narrator()) if comm.rank == 0 else Narrator(enabled=False)
        self.books = Books()
        self._resume = Resume.of(resume)
        self._made: Path | None = None
        self._claim: claim.Claim | None = None
        self._stack = ExitStack()
        self._signals: StopSignals | None = None
        self._trainer: Trainer | None = None
        self._phase: Phase | None = None
        self._state: State | None = None
        self._own = Own()
        self._ending = "stop"
        self._owed = Ask.NOTHING
        self._split: dict[Roles, tuple[Communicator, Communicator | None]] = {}
        self._ended = False
        self._why = ""
        self._interrupted = False
        self._begun = self._over = self._left = False
        self._result: Result | None = None
        self._warned: set[str] = set()

    # -- what a user's loop uses -----------------------------------------------------------------------------
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
            where = f" (left at sample {self.books.cursor:,})" if self._left else ""
            raise HpctrainError(f"the session has no result: its batches() were not run to the end{where}")
        return self._result

    def step(self, loss: Tensor | tuple[Tensor, Any]) -> None:
        """Backward of the last batch's `loss`, and after a round's last batch the strategy's step.

        `loss`: a scalar, the mean over the batch's samples (or what `loss` of this session returned), or a pair (sum,
        weight): the mean of the round is then the sum of its sums over the sum of its weights.
        """
        if self._trainer is None:
            raise HpctrainError("step(loss) was called outside of batches()")
        self._trainer.step(loss)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches, phase after phase, while it is a worker; serving in between. Collective."""
        if self._begun:
            raise HpctrainError("batches() was called twice; a session is one run: open another one")
        self._begun = True
        leaving.agree_to_begin(self.comm, None)
        yield from self._course()

    def _course(self) -> Iterator[Batch]:
        """Phase after phase, from the one that is entered next."""
        going = True
        while going:
            phase = self._enter(self.books.phase)
            if phase.roles.of(self.comm.rank) is Role.WORKER:  # the role branch: there is no other
                yield from self._work(phase)
            else:
                self._serve(phase)
            going = self._conclude(phase)

    def _conclude(self, phase: Phase) -> bool:
        """What follows a phase. True if that is another. Collective over all ranks."""
        if self._next_phase(phase):
            self._hand_over()
            return True
        self._finish(phase)
        return False

    # -- beginning -------------------------------------------------------------------------------------------
    def __enter__(self) -> Session:
        with ExitStack() as undo:  # of a run that cannot begin nothing is left
            undo.callback(lambda: runfolder.discard(self._made))
            undo.push(self._stack)
            try:
                self._begin()
            except SystemExit as error:
                if self.comm.size == 1:
                    raise
                raise leaving.ended_alone(error) from error
            undo.pop_all()
        return self

    def _begin(self) -> None:
        comm, job, train = self.comm, self.job, self.job.train
        check_alike(comm, [job_topic(job.plain())])
        resumed, note = self._find_run()
        self.prepared: Prepared = agreed(comm, lambda: prepare(job, comm))
        self._check_built_alike()
        if self.prepared.norms is not None:
            self._stack.callback(self.prepared.norms.restore)
        self.comm, how = place_arenas(job, comm, self.prepared.device)
        comm = self.comm
        self.progress = Progress(train.target, train.patience, train.min_delta, job.metric.goal == "max")
        seed_run(job.seed + 1 + comm.rank, self.prepared.device)
        if resumed is None:
            self._hold(agreed(comm, lambda: claim.new_run(job) if comm.rank == 0 else None))
            self._made = self._claim.folder if self._claim is not None else None
        self.folder = Path(comm.broadcast_json(resumed or str(self._made)))
        self._files = RunFiles(self.folder, self.out) if comm.rank == 0 else None
        self.keeper = Keeper(self.prepared, comm, self.folder, self._files)
        if resumed is not None:
            self._state = self._restore()
        else:
            self.prepared.untrained.share(comm)
        self.tracing = Tracing(comm, self.folder)
        if comm.concurrent and threading.current_thread() is threading.main_thread():
            signals = StopSignals(comm.rank, train.stop_seconds, before_end=self.tracing.tick)
            self._signals = self._stack.enter_context(signals)
        self._hold(self._claim)  # let go before a held launcher is, which then kills this process
        self._stack.callback(self.tracing.close)
        attempt = comm.broadcast_json(next_attempt(self.folder) if comm.rank == 0 else 0)
        agreed(comm, lambda: self.tracing.open(job, self.prepared, attempt))
        self.tracing.begin()
        if self.prepared.device.type == "cpu":
            reserve(self.prepared.later_bytes(self.books.phase, comm.rank))
        self.out.say(self._headline())
        if how is not None:
            self.out.say(how)
        if self.prepared.norms is None and comm.size > 1 and (layers := sync_layers(self.model)):
            self.out.say(
                f"{layers[0]} is a SyncBatchNorm layer, which normalises over each worker's own samples as long as "
                "train.sync_batchnorm is false"
            )
        for text in [*self.prepared.notes(), *([note] if note else [])]:
            self.out.say(f"note: {text}")
        if resumed is not None:
            told = agreed(comm, self._record_changes)
            agreed(comm, self._forget_metrics if comm.rank == 0 else lambda: None)
            self.out.say("\n".join([f"resumed at sample {self.books.cursor:,} (step {self.books.step})", *told]))

    def _find_run(self) -> tuple[str | None, str]:
        """The folder of the run to go on with, now this one's (None: a new run), and what is to be said of it. Rank 0's
        `resume` counts. Collective."""
        resume, first = self._resume, self.comm.rank == 0
        found = agreed(self.comm, lambda: claim.run_to_resume(self.job, resume) if first and resume is not None else "")
        if isinstance(found, str):
            return self.comm.broadcast_json(None), found
        self._hold(found)
        return self.comm.broadcast_json(str(found.folder)), ""

    def _hold(self, held: claim.Claim | None) -> None:
        """Let the run folder go when the session ends."""
        self._claim = held
        if held is not None:
            self._stack.callback(held.release)

    def _check_hold(self) -> None:
        """Raise RunInUseError, on rank 0, if the run folder has become another process's meanwhile."""
        if self._claim is not None:
            self._claim.lock.check()

    def _record_changes(self) -> list[str]:
        if self._claim is None or self._resume is None:
            return []
        return self._claim.record(self.job, self._resume, self.books.cursor)

    def _check_built_alike(self) -> None:
        """All ranks have the same model and equally long data. Collective."""
        prepared, untrained = self.prepared, self.prepared.untrained
        model = model_topic(prepared.replica.layout, untrained.frozen(), untrained.buffers())
        check_alike(self.comm, [data_topic(prepared.splits), model])

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._stack:
            if isinstance(error, Exception):
                self._note_failure(error)
            elif not self._over and (error is None or isinstance(error, LEAVING)):
                try:
                    with leaving.says_that_it_waits(self.comm, self.books.step, error):
                        self._depart(error)
                except Exception as failure:
                    self._note_failure(failure)
                    raise

    def _note_failure(self, error: Exception) -> None:
        self.comm.recorder.event(Failure(type(error).__name__, str(error)))

    def _headline(self) -> str:
        layout, nodes = self.replica.layout, len(set(self.comm.nodes))
        name = runfolder.title(self.job.name, self._claim.overrides if self._claim is not None else ())
        return (
            f"{name}: {self.comm.size} rank{'s' * (self.comm.size > 1)} on {nodes} "
            f"node{'s' * (nodes > 1)}, {layout.parameters:,} parameters ({self.job.train.precision}), "
            f"{self.prepared.total:,} samples to train on; run folder {self.folder}"
        )

    def _restore(self) -> State | None:
        """Take up the newest checkpoint of the run folder. Collective. Returns like Strategy.state."""
        head, state, self._own = self.keeper.restore(self._resume.optimizer if self._resume is not None else "keep")
        self._take_account(head["account"])
        self._ended = self._ending != "on"
        if self._ended:
            self._own = Own()  # it belongs to the phase that has ended
        return state

    def _forget_metrics(self) -> None:
        try:
            runfolder.forget_metrics(self.folder, self.books.cursor, owed=bool(self._owed & Ask.EVALUATE))
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: its metrics.csv cannot be written ({error.strerror}); free space or mend permissions"
            ) from None

    # -- phases ----------------------------------------------------------------------------------------------
    def _enter(self, index: int) -> Phase:
        prepared, books, state = self.prepared, self.books, self._state
        roles, before = prepared.roles[index], self._phase
        comm, workers = self._communicators(roles)
        strategy = prepared.strategy(index)
        shared = self._may_share(comm, strategy)
        with comm.span("switch"):
            prepared.replica.place(comm, shared)
            if prepared.norms is not None and workers is not None:
                prepared.norms.join(workers)
        if before is not None:
            prepared.untrained.share(self.comm, set(roles.workers) - set(before.roles.workers))
        recorder, pace = comm.recorder, prepared.pace(index, books.phase_start)
        conductor = prepared.conductor(index, books.phase_start, recorder.event)
        rule_state = comm.broadcast_json(state.rule if state is not None else None)
        if rule_state and conductor.rule is not None:
            conductor.rule.load(rule_state)
        phase = Phase(
            index=index,
            comm=comm,
            roles=roles,
            workers=workers,
            replica=prepared.replica,
            shared=shared,
            elementwise=prepared.optimizer.elementwise,
            make_update=lambda values, low, high: make_update(
                prepared.optimizer, prepared.replica.layout, values, low, high
            ),
            rate=pace.rate,
            conductor=conductor,
            batch=prepared.batch,
            clip_norm=self.job.train.clip_norm,
            nan=self.job.train.nan,
            cursor=books.cursor,
            momentum=pace.momentum_factor,
            per_update=pace.per_update,
            adaptive=prepared.optimizer.adaptive,
            queue="static" if self.job.data.queue == "static" else "shared",
            epoch=prepared.order.length,
            ahead=prepared.ahead,
            equal=before is not None and len(before.roles.workers) == comm.size and len(set(comm.nodes)) == 1,
            tick=self._tick,
            saving=self._saving,
        )
        name = runfolder.name_of(self.job.schedule[index].strategy)
        recorder.event(PhaseEntered(index, roles.of(comm.rank).value, name))
        if len(self.job.schedule) > 1:
            self.out.say(f"phase {index}: {name}, {runfolder.describe_roles(roles)}")
        self._phase = phase
        return phase

    def _communicators(self, roles: Roles) -> tuple[Communicator, Communicator | None]:
        """Of all ranks and of the workers; kept for later phases of the same roles: to split takes milliseconds."""
        if roles not in self._split:
            comm = self.comm.split(0, self.comm.rank)
            assert comm is not None
            self._split[roles] = comm, comm.split(0 if comm.rank in roles.workers else None, comm.rank)
        return self._split[roles]

    def _may_share(self, comm: Communicator, strategy: Strategy) -> bool:
        if not self._shares(strategy):  # the same on all ranks
            return False
        layout = self.replica.layout
        if self.replica.keeps_shared(comm):
            return True
        why = comm.can_share(layout.length * layout.dtype.itemsize * 2)
        if why is not None:
            self.out.say(f"not sharing memory between the ranks of a node: {why}")
        return comm.gather_json(why is None).count(False) == 0

    def _shares(self, strategy: Strategy) -> bool:
        """Whether this phase wants node-shared arenas."""
        elementwise, on_cpu = self.prepared.optimizer.elementwise, self.prepared.device.type == "cpu"
        allowed = self.job.communicator.shared and on_cpu
        return strategy.needs.parameters == "node" and elementwise and allowed

    def _work(self, phase: Phase) -> Iterator[Batch]:
        strategy = self.prepared.strategy(phase.index)
        strategy.join(phase, self._take_state())
        own, self._own = self._own, Own()
        strategy.load_own(own)
        trainer = self._trainer_of(phase, strategy)
        if self._owed and self._pay():
            trainer.end()
        yield from trainer.batches()
        if self._over:  # left, and a batch asked for after all
            raise HpctrainError("batches() was asked for a batch after its session had ended")
        self._leave(phase, strategy)

    def _serve(self, phase: Phase) -> None:
        spec = self.job.schedule[phase.index].strategy
        kind = spec.resolve().Server
        if kind is None:
            raise ClusterError(f"strategy {spec.name} has servers but no Server class")
        server = kind(spec.options)
        server.join(phase, self._take_state())
        server.serve()
        self._saving()  # the workers may write a last checkpoint

    def _take_state(self) -> State | None:
        """What the phase takes over: it is not kept beyond that, being as large as the model or larger."""
        state, self._state = self._state, None
        return state

    def _trainer_of(self, phase: Phase, strategy: Strategy) -> Trainer:
        threads = None if self.comm.concurrent else 0
        self._loader = loader = self.prepared.loader(phase.index, threads, phase.workers)
        self._stack.callback(loader.close)
        train = self.job.train
        self._strategy = strategy
        summaries = self.books.summaries
        if not summaries or summaries[-1].index != phase.index:
            summaries.append(PhaseSummary(phase.index, runfolder.name_of(self.job.schedule[phase.index].strategy)))
        self._since = self.comm.now()
        self._version = strategy.version
        phase.comm.recorder.step = self.books.step
        self._tick()
        self._trainer = Trainer(
            phase=phase,
            strategy=strategy,
            loader=loader,
            attendant=self,
            batch_size=train.batch_size,
            move=self.prepared.move,
            slow=self.job.debug.slow.get(self.comm.rank, 1.0),
            check_gradient=train.nan == "skip",
            steps=self.books.step,
            norms=self.prepared.norms,
        )
        if self.books.cursor >= self.prepared.total or self._ended:
            self._trainer.end()
        return self._trainer

    def _leave(self, phase: Phase, strategy: Strategy) -> None:
        self._loader.close()
        self._state = state = strategy.leave()
        if self.prepared.norms is not None:
            self.prepared.norms.leave()
        self._trainer = None
        del self._strategy  # and its memory, which the next phase may need
        if state is not None:  # what only this phase's strategy and rule understand ends with it
            self.books.summaries[-1].dropped = int(state.counters.get("dropped", 0))
            state.keep_optimizer_only()

    def _next_phase(self, phase: Phase) -> bool:
        """Whether another phase follows. Collective over all ranks; rank 0, always a worker, knows."""
        self._ended = False
        account = self._account() if self.comm.rank == 0 else None
        told = self.comm.gather_json([self.books.step, self._interrupted, self._left, account])
        _, self._interrupted, self._left, account = told[0]
        self._take_account(account)
        self.books.step = max(row[0] for row in told)  # where workers do not step together, some took more
        if self._left:
            return False
        if self._ending != "phase" or self._interrupted or phase.index + 1 >= len(self.job.schedule):
            return False
        self.books.phase, self.books.phase_start = phase.index + 1, self.books.cursor
        self.out.say(f"switched at sample {self.books.cursor:,}: {self._why}")
        self.comm.recorder.event(Switch(self._why))
        return True

    def _hand_over(self) -> None:
        """The next phase's optimizer takes over what it is to."""
        if self.prepared.pace(self.books.phase, self.books.phase_start).resets:
            self._state = None

    def _account(self) -> dict[str, Any]:
        """Where the run stands, as plain values: what the ranks of the next phase and a checkpoint must know."""
        books = {**vars(self.books), "summaries": [vars(summary) for summary in self.books.summaries]}
        ending = {"ending": self._ending, "why": self._why, "owed": int(self._owed)}
        return {"books": books, "stopping": vars(self.progress), **ending}

    def _take_account(self, told: dict[str, Any]) -> None:
        books = dict(told["books"])
        summaries = [PhaseSummary(**row) for row in books.pop("summaries")]
        self.books = Books(**books, summaries=summaries)
        self.progress = Progress(**told["stopping"])
        self._ending, self._why = told["ending"], told["why"]
        self._owed = Ask(told.get("owed", 0))

    # -- steps -----------------------------------------------------------------------------------------------
    def stepped(self, trainer: Trainer, outcome: Outcome, loss: float, samples: int) -> bool:
        """Keep the books after a step, and do what it asks for. True if the phase ends here."""
        phase, books = trainer.phase, self.books
        before, books.cursor = books.cursor, outcome.cursor
        books.step = trainer.steps
        summary = books.summaries[-1]
        summary.steps += self._updates_until(outcome)
        summary.samples += outcome.cursor - before
        summary.loss = outcome.loss
        epoch = outcome.cursor / self.prepared.epoch
        recorder, rate = phase.comm.recorder, self.job.optimizer.lr or 0.0
        recorder.step_done(
            epoch, loss, samples, rate * phase.rate(before), outcome.result,
            *outcome.staleness, phase.index, outcome.cursor,
        )  # fmt: skip
        recorder.step = trainer.steps
        self._tick()
        if outcome.ask & Ask.LEAVE:
            leaving.agree_to_leave(phase, books.step, leaves=False)
        if self._signals is not None and self._signals.asked:
            phase.wish = Ask.INTERRUPT
        if self.out.due():
            self._tell_progress(summary, epoch, outcome.loss)
        return self._heed(outcome.ask, outcome.why, outcome.held) if outcome.ask else False

    def warn(self, text: str) -> None:
        """Say it once, on rank 0."""
        if text not in self._warned:
            self._warned.add(text)
            self.out.say(f"warning: {text}")

    def _tick(self) -> None:
        """This rank has taken a step, or served one."""
        self.tracing.tick()
        self._works()

    def _works(self) -> None:
        """This rank is not stuck."""
        if self._signals is not None:
            self._signals.stepped()

    def _saving(self) -> None:
        """Until the next step ends, this rank or one that it waits for writes files."""
        if self._signals is not None:
            self._signals.saving()

    def _move_measured(self, batch: Batch) -> Batch:
        self._works()
        return self.prepared.move(batch)

    def _updates_until(self, outcome: Outcome) -> int:
        """How many there were since this worker's last step: where workers do not step together, those of all."""
        before, self._version = self._version, outcome.version
        return max(1, outcome.version - before)

    def _tell_progress(self, summary: PhaseSummary, epoch: float, loss: float) -> None:
        seconds = (self.comm.now() - self._since) / 1e9 + summary.seconds
        rate = summary.samples / seconds if seconds > 0 else 0.0
        share = 100 * self.books.cursor / self.prepared.total
        self.out.update(
            f"{share:3.0f} %  epoch {epoch:.2f}  step {self.books.step}  loss {loss:.4f}  {rate:,.0f} samples/s"
        )

    def _heed(self, ask: Ask, why: str, held: int = 0) -> bool:
        """Do what is asked for at this cursor. True if the phase ends here."""
        with self._clock_stopped(0 if ask & (Ask.STOP | Ask.END_PHASE) else held):
            if ask & Ask.INTERRUPT:
                self._interrupt(ask, why)
                return True
            return self._carry_out(ask, why)

    def _interrupt(self, ask: Ask, why: str) -> None:
        """Save and leave, quickly: what else is due at this cursor is owed by the run that goes on from here."""
        self._interrupted = True
        self._saving()
        self._owed, self._why, self._ending = ask & (Ask.EVALUATE | Ask.END_PHASE), why, "on"
        self._checkpoint("on")

    def _pay(self) -> bool:
        """Do what an interruption left to be done, as the run would have that was not interrupted. True if the phase
        ends here. Collective over the workers."""
        owed, self._owed = self._owed, Ask.NOTHING
        return self._heed(owed | Ask.STOP if self.books.cursor >= self.prepared.total else owed, self._why)

    def _carry_out(self, ask: Ask, why: str) -> bool:
        reason, last = None, self.books.phase + 1 >= len(self.job.schedule)
        stops = bool(ask & Ask.STOP) or (last and bool(ask & Ask.END_PHASE))
        if ask & Ask.EVALUATE:
            reason, ruled = self._evaluate(stops)
            if ruled is not None:
                ask, why, stops = ask | Ask.END_PHASE, ruled, stops or last
        ends = bool(ask & (Ask.STOP | Ask.END_PHASE)) or reason is not None
        if stops or reason is not None:
            self._ending = "stop"
        elif ask & Ask.END_PHASE:
            self._ending, self._why = "phase", why
        if reason is not None:
            self.out.say(f"stopped at sample {self.books.cursor:,}: {reason}")
        if ask & Ask.CHECKPOINT or (ends and self._ending == "stop"):
            self._checkpoint(self._ending if ends and not ask & Ask.STOP else "on")
        return ends

    @contextmanager
    def _clock_stopped(self, held: int) -> Iterator[None]:
        """Evaluation and checkpoints do not count as training time, nor what workers wait for each other (`held`
        nanoseconds, this one) to come to them."""
        summary, began = self.books.summaries[-1], self.comm.now() - held
        summary.seconds += (began - self._since) / 1e9
        try:
            yield
        finally:
            self._since = self.comm.now()
            summary.pauses += (self._since - began) / 1e9

    def _evaluate(self, stops: bool) -> tuple[str | None, str | None]:
        """On the validation samples (else the test samples). Why training should stop, and why the phase should, or
        None. Collective over the workers.

        Not where the run stops anyway and ends with just that evaluation.
        """
        splits = self.prepared.splits
        name, dataset = ("validation", splits.validation) if splits.validation is not None else ("test", splits.test)
        if dataset is None or (stops and (splits.validation is None or splits.test is None)):
            return None, None
        assert self._phase is not None and self._phase.workers is not None
        workers = self._phase.workers
        with self._strategy.settled():
            metric = self._measure(workers, name, dataset, self.prepared.untrained.agreed(workers)).metric
        conductor = self._phase.conductor
        ruled = conductor.evaluated(self.books.cursor, metric)
        return self.progress.judge(metric), conductor.why if ruled else None

    def _measure(self, comm: Communicator, name: str, dataset: Any, buffers: AbstractContextManager[Any]) -> Evaluation:
        """What an evaluation finds, with all ranks' `buffers` as they are to be. Collective over the workers."""
        prepared, books = self.prepared, self.books
        self._works()  # the checkpoint before, if there was one, is written
        with comm.span("evaluate"), buffers:
            found = evaluate(
                self.model, dataset, prepared.loss, prepared.metric, comm, self.job.train.evaluation_batch,
                self._move_measured, prepared.autocast, self.job.metric.name,
            )  # fmt: skip
        epoch = books.cursor / prepared.epoch
        seconds = sum(summary.seconds for summary in books.summaries)
        if self._files is not None:
            self._files.add_row(runfolder.metrics_row(books.step, books.cursor, epoch, seconds, name, found.plain()))
        first, *others = found.text(name, self.job.metric.name)
        self.out.say(f"epoch {epoch:.2f}: {', '.join([first, *(text.removeprefix(f'{name} ') for text in others)])}")
        return found

    def _checkpoint(self, ending: str) -> None:
        """`ending`: what ends here before the run's samples are used up: nothing ("on"), "phase", or all ("stop").

        Collective over the workers; the servers take part.
        """
        assert self._phase is not None and self._phase.workers is not None
        self._check_hold()
        self._saving()
        own = self._strategy.own()
        with self._phase.workers.span("checkpoint"), self._strategy.settled():
            account = {**self._account(), "ending": ending}
            self.keeper.save(self._phase, self._strategy.state(), own, account, self.books.cursor)
        if self.comm.rank == 0 and not self._interrupted:
            self._works()  # it has written; the others may have to wait for that still

    # -- leaving early ---------------------------------------------------------------------------------------
    def _depart(self, error: BaseException | None) -> None:
        """This rank's program leaves before the run has ended. If all do, the run ends here; else raises LeftError.
        Collective, with what those do who go on."""
        phase, trainer = self._phase, self._trainer
        if not self._begun:
            leaving.agree_to_begin(self.comm, leaving.words(error))
            self._over = True
            return
        if phase is None or trainer is None or trainer.inside or isinstance(error, KeyboardInterrupt):
            self._over = True
            if self.comm.size > 1:  # within what all take part in nobody can leave together with others
                where = f"in step {self.books.step}, where the others wait for it; leave it between steps, on all ranks"
                raise leaving.left_alone([self.comm.rank], leaving.words(error), where, leaving.status_of(error))
            return
        if not trainer.ended:
            self._withdraw(phase, trainer, error)
        self._leave(phase, self._strategy)
        if self._conclude(phase):  # the loop was left where the phase had ended
            for _ in self._course():
                self._depart(error)
                return

    def _withdraw(self, phase: Phase, trainer: Trainer, error: BaseException | None) -> None:
        assert phase.workers is not None
        if self.prepared.norms is not None and not leaving.all_come(phase.workers):
            where, how = f"at step {self.books.step} {leaving.ALONE}", leaving.words(error)
            raise leaving.left_alone([self.comm.rank], how, where, leaving.status_of(error))
        trainer.withdraw()
        self.books.cursor = phase.cursor
        leaving.agree_to_leave(phase, self.books.step, True, error)
        self._left = True

    # -- the end ---------------------------------------------------------------------------------------------
    def _finish(self, phase: Phase) -> None:
        """Save the model, test, tell. Collective over all ranks. Raises UnwrittenError if files are missing."""
        self._saving()
        metrics: dict[str, float] = {}
        interrupted, splits = self._interrupted, self.prepared.splits
        name, dataset = ("test", splits.test) if splits.test is not None else ("validation", splits.validation)
        if not interrupted and not self._left:
            agreed(self.comm, self._check_hold)
            self.keeper.settle_model(phase)
            for buffer in agreed(self.comm, self.keeper.check_model if self.comm.rank == 0 else list):
                self.warn(f"buffer {buffer} of the saved model holds NaN")
            agreed(self.comm, self.keeper.save_model)  # on the disk before a test that fails on any rank ends all
            if dataset is not None and phase.workers is not None:
                metrics = self._measure(phase.workers, name, dataset, nullcontext()).plain()
            self._saving()
            metrics = self.comm.broadcast_json(metrics)
        self.replica.release()
        for comm, workers in self._split.values():
            if workers is not None:
                workers.free()
            comm.free()
        untraced = self.tracing.finish()
        unwritten = self.comm.broadcast_json(self._close_files(untraced) if self._files is not None else None)
        self._over = True
        if self._left:
            self.out.say(f"left at sample {self.books.cursor:,} (step {self.books.step}); run folder {self.folder}")
            self._tell_unwritten(unwritten)
            return
        self._result = Result(self.model, self.folder, metrics, self.books.summaries, self.books.cursor, interrupted)
        if interrupted:
            self._tell_interruption(unwritten)
            return
        self._tell_end(name, metrics)
        if self.job.trace.report and self.job.trace.enabled and self.comm.concurrent:
            self._report()
        self._tell_unwritten(unwritten)

    def _tell_unwritten(self, unwritten: str | None) -> None:
        """On all ranks, after all else: a run whose files are missing has not come to a good end."""
        if unwritten is not None:
            error = UnwrittenError(f"the run has ended, but not all of it was saved: {unwritten}")
            error.everywhere, error.result = True, self._result
            raise error

    def _close_files(self, untraced: str | None) -> str | None:
        assert self._files is not None
        self._files.write_rows()
        return "; ".join(text for text in (self._files.unwritten(), untraced) if text is not None) or None

    def _tell_interruption(self, unwritten: str | None) -> None:
        told = "" if unwritten is None else f"not all of it was saved: {unwritten}; "
        text = f"interrupted at sample {self.books.cursor:,}; {told}go on with: hpctrain train --resume {self.folder}"
        if self._signals is not None and self.comm.rank == 0:
            self._signals.say(text)
        else:
            self.out.say(text)
        self.comm.barrier()  # a launcher that is held kills all ranks as soon as it is let go

    def _tell_end(self, measured: str, metrics: dict[str, float]) -> None:
        self.out.say(runfolder.table(self.books.summaries))
        for summary in self.books.summaries:
            if summary.dropped:
                self.out.say(f"phase {summary.index}: {summary.dropped} late gradients were dropped")
        if metrics:
            self.out.say(f"{measured} {self.job.metric.name} {metrics['metric']:.4f}")
        self.out.say(f"run folder {self.folder}")

    def _report(self) -> None:
        """Collective: the others wait, so that their launcher does not end before it is written."""
        if self.comm.rank == 0:
            from hpctrain.report import write_report

            try:
                path, headline = write_report(self.folder)
                self.out.say(f"{headline}\nreport {path}")
            except (HpctrainError, OSError) as error:  # the run itself is safe
                self.out.say(f"no report: {error}")
        self.comm.barrier()
