"""Test bodies that run unchanged over virtual ranks and under MPI, and the plain torch loop they are compared with.

Also models and data that a job can name ("tests.helpers:noisy_net").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator, Tag
from hpctrain.comm.virtual.platform import Compute
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.checks import Counted as Counted
from hpctrain.conformance.task import SAMPLES as SAMPLES
from hpctrain.conformance.task import STEPS as STEPS
from hpctrain.conformance.task import Sometimes as Sometimes
from hpctrain.conformance.task import Tables as Tables
from hpctrain.conformance.task import Vector, distance, one_process
from hpctrain.conformance.task import forget_after as forget_after
from hpctrain.conformance.task import net as net
from hpctrain.conformance.task import points as points
from hpctrain.conformance.task import some_count as some_count
from hpctrain.conformance.task import vector as vector
from hpctrain.data.splits import Splits
from hpctrain.errors import HpctrainError
from hpctrain.job import Job
from hpctrain.job.phases import Enter
from hpctrain.run.api import Result, session, train
from hpctrain.run.folder import Narrator
from hpctrain.trace.recorder import Recorder
from hpctrain.trace.schema import KIND_CODES, KINDS

difference = distance

# Synchronous strategies: [strategy], and the number of server ranks.
SYNCHRONOUS: dict[str, tuple[Tables, int]] = {
    "shared": ({"name": "all_reduce", "exchange": "shared"}, 0),
    "shared buckets": ({"name": "all_reduce", "bucket_mb": 0.0005}, 0),
    "message": ({"name": "all_reduce", "exchange": "message"}, 0),
    "ring": ({"name": "all_reduce", "exchange": "message", "algorithm": "ring"}, 0),
    "halving": ({"name": "all_reduce", "exchange": "message", "algorithm": "halving_doubling"}, 0),
    "tree": ({"name": "all_reduce", "exchange": "message", "algorithm": "tree"}, 0),
    "hierarchical": ({"name": "all_reduce", "exchange": "message", "algorithm": "hierarchical"}, 0),
    "overlap": ({"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.0005}, 0),
    "server": ({"name": "parameter_server", "mode": "sync", "servers": 1}, 1),
    "servers": ({"name": "parameter_server", "mode": "sync", "servers": 2}, 2),
    "colocated": ({"name": "parameter_server", "mode": "sync", "servers": 1, "colocated": True}, 0),
    "all_serve": ({"name": "parameter_server", "mode": "sync", "servers": -1, "colocated": True}, 0),
}
# Optimizers: [optimizer], and keys of [train] that change the arithmetic.
RECIPES: dict[str, tuple[Tables, Tables]] = {
    "momentum": ({"name": "SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, {}),
    "adam": ({"name": "Adam", "lr": 0.01, "weight_decay": 0.1}, {}),
    "clip": ({"name": "SGD", "lr": 0.3, "momentum": 0.5}, {"clip_norm": 0.05}),
    "accumulate": ({"name": "SGD", "lr": 0.1, "momentum": 0.9}, {"accumulate": 3, "batch_size": 2}),
    "all": (
        {"name": "AdamW", "lr": 0.01, "weight_decay": 0.1},
        {"accumulate": 2, "batch_size": 3, "clip_norm": 0.1},
    ),
}


# -- what a job can name -----------------------------------------------------------------------------------------
def noisy_net() -> nn.Module:
    """With batch norm and dropout, for images (1, 8, 8)."""
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(108, 3)
    )


def pictures(samples: int = 75) -> Splits:
    """Inputs (1, 8, 8) float32 and classes 0..2, with a validation and a test part."""
    generator = torch.Generator().manual_seed(6)
    parts = [
        TensorDataset(
            torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)
        )
        for n in (samples, 11, 13)
    ]
    return Splits(*parts)


def limited_pictures(limit: int = 75) -> Splits:
    """The first `limit` pictures."""
    return pictures(limit)


# -- jobs --------------------------------------------------------------------------------------------------------
def make_job(folder: Path | str, **tables: Any) -> Job:
    """A small job: `net` on `points`, 8 steps of 6 samples per worker; tables are merged into it."""
    base: Tables = {
        "output": str(folder),
        "model": {"name": "tests.helpers:net"},
        "data": {"name": "tests.helpers:points"},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "train": {"steps": 8, "batch_size": 6},
        "trace": {"enabled": False},
        "threads": 1,
    }
    for key, table in tables.items():
        if isinstance(table, dict) and isinstance(base.get(key), dict) and "name" not in table:
            base[key] = {**base[key], **table}
        else:
            base[key] = table
    if "epochs" in base["train"] and "steps" not in tables.get("train", {}):
        del base["train"]["steps"]
    return Job(**base)


def equivalence_job(folder: Path | str, agree: str, recipe: str, precision: str, size: int) -> Job:
    """`STEPS` rounds for `size` ranks, including short last rounds of epochs."""
    strategy, _ = SYNCHRONOUS[agree]
    if strategy.get("servers") == -1:
        strategy = {**strategy, "servers": size}
    optimizer, keys = RECIPES[recipe]
    return make_job(
        folder,
        optimizer=optimizer,
        strategy=strategy,
        train={"steps": STEPS, "batch_size": 6, **keys, "precision": precision},
    )


def workers_of(agree: str, size: int) -> int:
    """The number of workers among `size` ranks."""
    return size - SYNCHRONOUS[agree][1]


def quiet_train(comm: Communicator, job: Job, **arguments: Any) -> Result:
    """`train` without output."""
    return train(job, comm=comm, out=Narrator(enabled=False), **arguments)


def plain(
    job: Job,
    workers: int,
    build: Callable[[], nn.Module] = net,
    data: TensorDataset | None = None,
    loss: Callable[..., Tensor] = nn.functional.cross_entropy,
    cursor: int = 0,
    steps: int | None = None,
) -> Vector:
    """`one_process` with a cache: all ranks and many tests need the same result."""
    tensors = (data or points()).tensors
    key = repr((job.train, job.optimizer, job.seed, workers, cursor, steps)), build, loss, _bytes(tensors)
    if key not in _KNOWN:
        _KNOWN[key] = one_process(job, workers, build, data, loss, cursor, steps)
    return _KNOWN[key].copy()


_KNOWN: dict[Any, Vector] = {}


def _bytes(tensors: Sequence[Tensor]) -> bytes:
    return b"".join(tensor.numpy().tobytes() for tensor in tensors)


# -- bodies ------------------------------------------------------------------------------------------------------
def equivalence(comm: Communicator, folder: Path | str, agree: str, recipe: str, precision: str) -> float:
    """The largest difference between the result of `comm.size` ranks and of one process; all ranks must hold the same
    bits."""
    job = equivalence_job(folder, agree, recipe, precision, comm.size)
    found = vector(quiet_train(comm, job).model)
    table = comm.gather_rows(found)
    assert (table == table[0]).all(), "the ranks hold different parameters"
    return difference(found, plain(job, workers_of(agree, comm.size)))


def uneven_rounds(comm: Communicator, folder: Path | str, strategy: Tables, servers: int) -> float:
    """The largest difference from one process when uneven shares of targets do not count, and some parameters get no
    gradient in some rounds, on some workers."""
    job = make_job(
        folder,
        model=Sometimes,
        data=some_count(),
        optimizer={"name": "AdamW", "lr": 0.02, "weight_decay": 0.3},
        strategy=strategy,
        train={"steps": STEPS, "batch_size": 3, "precision": "float64"},
    )
    found = vector(quiet_train(comm, job).model)
    table = comm.gather_rows(found)
    assert (table == table[0]).all(), "the ranks hold different parameters"
    return difference(found, plain(job, comm.size - servers, Sometimes, some_count()))


def resumed_bits(
    comm: Communicator,
    folder: Path | str,
    strategy: Tables,
    optimizer: Tables,
    communicator: Tables | None = None,
    **data: Any,
) -> None:
    """A run resumes from a checkpoint in mid-epoch: bit for bit the model of the uninterrupted run.

    Momentum or Adam, dropout, batch norm, augmentation, accumulation.
    """
    job = make_job(
        folder,
        model="tests.helpers:noisy_net",
        data={"name": "tests.helpers:pictures", "augment": ["shift", "flip"], **data},
        optimizer=optimizer,
        strategy=strategy,
        train={"steps": 9, "batch_size": 4, "accumulate": 2, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9},
        communicator=communicator or {},
    )
    whole = quiet_train(comm, job)
    model = whole.folder / "model.safetensors"
    first = model.read_bytes() if comm.rank == 0 else b""
    if comm.rank == 0:
        forget_after(whole.folder, 0)
    comm.barrier()
    again = quiet_train(comm, Job.load(whole.folder / "job.toml"), resume=whole.folder)
    assert again.samples == whole.samples
    assert [p.steps for p in again.phases] == [p.steps for p in whole.phases]
    assert again.metrics == whole.metrics
    for (name, a), b in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    if comm.rank == 0:
        assert model.read_bytes() == first


def every_sample_once(
    comm: Communicator, folder: Path | str, epochs: int = 3, samples: int = 29, **tables: Any
) -> None:
    """In every epoch, all ranks together see each sample exactly once. `data_keys`: keys of [data]."""
    data = {"name": Counted(samples), **tables.pop("data_keys", {})}
    train_keys = {"epochs": epochs, "batch_size": 3, **tables.pop("train", {})}
    job = make_job(
        folder, model=nn.Linear(1, 1), loss="mse", data=data, train=train_keys,
        metric="tests.helpers:no_metric", **tables,
    )  # fmt: skip
    seen: list[list[int]] = []
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            epoch = running.totals.cursor // samples
            seen += [[epoch, int(value)] for value in batch.inputs[:, 0]]
            running.step(running.loss(running.model(batch.inputs / samples), batch.targets))
    together = sorted(pair for own in comm.gather_json(seen) for pair in own)
    assert together == [[epoch, index] for epoch in range(epochs) for index in range(samples)]
    assert running.result.samples == epochs * samples


def no_metric(outputs: Tensor, targets: Tensor) -> float:
    """Of nothing."""
    return 0.0


def nan_error(comm: Communicator, folder: Path | str, strategy: Tables) -> str:
    """The error that every rank raises when a sample of the third round is not finite."""
    job = make_job(
        folder, data={"name": "tests.helpers:points", "bad": 12 * comm.size, "shuffle": False}, strategy=strategy
    )
    try:
        quiet_train(comm, job)
    except HpctrainError as error:
        assert error.everywhere
        return str(error)
    raise AssertionError("training went on")


def nan_skipped(comm: Communicator, folder: Path | str, strategy: Tables) -> None:
    """With train.nan = "skip" that round is left out, and parameters stay finite and equal on all ranks."""
    job = make_job(
        folder,
        data={"name": "tests.helpers:points", "bad": 12, "shuffle": False},
        strategy=strategy,
        train={"nan": "skip"},
    )
    found = vector(quiet_train(comm, job).model)
    assert np.isfinite(found).all()
    table = comm.gather_rows(found)
    assert (table == table[0]).all()


def messages_are_traced(comm: Communicator) -> None:
    """Messages, however sent and received, leave a span at both ends, with the same number and their bytes."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    comm.recorder.drain()
    incoming = [comm.start_recv(np.zeros(300), before, tag) for tag in (Tag.PUSH, Tag.CONTROL)]
    sends = [comm.start_send(np.ones(n), after, tag) for n, tag in ((200, Tag.PUSH), (3, Tag.CONTROL))]
    first = comm.wait_any(incoming)
    comm.sleep(0.01)
    comm.wait_all([incoming[1 - first], *sends])
    comm.sendrecv(np.ones(50_000), after, np.zeros(50_000), before, Tag.PULL)
    every = comm.gather_json(_spans(comm))
    for rank in range(comm.size):
        peer = (rank + 1) % comm.size
        sent = sorted((id, nbytes) for kind, id, to, nbytes in every[rank] if kind == "send" and to == peer and nbytes)
        taken = sorted((id, nbytes) for kind, id, of, nbytes in every[peer] if kind == "recv" and of == rank)
        assert sent == taken
        assert sorted(nbytes for _, nbytes in taken) == [24, 1600, 400_000]


