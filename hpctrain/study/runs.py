"""Running what a study lacks."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable

from hpctrain.errors import HpctrainError
from hpctrain.study.case import Case
from hpctrain.study.kept import Figures, Kept
from hpctrain.study.payload import model_layout, payload_per_step, steps_per_round
from hpctrain.study.virtual import train_virtually


def chosen(cases: Iterable[Case], pattern: str) -> list[Case]:
    """Those in whose name (SETTING/ROW.SEED) there is a match of a shell pattern."""
    return [case for case in cases if fnmatch.fnmatch(case.name, f"*{pattern}*")]


def run_missing(
    cases: Iterable[Case], kept: Kept, seconds: float, say: Callable[[str], None], part: tuple[int, int] = (0, 1)
) -> bool:
    """Run the cases that have no result, one after another. After `seconds`, start no more.

    `part`: (index, count) of the processes that share them, all of which are given the same cases. A run that fails
    with an HpctrainError is reported with `say` and left out. Returns whether nothing is left to do and nothing failed.
    """
    todo = [case for case in list(cases)[part[0] :: part[1]] if kept.find(case) is None]
    began, complete = time.monotonic(), True
    for number, case in enumerate(todo):
        if time.monotonic() - began >= seconds:
            return False
        try:
            figures = figures_of(case)
        except HpctrainError as error:
            say(f"{case.name}: {error}")
            complete = False
            continue
        kept.keep(case, figures)
        say(f"{number + 1} of {len(todo)}: {case.name}: {figures['metric']:.4f}, loss {figures['loss']:.4f}")
    return complete


def figures_of(case: Case) -> Figures:
    """Train, and note what a table needs: accuracy (or whatever the job's metric is) and loss; bytes per step, namely
    `payload`, of one worker's own contribution, `full`, of all its parameters, `received`, by a worker's link on
    average, and `busiest`, of the link that carries most in one direction, which may be a server's. Raises
    HpctrainError."""
    job, ranks = case.job(), case.ranks()
    layout = model_layout(job)
    trained = train_virtually(job, range(ranks), case.seed, steps_per_round(job))
    received = [trained.links[rank].received for rank in trained.workers]
    return {
        "metric": trained.result.metrics["metric"],
        "loss": trained.result.metrics["loss"],
        "samples": trained.result.samples,
        "payload": payload_per_step(job, layout),
        "full": layout.length * layout.dtype.itemsize,
        "received": round(sum(received) / len(received), 1),
        "busiest": round(max(max(link) for link in trained.links.values()), 1),
        "seconds": round(trained.seconds, 1),
    }
