"""`hpctrain bench`: measures on this machine every speed that the documentation gives.

Importing this module imports neither torch nor MPI.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from hpctrain.cluster import threads_for
from hpctrain.errors import HpctrainError
from hpctrain.launcher.started import is_launched, launched_rank

if TYPE_CHECKING:
    from hpctrain.bench.report import FigureTable, Report
    from hpctrain.comm.base import Communicator

ALONE = {  # benches that need no other ranks
    "virtual": "alone:measure_virtual",
    "trace": "alone:measure_trace",
    "read": "reading:measure_read",
}
TOGETHER = {
    "all_reduce": "together:measure_all_reduce",
    "step_mlp": "steps:measure_mlp",
    "step_resnet18": "steps:measure_resnet18",
    "pushes": "asynchronous:measure_pushes",
    "slow": "asynchronous:measure_slow",
    "switch": "switching:measure_switch",
    "tracing": "tracing:measure_tracing",
    "checks": "checks:measure_checks",
    "device_all_reduce": "device:measure_all_reduce",
    "device_step": "device:measure_step",
    "device_update": "device:measure_update",
}
STEPS = ("step_mlp", "step_resnet18")
OF_ANY_RANKS, OF_ONE = ("all_reduce", *STEPS), ("virtual", "trace")  # what `all` measures: on any ranks, on one
OF_GPUS = ("device_all_reduce", "device_step", "device_update")
SEVERAL = {"step": STEPS, "all": OF_ANY_RANKS, "device": OF_GPUS}
THREADS = "OMP_NUM_THREADS"  # of each rank, where it is set
CHOICES = (*SEVERAL, *TOGETHER, *ALONE)


def needs_ranks(what: str, environment: Mapping[str, str]) -> bool:
    """Whether ranks must be started first: the bench needs some, and no launcher has started this process."""
    return what not in ALONE and not is_launched(environment)


def check_path(path: str | None) -> None:
    """Raise HpctrainError if the figures could not be written to `path`, before any are measured."""
    if path is None:
        return
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise HpctrainError(f"--json {path}: there is no folder {folder}; create it, or name another file")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise HpctrainError(f"--json {path}: this file cannot be written; name another one")


def main(what: str = "all", path: str | None = None) -> int:
    """Measure `what` (one of CHOICES) on the ranks that a launcher started, and print tables.

    `path`: a file for the figures as JSON. Progress goes to stderr. Returns the exit status.
    Collective over these ranks; the benches in ALONE do not start MPI and need no launcher.
    """
    if what in ALONE:
        check_path(path)
        _output(_measure_alone(what), path)
        return 0
    from hpctrain.comm.connect import connect, report

    rank = launched_rank(os.environ)
    try:
        comm = connect()
        rank = comm.rank
        _agree_on_path(comm, path)
        _measure_together(what, comm, path)
    except HpctrainError as mistake:
        return report(mistake, rank)
    return 0


def _agree_on_path(comm: Communicator, path: str | None) -> None:
    """Check the path on rank 0, which writes; all ranks must stop if it cannot. Collective."""
    problem = None
    if comm.rank == 0:
        try:
            check_path(path)
        except HpctrainError as error:
            problem = str(error)
    problem = comm.broadcast_json(problem)
    if problem is not None:
        raise HpctrainError(problem)


def _measure_together(what: str, comm: Communicator, path: str | None) -> None:
    import numpy as np
    import torch

    from hpctrain.bench.report import Report

    torch.set_num_threads(int(os.environ.get(THREADS) or threads_for(comm.cores, "auto")))
    progress = _progress if comm.rank == 0 else _silent
    names = SEVERAL.get(what, (what,))
    tables = [_function(TOGETHER[name])(comm, progress) for name in names]
    if comm.rank == 0:
        rest = _measure_alone(what) if what == "all" else Report()
        _output(Report(tables + rest.tables), path)
    # Ranks that only wait for rank 0 must leave it the cores: MPI libraries' own waits use CPU.
    end = comm.start_all_reduce(np.zeros(1))
    while not end.test():
        comm.sleep(0.05)


def _function(place: str) -> Callable[..., FigureTable]:
    module, name = place.split(":")
    function: Callable[..., FigureTable] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return function


def _measure_alone(what: str) -> Report:
    import torch

    from hpctrain.bench.report import Report

    torch.set_num_threads(1)
    names = OF_ONE if what == "all" else (what,)
    return Report([_function(ALONE[name])(_progress) for name in names])


def _output(report: Report, path: str | None) -> None:
    where = "standard output"
    try:
        print(report.text(), flush=True)
        if path is not None:
            where = f"--json {path}"
            with open(path, "w") as file:
                json.dump(report.plain(), file, indent=1)
                file.write("\n")
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HpctrainError(f"{where}: the figures cannot be written ({error.strerror or error})") from None


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    return None
