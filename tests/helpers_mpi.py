"""Start `hpctrain` as users do, find its ranks; objects that job files of the tests name."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpctrain import launcher
from hpctrain.comm.base import Communicator
from hpctrain.job import Job
from hpctrain.launcher.rankwatch import RANK_VARIABLES
from hpctrain.launcher.started import launched_rank
from hpctrain.trace.schema import SPANS, STEPS
from tests import helpers

ROOT = Path(__file__).resolve().parent.parent
TRAIN = [sys.executable, "-m", "hpctrain", "train"]
RUN = [sys.executable, "-m", "hpctrain", "run"]
RANKS = tuple(f"{name}=".encode() for name in RANK_VARIABLES)


Join = Callable[..., Communicator]  # the fixture `join`


def record(comm: Communicator, job: Job) -> helpers.Recording:
    """Run the job on the ranks of a traced communicator on one machine with one clock. Returns every rank's trace rows,
    on every rank."""
    comm.recorder.drain()
    result = helpers.quiet_train(comm, job)
    found = comm.recorder.drain()
    rows = comm.gather_json([found["steps"].tolist(), found["spans"].tolist()])
    steps, spans = ([list(map(tuple, own[table])) for own in rows] for table in (0, 1))
    return helpers.Recording(
        job, [result], {}, [np.array(own, STEPS) for own in steps], [np.array(own, SPANS) for own in spans]
    )


class Raising(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Raises at sample 17, after writing the time to the file `mark`."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.points = helpers.points()

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 17:
            Path(self.mark).write_text(str(time.time()))
            raise ZeroDivisionError("sample 17 is bad")
        return self.points[index]


class Blocking(Raising):
    """Never returns from sample 17."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == 17:
            Path(self.mark).touch()
            time.sleep(1000)
        return self.points[index]


def frozen() -> torch.nn.Module:
    """Nothing to train."""
    return torch.nn.Linear(7, 3).requires_grad_(False)


def uneven() -> TensorDataset:
    """A data set that is longer on each further rank."""
    return helpers.points(helpers.SAMPLES + _rank())


def uneven_net() -> nn.Module:
    """A net that is wider on rank 3."""
    width = 4 + _rank() // 3
    return nn.Sequential(nn.Linear(7, width), nn.Linear(width, 3))


def _rank() -> int:
    return launched_rank(os.environ)


def wide() -> torch.nn.Module:
    """A wider model than `helpers.net`."""
    return torch.nn.Linear(7, 3)


def tested() -> tuple[TensorDataset, TensorDataset]:
    """`points`, with a test part."""
    return helpers.points(), helpers.points(20)


def write_job(folder: Path, text: str = "", steps: int = 8) -> Path:
    """A job file of `net` on `tested`."""
    path = folder / "job.toml"
    path.write_text(
        f"""
        name = "t"
        output = "{folder}/runs"
        threads = 1
        model = {{name = "tests.helpers:net"}}
        data = {{name = "tests.helpers_mpi:tested"}}
        train = {{steps = {steps}, batch_size = 6}}
        {text}
        """
    )
    return path


def names_the_dead(rank: int, pid: int, ranks: int) -> str:
    """A pattern for how the launcher names that rank, which ended the job.

    Where ends are closer together than the scheduler's time slices, its message says that it is not certain.
    """
    others = [other for other in range(ranks) if other != rank]
    before = "".join(f"({other}, )?" for other in others if other < rank)
    after = "".join(f"(, {other})?" for other in others if other > rank)
    return rf"hpctrain run: (rank {rank} with PID {pid}|one of the ranks \[{before}{rank}{after}\]) on "


class Started:
    """A command in its own session, its output in files; `clear` removes all traces of it."""

    def __init__(self, folder: Path, argv: list[str], environment: dict[str, str] | None = None) -> None:
        self.mark = f"HPCTRAIN_TEST={uuid.uuid4().hex}"
        self.began = time.time()
        name, _, value = self.mark.partition("=")
        variables = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {}), name: value}
        self._out, self._err = folder / f"out-{value[:6]}", folder / f"err-{value[:6]}"
        with open(self._out, "w") as out, open(self._err, "w") as err:
            self.process = subprocess.Popen(
                argv, env=variables, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def ranks(self) -> dict[int, int]:
        """The PIDs of the living ranks, by rank."""
        found = {}
        for pid in self.living():
            with contextlib.suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                for name in RANKS:
                    for variable in variables:
                        if variable.startswith(name) and b"hpctrain\0train" in command:
                            found[int(variable[len(name) :])] = pid
        return found

    def living(self) -> list[int]:
        """All living processes of this command."""
        found = []
        for entry in os.scandir("/proc"):
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in Path(entry.path, "environ").read_bytes():
                    state = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[0]
                    if state != "Z":
                        found.append(int(entry.name))
        return found

    def until(self, text: str, seconds: float = 60.0) -> None:
        """Wait until the output contains that text."""
        deadline = time.monotonic() + seconds
        while text not in self.out + self.err:
            assert self.process.poll() is None, self.out + self.err
            assert time.monotonic() < deadline, self.out + self.err
            time.sleep(0.05)

    def end(self, seconds: float) -> int:
        """The exit status; the test fails if it takes longer."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended within {seconds} s\n{self.out}\n{self.err}", pytrace=False)

    def gone(self, seconds: float) -> None:
        """Wait until none of its processes is left; the test fails if that takes longer."""
        deadline = time.monotonic() + seconds
        while left := self.living():
            assert time.monotonic() < deadline, f"left: {left}\n{self.out}\n{self.err}"
            time.sleep(0.05)

    def clear(self) -> None:
        """Kill remaining processes and remove files that the MPI library left."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for path in launcher.leftovers(self.began, self.process.pid):
            if path.is_file():
                path.unlink(missing_ok=True)
