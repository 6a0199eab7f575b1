"""The main job reaches an accuracy of at least 0.97 on average over five seeds, on four ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import Mpirun

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys
import hpctrain
from hpctrain.comm.connect import connect
from hpctrain.run.folder import Narrator

job = hpctrain.Job.load(sys.argv[1], [f"output={sys.argv[2]}", "train.evaluate_every.fraction=1", "trace.report=false"])
comm = connect(job)
found = []
for seed in range(5):
    result = hpctrain.train(job.override([f"seed={seed}"]), comm, out=Narrator(enabled=False))
    found.append(result.metrics["metric"])
if comm.rank == 0:
    print(json.dumps(found))
"""


@pytest.mark.any_mpi
@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mean_accuracy_of_five_seeds(mpirun: Mpirun, tmp_path: Path) -> None:
    ended = mpirun(4, PROGRAM, str(ROOT / "jobs" / "digits.toml"), str(tmp_path / "runs"), timeout=240)
    found = json.loads(ended.out)
    assert len(found) == 5
    assert sum(found) / 5 >= 0.97, found