def barriers_are_traced(comm: Communicator) -> None:
    """Waits for arenas leave a span on every rank, including the last to arrive, each with its own number."""
    arenas = [comm.arena(4, np.dtype(np.float32), "node") for _ in range(2)]
    comm.recorder.drain()
    for arena in arenas * 2:
        comm.notify(arena)
        comm.wait(arena)
    every = comm.gather_json([id for kind, id, peer, _ in _spans(comm) if kind == "wait"])
    for arena in arenas:
        arena.free()
    assert len(set(every[0])) == len(every[0]) == 4
    assert all(found == every[0] for found in every)


def _spans(comm: Communicator) -> list[tuple[str, int, int, int]]:
    rows = comm.recorder.drain()["spans"]
    return [(KINDS[row["kind"] - 1], int(row["id"]), int(row["peer"]), int(row["bytes"])) for row in rows]


# -- asynchronous runs ------------------------------------------------------------------------------------------
def served(mode: str = "async", **keys: Any) -> Tables:
    """[strategy] of a parameter server whose updates are one worker's share of a synchronous update, without other
    corrections unless `keys` set them."""
    plain = {"lr_per_update": "workers", "momentum_correction": False, "clip_pushes": 1e9} if mode != "sync" else {}
    return {"name": "parameter_server", "mode": mode, **plain, **keys}


