"""Failures under a real launcher: reported once and clearly, all ranks end in time, no partial files."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from hpctrain import launcher
from hpctrain.run.lock import Lock
from hpctrain.trace import open_run
from tests.conftest import ROOT, Mpirun, launch
from tests.helpers_mpi import RUN, TRAIN, Started, names_the_dead, write_job
from tests.marks import slow

pytestmark = pytest.mark.launch
Start = Callable[..., Started]
IDX = b"\0\0\x08\x03\0\0\0\5"  # the header of an idx file, cut off


@pytest.fixture
def start(tmp_path: Path, mpi: launcher.Mpi) -> Iterator[Start]:
    """start(count, *arguments, plain=False): `hpctrain run -n count ...`, or `mpiexec ... hpctrain train ...`."""
    began = []

    def begin(count: int, *arguments: str, plain: bool = False) -> Started:
        command = [*mpi.command(count), *TRAIN] if plain else [*RUN, "-n", str(count)]
        environment = launcher.rank_environment(mpi.library, os.environ) if plain else {}
        began.append(Started(tmp_path, [*command, *arguments], environment))
        return began[-1]

    yield begin
    for one in began:
        one.clear()


# -- bad input ---------------------------------------------------------------------------------------------------
@pytest.mark.any_mpi
def test_mistakes_in_the_job_file(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """Under plain mpirun, before torch is imported."""
    overrides = ["strategy.name=parameter_server", "strategy.servers=9"]
    argv = [*mpi.command(4), *TRAIN, str(write_job(tmp_path)), *overrides]
    ended = launch(argv, mpi, timeout=40)
    assert ended.status == 2, ended
    assert ended.err.count("strategy.servers = 9: of 4 ranks at most 3") == 1, ended.err
    assert "Traceback" not in ended.err + ended.out
    assert ended.out.strip("\n") == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.any_mpi
def test_missing_job_file_under_hpctrain_run(start: Start, tmp_path: Path) -> None:
    started = start(4, str(tmp_path / "nowhere.toml"))
    assert started.end(40) == 2
    assert started.err.startswith("hpctrain: there is no job file ")
    assert started.err.count("\n") == 1


BATTERY = """
import glob, io, json, os, pathlib, shutil, sys, time
from contextlib import redirect_stderr
import torch
from hpctrain.job import Job
from hpctrain.run.resume import Resume
from hpctrain.run.command import main

