"""`hpctrain doctor` in jobs of a real Slurm: two nodes (both this machine) with two ranks each."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hpctrain import launcher
from tests.cluster.slurm import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[2]
DOCTOR = f"{sys.executable} -m hpctrain doctor --json"


def doctor_report(slurm: Slurm, folder: Path, start: str) -> tuple[str, dict[str, Any]]:
    """(the job's state, doctor's JSON) when the batch script starts doctor with the command `start`."""
    (folder / "doctor.sh").write_text(f"#!/bin/bash\n{start} {DOCTOR} 2>{folder}/err\n")
    options = ["--nodes=2", "--ntasks-per-node=2", f"--output={folder}/out"]
    job = slurm.submit("doctor.sh", cwd=folder, options=options, environment={"PYTHONPATH": str(ROOT)})
    state = slurm.wait(job, 120)
    text = (folder / "out").read_text()
    assert text.count('"problems"') == 1, text + (folder / "err").read_text()
    facts: dict[str, Any] = json.loads(text)
    return state, facts


def test_doctor_reports_slurms_grant_and_how_ranks_were_started(slurm: Slurm, tmp_path: Path) -> None:
    library = launcher.find_library()
    plugin = library.srun
    state, doctor = doctor_report(slurm, tmp_path, f"srun --mpi={plugin}")
    facts, whats = doctor["facts"], [problem["what"] for problem in doctor["problems"]]
    assert state == "COMPLETED", whats
    assert len(facts["ranks"]) == 4
    if library.kind == "mpich" and library.wheel:  # its UCX hangs here occasionally
        assert {rank["environment"].get("MPIR_CVAR_CH4_NETMOD") for rank in facts["ranks"]} == {"ofi"}
    assert facts["slurm"]["SLURM_NTASKS"] == "4"
    assert plugin in facts["plugins"]
    assert any("MPI counts it as" in what for what in whats), "both nodes are this machine"
    assert [rank for node in facts["nodes"] for rank in node["ranks"]] == [0, 1, 2, 3]
    assert any(link["nodes"] == [0, 1] for link in facts["links"])
    assert not any("SLURM_" in what for what in whats), whats


def test_ranks_that_srun_did_not_connect_are_one_error(slurm: Slurm, tmp_path: Path) -> None:
    state, doctor = doctor_report(slurm, tmp_path, "srun --mpi=none")
    errors = [problem for problem in doctor["problems"] if problem["severity"] == "error"]
    assert state == "FAILED"
    assert len(errors) == 1, errors
    assert "srun started 4 processes, but the MPI library" in errors[0]["what"]
    assert "srun --mpi=" in errors[0]["do"]


def test_in_a_batch_script_doctor_says_how_to_examine_all_ranks(slurm: Slurm, tmp_path: Path) -> None:
    state, doctor = doctor_report(slurm, tmp_path, "")
    assert state == "COMPLETED"
    assert any("srun --mpi=" in problem["do"] for problem in doctor["problems"] if problem["where"] == "Slurm")
