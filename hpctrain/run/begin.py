"""How a run begins: parts built alike on all ranks, the run folder, a checkpoint to resume from, the trace."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hpctrain.clock.decisions import Ask, EarlyStopping
from hpctrain.comm.alike import check_alike, data_topic, job_topic, model_topic
from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import place_arenas
from hpctrain.data.generators import seed_run
from hpctrain.errors import CheckpointError
from hpctrain.job import Job
from hpctrain.launcher.signals import StopSignals
from hpctrain.replica.batchnorm import sync_layers
from hpctrain.run import claim, leaving
from hpctrain.run import folder as runfolder
from hpctrain.run.active import ActiveRun
from hpctrain.run.agreement import agreed
from hpctrain.run.best import Best
from hpctrain.run.claim import Claim
from hpctrain.run.files import RunFiles
from hpctrain.run.folder import Narrator
from hpctrain.run.keeper import Keeper
from hpctrain.run.prepare import Prepared, prepare
from hpctrain.run.reserve import keep_freed_memory, models_needed, reserve
from hpctrain.run.resume import Resume
from hpctrain.run.scaling import LossScale
from hpctrain.run.totals import Ending, Totals
from hpctrain.run.tracing import Tracing
from hpctrain.run.tuning import tuned
from hpctrain.trace.writer import next_attempt


@contextmanager
def begun(
    job: Job,
    comm: Communicator,
    resume: Resume | None,
    out: Narrator | None,
    build: Callable[[Job, Communicator], Prepared] = prepare,
) -> Iterator[ActiveRun]:
    """Begin a run; if it cannot begin, nothing of it is left behind. Closes the run on exit, whatever the reason.
    Collective over all ranks. Raises HpctrainErrors, on all ranks. `build`: builds the parts of the run."""
    with ExitStack() as undo, ExitStack() as closing:
        narrator = (out or Narrator()) if comm.rank == 0 else Narrator(enabled=False)
        try:
            run = _begin(job, comm, resume, narrator, closing, undo, build)
        except SystemExit as error:
            if comm.size == 1:
                raise
            raise leaving.ended_alone(error) from error
        undo.pop_all()
        yield run


def _begin(
    job: Job,
    comm: Communicator,
    resume: Resume | None,
    out: Narrator,
    closing: ExitStack,
    undo: ExitStack,
    build: Callable[[Job, Communicator], Prepared],
) -> ActiveRun:
    """`undo`: what else to do if the run cannot begin."""
    kept = keep_freed_memory(os.environ)  # before anything large is allocated
    check_alike(comm, [job_topic(job.plain())])
    old, note = _find_run(job, comm, resume)
    if old is not None:
        closing.callback(old.release)
    resumed: bool = comm.broadcast_json(old is not None)
    job = tuned(job, comm, old.folder if old is not None else None)
    prepared: Prepared = agreed(comm, lambda: build(job, comm))
    _check_built_alike(comm, prepared)
    closing.callback(prepared.coupling.restore)
    comm, how = place_arenas(job, comm, prepared.device)
    seed_run(job.seed + 1 + comm.rank, prepared.device)
    held = old if resumed else _new_run(job, comm, closing, undo)
    folder = Path(comm.broadcast_json(str(held.folder) if held is not None else None))
    files = RunFiles(folder, out) if comm.rank == 0 else None
    run = ActiveRun(
        job,
        comm,
        prepared,
        folder,
        totals=_totals(job),
        out=out,
        claim=held,
        files=files,
        keeper=Keeper(prepared, comm, folder, files),
        tracing=Tracing(comm, folder),
        closing=closing,
        loss_scale=LossScale() if job.train.precision == "mixed_float16" else None,
    )
    if resumed:
        _restore(run, resume)
    else:
        prepared.untrained.share(comm)
    _open(run, kept)
    _announce(run, how, note)
    if resumed:
        _announce_resume(run, resume)
    return run


def _find_run(job: Job, comm: Communicator, resume: Resume | None) -> tuple[Claim | None, str]:
    """On rank 0, whose `resume` counts: the claim on the run to resume (None: a new run) and a note for the user.
    Collective."""
    first = comm.rank == 0
    found = agreed(comm, lambda: claim.run_to_resume(job, resume) if first and resume is not None else "")
    return (None, found) if isinstance(found, str) else (found, "")


def _new_run(job: Job, comm: Communicator, closing: ExitStack, undo: ExitStack) -> Claim | None:
    """On rank 0, claim a new folder. Collective."""
    made: Claim | None = agreed(comm, lambda: claim.new_run(job) if comm.rank == 0 else None)
    if made is not None:
        closing.callback(made.release)
        undo.callback(runfolder.discard, made.folder)
    return made


def _check_built_alike(comm: Communicator, prepared: Prepared) -> None:
    """Check that all ranks have the same model and data of equal length. Collective."""
    untrained = prepared.untrained
    model = model_topic(prepared.replica.layout, untrained.frozen(), untrained.buffers())
    check_alike(comm, [data_topic(prepared.splits), model])


def _totals(job: Job) -> Totals:
    train = job.train
    higher = job.metric.goal == "max"
    best = Best(train.keep_best, higher and train.keep_best != "loss") if train.keep_best is not None else None
    return Totals(EarlyStopping(train.target, train.patience, train.min_delta, higher), best=best)


def _restore(run: ActiveRun, resume: Resume | None) -> None:
    """Restore the newest checkpoint of the run folder. Collective."""
    head, run.state, own = run.keeper.restore(resume.optimizer if resume is not None else "keep")
    run.restore_scale(own)
    run.totals.take(head["account"])
    _check_best(run)
    if run.totals.ending is Ending.NOTHING and run.comm.rank in head["workers"]:
        run.own = own  # otherwise it belongs to the phase that has ended, or would stay for the next one


def _check_best(run: ActiveRun) -> None:
    """Forget the best evaluation if the folder has another one's model: of a later one that is not in the checkpoint.
    Collective."""
    if (best := run.totals.best) is None:
        return
    found = run.files.best() if run.files is not None else {}
    if run.comm.broadcast_json(found.get("samples")) != best.samples:
        best.forget()


def _open(run: ActiveRun, kept: int) -> None:
    """Catch signals, open the trace, and touch the memory of later phases. `kept`: how much freed memory the allocator
    keeps. Collective."""
    comm, job, prepared, tracing = run.comm, run.job, run.prepared, run.tracing
    if comm.concurrent and threading.current_thread() is threading.main_thread():
        signals = StopSignals(comm.rank, job.train.stop_seconds, before_end=tracing.tick)
        run.signals = run.closing.enter_context(signals)
    if run.claim is not None:  # release it before a held launcher is released, which then kills this process
        run.closing.callback(run.claim.release)
    run.closing.callback(tracing.close)
    attempt = comm.broadcast_json(next_attempt(run.folder) if comm.rank == 0 else 0)
    agreed(comm, lambda: tracing.open(job, prepared, attempt))
    tracing.begin()
    if prepared.device.type == "cpu":
        layout = prepared.replica.layout
        sizes = [models_needed(roles, comm.rank) for roles in prepared.roles[run.totals.phase + 1 :]]
        reserve(int(max(sizes, default=0.0) * layout.length * layout.dtype.itemsize), kept)


def _announce(run: ActiveRun, how: str | None, note: str) -> None:
    """Report the start of the run. `how`: from `place_arenas`; `note`: about other runs."""
    run.out.say(_headline(run))
    if how is not None:
        run.out.say(how)
    if not run.job.train.sync_batchnorm and run.comm.size > 1 and (layers := sync_layers(run.prepared.model)):
        run.out.say(
            f"{layers[0]} is a SyncBatchNorm layer, which normalises over each worker's own samples while "
            "train.sync_batchnorm is false"
        )
    for text in [*run.prepared.notes(), *([note] if note else [])]:
        run.out.say(f"note: {text}")


def _headline(run: ActiveRun) -> str:
    layout, nodes = run.prepared.replica.layout, len(set(run.comm.nodes))
    name = runfolder.title(run.job.name, run.claim.overrides if run.claim is not None else ())
    return (
        f"{name}: {run.comm.size} rank{'s' * (run.comm.size > 1)} on {nodes} "
        f"node{'s' * (nodes > 1)}, {layout.parameters:,} parameters ({run.job.train.precision}), "
        f"{run.prepared.total:,} samples to train on; run folder {run.folder}"
    )


def _announce_resume(run: ActiveRun, resume: Resume | None) -> None:
    """Report the resume and, on rank 0, record what changes from here on. Collective."""
    totals = run.totals

    def record() -> list[str]:
        if run.claim is None or resume is None:
            return []
        return run.claim.record(run.job, resume, totals.cursor)

    def forget() -> None:
        if run.comm.rank == 0:
            _forget_metrics(run)

    changed = agreed(run.comm, record)
    agreed(run.comm, forget)
    run.out.say("\n".join([f"resumed at sample {totals.cursor:,} (step {totals.step})", *changed]))


def _forget_metrics(run: ActiveRun) -> None:
    try:
        runfolder.forget_metrics(run.folder, run.totals.cursor, owed=bool(run.totals.owed & Ask.EVALUATE))
        if run.files is not None:
            run.files.forget_examples(run.totals.cursor)
    except OSError as error:
        raise CheckpointError(
            f"{run.folder}: its metrics.csv cannot be written ({error.strerror}); free space or fix permissions"
        ) from None