folder, job = pathlib.Path(sys.argv[1]), sys.argv[2]
rank = int(os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK", 0)))
found = {}
def run(what, overrides=(), resume=None):
    began, printed = time.monotonic(), io.StringIO()
    with redirect_stderr(printed):
        status = main(lambda: (Job.load(job, overrides), resume))
    found[what] = [status, printed.getvalue(), time.monotonic() - began]

good = folder / "good"
run("fine", [f"output={good}", "train.checkpoint_every.steps=3"])
run("a key", ["train.batchsize=3"])
run("values", ["train.batch_size=many", "ranks=0"])
run("number of ranks", ["ranks=3"])
run("corrupt", ["data.name=mnist", f"data.path={folder}/idx"])
run("missing data", ["data.name=mnist", f"data.path={folder}/nowhere"])
run("frozen", ["model.name=tests.helpers_mpi:frozen"])
run("output", [f"output={job}/below"])
run("no module", ["model.name=not_there:net"])
run("wait", [f"communicator.wait={('nap', 'spin')[rank % 2]}"])
run("ranks", [f"ranks={4 + rank // 3}"])
run("traces", [f"trace.enabled={str(rank > 0).lower()}"])
run("uneven data", ["data.name=tests.helpers_mpi:uneven"])
run("uneven model", ["model.name=tests.helpers_mpi:uneven_net", "strategy.exchange=message"])
run("uneven model, served", ["model.name=tests.helpers_mpi:uneven_net", "strategy.name=parameter_server"])
made = next(good.iterdir())
before = sorted(map(str, made.rglob("*")))
run("another job", ["model.name=tests.helpers_mpi:wide", "optimizer.lr=0.3"], str(made))
run("another model", ["model.name=tests.helpers_mpi:wide"], Resume(made, changes="take"))
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
if rank == 0:
    path = max((made / "checkpoints").iterdir())
    os.truncate(path, path.stat().st_size - 40)
MPI.COMM_WORLD.Barrier()
run("truncated", [], str(made))
run("no checkpoint", [], str(folder / "nowhere"))
sync = ["strategy.name=parameter_server", "strategy.mode=sync", f"output={folder}/nan"]
run("loss", [*sync, "data.name=tests.helpers:points", "data.bad=30", "data.shuffle=false"])
same = sorted(map(str, made.rglob("*"))) == before
everybody = MPI.COMM_WORLD.gather([found, same], 0)
if rank == 0:
    (folder / "found.json").write_text(json.dumps(everybody))
"""


@pytest.mark.any_mpi
def test_mistakes_that_only_the_ranks_can_find(mpirun: Mpirun, tmp_path: Path) -> None:
    """One message, from rank 0; no traceback; no partial files. All cases in one launch of 4 ranks."""
    (tmp_path / "idx").mkdir()
    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / "idx" / f"{part}-{kind}-ubyte").write_bytes(IDX)
    job = write_job(tmp_path)
    mpirun(4, BATTERY, str(tmp_path), str(job), timeout=90)
    everybody = json.loads((tmp_path / "found.json").read_text())
    words = {
        "a key": "train.batchsize",
        "values": "train.batch_size",
        "number of ranks": "ranks = 3: a job that needs 3 ranks was started with 4",
        "loss": "loss is nan on rank 2 in step 1 ",
        "corrupt": "train-images-idx3-ubyte",
        "missing data": "nowhere",
        "frozen": "no trainable parameters",
        "output": "output = ",
        "no module": "there is no module not_there",
        "wait": 'communicator.wait = "nap" on ranks 0 and 2 and "spin" on ranks 1 and 3; all ranks must be given',
        "ranks": "ranks = 4 on ranks 0, 1 and 2 and 5 on rank 3; all ranks must be given the same job",
        "traces": "trace.enabled = false on rank 0 and true on ranks 1, 2 and 3; all ranks must be given the same job",
        "uneven data": "the data set has 103 samples on rank 0, 104 samples on rank 1",
        "uneven model": "parameter 0.weight is float32 of shape (4, 7) on ranks 0, 1 and 2 and float32 of shape (5, 7)",
        "uneven model, served": "parameter 0.weight is float32 of shape (4, 7) on ranks 0, 1 and 2 and float32 of",
        "another job": 'model.name is "tests.helpers:net" there and "tests.helpers_mpi:wide" in this job, optimizer.lr',
        "another model": "is a checkpoint of another model",
        "truncated": "is truncated",
        "no checkpoint": "has no checkpoint to resume from",
    }
    for rank, (found, same) in enumerate(everybody):
        assert found.pop("fine")[:2] == [0, ""]
        assert same, "a refused resumption wrote into the run folder"
        for what, (status, printed, seconds) in found.items():
            assert status == (2 if rank == 0 else 0), (what, rank)
            assert seconds < 10, (what, rank)
            if rank == 0:
                assert printed.startswith("hpctrain: "), (what, printed)
                assert words[what] in printed
                assert printed.count("\n") == 1 + (what == "values"), printed  # a line for each
            else:
                assert printed == "", (what, rank)
    assert not (tmp_path / "runs").exists()


@pytest.mark.any_mpi
@pytest.mark.parametrize(("variable", "words"), [("PMI_SIZE", "mpiexec"), ("SLURM_STEP_NUM_TASKS", "srun")])
def test_process_outside_the_launchers_world(tmp_path: Path, variable: str, words: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), variable: "4"}
    argv = [*TRAIN, str(write_job(tmp_path))]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.count("started 4 processes, but the MPI library") == 1
    assert words in done.stderr
    assert not (tmp_path / "runs").exists()


# -- one rank fails ----------------------------------------------------------------------------------------------
def test_exception_in_user_code_on_one_rank(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """With shuffle = false sample 17 is rank 2's; the other ranks and their server threads wait for it."""
    job = write_job(tmp_path, 'strategy = {name = "parameter_server", mode = "sync", servers = 2, colocated = true}')
    mark = tmp_path / "mark"
    data = ["data.name=tests.helpers_mpi:Raising", f"data.mark={mark}", "data.shuffle=false"]
    ended = launch([*mpi.command(3), *TRAIN, str(job), *data], mpi, timeout=60)
    gone = time.time() - float(mark.read_text())
    assert ended.status not in (0, 2)
    printed = [line for line in ended.err.splitlines() if line.strip()]
    assert printed[0] == "rank 2: Traceback (most recent call last):", ended.err
    assert "rank 2: ZeroDivisionError: sample 17 is bad" in printed
    assert not [line for line in printed if line.startswith(("rank 0", "rank 1"))]
    assert gone < 5, gone


LONE = """
import sys
import torch
import hpctrain
from hpctrain.comm.connect import connect
from tests import helpers

job = helpers.make_job(sys.argv[1], strategy={"name": sys.argv[3]})
comm = connect(job)
with hpctrain.session(job, comm) as s:
    for batch in s.batches():
        loss = s.loss(s.model(batch.inputs), batch.targets)
        if s.totals.step == 1 and (sys.argv[2] == "all" or comm.rank == 1):
            s.model.zero_grad()
        s.step(loss)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("who", "strategy"), [("one", "parameter_server"), ("all", "all_reduce")])
def test_user_mistake_during_training(mpi: launcher.Mpi, tmp_path: Path, who: str, strategy: str) -> None:
    """On one rank or on all ranks: reported once, status 2, no rank is left waiting."""
    program = tmp_path / "program.py"
    program.write_text(LONE)
    argv = [*mpi.command(3), sys.executable, str(program), str(tmp_path / "runs"), who, strategy]
    ended = launch(argv, mpi, timeout=60)
    assert ended.status == 2, ended
    assert ended.err.count("no longer lies in its arena") == 1, ended.err
    assert f"hpctrain: rank {0 if who == 'all' else 1}: " in ended.err
    assert "Traceback" not in ended.err


OUTSIDE = """
import gc
import sys
import threading
import hpctrain
from hpctrain.comm.connect import connect
from tests import helpers

hooks = sys.excepthook, threading.excepthook
def as_they_were():
    gc.collect()
    return (sys.excepthook, threading.excepthook) == hooks

comm = connect()
assert as_they_were()
hpctrain.train(helpers.make_job(sys.argv[1]), comm)
assert as_they_were()
try:
    hpctrain.train(helpers.make_job(sys.argv[1], data={"name": "mnist", "path": "nowhere"}), comm)
except hpctrain.HpctrainError as error:
    assert error.everywhere
    assert not as_they_were()
assert as_they_were()
if comm.rank == 1:
    FAILING
comm.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["1 / 0", "comm.spawn(lambda: 1 / 0) and comm.sleep(50)"])
def test_failure_outside_a_session(mpi: launcher.Mpi, tmp_path: Path, failing: str) -> None:
    """It ends the other ranks, as does a failure in a thread that is never joined, such as a server's. The program's
    exception hooks stay in place, except for an error that all ranks raise."""
    program = tmp_path / "program.py"
    program.write_text(OUTSIDE.replace("FAILING", failing))
    ended = launch([*mpi.command(3), sys.executable, str(program), str(tmp_path / "runs")], mpi, timeout=60)
    assert ended.status == 1, ended
    assert ended.err.count("ZeroDivisionError") == 1, ended.err
    assert "AssertionError" not in ended.err