class Flat(nn.Module):
    """65,600 parameters that always have equal values, since `total` treats them alike."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(size) for size in (1, 65_000, 7, 592))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([part.sum() for part in self.parts]).sum()


def total(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss whose gradient is 1 in every parameter."""
    return outputs.sum()


def whole_pulls(comm: Communicator, folder: Path | str, strategy: Tables, pulls: int) -> int:
    """Train `Flat` and check all parameters after each of the `pulls` pulls: all must have the same value, written by
    one update. Returns the number of pulls that this rank checked."""
    job = make_job(
        folder, model=Flat, loss="tests.helpers:total", metric="tests.helpers:no_metric",
        data={"name": "tests.helpers:points", "samples": 64}, optimizer={"name": "SGD", "lr": 0.001},
        strategy=strategy, train={"epochs": pulls / 64, "batch_size": 1, "evaluate_every": {"fraction": 1}},
    )  # fmt: skip
    versions = []
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            values = [part.detach() for part in running.model.parameters()]
            first = values[1][0]
            assert all(bool((part == first).all()) for part in values), "a torn pull"
            versions.append(float(first))
            running.step(running.loss(running.model(batch.inputs), batch.targets))
    assert versions == sorted(versions, reverse=True), "an older version came after a newer one"
    return len(versions)


