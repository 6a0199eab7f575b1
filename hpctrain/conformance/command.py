"""`hpctrain test-strategy`: run every check on one strategy, and print each result."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain
from typing import Any

from hpctrain.errors import HpctrainError
from hpctrain.launcher.started import launched_rank, launched_size


def main(name: str, overrides: Sequence[str]) -> int:
    """Test the strategy that a job would name `name`, on virtual ranks or on those that mpirun or srun started.

    `overrides`: "key=value" options; without any, each set of options of `Strategy.tested_with`, and each codec.
    Returns the exit status: 0 if every promise is kept, 1 if not. Raises HpctrainError for a strategy that cannot be
    tested.
    """
    if launched_size(os.environ)[0] == 1:
        return _print_verdicts(name, overrides, None)
    from hpctrain.comm.connect import connect, report

    rank = launched_rank(os.environ)
    try:
        comm = connect()
        rank = comm.rank
        return _print_verdicts(name, overrides, comm)
    except HpctrainError as mistake:
        return report(mistake, rank)


def _print_verdicts(name: str, overrides: Sequence[str], comm: Any) -> int:
    from hpctrain.conformance import TRAINS_WITH_ITS_CODEC, Subject, pairs_of, subjects_of, verdicts

    subjects, pairs = subjects_of(name), pairs_of(name)
    if overrides:
        subjects, pairs = [Subject(name, _options(name, overrides))], []
    kept = broken = 0
    label = ""
    for verdict in chain(verdicts(subjects, comm), verdicts(pairs, comm, [TRAINS_WITH_ITS_CODEC])):
        failures = comm.gather_json(verdict.broken) if comm is not None else [verdict.broken]
        failure = next((text for text in failures if text is not None), None)
        if comm is not None and comm.rank != 0:
            broken += failure is not None
            continue
        if verdict.subject.label != label:
            label = verdict.subject.label
            print(label, flush=True)
        where = f"{verdict.ranks} rank{'s' * (verdict.ranks > 1)}"
        if failure is not None:
            broken += 1
            print(f"  BROKEN    {verdict.check.name} ({where}): {failure}", flush=True)
        elif verdict.left_out is not None:
            print(f"  left out  {verdict.check.name} ({where}): {verdict.left_out}", flush=True)
        else:
            kept += 1
            print(f"  kept      {verdict.check.name} ({where})", flush=True)
    if comm is None or comm.rank == 0:
        print(f"{kept} kept, {broken} broken")
    return 1 if broken else 0


def _options(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The options given as "key=value" texts. Raises JobError."""
    from hpctrain.job import Job

    job = Job().override([f"strategy.name={name}", *(f"strategy.{text}" for text in overrides)])
    options = job.schedule[0].strategy.plain()
    return {key: options[key] for key in (text.partition("=")[0] for text in overrides) if key in options}