ALL_RAISE = """
import sys
import hpctrain
from tests import helpers

with hpctrain.session(helpers.make_job(sys.argv[1], data={"name": "mnist", "path": "nowhere"})):
    pass
"""


@pytest.mark.parametrize("count", [1, slow(3)])
def test_error_raised_on_all_ranks_of_a_program(mpi: launcher.Mpi, tmp_path: Path, count: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(ALL_RAISE)
    ended = launch([*mpi.command(count), sys.executable, str(program), str(tmp_path / "runs")], mpi, timeout=60)
    assert ended.status == 2, ended
    assert ended.err.count("hpctrain: ") == 1, ended.err
    assert "Traceback" not in ended.err


LEAVING = """
import sys
import hpctrain
from pathlib import Path
from hpctrain.comm.connect import connect
from tests import helpers

comm = connect()
def leave(number, strategy, ends):
    job = helpers.make_job(sys.argv[1], strategy=strategy, trace={"enabled": True}, train={"epochs": 9})
    with hpctrain.session(job, comm) as s:
        for step, batch in enumerate(s.batches()):
            if step == 5 and ends():
                break
            s.step(s.loss(s.model(batch.inputs), batch.targets))
    Path(sys.argv[1], f"after-{number}-{comm.rank}").touch()

server = {"name": "parameter_server"}
strategies = {"name": "all_reduce"}, {**server, "mode": "sync"}, {**server, "mode": "async", "colocated": True}
for number, strategy in enumerate(strategies):
    leave(number, strategy, lambda: True)
leave(3, server, lambda: comm.rank == 1 and sys.exit(9))
"""


@pytest.mark.slow
def test_leaving_the_loop_on_all_ranks_and_on_one(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """All ranks leave three sessions early and continue; sys.exit() on one rank in a fourth session ends all."""
    program = tmp_path / "program.py"
    program.write_text(LEAVING)
    argv = [*mpi.command(3), sys.executable, str(program), str(tmp_path / "runs")]
    ended = launch(argv, mpi, timeout=90)
    assert ended.status == 9, ended
    runs = sorted((tmp_path / "runs").glob("train-*"))
    assert sorted(path.name for path in (tmp_path / "runs").glob("after-*")) == [
        f"after-{number}-{rank}" for number in range(3) for rank in range(3)
    ]
    assert ended.out.count("left at sample ") == 3, ended.out
    assert ended.err.count("rank 1 left the training loop at step 5 while others continue") == 1, ended.err
    assert "(sys.exit(9))" in ended.err
    assert "Traceback" not in ended.err
    for folder in runs[:3]:
        assert not [note for note in open_run(folder).notes if "not closed" in note]


@pytest.mark.any_mpi
@pytest.mark.slow
def test_non_finite_gradient(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """The server finds it in the sum, after it has answered the workers, and ends all ranks."""
    job = write_job(tmp_path, 'strategy = {name = "parameter_server", mode = "sync"}')
    data = ["data.name=tests.unit.test_round:one_bad", "data.place=31", "data.shuffle=false"]
    argv = [*mpi.command(3), *TRAIN, str(job), *data, "model.name=tests.unit.test_round:Poisoned"]
    ended = launch(argv, mpi, timeout=60)
    assert ended.status == 2, ended
    printed = "hpctrain: rank 2: the gradient of parameter hidden.bias is not finite on rank 1 in step 2 (phase 0)"
    assert ended.err.count(printed) == 1, ended.err
    assert "Traceback" not in ended.err


# -- no room -----------------------------------------------------------------------------------------------------
FILLING = """
import sys
from pathlib import Path
import hpctrain
from tests import helpers, helpers_mpi

every = {"steps": 3}
job = helpers.make_job(
    sys.argv[1], data=helpers_mpi.tested(), trace={"enabled": True, "flush_seconds": 0.01},
    train={"steps": 12, "evaluate_every": every, "checkpoint_every": every},
)
with hpctrain.session(job) as s:
    for step, batch in enumerate(s.batches()):
        if step == 4 and s.comm.rank == 0:
            with open(Path(sys.argv[1]) / "filler", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(4096)) == 4096:
                        pass
                except OSError:
                    pass
        s.step(s.loss(s.model(batch.inputs), batch.targets))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB. Skips if this user may not mount one."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "hpctrain-test", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.any_mpi
@pytest.mark.slow
def test_full_disk(mpi: launcher.Mpi, tmp_path: Path, small_disk: Path) -> None:
    """No space for traces, checkpoints and model: training continues, and the end reports what is missing."""
    program, spare = tmp_path / "program.py", tmp_path / "spare"
    program.write_text(FILLING)
    spare.mkdir()
    argv = [*mpi.command(2), sys.executable, str(program), str(small_disk)]
    ended = launch(argv, mpi, timeout=90, environment={"TMPDIR": str(spare)})
    assert ended.status == 1, ended
    assert "Traceback" not in ended.err
    assert ended.err.count("hpctrain: the run has ended, but not all of it was saved: ") == 1, ended.err
    assert len(list(spare.glob("*/model.safetensors"))) == 1
    for name in ("checkpoints/000000000072.safetensors", "model.safetensors"):
        assert ended.out.count(f"{name} cannot be written (") == 1, ended.out
    assert ended.err.count("trace.h5: cannot be written (No space left on device)") == 1, ended.err
    assert "test accuracy" in ended.out


# -- killed, interrupted -----------------------------------------------------------------------------------------
def _endless(tmp_path: Path, strategy: str = "all_reduce") -> str:
    text = f'trace = {{flush_seconds = 0.2}}\nstrategy = {{name = "{strategy}"}}'
    return str(write_job(tmp_path, text, steps=10**9))


def _folder(tmp_path: Path) -> Path:
    [folder] = (tmp_path / "runs").iterdir()
    return folder


def test_rank_killed_with_signal_9(start: Start, tmp_path: Path) -> None:
    """All traces can be read, and no process and no shared memory is left."""
    started = start(3, _endless(tmp_path))
    started.until(" step ")
    time.sleep(1.0)
    victim = started.ranks()[1]
    os.kill(victim, signal.SIGKILL)
    assert started.end(5) not in (0, 2, 130)
    started.gone(5)
    assert launcher.leftovers(started.began, started.process.pid) == []
    everything = open_run(_folder(tmp_path)).steps()
    for rank in range(3):
        steps = everything[everything["rank"] == rank]
        assert len(steps) > 10, rank
        assert np.isfinite(steps["loss"]).all()
    assert re.search(names_the_dead(1, victim, 3), started.err), started.err
    assert "was killed by signal 9" in started.err
    Lock(_folder(tmp_path), {}).release()  # its holder is recognised as dead


@pytest.mark.any_mpi
@pytest.mark.slow
def test_server_killed_with_signal_9(start: Start, tmp_path: Path) -> None:
    """It wrote its trace while it served."""
    started = start(3, _endless(tmp_path, "parameter_server"))
    started.until(" step ")
    time.sleep(1.0)
    os.kill(started.ranks()[2], signal.SIGKILL)
    assert started.end(5) not in (0, 2, 130)
    started.gone(5)
    run = open_run(_folder(tmp_path))
    assert run.attributes(2)["role"] == "server"
    assert len(run.spans(2, "update")) > 10
    assert any("not closed" in note for note in run.notes)


@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_ctrl_c(start: Start, mpi: launcher.Mpi, tmp_path: Path, plain: bool) -> None:
    """Sent to `hpctrain run` or to mpiexec: saves a checkpoint and prints one line within 10 s; --resume continues,
    also with changed keys, but not while the run is still running."""
    job = _endless(tmp_path)
    started = start(2, job, plain=plain)
    started.until(" step ")
    if not plain:
        second = start(1, job, "--resume=latest")
        assert second.end(60) == 2, second.err
        assert re.fullmatch(r"hpctrain: \S+ is in use by process \d+ on \S+, since [^\n]*\n", second.err)
        assert second.out == ""
    asked = time.monotonic()
    started.process.send_signal(signal.SIGINT)
    status = started.end(10)
    started.gone(10 - (time.monotonic() - asked))
    # Open MPI's mpirun has its own exit status when interrupted.
    assert status == (1 if plain and mpi.library.kind == "openmpi" else 130), started.err
    printed = [line for line in (started.out + started.err).splitlines() if "interrupted at sample" in line]
    assert len(printed) == 1, started.out + started.err
    assert "Traceback" not in started.err
    folder = _folder(tmp_path)
    [checkpoint] = (folder / "checkpoints").iterdir()
    assert not (folder / "model.safetensors").exists()
    assert len(open_run(folder).steps()) > 0
    steps = _rounds(int(checkpoint.stem)) + 4
    assert not (folder / "run.lock").exists()
    if plain:
        return
    resumed = start(2, str(folder / "job.toml"), f"train.steps={steps}", "--resume")
    assert resumed.end(60) == 0, resumed.err
    assert f"resumed at sample {int(checkpoint.stem):,}" in resumed.out
    assert f"changed from here on: train.steps = {steps} (was 1000000000)" in resumed.out
    assert json.loads((folder / "history.jsonl").read_text())["key"] == "train.steps"
    assert (folder / "model.safetensors").exists()


@pytest.mark.any_mpi
@pytest.mark.slow
def test_rank_stuck_in_user_code_ends_after_a_stop_signal(tmp_path: Path) -> None:
    """A single rank without a launcher. It reports how long it waited: as long as the job allows."""
    mark = tmp_path / "mark"
    data = ["data.name=tests.helpers_mpi:Blocking", f"data.mark={mark}", "data.shuffle=false", "train.stop_seconds=1"]
    started = Started(tmp_path, [*TRAIN, str(write_job(tmp_path)), *data])
    try:
        deadline = time.monotonic() + 60
        while not mark.exists():
            assert started.process.poll() is None, started.err
            assert time.monotonic() < deadline, started.err
            time.sleep(0.05)
        started.process.send_signal(signal.SIGTERM)
        assert started.end(20) == -signal.SIGTERM
        assert "hpctrain: rank 0 exits: SIGTERM was received 1 s ago, and no step has ended" in started.err
    finally:
        started.clear()


def _rounds(cursor: int) -> int:
    """Rounds of two workers with 6 samples each, on 103 samples: 9 per epoch."""
    epochs, rest = divmod(cursor, 103)
    return epochs * 9 + -(-rest // 12)
