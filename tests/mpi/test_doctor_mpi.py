"""`hpctrain doctor` on real ranks, alone, and with a launcher that does not match the MPI library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hpctrain import launcher
from hpctrain.launcher.started import without_launcher
from tests.conftest import ROOT, Ended, launch
from tests.marks import slow

pytestmark = [pytest.mark.launch, pytest.mark.timeout(180)]

DOCTOR = [sys.executable, "-m", "hpctrain", "doctor"]


def doctor(mpi: launcher.Mpi, count: int, *arguments: str, environment: dict[str, str] | None = None) -> Ended:
    """Under the bare mpiexec."""
    return launch([*mpi.command(count), *DOCTOR, *arguments], mpi, 90.0, environment)


def alone(folder: Path, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Without a launcher."""
    clean = without_launcher(os.environ)
    variables = {**clean, "PYTHONPATH": str(ROOT), **(environment or {})}
    return subprocess.run([*DOCTOR, *arguments], cwd=folder, env=variables, capture_output=True, text=True, timeout=90)


def severities(reported: dict[str, Any]) -> set[str]:
    return {problem["severity"] for problem in reported["problems"]}


def test_four_ranks_are_reported_as_one_json_object(mpi: launcher.Mpi) -> None:
    ended = doctor(mpi, 4, "--json")
    reported = json.loads(ended.out)
    facts = reported["facts"]
    assert ended.status == 0, reported["problems"]
    assert "error" not in severities(reported)
    assert facts["mpi"]["kind"] == mpi.library.kind
    assert facts["mpi"]["thread_level"] == "MPI_THREAD_MULTIPLE"
    assert facts["mpi"]["runs_with"] == mpi.path
    assert [rank["rank"] for rank in facts["ranks"]] == [0, 1, 2, 3]
    assert len({json.dumps(rank["versions"]) for rank in facts["ranks"]}) == 1
    assert [node["ranks"] for node in facts["nodes"]] == [[0, 1, 2, 3]]
    assert len(facts["links"]) == 6
    assert all(link["latency_us"] > 0 and link["bandwidth_gb_s"] > 0 for link in facts["links"])
    if len(facts["ranks"][0]["cores"]) < 4:
        assert any("4 ranks share" in problem["what"] for problem in reported["problems"])


@pytest.mark.any_mpi
@pytest.mark.slow
def test_rank_0_alone_prints_the_report_with_job_and_mpiexec(mpi: launcher.Mpi, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(mpi.path).parent), os.environ["PATH"]])
    arguments = ["--job", str(ROOT / "jobs/digits.toml"), f"output={tmp_path}"]
    ended = doctor(mpi, 2, *arguments, environment={"PATH": path})
    assert ended.status == 0, ended.out + ended.err
    assert ended.out.count("hpctrain doctor: 2 ranks on 1 node") == 1
    assert "belongs to this library; `hpctrain run` uses it" in " ".join(ended.out.split())
    assert "phase 0: all_reduce, workers 0-1" in ended.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_doctor_starts_ranks_itself(tmp_path: Path) -> None:
    done = alone(tmp_path, "-n", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["facts"]["ranks"]) == 2


@pytest.mark.slow
def test_doctor_alone_examines_one_rank_and_leaves_no_shared_memory(tmp_path: Path) -> None:
    started = time.time()
    done = alone(tmp_path, "--json")
    left = [path for path in launcher.leftovers(started, 0) if path.parent == Path("/dev/shm")]
    reported = json.loads(done.stdout)
    assert (done.returncode, len(reported["facts"]["ranks"]), reported["facts"]["links"]) == (0, 1, [])
    assert reported["facts"]["mpi"]["standard"]
    assert left == []


@pytest.mark.any_mpi
@pytest.mark.parametrize("arguments", [slow([]), ["-n", "2"]])
def test_missing_mpi_library_is_the_reported_error(tmp_path: Path, arguments: list[str]) -> None:
    done = alone(tmp_path, "--json", *arguments, environment={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"})
    reported = json.loads(done.stdout)
    assert done.returncode == 1
    (error,) = [problem for problem in reported["problems"] if problem["severity"] == "error"]
    assert error["where"] == "MPI"
    assert "cannot load" in error["what"]
    assert "install one" in error["do"]
    assert reported["facts"]["nodes"][0]["shm_total"] > 0


@pytest.mark.slow
def test_ranks_each_in_a_world_of_its_own_are_reported_once(mpi: launcher.Mpi, tmp_path: Path) -> None:
    """As under another MPI's launcher, which sets its own variables and uses a protocol that the library does not
    know."""
    prefix = "PMI" if mpi.library.kind == "openmpi" else "OMPI_COMM_WORLD"
    names = f"{prefix}_SIZE", f"{prefix}_RANK"
    ended = [alone(tmp_path, environment=dict(zip(names, ("2", rank), strict=True))) for rank in ("0", "1")]
    assert [done.returncode for done in ended] == [1, 0]
    assert "1 error" in ended[0].stdout
    assert "use the mpiexec that belongs to that library" in " ".join(ended[0].stdout.split())
    assert ended[1].stdout == ""


@pytest.mark.any_mpi
def test_unreadable_job_is_one_message_and_status_2(mpi: launcher.Mpi) -> None:
    ended = doctor(mpi, 2, "--job", "nowhere.toml")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("hpctrain: ") == 1
    assert "nowhere.toml" in ended.err


@pytest.mark.any_mpi
@pytest.mark.slow
def test_differing_environments_and_an_unsuitable_job_are_errors(
    mpi: launcher.Mpi, tmp_path: Path
) -> None:
    """Rank 1 reports another version of hpctrain; the job needs 3 ranks."""
    script = tmp_path / "start.py"
    script.write_text(
        "import os, sys\n"
        "from hpctrain.launcher.started import launched_rank\n"
        "from hpctrain.doctor import machine\n"
        "if launched_rank(os.environ) == 1:\n"
        "    machine.__version__ = '0.0.9'\n"
        "from hpctrain.cli import main\n"
        "sys.exit(main(['doctor', *sys.argv[1:]]))\n"
    )
    arguments = ["--json", "--job", str(ROOT / "jobs/digits.toml"), "ranks=3"]
    ended = launch([*mpi.command(2), sys.executable, str(script), *arguments], mpi, 90.0)
    reported = json.loads(ended.out)
    assert ended.status == 1
    assert any(problem["where"] == "hpctrain" and "on rank 1" in problem["what"] for problem in reported["problems"])
    assert any("ranks = 3" in problem["what"] for problem in reported["problems"])


@pytest.mark.any_mpi
def test_started_ranks_do_not_start_ranks(mpi: launcher.Mpi) -> None:
    ended = doctor(mpi, 2, "-n", "2")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("has already started 2 ranks; leave -n out") == 1
