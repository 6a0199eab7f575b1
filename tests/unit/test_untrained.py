"""Frozen parameters and buffers: all ranks start with rank 0's; evaluation and the saved model follow train.buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import CheckpointError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.job.tables import Policy
from hpctrain.run.api import session
from hpctrain.run.checkpoint import list_checkpoints
from hpctrain.run.folder import Narrator
from hpctrain.run.untrained import Untrained
from tests import helpers

QUIET = Narrator(enabled=False)
PS = {"name": "parameter_server", "mode": "sync"}


class Odd(nn.Module):
    """Untrained tensors of every kind, drawn by NumPy: each rank builds its own."""

    bank: Tensor

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        draw = np.random.default_rng(seed)
        self.line = nn.Linear(7, 3)
        self.norm = nn.BatchNorm1d(3)
        self.frozen = nn.Linear(7, 3).requires_grad_(False)
        for parameter in self.frozen.parameters():
            parameter.copy_(torch.from_numpy(draw.normal(size=parameter.shape)))
        values = torch.from_numpy(draw.normal(size=(4, 3)))
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int16):
            self.register_buffer(f"of_{str(dtype).removeprefix('torch.')}", (values * 8).to(dtype))
        self.register_buffer("bank", values.float())
        self.register_buffer("mask", values > 0)
        self.register_buffer("scalar", values[0, 0].float())
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("nothing", None)
        self.register_buffer("turned", values.float().t())
        self.register_buffer("conjugate", values.to(torch.complex64).mul(1j).conj())
        self.register_buffer("scratch", values.float(), persistent=False)
        self.register_buffer("wide", values.to(torch.complex128), persistent=False)
        sparse = values.float().relu()
        kinds = {"coo": sparse.to_sparse(), "csr": sparse.to_sparse_csr(), "csc": sparse.to_sparse_csc()}
        for name, made in kinds.items():
            self.register_buffer(name, made, persistent=False)
        self.twin = nn.Module()
        self.twin.register_buffer("bank", self.bank)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.bank[:] = self.bank.roll(1, 0) + x.mean()
        out: Tensor = self.norm(self.line(x) + self.frozen(x)) + self.bank[0]
        return out


def untrained(model: nn.Module, trained: tuple[str, ...] = ("line", "norm.weight", "norm.bias")) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: t.detach().clone() for name, t in named.items() if not name.startswith(trained)}


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype for name in one)
    return [name for name in one if not torch.equal(_plain(one[name]), _plain(other[name]))]


def _plain(tensor: Tensor) -> Tensor:
    tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
    return tensor if tensor.is_complex() else tensor.double()


# -- the beginning -----------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_all_ranks_start_with_rank_0s_tensors(tmp_path: Path, strategy: helpers.Tables, precision: str) -> None:
    def body(comm: Communicator) -> tuple[dict[str, Tensor], bool]:
        keys = {"steps": 2, "batch_size": 4, "precision": precision}
        job = helpers.make_job(tmp_path, model=lambda: Odd(comm.rank), strategy=strategy, train=keys)
        with session(job, comm, out=QUIET) as running:
            model: Any = running.model
            found = untrained(model), model.twin.bank is model.bank
            for batch in running.batches():
                running.step(running.loss(running.model(batch.inputs), batch.targets))
        return found

    first, *others = World(3).run(body)
    for found, tied in others:
        assert unlike(found, first[0]) == []
        assert tied
    assert unlike(untrained(Odd(1)), untrained(Odd(0)))


def test_nothing_is_sent_if_all_ranks_are_equal(tmp_path: Path) -> None:
    def moved(seed_of: Callable[[int], int]) -> int:
        def body(comm: Communicator) -> None:
            Untrained(Odd(seed_of(comm.rank))).share(comm)

        return sum(int(table["spans"]["bytes"].sum()) for table in helpers.traced(3, body)[1])

    assert moved(lambda rank: 0) < 300
    assert moved(lambda rank: rank) > 3000


class Loaded(nn.Module):
    """Statistics that only rank 0 loads from a file, for layers that are not trained further."""

    def __init__(self, mean: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(7)
        self.line = nn.Linear(7, 3)
        assert self.norm.running_mean is not None
        self.norm.running_mean.fill_(mean)

    def train(self, mode: bool = True) -> Loaded:
        super().train(mode)
        self.norm.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.line(self.norm(x))
        return out


def test_statistics_that_rank_0_loaded_are_not_halved(tmp_path: Path) -> None:
    def body(comm: Communicator) -> Path:
        job = helpers.make_job(tmp_path, model=lambda: Loaded(0.5 * (comm.rank == 0)))
        return helpers.quiet_train(comm, job).folder

    folder = World(2).run(body)[0]
    assert load_file(folder / "model.safetensors")["norm.running_mean"].tolist() == [0.5] * 7


# -- phases, checkpoints, the end ----------------------------------------------------------------------------------
class Teacher(nn.Module):
    """A frozen copy that follows the trained layer, and a table that is not saved; both drawn by NumPy."""

    table: Tensor
    wide: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(7, 3)
        self.teacher = nn.Linear(7, 3).requires_grad_(False)
        self.teacher.weight.copy_(torch.from_numpy(np.random.default_rng().normal(size=(3, 7))))
        table = torch.from_numpy(np.random.default_rng().normal(size=(7, 3)))
        self.register_buffer("table", table.float(), persistent=False)
        self.register_buffer("wide", table.to(torch.complex128), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.teacher.weight.lerp_(self.line.weight, 0.1)
        out: Tensor = self.line(x) + self.teacher(x) + x @ self.table + x @ self.wide.real.float()
        return out


def own_state(comm: Communicator, job: Job, resume: Path | None = None) -> tuple[Path, dict[str, Tensor]]:
    result = helpers.quiet_train(comm, job, resume=resume)
    return result.folder, {n: t.clone() for n, t in untrained(result.model, ()).items()}


@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_resumed_run_keeps_the_frozen_parameters(tmp_path: Path, strategy: helpers.Tables) -> None:
    keys = {"steps": 9, "batch_size": 4, "checkpoint_every": {"steps": 3}, "keep_checkpoints": 2}
    job = helpers.make_job(tmp_path, model=Teacher, strategy=strategy, train=keys)
    whole = World(3).run(lambda comm: own_state(comm, job))
    folder = whole[0][0]
    kept = list_checkpoints(folder)
    assert len(list((folder / "checkpoints").glob("untrained-*"))) == len(kept) == 2  # those of older ones are gone
    (folder / "model.safetensors").unlink()
    kept[-1].unlink()
    resumed = World(3).run(lambda comm: own_state(comm, job, folder))
    for _, state in resumed:
        assert unlike(state, whole[0][1]) == []
    for path in (folder / "checkpoints").glob("untrained-*"):
        path.unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"untrained-\w+.safetensors, which holds the frozen .* is missing"):
        World(3).run(lambda comm: own_state(comm, job, folder))


class Steady(nn.Sequential):
    """A frozen layer that never changes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(7, 5).requires_grad_(False), nn.Linear(5, 3))