def beginnings(comm: Communicator, job: Job) -> dict[str, list[float]]:
    """Run the job and return, by phase, the parameters with which this rank began it as a worker. All ranks end with
    equal parameters."""
    found: dict[str, list[float]] = {}
    with session(job, comm, out=Narrator(enabled=False)) as running:
        for batch in running.batches():
            phase = str(running.totals.phase)
            if phase not in found:
                found[phase] = vector(running.model).tolist()
            running.step(running.loss(running.model(batch.inputs), batch.targets))
    last = vector(running.result.model)
    assert (comm.gather_rows(last) == last).all(), "the ranks end with different parameters"
    return found


def leads(recording: Recording, epoch: int = SAMPLES) -> list[int]:
    """From the trace, for the start of every worker's every step: by how many steps it is ahead of the worker that has
    ended the fewest and has more to do, counted from the end of the previous epoch, where all were level."""
    begun: dict[tuple[int, int], list[int]] = {}
    ended: dict[tuple[int, int], list[int]] = {}
    for rank, spans in enumerate(recording.spans):
        for kind, times, of, last in (("forward", begun, "start_ns", min), ("backward", ended, "end_ns", max)):
            rows = spans[spans["kind"] == KIND_CODES[kind]]
            for step in np.unique(rows["step"]):
                before = recording.steps[rank]["cursor"][recording.steps[rank]["step"] < step]
                key = int(before[-1]) // epoch if len(before) else 0, rank
                times.setdefault(key, []).append(int(last(rows[of][rows["step"] == step])))
    found = []
    for (lap, rank), starts in begun.items():
        rest = [np.array(ends) for (other_lap, other), ends in ended.items() if other_lap == lap and other != rank]
        for done, now in enumerate(starts):
            found.append(done - min([int((ends <= now).sum()) for ends in rest if (ends > now).any()], default=done))
    return found


