"""Output that cannot be written: one message and a non-zero status, but training continues; devices are not
replaced."""

from __future__ import annotations

import io
import os
import stat
import sys
from contextlib import contextmanager

import pytest

from hpctrain.bench.report import Report
from hpctrain.cli import main
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.launcher.output import Pump
from hpctrain.output import output_file, output_text
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from tests.traces import HandMade

FULL = "/dev/full"
NO_SPACE = "standard output cannot be written (No space left on device)"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with HandMade(folder, 2) as made:
        for rank in (0, 1):
            made[rank].phase(0.0, 0, "worker", "all_reduce")
            made[rank].span("forward", 1.0, 2.0, 0)
            made[rank].done(3.0, 0)
    return folder


@contextmanager
def standard_output(monkeypatch, out):
    """Called in the test itself, since pytest replaces it after the fixtures."""
    with out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        yield


PRINTING = ("job explain", "job show RUN/job.toml", "trace RUN", "watch --once RUN", "compare RUN", "trace export RUN")


@pytest.mark.parametrize("command", [*PRINTING, "--help"])
def test_command_reports_unwritable_output(run, monkeypatch, capsys, command):
    with standard_output(monkeypatch, open(FULL, "w")):
        assert main([word.replace("RUN", str(run)) for word in command.split()]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"hpctrain: {NO_SPACE}"


def test_broken_pipe_ends_a_command_quietly(run, monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with standard_output(monkeypatch, open(writing, "w")):
        assert main(["job", "explain"]) == 1
    assert capsys.readouterr().err == ""


def test_closed_standard_output_is_no_error(run, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["trace", str(run)]) == 0 and main(["watch", "--once", str(run)]) == 0
    sys.stdout.close()


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("report RUN -o /dev/full", "/dev/full: cannot be written (No space left on device)"),
        ("compare RUN --csv /dev/full", "/dev/full: the CSV file cannot be written (No space left on device)"),
        ("trace export RUN -o /dev/full", "/dev/full: cannot be written (No space left on device)"),
        ("bench read --json /dev/full", "--json /dev/full: the figures cannot be written (No space left on device)"),
    ],
)
def test_unwritable_file_is_one_message(run, capsys, monkeypatch, command, what):
    monkeypatch.setattr("hpctrain.bench._measure_alone", lambda what: Report([]))
    monkeypatch.setattr("hpctrain.views.report.page.draw_pictures", lambda *_: ([], []))
    assert main([word.replace("RUN", str(run)) for word in command.split()]) == 2
    assert what in capsys.readouterr().err
    assert stat.S_ISCHR(os.stat(FULL).st_mode) and not os.path.exists("/dev/.full.part")


def test_devices_are_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with output_text(pipe) as file:
        file.write("told")
    assert os.read(reading, 10) == b"told" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reading)
    with pytest.raises(HpctrainError, match="this is a folder"), output_file(tmp_path):
        pass


# -- training --------------------------------------------------------------------------------------------------------
class Closing(io.StringIO):
    """Accepts a few lines, then behaves like a broken pipe."""

    def write(self, text):
        if self.getvalue().count("\n") >= 2:
            raise BrokenPipeError(32, "Broken pipe")
        return super().write(text)


def _trainer(job, out):
    return lambda comm: train(job, comm, out=Narrator(out=out))


def test_training_continues_when_output_fails(tmp_path, capsys):
    job = Job(model={"name": "mlp", "inputs": 64, "outputs": 10, "hidden": [8]}, output=str(tmp_path),
              train={"steps": 3, "batch_size": 16})  # fmt: skip
    message = "hpctrain: standard output cannot be written ({}); the run continues\n"
    with open(FULL, "w") as full:
        for out, reason in ((full, "No space left on device"), (Closing(), "Broken pipe")):
            result = World(2).run(_trainer(job, out))[0]
            assert (result.folder / "model.safetensors").exists()
            assert capsys.readouterr().err == message.format(reason)
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # flushes what it still holds


def test_narrator_without_standard_output_is_silent(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", None)
    narrator = Narrator()
    narrator.say("nobody hears it")
    assert not narrator.due()
    with open(os.devnull, "w") as closed:
        pass
    Narrator(out=closed).say("nor this")
    assert "I/O operation on closed file" in capsys.readouterr().err


@pytest.mark.parametrize("status", [0, 130])
def test_train_ends_with_the_status_of_the_run(monkeypatch, status):
    monkeypatch.setattr("hpctrain.run.command.main", lambda load: print("x" * 10) or status)
    with standard_output(monkeypatch, open(FULL, "w")):
        assert main(["train", "job.toml"]) == status


def test_launcher_passes_on_what_it_can():
    target = os.open(FULL, os.O_WRONLY)
    Pump(io.BytesIO(), target)._write(b"the ranks go on")
    os.close(target)