def test_unchanged_tensors_are_written_once(tmp_path: Path) -> None:
    keys = {"steps": 9, "batch_size": 4, "checkpoint_every": {"steps": 3}, "keep_checkpoints": 9}
    folder, _ = World(2).run(lambda comm: own_state(comm, helpers.make_job(tmp_path, model=Steady, train=keys)))[0]
    assert len(list_checkpoints(folder)) == 3
    assert len(list((folder / "checkpoints").glob("untrained-*"))) == 1


def test_checkpoint_with_another_models_buffers_is_refused(tmp_path: Path) -> None:
    keys = {"steps": 6, "batch_size": 4, "checkpoint_every": {"steps": 3}}

    class Net(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.line = nn.Linear(7, 3)
            self.add_module(name, nn.Flatten())
            self.get_submodule(name).register_buffer("bank", torch.zeros(2))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.line(x)
            return out

    def job(name: str) -> Job:
        return helpers.make_job(tmp_path, model=lambda: Net(name), train=keys)

    folder, _ = World(2).run(lambda comm: own_state(comm, job("one")))[0]
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"another model: this one has no buffer one.bank"):
        World(2).run(lambda comm: own_state(comm, job("other"), folder))


def test_former_servers_take_frozen_parameters_too(tmp_path: Path) -> None:
    phases = [
        {"strategy": {**PS, "servers": 1}, "until": {"rule": "after", "steps": 3}},
        {"strategy": {"name": "all_reduce"}},
    ]

    def body(comm: Communicator) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        job = helpers.make_job(tmp_path, model=Teacher, phases=phases, train={"steps": 6, "batch_size": 4})
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                if running.totals.phase == 1 and not seen:
                    seen = untrained(running.model, ("line",))
                running.step(running.loss(running.model(batch.inputs), batch.targets))
        return seen

    first, *others = World(3).run(body)
    assert [unlike(found, first) for found in others] == [[], []]


