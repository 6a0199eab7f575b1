"""`hpctrain bench`: measures on this machine every speed that the documentation gives.

Importing this module imports neither torch nor MPI.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hpctrain.cluster import threads_for
from hpctrain.errors import HpctrainError
from hpctrain.launcher.started import is_launched, launched_rank

if TYPE_CHECKING:
    from hpctrain.bench.report import FigureTable, Report
    from hpctrain.comm.base import Communicator

ALONE = {  # benches that need no other ranks, or start their own
    "virtual": "alone:measure_virtual",
    "simulate": "simulated:measure_simulate",
    "simulate_learn": "simulations:measure_learn",
    "simulate_scale": "simulations:measure_scale",
    "trace": "alone:measure_trace",
    "read": "reading:measure_read",
    "codecs": "codecs:measure_codecs",
    "start": "start:measure_start",
    "ingest": "ingest:measure_ingest",
}
TOGETHER = {
    "all_reduce": "together:measure_all_reduce",
    "step_mlp": "steps:measure_mlp",
    "step_resnet18": "steps:measure_resnet18",
    "limits": "limits:measure_limits",
    "traffic": "limits:measure_traffic",
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


class Outputs(NamedTuple):
    """Files for the figures, besides the printed tables: as JSON, as comma-separated values, as a picture."""

    json: str | None = None
    csv: str | None = None
    plot: str | None = None

    def arguments(self) -> list[str]:
        """The options of the command line that name these files."""
        return [f"--{name}={path}" for name, path in self._asdict().items() if path is not None]

    def check(self) -> None:
        """Raise HpctrainError if one could not be written, before anything is measured."""
        for name, path in self._asdict().items():
            if path is not None:
                check_path(path, f"--{name}")


NO_FILES = Outputs()


def check_path(path: str, option: str = "--json") -> None:
    """Raise HpctrainError if that file, which `option` names, could not be written."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise HpctrainError(f"{option} {path}: there is no folder {folder}; create it, or name another file")
    if os.path.isdir(path) or not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise HpctrainError(f"{option} {path}: this file cannot be written; name another one")


def main(what: str = "all", outputs: Outputs = NO_FILES) -> int:
    """Measure `what` (one of CHOICES) on the ranks that a launcher started, and print tables.

    Progress goes to stderr. Returns the exit status.
    Collective over these ranks; the benches in ALONE do not start MPI and need no launcher.
    """
    if what in ALONE:
        outputs.check()
        _output(_measure_alone(what), outputs)
        return 0
    from hpctrain.comm.connect import connect, report

    rank = launched_rank(os.environ)
    try:
        comm = connect()
        rank = comm.rank
        _agree_on_outputs(comm, outputs)
        _measure_together(what, comm, outputs)
    except HpctrainError as mistake:
        return report(mistake, rank)
    return 0


def _agree_on_outputs(comm: Communicator, outputs: Outputs) -> None:
    """Check the files on rank 0, which writes; all ranks must stop if it cannot. Collective."""
    problem = None
    if comm.rank == 0:
        try:
            outputs.check()
        except HpctrainError as error:
            problem = str(error)
    problem = comm.broadcast_json(problem)
    if problem is not None:
        raise HpctrainError(problem)


def _measure_together(what: str, comm: Communicator, outputs: Outputs) -> None:
    import numpy as np
    import torch

    from hpctrain.bench.report import Report

    torch.set_num_threads(int(os.environ.get(THREADS) or threads_for(comm.cores, "auto")))
    progress = _progress if comm.rank == 0 else _silent
    names = SEVERAL.get(what, (what,))
    tables = [_function(TOGETHER[name])(comm, progress) for name in names]
    hosts = list(dict.fromkeys(comm.gather_json(socket.gethostname())))
    if comm.rank == 0:
        rest = _measure_alone(what) if what == "all" else Report()
        _output(Report(tables + rest.tables, hosts if len(hosts) > 1 else []), outputs)
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
    names = OF_ONE if what == "all" else [name for name in ALONE if name == what or name.startswith(f"{what}_")]
    return Report([_function(ALONE[name])(_progress) for name in names])


def _output(report: Report, outputs: Outputs) -> None:
    where = "standard output"
    try:
        print(report.text(), flush=True)
        if outputs.json is not None:
            where = f"--json {outputs.json}"
            Path(outputs.json).write_text(json.dumps(report.plain(), indent=1) + "\n")
        if outputs.csv is not None:
            where = f"--csv {outputs.csv}"
            Path(outputs.csv).write_text(report.csv())
        if outputs.plot is not None:
            from hpctrain.bench.plot import draw

            where = f"--plot {outputs.plot}"
            draw([each.plain() for table in report.tables for each in table.comparisons], outputs.plot)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise HpctrainError(f"{where}: the figures cannot be written ({error.strerror or error})") from None


def _progress(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    return None
