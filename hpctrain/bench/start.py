"""Bench of start-up: from the command to the end of the first step on all ranks, beside torchrun with DDP.

The bench starts all ranks itself, one way after the other. Every rank trains the same model on the same data and writes
down when its second step begins, and how much memory it has used until then.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpctrain.bench.comparison import Goal, ratio
from hpctrain.bench.report import FigureTable, Sample
from hpctrain.bench.runs import random_samples
from hpctrain.errors import HpctrainError
from hpctrain.launcher import find_mpiexec, rank_environment

Progress = Callable[[str], None]
RANKS, REPETITIONS, LIMIT = 4, 5, 120.0
BATCH, SAMPLES, INPUTS = 16, 512, (64,)
FOLDER = "HPCTRAIN_BENCH_START"  # where ranks write down when they had taken a step
SECONDS, PEAK, PROPORTIONAL = "seconds", "peak, MiB per rank", "proportional, MiB per rank"
RUN, MPIEXEC, TORCHRUN = "hpctrain run", "mpiexec hpctrain train", "torchrun, DDP"
JOB = """
name = "start"
loss = "hpctrain.bench.start:noting_loss"
threads = 1
[model]
name = "mlp"
inputs = 64
hidden = [256]
[data]
name = "hpctrain.bench.start:samples"
[optimizer]
name = "SGD"
lr = 0.01
[train]
steps = 2
batch_size = 16
[strategy]
name = "all_reduce"
"""


def samples() -> TensorDataset:
    """What all ways train on."""
    return random_samples(INPUTS, SAMPLES)


def noting_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross entropy. The second call notes that this rank has taken a step, and from then on each is of no effect."""
    folder = Path(os.environ[FOLDER])
    first, note = folder / f"{os.getpid()}.first", folder / f"{os.getpid()}.json"
    if not first.exists():
        first.touch()
    elif not note.exists():
        note.write_text(json.dumps({"now": time.monotonic(), **memory()}))
    return nn.functional.cross_entropy(outputs, targets)


def memory() -> dict[str, float]:
    """This process's peak of resident memory, and what it holds now with shared pages split among their users; MiB."""
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    share = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return {PEAK: int(peak[1]) / 1024 if peak else 0.0, PROPORTIONAL: int(share[1]) / 1024 if share else 0.0}


def train_with_ddp() -> None:
    """Two steps of DDP on a rank that torchrun has started."""
    from torch.utils.data import DataLoader, DistributedSampler

    from hpctrain.models.mlp import mlp

    torch.distributed.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(mlp(64, 10, [256]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    data = samples()
    for step, (inputs, targets) in enumerate(DataLoader(data, BATCH, sampler=DistributedSampler(data))):
        noting_loss(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1:
            break
    torch.distributed.destroy_process_group()
    os._exit(0)  # torch sometimes aborts while the interpreter ends: one of its threads still runs


def measure_start(progress: Progress) -> FigureTable:
    """Seconds and memory to the first step, by way of starting ranks."""
    table = FigureTable("start", f"{RANKS} ranks to the end of their first step", [SECONDS, PEAK, PROPORTIONAL])
    taken: dict[str, dict[str, list[float]]] = {way: {} for way in (RUN, MPIEXEC, TORCHRUN)}
    with tempfile.TemporaryDirectory(prefix="hpctrain-bench-") as name:
        job = Path(name) / "job.toml"
        job.write_text(JOB)
        for repetition in range(REPETITIONS + 1):  # the first reads files from disk, and does not count
            progress(f"start, {repetition} of {REPETITIONS}")
            for way, columns in taken.items():
                for column, value in _started(_command(way, job), Path(name)).items():
                    columns.setdefault(column, []).extend([value] if repetition else [])
    units = {SECONDS: "s", PEAK: "MiB", PROPORTIONAL: "MiB"}
    table.rows = {way: {column: Sample(tuple(columns[column]), unit) for column, unit in units.items()}
                  for way, columns in taken.items()}  # fmt: skip
    for way in (RUN, MPIEXEC):
        for column, most in ((SECONDS, 0.95), (PEAK, 1.15), (PROPORTIONAL, None)):
            target = Goal(most) if most is not None and way == RUN else None
            own, other = table.rows[way][column], table.rows[TORCHRUN][column]
            table.comparisons.append(ratio(f"{way} / {TORCHRUN}", column, own, other, target))
    own, other = table.rows[RUN][SECONDS], table.rows[MPIEXEC][SECONDS]
    table.comparisons.append(ratio(f"{RUN} / {MPIEXEC}", SECONDS, own, other))
    return table


def _command(way: str, job: Path) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    train, output = [sys.executable, "-m", "hpctrain"], f"output={job.parent / 'runs'}"
    if way == RUN:
        return [*train, "run", "-n", f"{RANKS}", str(job), output], dict(os.environ)
    if way == MPIEXEC:
        mpi = find_mpiexec()
        variables = rank_environment(mpi.library, os.environ)
        variables.pop("GLIBC_TUNABLES", None)
        return [*mpi.command(RANKS), *train, "train", str(job), output], variables
    start = "from hpctrain.bench.start import train_with_ddp; train_with_ddp()"
    program = job.parent / "ddp.py"
    program.write_text(f"{start}\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return [*torchrun, str(program)], {"OMP_NUM_THREADS": "1", **os.environ}


def _started(command: tuple[Sequence[str], dict[str, str]], folder: Path) -> dict[str, float]:
    """Start ranks and wait for their end. Raises HpctrainError if they failed."""
    argv, environment = command
    with tempfile.TemporaryDirectory(dir=folder) as notes:
        environment = {**environment, FOLDER: notes, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        began = time.monotonic()
        try:
            done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            raise HpctrainError(f"hpctrain bench start: {argv[:5]} took more than {LIMIT:g} s") from None
        found = [json.loads(path.read_text()) for path in Path(notes).glob("*.json")]
    if done.returncode or len(found) != RANKS:
        raise HpctrainError(f"hpctrain bench start: {argv[:5]} failed: {done.stderr.strip()[-500:]}")
    mean = {name: sum(rank[name] for rank in found) / RANKS for name in (PEAK, PROPORTIONAL)}
    return {SECONDS: max(rank["now"] for rank in found) - began, **mean}
