"""The MPI library that mpi4py loads, and the mpiexec that belongs to it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import ClusterError
from hpctrain.launcher.facts import LAUNCHERS, OPEN_MPI, Kind, launcher_of
from hpctrain.launcher.started import without_launcher

NAMES = ("mpiexec", "mpirun", "mpiexec.hydra", "mpiexec.mpich", "mpiexec.openmpi")
PROBE = """
import json, mpi4py
mpi4py.rc(initialize=False, finalize=False)
from mpi4py import MPI
paths = {line.split(None, 5)[-1].strip() for line in open("/proc/self/maps") if "/libmpi" in line}
print(json.dumps([MPI.get_vendor()[0], MPI.Get_library_version().strip(), sorted(paths)]))
"""


@dataclass(frozen=True)
class Library:
    """The MPI library that mpi4py loads: its kind, its version string, its file ("" if not known)."""

    kind: Kind
    version: str
    path: str

    @property
    def srun(self) -> str:
        """What `srun --mpi=` needs for this library."""
        return launcher_of(self.kind).srun

    @property
    def wheel(self) -> bool:
        """Whether pip installed it into this environment (symbolic links are resolved)."""
        return os.path.realpath(self.path).startswith(os.path.realpath(sys.prefix) + os.sep) if self.path else False

    def fits(self, kind: str, major: str) -> bool:
        """Whether an mpiexec of this kind and major version belongs to the library."""
        return kind == self.kind and (kind != OPEN_MPI.kind or f"v{major}." in self.version)


@dataclass(frozen=True)
class Mpi:
    """An mpiexec and the library that it belongs to."""

    path: str
    library: Library

    def command(self, count: int) -> list[str]:
        """The arguments that start `count` ranks; the caller appends the command to run."""
        return [self.path, *launcher_of(self.library.kind).options, "-n", str(count)]

    @property
    def prints_codes(self) -> tuple[str, ...]:
        """The options that make it print how each rank ended."""
        return launcher_of(self.library.kind).prints_codes


class LibraryQuery:
    """Asks mpi4py for its library, in a child that does not initialise MPI: it runs while the caller does other work.

    Ask for the answer only once.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._child = subprocess.Popen(
            [python, "-c", PROBE],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=without_launcher(os.environ),
        )

    def answer(self) -> Library:
        """Raises ClusterError if no library loads."""
        with self._child as child:
            try:
                output, errors = child.communicate(timeout=60)
            except subprocess.TimeoutExpired as error:
                raise ClusterError("mpi4py did not load its MPI library within 60 s; check the file system") from error
            finally:
                if child.poll() is None:
                    child.kill()
        return _library(output, errors, child.returncode, self._python)


def find_library(python: str = sys.executable) -> Library:
    """The library that mpi4py loads (takes 0.1 s). Raises ClusterError if none loads."""
    return LibraryQuery(python).answer()


def _library(output: str, errors: str, status: int, python: str) -> Library:
    if status or not output.strip():
        reason = (errors.strip().splitlines() or [f"status {status}"])[-1]
        own = python == sys.executable
        raise ClusterError(
            f"mpi4py cannot load an MPI library{'' if own else f' for {python}'} ({reason}); "
            f"{'' if own else f'use {sys.executable}, which hpctrain runs on, or '}"
            "install one (pip install mpich) or load the cluster's MPI module"
        )
    vendor, version, paths = json.loads(output.strip().splitlines()[-1])
    return Library(_library_kind(vendor), version.splitlines()[0].strip(), paths[0] if paths else "")


def find_mpiexec(python: str = sys.executable, asked: LibraryQuery | None = None) -> Mpi:
    """The mpiexec of the library that mpi4py loads. `asked`: a query that was started before.

    Searches beside that library, beside Python, then on the path. Raises ClusterError when only launchers of another
    MPI are found: with one of those, every rank would run as if it were alone.
    """
    library = asked.answer() if asked is not None else find_library(python)
    others = []
    for path in _candidates(library, python):
        kind, major = launcher_kind(path)
        if library.fits(kind, major):
            return Mpi(path, library)
        others.append(f"{path} belongs to {kind} {major}".rstrip())
    found = "; ".join(others) or "no mpiexec is on the path"
    raise ClusterError(
        f"no mpiexec found for {library.kind}, the MPI that mpi4py loads ({library.version}): {found}; "
        "put the right one on the path, or install mpi4py for the other MPI"
    )


def launcher_kind(path: str) -> tuple[Kind, str]:
    """The kind of MPI this launcher belongs to, and its major version ("" if it does not say)."""
    clean = without_launcher(os.environ)
    try:
        done = subprocess.run([path, "--version"], check=False, capture_output=True, timeout=20, env=clean)
    except (OSError, subprocess.TimeoutExpired):
        return "other", ""
    text = (done.stdout + done.stderr).decode(errors="replace")
    version = re.search(r"(\d+)\.\d+", text)
    kinds = [launcher.kind for launcher in LAUNCHERS if launcher.kind and re.search(launcher.version, text)]
    return (kinds or ["other"])[0], version[1] if version else ""


def _library_kind(vendor: str) -> Kind:
    kinds = [launcher.kind for launcher in LAUNCHERS if launcher.kind and launcher.vendor == vendor]
    return (kinds or ["other"])[0]


def _candidates(library: Library, python: str) -> list[str]:
    folders = [Path(library.path).parent.parent / "bin"] if library.path else []
    folders += [Path(python).parent, *map(Path, os.get_exec_path())]
    paths = dict.fromkeys(folder / name for folder in folders for name in NAMES)
    return [str(path) for path in paths if path.is_file() and os.access(path, os.X_OK)]