# -- an asynchronous run, and one process that does the same updates in the same order ------------------------------
MILLISECOND = 1_000_000


def jitter(seed: int = 1, sigma: float = 0.5, slow: dict[int, float] | None = None) -> Compute:
    """Virtual compute times: a forward pass takes about 10 ms (lognormal), times the rank's factor in `slow`."""
    random = Random(seed)

    def cost(rank: int, kind: str, nbytes: int, flops: float) -> int:
        if kind != "forward":
            return 0
        return int(10 * MILLISECOND * random.lognormvariate(0.0, sigma) * (slow or {}).get(rank, 1.0))

    return cost


def traced(size: int, body: Callable[[Communicator], Any], **arguments: Any) -> tuple[list[Any], list[Tables]]:
    """Run `body` on virtual ranks. Returns (their results, each rank's recorder, in virtual time)."""
    world = World(size, **arguments)
    world.recorders = [Recorder(lambda: world.time) for _ in range(size)]
    results = world.run(body)
    return results, [recorder.drain() for recorder in world.recorders]


@dataclass
class Recording:
    """A recorded run. `batches[rank, step]`: the micro-batches (inputs, targets) that the rank computed on in
    that step; `steps[rank]`, `spans[rank]`: its rows of the trace."""

    job: Job
    results: list[Result]
    batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]]
    steps: list[np.ndarray[Any, Any]]
    spans: list[np.ndarray[Any, Any]]

    def workers(self, phase: int) -> list[int]:
        """The ranks that took steps in the phase."""
        return [rank for rank, rows in enumerate(self.steps) if (rows["phase"] == phase).any()]

    def row(self, rank: int, step: int) -> Any:
        """Of the rank's step."""
        [row] = self.steps[rank][self.steps[rank]["step"] == step]
        return row

    def staleness(self) -> list[list[int]]:
        """Of every worker's steps."""
        return [rows["staleness_max"].tolist() for rows in self.steps]

    def samples(self, rank: int, step: int) -> tuple[Tensor, Tensor]:
        """All samples that the rank computed on in that step."""
        inputs, targets = zip(*self.batches[rank, step], strict=True)
        return torch.cat(inputs), torch.cat(targets)

    def updates(self, phase: int) -> list[tuple[int, int]]:
        """(rank, step) of every update of an asynchronous phase, in order; the same on all servers."""
        found = []
        for spans in self.spans:
            rows = spans[(spans["kind"] == KIND_CODES["update"]) & (spans["piece"] == 0) & (spans["peer"] >= 0)]
            own = [row for row in rows if self.row(row["peer"], row["step"])["phase"] == phase]
            versions = [int(row["id"]) for row in own]
            assert versions == list(range(1, len(own) + 1)), "versions count the updates of a phase"
            if own:
                found.append([(int(row["peer"]), int(row["step"])) for row in own])
        assert found, "no server traced an update"
        assert all(order == found[0] for order in found), "the servers made other updates, or in another order"
        return found[0]


