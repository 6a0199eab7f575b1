"""Hashes of all numbers that a matrix of jobs produces, to prove that a change alters none.

    python -m tests.bits before.json                        over virtual ranks
    mpiexec -n 3 python -m tests.bits before.json --mpi     over real ranks: the deterministic jobs
    python -m tests.bits after.json --against before.json   status 1 and the jobs that differ, if any do

A hash is of the final parameters and buffers, and of every tensor of every checkpoint, by name. Models and data are its
own, so that they stay the same when other tests change.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hpctrain
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.launcher.started import launched_rank
from hpctrain.run.folder import Narrator

Tables = dict[str, Any]

ALL_REDUCE = {"name": "all_reduce"}
SERVER = {"name": "parameter_server"}
MESSAGE = {**ALL_REDUCE, "exchange": "message"}
AFTER = {"rule": "after", "samples": 50}
STRATEGIES: dict[str, Tables] = {
    "shared": {"strategy": {**ALL_REDUCE, "exchange": "shared"}},
    **{a: {"strategy": {**MESSAGE, "algorithm": a}} for a in ("library", "ring", "halving_doubling", "tree")},
    "hierarchical": {"strategy": {**MESSAGE, "algorithm": "hierarchical"}},
    "overlap": {"strategy": {**MESSAGE, "overlap": True, "bucket_mb": 0.001}},
    "sync": {"strategy": {**SERVER, "mode": "sync"}},
    "sync, two servers beside": {"strategy": {**SERVER, "mode": "sync", "servers": 2, "colocated": True}},
    "async": {"strategy": {**SERVER, "mode": "async"}},
    "async, compensated": {"strategy": {**SERVER, "mode": "async", "delay_compensation": "adaptive"}},
    "bounded": {"strategy": {**SERVER, "mode": "bounded", "bound": 1}},
    "there and back": {
        "phases": [
            {"strategy": ALL_REDUCE, "until": AFTER},
            {"strategy": {**SERVER, "mode": "sync"}, "until": AFTER, "enter": {"momentum": "keep"}},
            {"strategy": {**SERVER, "mode": "async"}, "until": AFTER, "enter": {"momentum": "scale", "scale": 0.5}},
            {"strategy": MESSAGE, "enter": {"learning_rate": "ramp", "momentum": "reset", "ramp": {"samples": 20}}},
        ]
    },
}
OPTIMIZERS: dict[str, tuple[Tables, Tables]] = {
    "SGD": ({"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {}),
    "Adam": ({"name": "Adam", "lr": 0.01, "schedule": "linear"}, {"clip_norm": 0.5}),
    "AdamW": ({"name": "AdamW", "lr": 0.01, "weight_decay": 0.1}, {"accumulate": 2, "batch_size": 3}),
    "Adafactor": ({"name": "Adafactor", "lr": 0.01}, {}),
}
TRAIN = {"epochs": 3, "batch_size": 6, "checkpoint_every": {"samples": 60}, "keep_checkpoints": 9}
WORLDS = [(0,), (0, 0, 0), (0, 0, 1, 1)]  # the node of each rank
# On real ranks the order of asynchronous updates is random, and so is an MPI library's order of summation.
DETERMINISTIC = (
    "shared",
    "ring",
    "halving_doubling",
    "tree",
    "hierarchical",
    "overlap",
    "sync",
    "sync, two servers beside",
)


def net() -> nn.Module:
    """With batch norm and dropout, for images (1, 8, 8)."""
    layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(108, 3)]
    return nn.Sequential(*layers)


def images() -> TensorDataset:
    """A prime number of random images of three classes."""
    generator = torch.Generator().manual_seed(6)
    inputs = torch.randn(79, 1, 8, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(3, (79,), generator=generator))


def jobs(folder: Path) -> Iterator[tuple[str, hpctrain.Job]]:
    """Every strategy with every optimizer, by name."""
    for strategy, tables in STRATEGIES.items():
        for optimizer, (keys, train) in OPTIMIZERS.items():
            if strategy == "shared" and optimizer == "Adafactor":
                continue  # not elementwise
            yield f"{strategy} / {optimizer}", hpctrain.Job(
                output=str(folder), model=net, data=(images(), images()), optimizer=keys, threads=1, **tables,
                train={**TRAIN, **train},
                trace={"enabled": False},
            )  # fmt: skip


def hashed(comm: Communicator, job: hpctrain.Job) -> list[str]:
    """Train; hash the final state of every rank and the checkpoints, or the error message. Collective."""
    try:
        result = hpctrain.train(job, comm=comm, out=Narrator(enabled=False))
    except hpctrain.HpctrainError as error:
        return [f"{type(error).__name__}: {str(error).replace(job.output, '')}"]
    models: list[str] = comm.gather_json(_hash(result.model.state_dict()))
    paths = sorted((result.folder / "checkpoints").glob("*.safetensors")) if comm.rank == 0 else []
    checkpoints: list[str] = comm.broadcast_json([_hash(load_file(path)) for path in paths])
    return models + checkpoints


def _hash(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def over_virtual_ranks(folder: Path) -> dict[str, list[str]]:
    """By job and nodes."""
    found = {}
    for name, job in jobs(folder):
        for nodes in WORLDS:
            try:
                found[f"{name} / {nodes}"] = World(len(nodes), nodes=nodes).run(partial(hashed, job=job))[0]
            except hpctrain.HpctrainError as error:
                found[f"{name} / {nodes}"] = [f"{type(error).__name__}: {error}"]
    return found


def over_real_ranks(folder: Path) -> dict[str, list[str]]:
    """By job, on every rank. Collective."""
    from hpctrain.comm.connect import connect

    comm = connect()
    place = Path(comm.broadcast_json(str(folder)))
    chosen = [(name, job) for name, job in jobs(place) if name.partition(" / ")[0] in DETERMINISTIC]
    return {f"{name} / {comm.size} real": hashed(comm, job) for name, job in chosen}


def main(arguments: list[str]) -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--mpi", action="store_true")
    parser.add_argument("--against", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpctrain-bits-") as folder:
        found = (over_real_ranks if given.mpi else over_virtual_ranks)(Path(folder))
    if given.mpi and launched_rank(os.environ) > 0:
        return 0
    given.output.write_text(json.dumps(found, indent=1))
    if given.against is None:
        return 0
    before = json.loads(given.against.read_text())
    differing = [name for name in {**before, **found} if before.get(name) != found.get(name)]
    print(*differing, f"{len(differing)} of {len(found)} jobs differ", sep="\n")
    return int(bool(differing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
