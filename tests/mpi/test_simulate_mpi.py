"""What the simulator computes beside what real ranks compute, in the same job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain import launcher
from hpctrain.hosts import Description
from hpctrain.job import Job
from hpctrain.simulate.calibration import Calibration, MeasuredCost, ModelCosts
from hpctrain.simulate.simulation import Simulated, Simulation
from hpctrain.trace import open_run
from tests.conftest import launch

SERVER = {"name": "parameter_server"}
MESSAGES = {"name": "all_reduce", "exchange": "message"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # ranks and strategy
    "shared": (4, {"name": "all_reduce"}),
    "ring": (4, {**MESSAGES, "algorithm": "ring"}),
    "halving_doubling": (3, {**MESSAGES, "algorithm": "halving_doubling"}),
    "library": (4, MESSAGES),
    "sync": (4, {**SERVER, "mode": "sync"}),
    "two sync servers": (4, {**SERVER, "mode": "sync", "servers": 2}),
    "one async worker": (2, {**SERVER, "mode": "async"}),
}
LATE = {"strategy": {**SERVER, "mode": "async"}, "debug": {"slow": {0: 10, 1: 10, 2: 40}}}
PROGRAM = """
import json, sys
import torch
import hpctrain
from hpctrain.comm.connect import connect
from hpctrain.run.folder import Narrator

torch.set_num_threads(1)
jobs = {name: (ranks, hpctrain.Job(**tables)) for name, (ranks, tables) in json.loads(sys.argv[1]).items()}
comm = connect(next(iter(jobs.values()))[1])
folders = {}
for name, (ranks, job) in jobs.items():
    some = comm.split(0 if comm.rank < ranks else None)
    if some is not None:
        folders[name] = str(hpctrain.train(job, some, out=Narrator(enabled=False)).folder)
    comm.barrier()
if comm.rank == 0:
    print(json.dumps(folders))
"""


def job_of(folder: Path, name: str) -> dict[str, Any]:
    """A small net on digits."""
    own = LATE if name == "late" else {"strategy": CASES[name][1]}
    return {
        "name": name.replace(" ", "_"),
        "output": str(folder),
        "threads": 1,
        "model": {"name": "mlp", "inputs": 64, "outputs": 10, "hidden": [32]},
        "data": {"name": "digits"},
        "optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9},
        "train": {"steps": 150 if name == "late" else 40, "batch_size": 16, "evaluate_every": {"fraction": 1.0}},
        "trace": {"report": False},
        **own,
    }


def ranks_of(name: str) -> int:
    return 4 if name == "late" else CASES[name][0]


def calibration() -> Calibration:
    """Of the model above: any times will do."""
    cost = MeasuredCost(fixed_s=3e-3, least=1, most=64, spread=0.1)
    spans = dict.fromkeys(("data", "reduce", "update", "encode", "decode", "send"), MeasuredCost(each_s=1e-9))
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    model = ModelCosts(
        name="mlp", parameters=parameters, forward=cost, backward=cost, order=[3, 2, 1, 0], shares=[0.25] * 4
    )
    return Calibration(source="a test", model=model, spans=spans)


def simulated(folder: Path, name: str) -> Simulated:
    ranks = ranks_of(name)
    cluster = Description.model_validate({"hosts": [{"count": 1, "ranks": ranks}]})
    return Simulation(Job(**job_of(folder, name)), cluster, ranks, learn=True).run(calibration())


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, mpi: launcher.Mpi) -> dict[str, Path]:
    """Folders of real runs, all by the same ranks."""
    folder = tmp_path_factory.mktemp("real")
    jobs = {name: (ranks_of(name), job_of(folder, name)) for name in (*CASES, "late")}
    (folder / "program.py").write_text(PROGRAM)
    argv = [*mpi.command(4), sys.executable, "-m", "mpi4py", str(folder / "program.py"), json.dumps(jobs)]
    ended = launch(argv, mpi, 100.0)
    assert ended.status == 0, ended.err
    return {name: Path(path) for name, path in json.loads(ended.out).items()}


def losses(folder: Path) -> dict[int, list[float]]:
    """By rank, step by step."""
    steps = open_run(folder).steps()
    return {rank: steps[steps["rank"] == rank].sort_values("step")["loss"].tolist() for rank in set(steps["rank"])}


@pytest.mark.any_mpi
@pytest.mark.launch
@pytest.mark.parametrize("name", CASES)
def test_simulated_losses_are_those_of_real_ranks(name: str, real: dict[str, Path], tmp_path: Path) -> None:
    """Bit for bit where sums have the same order; an MPI library has its own."""
    found, wanted = losses(simulated(tmp_path, name).folder), losses(real[name])
    assert found.keys() == wanted.keys()
    assert all(len(own) == 40 for own in wanted.values())
    if name == "library":
        for rank in wanted:
            np.testing.assert_allclose(found[rank], wanted[rank], rtol=1e-6)
    else:
        assert found == wanted


def staleness(folder: Path) -> dict[int, float]:
    """The mean of each worker's gradients, without the first ones and the last ones."""
    steps = open_run(folder).steps()
    steps = steps[(steps["step"] >= 5) & (steps["t_s"] < 0.9 * steps["t_s"].max())]
    return {rank: float(steps[steps["rank"] == rank]["staleness_max"].mean()) for rank in set(steps["rank"])}


@pytest.mark.any_mpi
@pytest.mark.launch
def test_simulated_gradients_are_as_late_as_real_ones(real: dict[str, Path], tmp_path: Path) -> None:
    """Three asynchronous workers, of which the last takes four times as long: while it computes, each of the others
    updates four times; while one of these computes, the other does once, and the last a quarter of a time."""
    found, wanted = staleness(simulated(tmp_path, "late").folder), staleness(real["late"])
    assert found == pytest.approx({0: 1.25, 1: 1.25, 2: 8.0}, rel=0.15)
    assert wanted[2] > max(wanted[0], wanted[1])  # by how much depends on the machine: docs/simulation.md
