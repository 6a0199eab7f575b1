"""Does asynchrony cost accuracy? All-reduce against async, bounded and switch, by number of workers and optimizer.

    python analysis/study_async.py            run what docs/asynchrony.csv lacks, then write docs/asynchrony.md
    python analysis/study_async.py --table    write docs/asynchrony.md from docs/asynchrony.csv

About an hour on two cores; it can be interrupted and continues where it stopped. 4 and 8 workers train under mpirun, 16
over virtual ranks, whose computing times are drawn from a log-normal distribution (sigma 0.3). MNIST must be in
data/mnist (or below HPCTRAIN_DATA).
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from hpctrain import launcher
from hpctrain.job import Job
from hpctrain.run.api import Result, train
from hpctrain.run.folder import Narrator
from hpctrain.study.virtual import train_virtually

ROOT = Path(__file__).parent.parent
RESULTS, DOCUMENT = ROOT / "docs" / "asynchrony.csv", ROOT / "docs" / "asynchrony.md"
COLUMNS = ("task", "optimizer", "workers", "way", "seed", "accuracy", "switched", "seconds")
SGD, ADAM, FAST_ADAM = "SGD 0.05, momentum 0.9", "Adam 0.001", "Adam 0.01"
OPTIMIZERS = {
    SGD: ["optimizer.name=SGD", "optimizer.lr=0.05", "optimizer.momentum=0.9"],
    ADAM: ["optimizer={name = 'Adam', lr = 0.001}"],
    FAST_ADAM: ["optimizer={name = 'Adam', lr = 0.01}"],
}
Table = pd.DataFrame
WAYS = {
    "all_reduce": ["strategy=all_reduce"],
    "async": ["strategy=parameter_server", "strategy.mode=async"],
    "bounded": ["strategy=parameter_server", "strategy.mode=bounded"],
    "switch": ["strategy=switch"],
    "async, rate by workers": ["strategy=parameter_server", "strategy.lr_per_update=workers"],
    "async, rate by staleness": ["strategy=parameter_server", "strategy.lr_per_update=staleness"],
    "async, rate undivided": ["strategy=parameter_server", "strategy.lr_per_update=none"],
    "async, momentum as it is": ["strategy=parameter_server", "strategy.momentum_correction=false"],
}
MAIN = ["all_reduce", "async", "bounded", "switch"]
RATES = ["all_reduce", *[way for way in WAYS if way.startswith("async")]]
MNIST = ["data.validation=0.0", "train.evaluate_every={fraction = 1}"]


@dataclass(frozen=True)
class Case:
    """One training run. `task`: "mnist", "digits" (the main job's model and data), or "main job" as it is."""

    task: str
    optimizer: str
    workers: int
    way: str
    seed: int

    @property
    def ranks(self) -> int:
        """How many it takes: a server besides the workers, but for all-reduce. The main job has four in all."""
        return self.size - (self.way == "all_reduce")

    @property
    def size(self) -> int:
        """Of the MPI job that it runs in: cases that differ in their way alone share one."""
        return 4 if self.task == "main job" else self.workers + 1

    @property
    def virtual(self) -> bool:
        """Whether it runs over virtual ranks."""
        return self.workers == 16 or self.way not in MAIN or self.optimizer == FAST_ADAM or self.task == "digits"

    def job(self) -> Job:
        """What is trained."""
        file = "mnist" if self.task == "mnist" else "digits"
        keys = [f"seed={self.seed}", f"output={os.environ.get('STUDY_RUNS', 'runs/study')}", "trace.enabled=false"]
        if self.task == "main job":
            return Job.load(ROOT / "jobs" / "digits.toml", keys)
        keys += [*OPTIMIZERS[self.optimizer], *WAYS[self.way], "threads=1"]
        return Job.load(ROOT / "jobs" / f"{file}.toml", keys + (MNIST if file == "mnist" else []))


def cases() -> Iterator[Case]:
    """All cases of the first seed come first, so that an interrupted study is of use too."""
    for seed in range(10):
        yield Case("main job", "as it is", 4, "switch", seed)
    for seed in range(5):
        for workers in (4, 8, 16):
            for optimizer in (SGD, ADAM):
                yield from (Case("mnist", optimizer, workers, way, seed) for way in MAIN)
    for seed in range(2):
        yield from (Case("mnist", SGD, 8, way, seed) for way in RATES[3:])
        yield from (Case("mnist", ADAM, 8, way, seed) for way in RATES[2:5])
        yield from (Case("mnist", FAST_ADAM, 8, way, seed) for way in RATES[:5])
        yield from (Case("digits", ADAM, 8, way, seed) for way in RATES[:5])


# -- running ------------------------------------------------------------------------------------------------------
def run(todo: list[Case]) -> None:
    """What is missing: under mpirun together by number of ranks, then over virtual ranks, a process per core."""
    this = [sys.executable, __file__]
    for size in sorted({case.size for case in todo if not case.virtual}):
        if status := launcher.run(size, [*this, "--part", str(size)]):
            raise SystemExit(status)
    cores = len(os.sched_getaffinity(0))
    parts = [subprocess.Popen([*this, "--virtual", f"{part}/{cores}"]) for part in range(cores)]
    statuses = [part.wait() for part in parts]
    if any(statuses):
        raise SystemExit("a part of the study failed; finished runs are kept: start it again")


def run_under_mpi(todo: list[Case], size: int) -> None:
    """On all ranks: those cases that take as many, or one fewer. Collective."""
    from hpctrain.comm.connect import connect

    torch.set_num_threads(1)
    comm = connect()
    mine = [case for case in todo if not case.virtual and case.size == size]
    for case in mine:
        group = comm.split(0 if comm.rank < case.ranks else None, comm.rank)
        if group is not None:
            began = time.monotonic()
            result = train(case.job(), group, out=Narrator(enabled=False))
            if comm.rank == 0:
                keep(case, result, time.monotonic() - began)
        comm.barrier()


def run_virtual(todo: list[Case], part: int, parts: int) -> None:
    """Every `parts`-th case."""
    torch.set_num_threads(1)
    for case in [case for case in todo if case.virtual][part::parts]:
        began = time.monotonic()
        trained = train_virtually(case.job(), (0,) * case.ranks, case.seed)
        keep(case, trained.result, time.monotonic() - began)


def keep(case: Case, result: Result, seconds: float) -> None:
    """One more row of the results. On one rank."""
    switched = result.phases[0].samples / result.samples if len(result.phases) > 1 else ""
    row = [*vars(case).values(), f"{result.metrics['metric']:.4f}", switched and f"{switched:.3f}", f"{seconds:.1f}"]
    with open(RESULTS, "a", newline="") as file:
        csv.writer(file).writerow(row)
    print(", ".join(str(value) for value in row), flush=True)


def known() -> Table:
    """What has run: a row per case, of COLUMNS."""
    if not RESULTS.exists():
        RESULTS.write_text(",".join(COLUMNS) + "\n")
    return pd.read_csv(RESULTS)


# -- writing ------------------------------------------------------------------------------------------------------
def document(found: Table) -> str:
    """docs/asynchrony.md."""
    found = found.sort_values(["workers", "seed"], kind="stable")
    mnist, job = found[found["task"] == "mnist"], found[found["task"] == "main job"]
    few = found[found["seed"] < 2]
    rates = pd.concat([few[few["task"] == "mnist"], few[few["task"] == "digits"]])
    fired = job["switched"].dropna()
    return f"""# What asynchrony costs in accuracy

Written by `make study-async` (method: analysis/study_async.py; results of all runs: asynchrony.csv). Each cell shows
the test accuracy: the mean over seeds, its difference from all-reduce's mean in percentage points, and in brackets the
lowest accuracy and the number of seeds. An empty cell has not run yet.

## MNIST, lenet5, 3 epochs, batch 32 per worker, one server

4 and 8 workers ran under mpirun, 16 over virtual ranks.

{grid(mnist, ["workers", "optimizer"], MAIN)}

## How to scale the learning rate of one worker's update

8 workers. `async` is as above: for SGD the rate is divided by the number of workers, for Adam by that number to the
power of 0.75; each worker has its own velocity.

{grid(rates[rates["workers"] == 8], ["task", "optimizer"], RATES)}

## The main job

jobs/digits.toml on 4 ranks: all-reduce until `loss_stable`, then async with 3 workers and a server. The switch fired in
{len(fired)} of {len(job)} runs, after {fired.min():.0%} to {fired.max():.0%} of the run; test accuracy
{job["accuracy"].mean():.4f} on average, {job["accuracy"].min():.4f} at the lowest.
"""


def grid(found: Table, by: list[str], ways: list[str]) -> str:
    """A Markdown table: a row for every value of `by`, a column for every way."""
    lines = ["| " + " | ".join([*by, *ways]) + " |", "|" + "---|" * (len(by) + len(ways))]
    for key, rows in found.groupby(by, sort=False):
        runs = {way: rows.loc[rows["way"] == way, "accuracy"] for way in ways}
        base = runs["all_reduce"].mean()
        cells = [cell(runs[way], None if way == "all_reduce" else base) for way in ways]
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)


def cell(runs: pd.Series[float], base: float | None) -> str:
    """Of one way."""
    if runs.empty:
        return ""
    gap = f" {100 * (runs.mean() - base):+.1f}" if base is not None else ""
    return f"{runs.mean():.4f}{gap} ({runs.min():.4f}, {len(runs)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--virtual", help=argparse.SUPPRESS)
    given = parser.parse_args()
    done = {Case(*row) for row in known()[list(COLUMNS[:5])].itertuples(index=False)}
    todo = [case for case in cases() if case not in done]
    if given.part is not None:
        run_under_mpi(todo, given.part)
    elif given.virtual is not None:
        run_virtual(todo, *(int(number) for number in given.virtual.split("/")))
    else:
        if todo and not given.table:
            print(f"{len(todo)} of {len(done) + len(todo)} runs to go", flush=True)
            run(todo)
        DOCUMENT.write_text(document(known()))
        print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    main()
