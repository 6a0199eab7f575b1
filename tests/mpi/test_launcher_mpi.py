"""`hpctrain run` with the real mpiexec: output, status, signals, dying ranks, and clean-up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpctrain import launcher
from tests.helpers_mpi import names_the_dead

pytestmark = pytest.mark.launch

RUN = """
import sys
from hpctrain.launcher import run
sys.exit(run(int(sys.argv[2]), sys.argv[3:], grace=float(sys.argv[1])))
"""
GRACE = 2.0  # seconds
HEAD = """
import os, signal, sys, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank = comm.rank
folder = sys.argv[1]
open(f"{folder}/pid.{rank}", "w").write(str(os.getpid()))
"""
STOPPABLE = """
from hpctrain.launcher.signals import StopSignals
with StopSignals() as stop:
    asked = 0
    comm.Barrier()
    open(f"{folder}/ready.{rank}", "w").close()
    while not asked:
        time.sleep(0.02)
        asked = comm.allreduce(stop.asked, MPI.MAX)
    stop.saving()
    time.sleep(float(sys.argv[2]))          # a checkpoint that takes its time
    open(f"{folder}/saved.{rank}", "w").close()
    comm.Barrier()
    if rank == 0:
        stop.say("stopped, saved")
    comm.Barrier()
MPI.Finalize()
sys.exit(130 if rank == 0 else 0)
"""
STUBBORN = """
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN)
window = MPI.Win.Allocate_shared(1 << 16, comm=comm)
comm.Barrier()
open(f"{folder}/ready.{rank}", "w").close()
time.sleep(100)
"""


RUNNING = "from hpctrain.launcher.signals import StopSignals\nStopSignals(rank).__enter__()\n"
STUCK = """
from hpctrain.launcher.signals import StopSignals
with StopSignals(rank, limit=1.0) as stop:
    comm.Barrier()
    open(f"{folder}/ready.{rank}", "w").close()
    if rank == 1:
        comm.Barrier()      # the others never come
    time.sleep(100)
