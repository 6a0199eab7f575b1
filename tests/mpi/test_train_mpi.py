"""Training as users start it: the command under mpirun, `hpctrain run`, and a script with its own objects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hpctrain import launcher
from hpctrain.trace import open_run
from tests.conftest import launch
from tests.helpers_mpi import RUN, TRAIN, Started, write_job

pytestmark = pytest.mark.launch


def _only(folder: Path) -> Path:
    [run] = folder.iterdir()
    return run


@pytest.mark.slow
@pytest.mark.any_mpi
def test_the_same_resolved_job_gives_the_same_bits(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """First with overrides, then from the job in the run folder; also under the other launcher."""
    job = write_job(tmp_path)
    overrides = ["strategy.name=parameter_server", "strategy.mode=sync", "train.clip_norm=0.5"]
    first = launch([*mpi.command(3), *TRAIN, str(job), *overrides], mpi, timeout=60)
    assert first.status == 0, first
    assert "parameter_server (sync)      8" in first.out
    assert "test accuracy 0." in first.out
    assert first.err == ""
    assert first.out.startswith(f"t with {', '.join(overrides)}: 3 ranks on 1 node")
    folder = _only(tmp_path / "runs")
    moved = tmp_path / "first"
    folder.rename(moved)
    second = launch([*RUN, "-n", "3", str(moved / "job.toml")], mpi, timeout=60)
    assert second.status == 0, second
    again = _only(tmp_path / "runs")
    assert (again / "model.safetensors").read_bytes() == (moved / "model.safetensors").read_bytes()
    assert sorted(open_run(again).steps()["rank"].unique()) == [0, 1]  # rank 2 serves
    assert {path.name for path in again.iterdir()} == {
        "job.toml", "run.toml", "trace", "trace.h5", "metrics.csv", "checkpoints", "model.safetensors"
    }  # fmt: skip


@pytest.mark.any_mpi
@pytest.mark.slow
def test_backup_workers_do_not_wait_for_a_slow_rank(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """Rank 2 is many times slower than the other workers: its gradients arrive late, are dropped and counted."""
    job = write_job(tmp_path)
    sync = ["strategy.name=parameter_server", "strategy.mode=sync", "strategy.backup_workers=1"]
    keys = [*sync, "debug.slow.2=200", "train.steps=40"]
    ended = launch([*mpi.command(4), *TRAIN, str(job), *keys], mpi, timeout=60)
    assert ended.status == 0, ended
    assert "late gradients were dropped" in ended.out
    steps = open_run(_only(tmp_path / "runs")).steps()
    slow, quick = steps[steps["rank"] == 2], steps[steps["rank"] == 1]
    assert (slow["outcome"] == "dropped").sum() > 0
    assert len(slow) < len(quick)


OWN = """
import sys
import torch
from torch import nn
import hpctrain

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(7, 3)
    def forward(self, x):
        return self.layer(x)

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, i):
        return torch.full((7,), i / 50.0), i % 3

class Descent(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad

loss = lambda outputs, targets: nn.functional.cross_entropy(outputs, targets)
job = hpctrain.Job(
    name="own", output=sys.argv[1], model=Net, data=(Points(), Points()), loss=loss,
    optimizer={"name": Descent, "lr": 0.5}, train={"epochs": 2, "batch_size": 5}, threads=1,
)
result = hpctrain.train(job)
from mpi4py import MPI
sums = MPI.COMM_WORLD.allgather(sum(float(p.double().sum()) for p in result.model.parameters()))
assert len(set(sums)) == 1, sums
assert set(result.metrics) == {"loss", "metric"}
try:
    hpctrain.Job.load(result.folder / "job.toml")
except hpctrain.HpctrainError as error:
    refusal = str(error)

# a custom loop, with a server
job = hpctrain.Job(
    name="loop", output=sys.argv[1], model=Net, data=Points(), train={"epochs": 1, "batch_size": 5}, threads=1,
    strategy={"name": "parameter_server", "mode": "sync"}, trace={"enabled": False},
)
count = 0
with hpctrain.session(job) as s:
    for batch in s.batches():
        s.step(s.loss(s.model(batch.inputs), batch.targets))
        count += 1
counts = MPI.COMM_WORLD.allgather(count)
if MPI.COMM_WORLD.rank == 0:
    print("COUNTS", counts)
    print("REFUSED", refusal)
"""


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(count, source): `hpctrain run -n count -- python program.py FOLDER`, for runs in that folder."""
    began = []

    def begin(count: int, source: str) -> Started:
        program = tmp_path / "program.py"
        program.write_text(source)
        words = ["-n", str(count), "--", "python", str(program), str(tmp_path / "runs")]
        began.append(Started(tmp_path, [*RUN, *words]))
        return began[-1]

    yield begin
    for one in began:
        one.clear()


def test_program_with_its_own_objects_and_loop(start: Start, tmp_path: Path) -> None:
    started = start(3, OWN)
    assert started.end(60) == 0, started.out + started.err
    assert "COUNTS [5, 5, 0]" in started.out
    assert "REFUSED " in started.out
    assert "was an object of the program that made this run" in started.out
    [own] = (tmp_path / "runs").glob("own-*")
    assert set(load_file(own / "model.safetensors")) == {"layer.weight", "layer.bias"}
    assert "<lambda in program.py:" in (own / "job.toml").read_text()
    assert started.out.count("own: 3 ranks on 1 node") == 1


FAILING = """
import os, sys
import hpctrain
from tests import helpers

assert "glibc.malloc.trim_threshold=" in os.environ["GLIBC_TUNABLES"]
with hpctrain.session(helpers.make_job(sys.argv[1])) as s:
    for batch in s.batches():
        if s.totals.step == 2 and s.comm.rank == 1:
            1 / 0
        s.step(s.loss(s.model(batch.inputs), batch.targets))
"""


def test_traceback_of_a_program_that_fails_on_one_rank_comes_first(start: Start) -> None:
    """It ends all ranks, with the program's status."""
    started = start(2, FAILING)
    assert started.end(60) == 1, started.out + started.err
    started.gone(5)
    printed = [line for line in started.err.splitlines() if "hpctrain run: python is " not in line]
    assert printed[0] == "rank 1: Traceback (most recent call last):", started.err
    assert printed[-1] == "rank 1: ZeroDivisionError: division by zero", started.err
