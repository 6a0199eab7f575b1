"""How a run ends: saves and tests the final model, closes files and communicators, and prints the summary."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from hpctrain.errors import HpctrainError, UnwrittenError
from hpctrain.run import folder as runfolder
from hpctrain.run.active import ActiveRun
from hpctrain.run.agreement import agreed
from hpctrain.run.entrance import Entrance
from hpctrain.run.result import Result
from hpctrain.strategies.phase import Phase


@dataclass(frozen=True)
class RunEnd:
    """`result`: None if the program left the loop early. `measured`: the part of the data that the metrics are for.
    `unwritten`: what the run folder lacks, and why."""

    result: Result | None
    measured: str
    unwritten: str | None


def end(run: ActiveRun, phase: Phase, entrance: Entrance) -> RunEnd:
    """Save and test the model if the run is complete, and close everything. Collective over all ranks."""
    run.saving()
    totals, splits = run.totals, run.prepared.splits
    measured = "test" if splits.test is not None else "validation"
    whole = not totals.interrupted and not totals.left
    metrics = _save_and_test(run, phase, measured) if whole else {}
    run.prepared.replica.release()
    entrance.release()
    untraced = run.tracing.finish()
    unwritten = run.comm.broadcast_json(_close_files(run, untraced))
    if totals.left:
        return RunEnd(None, measured, unwritten)
    model, interrupted = run.prepared.model, totals.interrupted
    result = Result(model, run.folder, metrics, totals.summaries, totals.cursor, interrupted)
    return RunEnd(result, measured, unwritten)


def announce(run: ActiveRun, ended: RunEnd) -> None:
    """Report how the run ended, and write the report. Collective over all ranks. Raises UnwrittenError if files are
    missing."""
    totals, result = run.totals, ended.result
    if result is None:
        run.out.say(f"left at sample {totals.cursor:,} (step {totals.step}); run folder {run.folder}")
    elif result.interrupted:
        _announce_interruption(run, ended.unwritten)
        return
    else:
        _announce_end(run, ended.measured, result)
        if run.job.trace.report and run.job.trace.enabled and run.comm.concurrent:
            _report(run)
    if ended.unwritten is not None:  # last, because a run with missing files has not succeeded
        error = UnwrittenError(f"the run has ended, but not all of it was saved: {ended.unwritten}")
        error.everywhere, error.result = True, result
        raise error


def _save_and_test(run: ActiveRun, phase: Phase, measured: str) -> dict[str, float]:
    comm, keeper, splits = run.comm, run.keeper, run.prepared.splits
    metrics: dict[str, float] = {}
    dataset = splits.test if splits.test is not None else splits.validation
    agreed(comm, run.check_hold)
    keeper.settle_model(phase)
    for buffer in agreed(comm, keeper.check_model if comm.rank == 0 else list):
        run.warn(f"buffer {buffer} of the saved model holds NaN")
    agreed(comm, keeper.save_model)  # before the test: if that fails on any rank, all ranks end
    if dataset is not None and phase.workers is not None:
        metrics = run.measure(phase.workers, measured, dataset, nullcontext()).plain()
    run.saving()
    found: dict[str, float] = comm.broadcast_json(metrics)
    return found


def _close_files(run: ActiveRun, untraced: str | None) -> str | None:
    """On rank 0: what is missing, including traces."""
    if run.files is None:
        return None
    run.files.write_rows()
    return "; ".join(text for text in (run.files.unwritten(), untraced) if text is not None) or None


def _announce_interruption(run: ActiveRun, unwritten: str | None) -> None:
    missing = "" if unwritten is None else f"not all of it was saved: {unwritten}; "
    how = f"hpctrain train --resume {run.folder}" if run.job.file else f'resume="{run.folder}", in the program'
    text = f"interrupted at sample {run.totals.cursor:,}; {missing}continue with: {how}"
    if run.signals is not None and run.comm.rank == 0:
        run.signals.say(text)
    else:
        run.out.say(text)
    run.comm.barrier()  # a held launcher kills all ranks as soon as it is released


def _announce_end(run: ActiveRun, measured: str, result: Result) -> None:
    run.out.say(runfolder.table(result.phases))
    for summary in result.phases:
        if summary.dropped:
            run.out.say(f"phase {summary.index}: {summary.dropped} late gradients were dropped")
    if result.metrics:
        named = [name.removeprefix("metric.") for name in result.metrics if name.startswith("metric.")]
        name = named[0] if named and run.job.metric.monitor is None else run.job.measured
        run.out.say(f"{measured} {name} {result.metrics['metric']:.4f}")
    run.out.say(f"run folder {run.folder}")


def _report(run: ActiveRun) -> None:
    """Write the report. Collective: the others wait, so that their launcher does not end before it is written."""
    if run.comm.rank == 0:
        from hpctrain.views.report import write_report

        try:
            path, headline = write_report(run.folder)
            run.out.say(f"{headline}\nreport {path}")
        except (HpctrainError, OSError) as error:  # the run itself is safe
            run.out.say(f"no report: {error}")
    run.comm.barrier()