"""


class Started:
    """`hpctrain run` (or a plain mpiexec) as a separate process."""

    def __init__(self, folder: Path, argv: list[str], environment: dict[str, str]) -> None:
        self.folder, self.began = folder, time.time()
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            self.process = subprocess.Popen(argv, env=environment, stdout=out, stderr=err, start_new_session=True)

    def ready(self, count: int) -> None:
        """Wait until all ranks are ready."""
        deadline = time.monotonic() + 30
        while len(list(self.folder.glob("ready.*"))) < count:
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.02)

    def end(self, seconds: float) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended within {seconds} s\n{self.text()}", pytrace=False)

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in self.folder.glob("pid.*")]

    def living(self) -> list[int]:
        """Ranks that have not ended and are not zombies."""
        found = []
        for pid in self.pids():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(pid)
        return found

    def gone(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.living():
            assert time.monotonic() < deadline, f"ranks left: {self.living()}"
            time.sleep(0.05)

    def text(self) -> str:
        return "".join((self.folder / name).read_text() for name in ("out", "err"))


Start = Callable[..., Started]


@pytest.fixture
def start(tmp_path: Path, mpi: launcher.Mpi) -> Iterator[Start]:
    """start(count, body, *arguments, plain=False, grace=GRACE, options=()): with `run`, or with the bare mpiexec.

    `options`: of mpiexec.
    """
    began = []
    root = str(Path(launcher.__file__).parents[2])
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"

    def begin(
        count: int,
        body: str,
        *arguments: str,
        plain: bool = False,
        grace: float = GRACE,
        options: tuple[str, ...] = (),
    ) -> Started:
        (tmp_path / "program.py").write_text(HEAD + body)
        command = [*options, sys.executable, "-m", "mpi4py", str(tmp_path / "program.py"), str(tmp_path), *arguments]
        environment = {**os.environ, "PYTHONPATH": root, "TEST_MARK": mark}
        argv = [sys.executable, "-c", RUN, str(grace), str(count)]
        if plain:
            argv = mpi.command(count)
            environment = launcher.rank_environment(mpi.library, environment)
        began.append(Started(tmp_path, argv + command, environment))
        return began[-1]

    yield begin
    for each in began:
        for pid in [*each.living(), each.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        each.process.wait()
        for path in launcher.leftovers(each.began, each.process.pid):  # of a bare mpiexec that was killed
            if path.is_file():
                path.unlink()


def no_files_since(began: float) -> None:
    """No file of an MPI library is left in shared memory (within 5 s: the watcher may still be cleaning up)."""
    deadline = time.monotonic() + 5
    while left := launcher.leftovers(began, launcher=0):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_all_ranks_are_in_one_world_and_output_and_status_pass_through(mpi: launcher.Mpi, start: Start) -> None:
    body = (
        "comm.Barrier()\nos.write(1, b'rank %d of %d\\n' % (rank, comm.size))\nMPI.Finalize()\n"
        "sys.exit(7 if rank == 0 else 0)"
    )
    run = start(3, body)
    assert run.end(30) == 7
    assert sorted((run.folder / "out").read_text().splitlines()) == [f"rank {rank} of 3" for rank in range(3)]
    assert (run.folder / "err").read_text() == ""
    assert mpi.library.kind in ("mpich", "openmpi", "intel")


def test_output_arrives_line_by_line_and_tracebacks_without_launcher_noise(start: Start) -> None:
    run = start(
        3,
        "comm.Barrier()\nif rank == 0: print('first', flush=True)\n"
        "while not os.path.exists(f'{folder}/seen'): time.sleep(0.02)\n"
        "if rank == 1: raise ValueError('mine')\ntime.sleep(60)",
    )
    deadline = time.monotonic() + 30
    while "first" not in run.text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert run.process.poll() is None
    (run.folder / "seen").touch()
    assert run.end(10) != 0
    assert not run.living()
    lines = [line for line in run.text().splitlines() if line.strip()]
    assert lines[:2] == ["first", "Traceback (most recent call last):"]
    assert lines[-1] == "ValueError: mine"


WAITING = "hpctrain run: waiting for the step in progress and its checkpoint; press Ctrl-C again to stop at once\n"


@pytest.mark.parametrize(
    ("number", "seconds", "warning"), [(signal.SIGINT, 0.5, ""), (signal.SIGTERM, GRACE + 3, WAITING)]
)
def test_stop_signal_lets_ranks_save(start: Start, number: int, seconds: float, warning: str) -> None:
    """Even if that takes longer than the grace period."""
    run = start(3, STOPPABLE, str(seconds))
    run.ready(3)
    run.process.send_signal(number)
    assert run.end(seconds + 10) == 130
    assert len(list(run.folder.glob("saved.*"))) == 3
    assert (run.folder / "err").read_text() == warning + "stopped, saved\n"
    assert not run.living()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_and_sighup_to_the_bare_launcher_let_ranks_save(
    start: Start, mpi: launcher.Mpi, number: int
) -> None:
    run = start(3, STOPPABLE, "0.5", plain=True)
    run.ready(3)
    os.killpg(run.process.pid, number)  # as a terminal does
    assert run.end(10) != 0
    run.gone(10)
    assert len(list(run.folder.glob("saved.*"))) == 3
    if number != signal.SIGHUP or mpi.library.kind != "mpich":  # whose mpiexec is gone then
        assert run.text().count("stopped, saved\n") == 1


def test_stuck_ranks_end_themselves(start: Start) -> None:
    """The signal is sent to one of them only."""
    run = start(3, STUCK, plain=True)
    run.ready(3)
    os.kill(int((run.folder / "pid.1").read_text()), signal.SIGTERM)
    assert run.end(15) not in (0, 2, 130), run.text()
    assert "hpctrain: rank 1 exits: SIGTERM was received 1 s ago, and no step has ended" in run.text()
    run.gone(5)


def test_ranks_that_do_not_stop_are_killed_at_the_deadline(start: Start) -> None:
    began = time.time()
    run = start(3, STUBBORN)
    run.ready(3)
    run.process.send_signal(signal.SIGINT)
    assert run.end(10) == 137
    assert "were killed" in run.text()
    assert not run.living()
    no_files_since(began)


def test_second_ctrl_c_kills_at_once(start: Start) -> None:
    run = start(2, STUBBORN, grace=60.0)
    run.ready(2)
    run.process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    run.process.send_signal(signal.SIGINT)
    assert run.end(10) == 137
    assert not run.living()


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", " was killed by signal 9 (SIGKILL)"),
        ("os._exit(0)", " ended in the middle of the run, with exit status 0; the launcher then ended the other ranks"),
        ("os.kill(os.getpid(), signal.SIGBUS)", " (docker run --shm-size=2g)"),
    ],
)
def test_rank_that_dies_silently_ends_all_and_is_named_once(start: Start, how: str, words: str) -> None:
    began = time.time()
    run = start(3, f"{RUNNING}comm.Barrier()\nif rank == 1:\n    time.sleep(1)\n    {how}\n" + STUBBORN)
    assert run.end(30) not in (0, 2, 130)
    victim = int((run.folder / "pid.1").read_text())
    assert not run.living()
    no_files_since(began)
    lines = [line for line in run.text().splitlines() if not re.match(r"\[\w+:\d+\]", line)]  # Open MPI's backtrace
    assert len(lines) == 1, lines
    assert re.match(names_the_dead(1, victim, 3), lines[0]), lines
    assert lines[0].endswith(words)


def test_ranks_whose_launcher_does_not_notice_a_lost_rank_are_ended(mpi: launcher.Mpi, start: Start) -> None:
    if mpi.library.kind != "mpich":
        pytest.skip("only MPICH's mpiexec can be made not to notice")
    began = time.time()
    body = f"{RUNNING}comm.Barrier()\nif rank == 1:\n    os._exit(0)\n" + STUBBORN
    run = start(3, body, options=("-disable-auto-cleanup",))
    assert run.end(30) == 137
    victim = int((run.folder / "pid.1").read_text())
    assert not run.living()
    no_files_since(began)
    assert run.text().startswith(f"hpctrain run: rank 1 with PID {victim} on ")
    assert run.text().count("\n") == 1


@pytest.mark.parametrize("victim", ["launcher", "run"])
def test_no_rank_outlives_its_launcher(start: Start, victim: str) -> None:
    began = time.time()
    run = start(3, STUBBORN)
    run.ready(3)
    if victim == "run":
        run.process.kill()
        run.gone(GRACE + 5)
    else:
        children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children").read_text().split()
        names = {int(pid): Path(f"/proc/{pid}/comm").read_text().strip() for pid in children}
        os.kill(next(pid for pid, name in names.items() if not name.startswith("python")), signal.SIGKILL)
        assert run.end(10) == 137
        assert not run.living()
    no_files_since(began)
