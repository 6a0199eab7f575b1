"""A job is checked before heavy modules are loaded: what these modules import."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import hpctrain

HEAVY = {"torch", "mpi4py", "h5py", "cupy", "pandas"}
PACKAGE = Path(hpctrain.__file__).parent
LIGHT = ["hpctrain", "hpctrain.cli", "hpctrain.job", "hpctrain.launcher", "hpctrain.launcher.signals", "hpctrain.trace"]
STRATEGIES = sorted(f"hpctrain.strategies.{path.stem}" for path in (PACKAGE / "strategies").glob("[a-z]*.py"))
for joined in ("exchange", "island", "shared", "sums"):  # strategies load them when they join a phase
    STRATEGIES.remove(f"hpctrain.strategies.{joined}")


def test_imports_load_nothing_heavy() -> None:
    """In one process, which stops at the first module that does."""
    code = (
        "import importlib, sys\n"
        f"for name in {LIGHT + STRATEGIES!r}:\n"
        "    importlib.import_module(name)\n"
        f"    heavy = sorted({HEAVY!r} & set(sys.modules))\n"
        "    assert not heavy, f'importing {name} loads {heavy}'\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_command_excludes_imports_from_garbage_collection() -> None:
    """Runs in a separate process: nothing changes if torch is already loaded."""
    code = (
        "import gc, sys\n"
        "from hpctrain.run.command import _imports_kept\n"
        "with _imports_kept():\n"
        "    assert not gc.isenabled()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 1000\n"
        "gc.unfreeze()\n"
        "sys.modules['torch'] = sys\n"
        "with _imports_kept():\n"
        "    assert gc.isenabled()\n"
        "assert gc.get_freeze_count() == 0\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=True)


SOURCES = sorted(PACKAGE.rglob("*.py"))


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_no_file_has_more_than_450_lines() -> None:
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {name: length for name, length in lengths.items() if length > 450} == {}


def test_roles_are_branched_on_in_one_place() -> None:
    """`Role` is compared in the session, and where roles are assigned and shown."""
    found = [str(path.relative_to(PACKAGE)) for path in SOURCES if re.search(r"is (not )?Role\.", path.read_text())]
    assert found == ["run/session.py"]