def record(size: int, job: Job, **arguments: Any) -> Recording:
    """Run the job over virtual ranks and record it; further arguments are World's."""
    batches: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}

    def body(comm: Communicator) -> Result:
        with session(job, comm, out=Narrator(enabled=False)) as running:
            for batch in running.batches():
                batches.setdefault((comm.rank, running.totals.step), []).append((batch.inputs, batch.targets))
                running.step(running.loss(running.model(batch.inputs), batch.targets))
        return running.result

    results, traces = traced(size, body, **arguments)
    return Recording(job, results, batches, [t["steps"] for t in traces], [t["spans"] for t in traces])


class Replay:
    """Repeats a recorded run in one process, in torch alone: `vector` must be the same."""

    def __init__(self, recording: Recording) -> None:
        self.recording, job = recording, recording.job
        self.job, self.cursor, self.start, self.updates = job, 0, 0, 0
        self.total = recording.results[0].samples
        torch.manual_seed(job.seed)
        self.model = job.model.bind()().to(getattr(torch, job.train.precision))
        self.parameters = list(self.model.parameters())
        self.optimizer = self._fresh()
        for index, phase in enumerate(job.schedule):
            self.enter, self.start = phase.enter or Enter(), self.cursor
            if self.enter.momentum == "reset":
                self.optimizer = self._fresh()
            mode = getattr(phase.strategy.options, "mode", "sync")
            (self._rounds if mode == "sync" else self._updates)(index)

    @property
    def vector(self) -> np.ndarray[Any, Any]:
        """The final parameters."""
        return vector(self.model)

    def _fresh(self) -> torch.optim.Optimizer:
        optimizer, options = self.job.optimizer, dict(self.job.optimizer.options)
        made: torch.optim.Optimizer = getattr(torch.optim, optimizer.name)(self.parameters, lr=optimizer.lr, **options)
        return made

    def _rounds(self, phase: int) -> None:
        recording, workers = self.recording, self.recording.workers(phase)
        steps = recording.steps[workers[0]]
        for step in steps["step"][steps["phase"] == phase].tolist():
            parts = [recording.samples(rank, step) for rank in workers if (rank, step) in recording.batches]
            inputs, targets = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            self._apply(self._gradient(inputs, targets), self._rate(), self._momentum())
            self.cursor += len(targets)

    def _updates(self, phase: int) -> None:
        recording, options = self.recording, self.job.schedule[phase].strategy.options
        workers = len(recording.workers(phase))
        history = [[p.detach().clone() for p in self.parameters]]
        squares = [torch.zeros_like(p) for p in self.parameters]
        lengths: dict[int, list[float]] = {}
        velocities = {rank: [self._velocity(p) for p in self.parameters] for rank in recording.workers(phase)}
        corrects = options.momentum_correction and workers > 1 and self.job.optimizer.options.get("momentum")
        for rank, step in recording.updates(phase):
            inputs, targets = recording.samples(rank, step)
            staleness = int(recording.row(rank, step)["staleness_max"])
            old, now = history[-1 - staleness], history[-1]
            self._put(old)
            gradient = self._gradient(inputs, targets)
            _clip_to_running_mean(gradient, lengths.setdefault(rank, []), options.clip_pushes)
            self._put(now)
            gradient = [_compensated(options, *each) for each in zip(gradient, now, old, squares, strict=True)]
            auto = workers**0.75 if "betas" in self.optimizer.param_groups[0] else workers
            ways = {"auto": auto, "workers": workers, "staleness": max(1, staleness), "none": 1}
            divisor = ways[options.lr_per_update]
            if self.enter.learning_rate in ("keep", "scale"):
                divisor = 1
            if corrects:
                self._apply_nesterov(gradient, self._rate() / divisor, self._momentum(), velocities[rank])
            else:
                self._apply(gradient, self._rate() / divisor, self._momentum())
            history.append([p.detach().clone() for p in self.parameters])
            self.cursor += len(targets)
            self.updates += 1
        for parts in zip(self.parameters, *velocities.values(), strict=True) if corrects else ():
            self.optimizer.state[parts[0]]["momentum_buffer"] = torch.stack(parts[1:]).mean(dim=0)

    def _velocity(self, parameter: Tensor) -> Tensor:
        known = self.optimizer.state[parameter].get("momentum_buffer")
        return torch.zeros_like(parameter) if known is None else known.clone()

    def _apply_nesterov(self, gradient: list[Tensor], rate: float, momentum: float, velocity: list[Tensor]) -> None:
        """SGD by hand, with one worker's velocity: v = m v + g, w -= rate (g + m v)."""
        options = self.job.optimizer.options
        inertia = options["momentum"] * momentum
        with torch.no_grad():
            for parameter, part, inert in zip(self.parameters, gradient, velocity, strict=True):
                part = part + options.get("weight_decay", 0.0) * parameter
                inert.mul_(inertia).add_(part)
                parameter.sub_((self.job.optimizer.lr or 0.0) * rate * (part + inertia * inert))

    def _put(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)

    def _gradient(self, inputs: Tensor, targets: Tensor) -> list[Tensor]:
        """The clipped gradient of the mean loss at the model's current parameters."""
        self.model.zero_grad()
        nn.functional.cross_entropy(self.model(inputs), targets).backward()
        if self.job.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.job.train.clip_norm)
        return [p.grad.clone() for p in self.parameters if p.grad is not None]

    def _apply(self, gradient: list[Tensor], rate: float, momentum: float) -> None:
        group, options = self.optimizer.param_groups[0], self.job.optimizer.options
        if "betas" in group:
            first, second = options.get("betas", (0.9, 0.999))
            group["betas"] = (first * momentum, second)
        elif "momentum" in group:
            group["momentum"] = options.get("momentum", 0.0) * momentum
        group["lr"] = (self.job.optimizer.lr or 0.0) * rate
        for parameter, part in zip(self.parameters, gradient, strict=True):
            parameter.grad = part
        self.optimizer.step()

    def _rate(self) -> float:
        """The learning-rate factor, constant or "linear" from 1 to 0, with the effect of `enter`."""
        linear = self.job.optimizer.schedule.name == "linear"
        course = 1 - self.cursor / self.total if linear else 1.0
        if self.enter.learning_rate == "reset":
            return 1 - (self.cursor - self.start) / (self.total - self.start) if linear else 1.0
        return course * self._policy(self.enter.learning_rate)

    def _momentum(self) -> float:
        return self._policy(self.enter.momentum)

    def _policy(self, policy: str) -> float:
        if policy == "scale":
            return self.enter.scale or 0.0
        if policy == "ramp":
            assert self.enter.ramp.samples is not None
            return min(1.0, (self.cursor - self.start + 1) / (self.enter.ramp.samples + 1))
        return 1.0


def _clip_to_running_mean(gradient: list[Tensor], means: list[float], longest: float) -> None:
    """Clips in place and updates `means` of one worker's gradients, of which the last one counts."""
    length = float(torch.linalg.vector_norm(torch.cat([part.flatten() for part in gradient])))
    kept = min(length, longest * means[-1]) if means else length
    share = max(0.1, 1 / (len(means) + 1))
    means.append((1 - share) * means[-1] + share * kept if means else kept)
    for part in gradient:
        part.mul_(kept / length)


def _compensated(options: Any, gradient: Tensor, now: Tensor, old: Tensor, squares: Tensor) -> Tensor:
    """DC-ASGD; updates `squares` in the adaptive mode."""
    if options.delay_compensation == "none":
        return gradient
    strength = options.delay_lambda
    if options.delay_compensation == "adaptive":
        squares.copy_(0.95 * squares + 0.05 * gradient**2)
        strength = strength / torch.sqrt(squares + 1e-7)
    return gradient + strength * gradient * gradient * (now - old)