# -- evaluation and the saved model ------------------------------------------------------------------------------
class Kinds(nn.Module):
    """Buffers that are running statistics, and some that only look like them."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.norm, self.other = nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)
        self.sync = nn.SyncBatchNorm(2)
        self.scripted = torch.jit.script(nn.BatchNorm1d(2))
        self.register_buffer("running_mean", torch.zeros(2))
        self.register_buffer("bank", torch.zeros(2))
        self.register_buffer("turn", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("place", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)


POLICIES: dict[str, tuple[dict[str, Policy], dict[str, str]]] = {
    "default": ({}, {"bank": "rank0", "turn": "rank0", "place": "rank0", "norm.running_mean": "mean"}),
    "mean": ({"*": "mean"}, {"bank": "mean", "turn": "mean", "place": "rank0", "norm.running_mean": "mean"}),
    "own": ({"*": "own"}, {"bank": "own", "turn": "own", "place": "own", "norm.running_mean": "mean"}),
    "by name": (
        {"b*": "own", "norm.*": "rank0", "*": "mean"},
        {"bank": "own", "turn": "mean", "place": "rank0", "norm.running_mean": "rank0"},
    ),
}


@pytest.mark.parametrize("what", list(POLICIES))
def test_evaluation_applies_buffer_policies_and_restores(what: str) -> None:
    policies, wanted = POLICIES[what]
    if what == "default":
        statistics = ("norm", "other", "sync", "scripted")
        wanted = {**wanted, "running_mean": "rank0", **{f"{name}.running_var": "mean" for name in statistics}}

    def body(comm: Communicator) -> None:
        model: Any = Kinds()
        parts = Untrained(model, policies)
        before = {name: buffer.fill_(comm.rank) for name, buffer in model.named_buffers()}
        values = {"rank0": 0.0, "mean": 1.0, "own": float(comm.rank)}
        with pytest.raises(ZeroDivisionError), parts.agreed(comm):
            for name, policy in wanted.items():
                assert complex(model.get_buffer(name).reshape(-1)[0]) == values[policy], name
            assert float(model.scratch) == comm.rank
            raise ZeroDivisionError
        for name, buffer in model.named_buffers():
            assert buffer is before[name]
            assert complex(buffer.reshape(-1)[0]) == comm.rank, name
        parts.settle(comm, comm)
        for name in wanted:
            assert complex(model.get_buffer(name).reshape(-1)[0]) == (1.0 if wanted[name] == "mean" else 0.0), name

    World(3).run(body)


def test_means_are_summed_in_float64_in_rank_order(tmp_path: Path) -> None:
    """Summed in float64, in rank order, rounded once."""
    def body(comm: Communicator) -> None:
        values = [torch.randn(5, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
        model = nn.BatchNorm1d(5)
        assert model.running_var is not None
        model.running_var.copy_(values[comm.rank])
        with Untrained(model).agreed(comm):
            mean = (values[0].double() + values[1].double() + values[2].double()) / 3
            assert torch.equal(model.running_var, mean.float())

    World(3).run(body)


def test_pattern_that_matches_nothing() -> None:
    with pytest.raises(ModelError, match=r'train.buffers: "bnak" matches no buffer of the model; it has .*bank'):
        Untrained(Kinds(), {"bnak": "own"})
    Untrained(nn.Linear(2, 2), {"*": "own"})


def test_growing_buffers(tmp_path: Path) -> None:
    """A queue that each worker has filled with a different number of samples, and one that some workers do not have
    yet."""
    def grown(comm: Communicator) -> Any:
        model: Any = nn.Linear(2, 2)
        model.twin = nn.Module()
        for place in (model, model.twin):
            place.register_buffer("queue", None)
        model.register_buffer("cache", torch.zeros(1 + comm.rank), persistent=False)
        if comm.rank != 1:
            model.queue = model.twin.queue = torch.full((2 + comm.rank,), float(comm.rank))
        return model

    def body(comm: Communicator) -> None:
        model = grown(comm)
        before = model.queue
        with Untrained(model).agreed(comm):
            assert model.queue.tolist() == [0.0, 0.0]
        assert model.queue is before
        Untrained(model).share(comm)
        assert model.queue.tolist() == [0.0, 0.0]
        assert comm.rank == 1 or model.twin.queue is model.queue
        assert model.cache.shape == (1 + comm.rank,)
        model = copy.deepcopy(grown(comm))
        means = Untrained(model, {"*": "mean"})
        words = r"^buffer queue is of shape \(2,\) on rank 0, not there on rank 1 and of"
        with pytest.raises(ModelError, match=words), means.agreed(comm):
            pass

    World(3).run(body)


class Bank(nn.Module):
    """A memory bank of unit vectors, from different samples on each worker."""

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(7, 3)
        self.register_buffer("bank", nn.functional.normalize(torch.randn(6, 7), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.bank[: len(x)] = nn.functional.normalize(x.detach(), dim=1)
        out: Tensor = self.line(x)
        return out


@pytest.mark.parametrize(
    ("given", "unit"),
    [({}, True), ({"buffers": "own"}, True), ({"buffers": "mean"}, False), ({"buffers": {"b*": "mean"}}, False)],
)
def test_saved_memory_bank_is_one_workers_by_default(tmp_path: Path, given: helpers.Tables, unit: bool) -> None:
    data = (helpers.points(), helpers.points(9))
    job = helpers.make_job(tmp_path, model=Bank, data=data, train={"steps": 3, "batch_size": 4, **given})
    results = World(3).run(lambda comm: helpers.quiet_train(comm, job))
    bank = load_file(results[0].folder / "model.safetensors")["bank"]
    assert torch.allclose(bank.norm(dim=1), torch.ones(6)) is unit
    assert all(torch.equal(result.model.get_buffer("bank"), bank) for result in results)
    again = Job.load(results[0].folder / "job.toml") if "<" not in job.dump() else job
    assert again.train.buffers == job.train.buffers


@pytest.mark.filterwarnings("ignore:Sparse")
def test_expanded_and_sparse_buffers_train_evaluate_and_resume(tmp_path: Path) -> None:
    class Net(nn.Module):
        scale: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(7, 3)
            self.register_buffer("scale", torch.ones(()).expand(7))
            self.register_buffer("edges", torch.eye(7).to_sparse(), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.line((self.get_buffer("edges") @ (x * self.scale).t()).t())
            return out

    keys = {"steps": 6, "batch_size": 4, "checkpoint_every": {"steps": 3}}
    job = helpers.make_job(tmp_path, model=Net, data=(helpers.points(), helpers.points(9)), train=keys)
    whole = World(2).run(lambda comm: helpers.quiet_train(comm, job))
    helpers.forget_after(whole[0].folder, 0)
    again = World(2).run(lambda comm: helpers.quiet_train(comm, job, resume=whole[0].folder))
    assert (helpers.vector(again[0].model) == helpers.vector(whole[0].model)).all()
    assert again[0].metrics == whole[0].metrics


@pytest.mark.parametrize(
    "value", ["both", 3, {"a": "both"}, {"": "own"}, ["own"], {"a": {"b": "own"}}]
)
def test_invalid_policies_are_refused(value: Any) -> None:
    with pytest.raises(JobError, match=r'^train.buffers.*: must be one of "rank0", "mean", "own", or a table of these'):
        Job(train={"buffers": value})


def test_policies_in_a_job_file_and_on_the_command_line(tmp_path: Path) -> None:
    job = Job(train={"buffers": {"*.bank": "own", "a b": "mean"}})
    (tmp_path / "job.toml").write_text(job.dump())
    assert Job.load(tmp_path / "job.toml") == job
    assert job.override(["train.buffers=mean"]).train.buffers == "mean"
    assert Job.load(tmp_path / "job.toml", ["train.buffers=rank0"]).train.buffer_policies == {"*": "rank0"}
