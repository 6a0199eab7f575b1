"""Describes the differences between the jobs of runs in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpctrain.views.compare.summary import RunSummary

# Keys that a comparison varies on purpose, or that do not matter for it.
EXPECTED = ("strategy", "phases", "ranks", "seed", "output", "name")
TASK = ("model", "data", "loss", "metric", "evaluate")
SPELLED_OUT = 8  # number of keys shown with their values; of the rest only the names


def job_notes(runs: Mapping[str, RunSummary]) -> list[str]:
    """A sentence for each job key that differs, with those of the model and the data first. `runs`: by letter."""
    jobs = {letter: run.job for letter, run in runs.items() if run.job}
    notes = [f"{letter}: its job cannot be read, so other differences are unknown" for letter in runs.keys() - jobs]
    keys = differing_keys(jobs.values())
    tasks = sorted({table for key in keys if (table := _table(key)) in TASK}, key=TASK.index)
    if tasks:
        notes.append(f"the runs differ in {' and '.join(tasks)}: losses and metrics may not be comparable")
    notes += [f"job key {key} differs: {_values(jobs, key)}" for key in keys[:SPELLED_OUT]]
    if len(keys) > SPELLED_OUT:
        notes.append(f"other job keys that differ: {', '.join(keys[SPELLED_OUT:])}")
    return notes


def differing_keys(jobs: Iterable[Mapping[str, Any]]) -> list[str]:
    """The keys whose values differ among `jobs`, except those expected to differ."""
    jobs = list(jobs)
    everything = dict.fromkeys(key for job in jobs for key in job if _table(key) not in EXPECTED)
    differing = [key for key in everything if any(_value(job, key) != _value(jobs[0], key) for job in jobs)]
    return sorted(differing, key=lambda key: TASK.index(_table(key)) if _table(key) in TASK else len(TASK))


def _table(key: str) -> str:
    return key.partition(".")[0]


def _value(job: Mapping[str, Any], key: str) -> str:
    return repr(job[key]) if key in job else "not set"


def _values(jobs: Mapping[str, Mapping[str, Any]], key: str) -> str:
    """ "0.1 in A, C; 0.05 in B"."""
    return spread({letter: _value(job, key) for letter, job in jobs.items()})


def spread(values: Mapping[str, str]) -> str:
    """The letters with each value: "0.1 in A, C; 0.05 in B"; for a value of more than three: "0.2 in the others"."""
    of: dict[str, list[str]] = {}
    for letter, value in values.items():
        of.setdefault(value, []).append(letter)
    most = max(of, key=lambda value: len(of[value]))
    if len(of[most]) <= 3 or len(of) == 1:
        return "; ".join(f"{value} in {', '.join(letters)}" for value, letters in of.items())
    few = [f"{value} in {', '.join(letters)}" for value, letters in of.items() if value != most]
    return "; ".join([*few, f"{most} in the others"])
