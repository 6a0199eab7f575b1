"""slurm/train.sbatch on a real Slurm: two nodes with two ranks each."""

from __future__ import annotations

import contextlib
import json
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from hpctrain import launcher
from tests.cluster.slurm import ENDED, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm" / "train.sbatch"
SCRIPT_GPU = ROOT / "slurm" / "train_gpu.sbatch"
ENVIRONMENT = {"HPCTRAIN_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
JOB = """
name = "tiny"
[model]
name = "mlp"
inputs = 64
outputs = 10
[data]
name = "digits"
[train]
epochs = 1
"""
WORLD = """
from mpi4py import MPI
names = MPI.COMM_WORLD.gather(__import__("os").environ["SLURMD_NODENAME"])
if names: print(*names, flush=True)
"""

PROGRAM = """
import os, subprocess, sys, time
from torch import nn
import hpctrain
job = hpctrain.Job(
    model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), data="digits", threads=1,
    train={"epochs": 30, "batch_size": 32},
)
first = "SLURM_RESTART_COUNT" not in os.environ
with hpctrain.session(job, resume="latest") as s:
    for batch in s.batches():
        if first and s.totals.step == 2 and s.comm.rank == 0:  # what --signal=B:USR1@120 makes Slurm do
            subprocess.run(["scancel", "--batch", "--signal=USR1", os.environ["SLURM_JOB_ID"]], check=True)
        time.sleep(0.05 * first)
        s.step(nn.functional.cross_entropy(s.model(batch.inputs), batch.targets))
print(f"{sys.argv[1:]} ends with {s.result.status}", flush=True)
sys.exit(s.result.status)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(JOB)
    return tmp_path


def output(folder: Path, job: int) -> str:
    file = folder / f"slurm-{job}.out"
    return file.read_text() if file.exists() else ""


def test_srun_with_the_librarys_plugin_makes_one_world(slurm: Slurm, folder: Path) -> None:
    plugin = launcher.find_library().srun
    (folder / "world.py").write_text(WORLD)
    (folder / "world.sh").write_text(f"#!/bin/bash\nsrun --mpi={plugin} {sys.executable} world.py\n")
    job = slurm.submit("world.sh", cwd=folder, options=["--nodes=2", "--ntasks-per-node=2"])
    state = slurm.wait(job, 60)
    assert (state, output(folder, job).split()) == ("COMPLETED", ["n1", "n1", "n2", "n2"])


def test_the_template_trains_on_two_nodes(slurm: Slurm, folder: Path) -> None:
    job = slurm.submit(SCRIPT, "tiny.toml", "train.epochs=2", cwd=folder, environment=ENVIRONMENT)
    state = slurm.wait(job, 120)
    text = output(folder, job)
    assert state == "COMPLETED", text
    (run,) = (folder / "runs").iterdir()
    assert (run / "model.safetensors").stat().st_size > 0
    assert sorted(path.name for path in (run / "trace").iterdir()) == [f"rank_{r:05d}.h5" for r in range(4)]
    assert "4 ranks" in text
    assert "test accuracy 0." in text


@pytest.mark.any_mpi
def test_the_template_for_gpus_starts_its_ranks_and_trains_without_gpus_if_told_to(slurm: Slurm, folder: Path) -> None:
    """This Slurm has no GPUs, so this shows only that the script finds train.sbatch and passes everything on."""
    options = ["--nodes=1", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=1"]
    job = slurm.submit(SCRIPT_GPU, "tiny.toml", "device=auto", cwd=folder, environment=ENVIRONMENT, options=options)
    state = slurm.wait(job, 60)
    text = output(folder, job)
    assert state == "COMPLETED", text
    assert "tiny with device=cuda, device=auto: 2 ranks on " in text  # of nodes Open MPI here counts 2, not 1
    assert "test accuracy 0." in text


@pytest.fixture
def program(slurm: Slurm, tmp_path: Path) -> Callable[[], None]:
    """Submits a program that asks for the signal in the middle of its first run. The function waits for its end."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "train.py").write_text(PROGRAM)
    words, options = ["--", "python", "train.py", "--one", "two words"], ["--nodes=1", "--ntasks-per-node=2"]
    job = slurm.submit(SCRIPT, *words, cwd=folder, environment=ENVIRONMENT, options=options)

    def check() -> None:
        state = slurm.wait(job, 120)
        text = output(folder, job)
        assert state == "COMPLETED", text
        assert slurm.state(job)["Restarts"] == "1", text
        assert "saved; queueing again (restart 1)" in text
        assert "resumed at sample " in text
        assert [text.count(f"['--one', 'two words'] ends with {status}") for status in (130, 0)] == [2, 2], text
        [run] = (folder / "runs").iterdir()
        assert (run / "model.safetensors").exists()

    return check


@pytest.mark.timeout(400)
def test_job_saves_and_requeues_before_its_time_limit_and_resumes(
    slurm: Slurm, folder: Path, program: Callable[[], None]
) -> None:
    """The signal comes twice: before the ranks have begun, and in the middle of training. So does a program of the
    user's own, which runs at the same time, because requeued jobs have to wait."""
    job = slurm.submit(SCRIPT, "tiny.toml", "train.epochs=3000", cwd=folder, environment=ENVIRONMENT)

    def until(condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            state = slurm.state(job)["JobState"]
            assert state not in ENDED, f"{state}\n{output(folder, job)}\n{slurm.logs()}"
            assert time.monotonic() < deadline, output(folder, job) + slurm.logs()
            time.sleep(0.2)

    def announce() -> None:
        """What --signal=B:USR1@120 makes Slurm do."""
        slurm.command("scancel", "--batch", "--signal=USR1", str(job))

    until(lambda: any("train" in argv for argv in ranks(slurm)), 60)
    announce()  # Python has just started: torch is not imported yet
    until(lambda: slurm.state(job)["Restarts"] == "1", 120)
    (run,) = (folder / "runs").iterdir()
    other = slurm.submit(SCRIPT, "tiny.toml", "train.epochs=1", cwd=folder, environment=ENVIRONMENT)  # the same name
    assert list((run / "checkpoints").glob("*.safetensors"))
    assert "saved; queueing again (restart 1)" in output(folder, job)
    assert "make --time much longer" in output(folder, job)

    until(lambda: "epoch 1.00:" in output(folder, job), 60)
    announce()
    until(lambda: slurm.state(job)["Restarts"] == "2", 60)
    assert not (run / "model.safetensors").exists()
    until((run / "trace" / "rank_00003.3.h5").exists, 60)
    holder = json.loads((run / "run.lock").read_text())
    assert (holder["slurm_job"].partition("@")[0], holder["restarts"]) == (str(job), 2)
    slurm.command("scancel", str(job))
    slurm.wait(job, 30)
    assert slurm.wait(other, 60) == "COMPLETED", output(folder, other)
    assert len(list((folder / "runs").iterdir())) == 2  # the other job has its own run
    assert not (run / "model.safetensors").exists()
    assert tomllib.loads((run / "run.toml").read_text())["slurm_job"].partition("@")[0] == str(job)
    assert "saved; queueing again (restart 2)" in output(folder, job)
    assert "tiny with train.epochs=3000: 4 ranks on " in output(folder, job)  # of nodes Open MPI here counts 4, not 2
    program()


def ranks(slurm: Slurm) -> list[list[str]]:
    """The command lines of Slurm's tasks that are Python processes."""
    found = []
    for process in slurm.processes():
        with contextlib.suppress(psutil.Error):
            argv = process.cmdline()
            if "SLURM_PROCID" in process.environ() and argv[:1] == [sys.executable]:
                found.append(argv)
    return found


@pytest.mark.any_mpi
@pytest.mark.parametrize(
    ("words", "message"),
    [(["tiny.toml", "train.epochs=-1"], "train.epochs"), (["--", "tiny.toml"], "tiny.toml: a job file is not a ")],
)
def test_wrong_job_or_program_is_one_message_and_status_2(
    slurm: Slurm, folder: Path, words: list[str], message: str
) -> None:
    job = slurm.submit(SCRIPT, *words, cwd=folder, environment=ENVIRONMENT)
    assert slurm.wait(job, 60) == "FAILED"
    text = output(folder, job)
    assert slurm.state(job)["ExitCode"] == "2:0", text
    assert text.count(message) == 1, text
    assert not (folder / "runs").exists()
