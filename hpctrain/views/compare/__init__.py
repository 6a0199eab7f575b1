"""`hpctrain compare`: runs side by side, as a table, a CSV file and pictures.

Summaries of runs are pure functions of their analyses (`summary.summarise`); everything else works on summaries.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import count, product
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError, TraceError
from hpctrain.text import escaped, shown_path

if TYPE_CHECKING:
    import pandas as pd

    from hpctrain.trace import Run
    from hpctrain.views.compare.summary import RunSummary


def main(
    paths: Sequence[Path],
    baseline: Path | None = None,
    target_loss: float | None = None,
    target_metric: float | None = None,
    csv: Path | None = None,
    output: Path | None = None,
) -> int:
    """Compare the runs in the folders `paths` and `baseline`: print the table, write the CSV file, and the pictures
    into the folder `output`. Raises HpctrainError: no run can be read, or a file cannot be written.
    """
    from hpctrain.views.compare.table import as_text, comparison_frame
    from hpctrain.views.compare.targets import choose_targets

    found, faults = read_runs(paths if baseline is None else [baseline, *paths])
    runs = dict(zip(letters(), found, strict=False))
    base = _of(runs, baseline)
    targets = choose_targets(runs, target_loss, target_metric)
    frame = comparison_frame(runs, targets, base)
    notes = [*faults, *_remarks(runs)]
    print(escaped(as_text(frame, targets.notes, notes)))
    if csv is not None:
        _write_csv(frame, csv)
    if output is not None:
        from hpctrain.views.compare.plots import write_plots

        for path in write_plots(output, frame, runs, targets, notes):
            print(f"wrote {shown_path(path)}")
    return 0


def read_runs(paths: Iterable[Path]) -> tuple[list[RunSummary], list[str]]:
    """(a summary of each run, notes on runs left out and why). Raises TraceError if no run can be read."""
    from hpctrain.analysis import Analysis
    from hpctrain.trace import open_run
    from hpctrain.views.compare.summary import summarise

    opened: dict[Path, Run] = {}
    faults: list[str] = []
    for path in paths:
        try:
            run = open_run(path)
            opened.setdefault(run.folder.resolve(), run)
        except TraceError as error:
            faults.append(str(error))
    found = []
    for run, name in zip(opened.values(), distinct_names(list(opened)), strict=True):
        try:
            found.append(summarise(Analysis(run), name))
        except TraceError as error:
            faults.append(str(error))
    if not found:
        raise TraceError(f"there is no run to compare; {'; '.join(dict.fromkeys(faults))}")
    return found, [f"left out: {fault}" for fault in dict.fromkeys(faults)]


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as are needed to distinguish all of them."""
    length = 1
    while len({folder.parts[-length:] for folder in folders}) < len(folders):
        length += 1
    return ["/".join(folder.parts[-length:]) for folder in folders]


def letters() -> Iterable[str]:
    """A, B ... Z, AA, AB ..."""
    for length in count(1):
        yield from map("".join, product(string.ascii_uppercase, repeat=length))


def _of(runs: Mapping[str, RunSummary], path: Path | None) -> str | None:
    """The letter of the run that `path` (its folder or a file in it) belongs to; None if it was left out."""
    if path is None:
        return None
    places = {place.resolve() for place in (path, path.parent, path.parent.parent)}
    return next((letter for letter, run in runs.items() if run.folder.resolve() in places), None)


def _remarks(runs: Mapping[str, RunSummary]) -> list[str]:
    """Notes on anything that limits how well the runs can be compared."""
    from hpctrain.views.compare.differences import job_notes

    remarks = job_notes(runs)
    for letter, run in runs.items():
        if not run.finished:
            why = "still running, interrupted or killed"
            remarks.append(f"{letter}: not finished ({why}), {run.samples:,} samples so far")
        if run.attempts > 1:
            remarks.append(f"{letter}: {run.attempts} attempts; their seconds are summed, without the time between")
        remarks += [f"{letter}: {note}" for note in run.notes]
    return remarks


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    try:
        frame.to_csv(path, index=False)
    except OSError as error:
        raise HpctrainError(
            f"{path}: the CSV file cannot be written ({error.strerror or error}); choose another file with --csv"
        ) from None
    print(f"wrote {shown_path(path)}")
