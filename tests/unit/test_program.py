"""Programs of the user's own after `hpctrain run --`: what is started, and mistakes reported before any rank starts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hpctrain import launcher
from hpctrain.cli import main
from hpctrain.errors import HpctrainError
from hpctrain.launcher import start
from hpctrain.launcher.program import find_program


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: train.py, a package, a program that can be executed, and one that cannot; on the path only
    `bin`, where another Python is."""
    monkeypatch.chdir(tmp_path)
    for name in ("bin/python", "bin/python3.9", "bin/tool", "own", "train.py", "plain", "job.toml", "pkg/__main__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755 if name.startswith(("bin", "own")) else 0o644)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "python train.py --epochs 3 -m nowhere",
        "python -u -Wignore -X dev -Bu train.py",
        "python -W ignore -c pass nowhere.py",
        "python -m pkg 3",
        "python -mpkg.part",
        "python -Im timeit",
        "python --check-hash-based-pycs always train.py",
        "python - nowhere.py",
        "python3 pkg",
    ],
)
def test_plain_python_is_the_one_that_hpctrain_runs_on(words: str) -> None:
    first, *rest = words.split()
    found = find_program([first, *rest])
    assert found.command == [sys.executable, *rest]
    assert found.python == sys.executable


def test_note_names_the_python_on_the_path_unless_it_is_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = here / "bin" / "python"
    assert f"python is {sys.executable}, which hpctrain runs on, not {other};" in find_program(["python"]).note
    assert find_program(["python3"]).note == ""  # there is none on the path
    other.unlink()
    other.symlink_to(sys.executable)  # as in a virtual environment: the same interpreter, but other packages
    assert str(other) in find_program(["python"]).note
    monkeypatch.setattr(sys, "executable", str(other))
    assert find_program(["python"]).note == ""
    assert find_program(["tool"]).note == ""


@pytest.mark.parametrize(
    ("words", "path", "python"),
    [
        (["tool", "nowhere.py"], "bin/tool", ""),
        (["./own"], "./own", ""),
        (["python3.9", "train.py"], "bin/python3.9", "bin/python3.9"),
        (["bin/python", "-m", "nowhere"], "bin/python", "bin/python"),  # it may have other modules
    ],
)
def test_other_programs_and_pythons_are_taken_as_they_are(here: Path, words: list[str], path: str, python: str) -> None:
    """The mpiexec is that of a named Python's MPI."""
    found = find_program(words)
    assert os.path.samefile(found.command[0], path)
    assert found.command[1:] == words[1:]
    assert os.path.samefile(found.python, python or sys.executable)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there is no program after --; for example: hpctrain run -n 4 -- python train.py"),
        (["train.py", "--x", "3"], "train.py is not a program; put python before it: -- python train.py --x 3"),
        (["./train.py"], "./train.py is not a program; put python before it: -- python ./train.py"),
        (["nowhere"], "there is no program nowhere on the path or in this folder; give one after --, as in hpctrain"),
        (["./nowhere"], "there is no program ./nowhere; give one after --"),
        (["own"], "own is not on the path; write ./own"),
        (["./plain"], "./plain is not executable; put its interpreter before it, or make it so: chmod +x ./plain"),
        (["pkg"], "pkg is a folder, not a program"),
        (["job.toml"], "job.toml: a job file is not a program; leave out the -- before it"),
        (["python", "-u", "nowhere.py"], f"there is no file nowhere.py for {sys.executable} to run"),
        (["bin/python", "nowhere.py"], "there is no file nowhere.py for bin/python to run"),
        (["python", "-m", "nowhere.part"], "there is no module nowhere.part in this folder, and none is installed"),
    ],
    ids=str,
)
def test_mistakes_are_one_message_before_any_rank_starts(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(launcher, "run", None)
    assert main(["run", "-n", "3", "--", *words]) == 2
    assert capsys.readouterr().err.startswith(f"hpctrain: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["job.toml", "--", "python", "train.py"], "job.toml: give either a job file or the program after --"),
        (["train.epochs=3", "--", "python", "train.py"], "train.epochs=3: the program after -- (python train.py) sets"),
        (["--resume", "--", "python", "train.py"], "--resume is for job files; the program after -- (python train.py)"),
        (["--resume=latest", "--", "tool"], "--resume is for job files; the program after -- (tool) says itself"),
        (["--reset-optimizer", "--", "tool"], "--reset-optimizer is for job files"),
        (["python", "train.py"], "python is not a job file (TOML); put -- before a program of your own"),
        (["train.py"], "train.py is not a job file (TOML); put -- before a program of your own"),
        ([], "no job file given"),
    ],
    ids=str,
)
def test_job_and_program_are_not_mixed(words: list[str], message: str, capsys: Any) -> None:
    assert main(["run", *words]) == 2
    assert capsys.readouterr().err.startswith(f"hpctrain: {message}")


def test_options_of_a_program_without_the_dashes_before_it(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["run", "-n", "4", "python", "train.py", "--epochs", "3"])
    assert "unrecognized arguments: --epochs 3; put -- before a program of your own" in capsys.readouterr().err


def test_everything_after_the_dashes_belongs_to_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(count: int, command: list[str], **arguments: Any) -> int:
        seen.append((count, command))
        return 41

    monkeypatch.setattr(launcher, "run", run)
    words = ["train.py", "--help", "-n", "9", "--resume", "a=b", "--", "x"]
    assert main(["run", "-n", "3", "--", "python", *words]) == 41
    assert seen == [(3, [sys.executable, *words])]


def test_another_python_without_mpi4py_is_named(here: Path) -> None:
    broken = here / "bin" / "python3.9"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'mpi4py'\" >&2; exit 1\n")
    with pytest.raises(HpctrainError, match=f"for {broken} .*'mpi4py'.*; use {sys.executable}, which hpctrain runs on"):
        launcher.find_library(find_program(["python3.9", "train.py"]).python)


@pytest.mark.parametrize(("module", "advised"), [("hpctrain", True), ("hpctrains", False)])
def test_advice_if_a_rank_has_no_hpctrain(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any, module: str, advised: bool
) -> None:
    mpiexec = here / "bin" / "tool"
    mpiexec.write_text(f"#!/bin/sh\necho \"rank 1: ModuleNotFoundError: No module named '{module}'\" >&2; exit 7\n")
    mpi = launcher.Mpi(str(mpiexec), launcher.Library("mpich", "", ""))
    monkeypatch.setattr(start, "find_mpiexec", lambda asked: mpi)
    assert launcher.run(2, ["tool"]) == 7
    advice = f"\nhpctrain run: the Python of the ranks lacks hpctrain; {sys.executable} has it"
    assert (advice in capfd.readouterr().err) == advised
