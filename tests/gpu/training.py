"""Started by mpiexec: ranks that share a GPU end with the same parameters as one process on the CPU. Arguments: what,
folder, transport."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the same sums every time

import numpy as np
import torch

from hpctrain.comm.base import Communicator
from hpctrain.comm.connect import connect
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.ipc import IpcCommunicator
from hpctrain.job import Job
from hpctrain.run.api import fit, session
from hpctrain.run.folder import Narrator
from tests import helpers

AGREE = ["message", "ring", "overlap", "server", "colocated", "all_serve"]
CASES = [("all", "float64", 1e-10), ("momentum", "float32", 1e-5)]


def over(job: Job, transport: str) -> Job:
    """The job with that transport."""
    table = job.communicator.model_copy(update={"device_transport": transport})
    return job.model_copy(update={"communicator": table})


def trained(comm: Communicator, job: Job) -> tuple[Communicator, np.ndarray]:
    """The communicator of the run and the flat parameters in float64."""
    with session(job, comm, out=Narrator(enabled=False)) as running:
        fit(running)
    assert isinstance(running.comm, DeviceCommunicator)
    assert running.comm.transport == job.communicator.device_transport
    flat = torch.nn.utils.parameters_to_vector(running.result.model.parameters())
    assert flat.device.type == "cuda"
    return running.comm, flat.detach().double().cpu().numpy()


def equivalence(comm: Communicator, folder: Path, transport: str) -> None:
    for agree in AGREE:
        for recipe, precision, limit in CASES:
            job = helpers.equivalence_job(folder, agree, recipe, precision, comm.size)
            _, found = trained(comm, over(job, transport))
            table = comm.gather_rows(found)
            assert (table == table[0]).all(), (agree, recipe, "the ranks hold different parameters")
            distance = helpers.difference(found, helpers.plain(job, helpers.workers_of(agree, comm.size)))
            if comm.rank == 0:
                print(f"{agree} {recipe} {precision}: {distance:.2e}", flush=True)
            assert distance < limit, (agree, recipe, precision, distance)


STAGED = (
    {"name": "all_reduce", "exchange": "message"},
    {"name": "parameter_server", "mode": "sync", "colocated": True},
)


def bfloat16(comm: Communicator, folder: Path, transport: str) -> None:
    """In bfloat16, and in mixed float16, the ranks agree bit for bit, and are close to float32."""
    for strategy in STAGED:
        ends = []
        for precision in ("bfloat16", "mixed_float16", "float32"):
            job = helpers.make_job(folder, strategy=strategy, train={"precision": precision})
            _, found = trained(comm, over(job, transport))
            table = comm.gather_rows(found)
            assert (table == table[0]).all()
            ends.append(found)
        *short, exact = ends
        assert max(helpers.difference(found, exact) for found in short) < 0.05


def resumes(comm: Communicator, folder: Path, transport: str) -> None:
    torch.use_deterministic_algorithms(True)
    for strategy in STAGED:
        for optimizer in ({"name": "SGD", "lr": 0.05, "momentum": 0.9}, {"name": "Adam", "lr": 0.01}):
            helpers.resumed_bits(comm, folder, strategy, optimizer, {"device_transport": transport})


if __name__ == "__main__":
    what, where, transport = sys.argv[1:]
    torch.set_num_threads(1)
    IpcCommunicator.least = 1  # the models are small
    {"equivalence": equivalence, "bfloat16": bfloat16, "resumes": resumes}[what](connect(), Path(where), transport)
