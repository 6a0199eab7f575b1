"""A program of the user's own, `hpctrain run -n N -- PROGRAM ...`: which one is meant, and mistakes that can be found
before its ranks start."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from hpctrain.errors import HpctrainError
from hpctrain.text import shown_path

PLAIN = ("python", "python3")  # as the first word: the Python that hpctrain runs on
PYTHON = re.compile(r"python(\d(\.\d+)?)?")
EXAMPLE = "hpctrain run -n 4 -- python train.py"
VALUED, MAIN = "WX", "cm"  # Python's options that take a value; those that take the code to run


class Program(NamedTuple):
    """`command` starts it. `python`: the Python whose MPI it uses. `note`: for the user; "" if there is none."""

    command: list[str]
    python: str
    note: str


def find_program(words: Sequence[str]) -> Program:
    """What to start. Plain `python` is the Python that hpctrain runs on, whatever is on the path: the mpiexec that
    starts it belongs to that Python's MPI.

    Raises HpctrainError if there is no such program, or Python's script or module does not exist.
    """
    if not words:
        raise HpctrainError(f"there is no program after --; for example: {EXAMPLE}")
    path = _located(words)
    python = path if path == sys.executable or PYTHON.fullmatch(os.path.basename(path)) else ""
    if python:
        _check_script(python, words[1:])
    return Program([path, *words[1:]], python or sys.executable, _note(words[0]))


def main(words: Sequence[str]) -> int:
    """For slurm/train.sbatch, which starts the program itself: report a mistake, and return 2, or else 0."""
    try:
        find_program(words)
    except HpctrainError as error:
        print(f"hpctrain: {error}", file=sys.stderr)
        return error.status
    return 0


def looks_like_program(word: str) -> bool:
    """Whether a word in the place of a job file is the beginning of a program."""
    return PYTHON.fullmatch(word) is not None or word.endswith((".py", ".sh"))


def _located(words: Sequence[str]) -> str:
    """The program's path. Raises HpctrainError."""
    word = words[0]
    if word in PLAIN:
        return sys.executable
    if (found := shutil.which(word)) is not None:
        return found
    name, there = shown_path(word), Path(word)
    if there.suffix == ".toml":
        raise HpctrainError(f"{name}: a job file is not a program; leave out the -- before it")
    if not there.exists():
        where = "" if os.sep in word else " on the path or in this folder"
        raise HpctrainError(f"there is no program {name}{where}; give one after --, as in {EXAMPLE}")
    if there.is_dir():
        raise HpctrainError(f"{name} is a folder, not a program; give a program after --, as in {EXAMPLE}")
    if there.suffix == ".py":
        rest = shown_path(" ".join(words[1:]))
        raise HpctrainError(f"{name} is not a program; put python before it: -- python {name} {rest}".rstrip())
    if os.access(there, os.X_OK):
        raise HpctrainError(f"{name} is not on the path; write ./{name} for the file in this folder")
    raise HpctrainError(f"{name} is not executable; put its interpreter before it, or make it so: chmod +x {name}")


def _note(word: str) -> str:
    """Says so if plain `python` usually means another Python than hpctrain's."""
    found = shutil.which(word) if word in PLAIN else None
    if found is None:
        return ""
    folders = os.path.dirname(found), os.path.dirname(sys.executable)
    if os.path.samefile(found, sys.executable) and os.path.samefile(*folders):  # environments share their interpreter
        return ""
    return f"{word} is {sys.executable}, which hpctrain runs on, not {found}; to start another, write its path"


def _check_script(python: str, words: Sequence[str]) -> None:
    """Raises HpctrainError if Python's script, or a module for the Python that hpctrain runs on, does not exist."""
    option, value = _main(iter(words))
    name = shown_path(value)
    if option == "" and not os.path.exists(value):
        raise HpctrainError(f"there is no file {name} for {shown_path(python)} to run")
    if option == "m" and python == sys.executable and not _is_module(value.partition(".")[0]):
        raise HpctrainError(f"there is no module {name} in this folder, and none is installed for {python}")


def _is_module(name: str) -> bool:
    try:
        return PathFinder.find_spec(name, [os.getcwd()]) is not None or find_spec(name) is not None
    except ValueError:  # only Python itself can judge such a name
        return True


def _main(words: Iterator[str]) -> tuple[str, str]:
    """What Python's arguments make it run: ("m", a module), ("c", code), ("", a script), or ("-", "") for neither."""
    for word in words:
        if not word.startswith("-"):
            return "", word
        if word in ("-", "--help", "--version"):
            break
        place = next((place for place, letter in enumerate(word) if letter in VALUED + MAIN), 0)
        if word.startswith("--"):
            next(words, None)  # its value
        elif place > 0:
            value = word[place + 1 :] or next(words, "")
            if word[place] in MAIN:
                return word[place], value
    return "-", ""
