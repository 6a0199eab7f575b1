"""A full disk or a removed run folder during a run: reported once and at the end; nothing more is lost."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import CheckpointError, UnwrittenError
from hpctrain.filenames import JOB, METRICS, MODEL
from hpctrain.job import Job
from hpctrain.run import checkpoint, keeper
from hpctrain.run import files as runfiles
from hpctrain.run import folder as runfolder
from hpctrain.run.api import Result, session, train
from hpctrain.run.files import RunFiles
from hpctrain.run.folder import Narrator
from tests import helpers

PS = {"name": "parameter_server", "mode": "sync", "servers": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(runfiles, "PAUSES", (0.0, 0.0))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "elsewhere"))


def make_job(folder: Path, **tables: Any) -> Job:
    """Four evaluations and checkpoints in 8 steps."""
    every = {"steps": 2}
    keys = {"steps": 8, "batch_size": 4, "evaluate_every": every, "checkpoint_every": every}
    return helpers.make_job(
        folder / "runs", model="tests.helpers:noisy_net", data="tests.helpers:pictures", train=keys, **tables
    )


def run(job: Job) -> tuple[list[Result], str]:
    """The results and the output."""
    out = io.StringIO()
    return World(3).run(lambda comm: train(job, comm, out=Narrator(out=out))), out.getvalue()


def rows(folder: Path) -> list[list[str]]:
    with open(folder / METRICS) as file:
        return [[value for key, value in row.items() if key != "seconds"] for row in csv.DictReader(file)]


class Full:
    """Replaces a writing function: no space from its call `first` on, for this many `calls`."""

    def __init__(self, write: Any, first: int, calls: int = 10**6) -> None:
        self.write, self.count, self.full = write, 0, range(first, first + calls)

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        if self.count - 1 in self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(*arguments)


def test_failed_writes_are_retried_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk is full at two evaluations and checkpoints: in the end nothing is missing and the status is 0."""
    job = make_job(tmp_path)
    whole = run(job)[0][0]
    monkeypatch.setattr(runfiles, "append_metrics", Full(runfolder.append_metrics, 1, 2))
    monkeypatch.setattr(keeper, "save_checkpoint", Full(checkpoint.save_checkpoint, 1, 2))
    results, output = run(job)
    assert rows(results[0].folder) == rows(whole.folder)
    assert output.count("metrics.csv cannot be written (No space left on device)") == 1
    assert output.count("metrics.csv can be written again") == 1
    assert output.count("checkpoints cannot be written") == output.count("checkpoints can be written again") == 1


@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_permanently_full_disk_is_reported_once_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: helpers.Tables
):
    job = make_job(tmp_path, strategy=strategy)
    whole = run(job)[0]
    monkeypatch.setattr(runfiles, "append_metrics", Full(runfolder.append_metrics, 2))
    monkeypatch.setattr(keeper, "save_checkpoint", Full(checkpoint.save_checkpoint, 0))
    monkeypatch.setattr(keeper, "save_model", Full(checkpoint.save_model, 0, 2))
    out = io.StringIO()
    errors = []

    def body(comm: Communicator) -> None:
        with pytest.raises(UnwrittenError) as caught:
            train(job, comm, out=Narrator(out=out))
        errors.append(caught.value)

    World(3).run(body)
    output = out.getvalue()
    for name in (METRICS, "checkpoints", MODEL):
        assert output.count(f"{name} cannot be written") == 1, output
    for error, result in zip(errors, whole, strict=True):
        assert (error.everywhere, error.status) == (True, 1)
        assert error.result.metrics == result.metrics
        assert (helpers.vector(error.result.model) == helpers.vector(result.model)).all()
        for name in (METRICS, "checkpoints", MODEL):
            assert f"{name} cannot be written (No space left on device)" in str(error)
    folder = errors[0].result.folder
    assert rows(folder) == rows(whole[0].folder)[:2]
    assert not (folder / MODEL).exists()
    [elsewhere] = (tmp_path / "elsewhere").iterdir()
    assert f"the model is in {elsewhere / MODEL}" in str(errors[0])
    assert (elsewhere / MODEL).read_bytes() == (whole[0].folder / MODEL).read_bytes()


def test_model_written_at_the_second_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(keeper, "save_model", Full(checkpoint.save_model, 0, 1))
    results, output = run(make_job(tmp_path))
    assert (results[0].folder / MODEL).exists()
    assert output.count("model.safetensors can be written again") == 1


def test_removed_run_folder_is_created_again(tmp_path: Path):
    job = make_job(tmp_path)
    whole = run(job)[0][0]
    texts: list[str] = []

    def body(comm: Communicator) -> None:
        with session(job, comm, out=Narrator(out=out)) as running:
            with pytest.raises(UnwrittenError) as caught:
                for batch in running.batches():
                    running.step(running.loss(running.model(batch.inputs), batch.targets))
                    if running.totals.step == 3 and comm.rank == 0:
                        texts.append((running.folder / JOB).read_text())
                        shutil.rmtree(running.folder)
            assert "was removed during the run" in str(caught.value)
        assert running.result.metrics == whole.metrics

    out = io.StringIO()
    World(3).run(body)
    assert out.getvalue().count("was removed during the run and has been recreated") == 1
    [folder] = [path for path in (tmp_path / "runs").iterdir() if path != whole.folder]
    assert (folder / JOB).read_text() == texts[0]
    assert rows(folder) == rows(whole.folder)
    assert (folder / MODEL).read_bytes() == (whole.folder / MODEL).read_bytes()
    assert not (tmp_path / "elsewhere" / MODEL).exists()


def failing_metric(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    raise ZeroDivisionError("no metric")


def test_failing_test_keeps_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On any rank, and however long rank 0 takes to write."""

    def slowly(*args: Any) -> None:
        time.sleep(0.5)
        checkpoint.save_model(*args)

    monkeypatch.setattr(keeper, "save_model", slowly)
    job = helpers.make_job(
        tmp_path, data=(helpers.points(), helpers.points(9)), metric="tests.unit.test_run_files:failing_metric",
        train={"evaluate_every": {"fraction": 1}},
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        World(2).run(lambda comm: helpers.quiet_train(comm, job))
    assert len(list(tmp_path.glob("*/model.safetensors"))) == 1


def test_partial_row_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A partly written row is removed, or the next one would be appended to it."""
    runfolder.append_metrics(tmp_path, [dict.fromkeys("abcdefg", "1")])
    before = (tmp_path / METRICS).read_text()

    class Torn:
        def __init__(self, file: Any) -> None:
            self.file = file

        def writerows(self, _: Any) -> None:
            self.file.write("2,2")
            self.file.flush()
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(csv, "writer", Torn)
        runfolder.append_metrics(tmp_path, [dict.fromkeys("abcdefg", "2")])
    assert (tmp_path / METRICS).read_text() == before


def test_run_continues_when_nothing_can_be_printed():
    class Gone(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError

    Narrator(out=Gone()).say("a word")


def test_failure_is_forgotten_once_writing_works(tmp_path: Path):
    out = io.StringIO()
    files = RunFiles(tmp_path, Narrator(out=out))

    def fail() -> None:
        raise CheckpointError("no room")

    for _ in range(3):
        assert not files.write("this", fail, "so what")
    assert files.unwritten() == "no room"
    assert files.write("this", lambda: None, "so what")
    assert files.unwritten() is None
    assert out.getvalue() == f"warning: no room; so what\n{tmp_path / 'this'} can be written again\n"
