"""Models that are compiled, scripted or wrapped: they train like the plain model, under its names, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError
from hpctrain.job import Job
from hpctrain.models.wrappers import check_model, load_plain_state, plain_name, plain_state
from hpctrain.replica import replica
from hpctrain.replica.replica import Replica
from hpctrain.run import keeper, untrained
from hpctrain.run.api import Result
from hpctrain.run.command import evaluate_run
from tests import helpers
from tests.marks import mostly_slow, slow

HERE = __name__


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Net(nn.Module):
    """With batch norm, dropout and an own tensor, for images (1, 8, 8); `wrap` is applied to its first part."""

    def __init__(self, wrap: Callable[[nn.Module], Any] = lambda module: module) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.first = wrap(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()))
        self.drop, self.last = nn.Dropout(0.3), nn.Linear(108, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(self.first(x).flatten(1))) * self.scale
        return out


def eagerly(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def compiled() -> Any:
    return eagerly(Net())


def partly_compiled() -> nn.Module:
    return Net(eagerly)


def scripted() -> nn.Module:
    return torch.jit.script(Net())


def partly_scripted() -> nn.Module:
    return Net(torch.jit.script)


def job_of(folder: Path, model: str, strategy: helpers.Tables, **tables: Any) -> Job:
    keys = {"steps": 8, "batch_size": 5, "checkpoint_every": {"steps": 3}, "keep_checkpoints": 9}
    return helpers.make_job(
        folder, model=f"{HERE}:{model}", data={"name": "tests.helpers:pictures"}, strategy=strategy,
        optimizer={"name": "Adam", "lr": 0.01}, train=keys, **tables,
    )  # fmt: skip


def run(job: Job, resume: Path | None = None, size: int = 3) -> list[Result]:
    return World(size).run(lambda comm: helpers.quiet_train(comm, job, resume=resume))


AGREE: dict[str, helpers.Tables] = {
    "shared": {"name": "all_reduce"},
    "overlap": {"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.0005},
    "server": {"name": "parameter_server", "mode": "sync"},
}


WRAPPED = list(product(["compiled", "partly_compiled", "scripted", "partly_scripted"], AGREE))


@pytest.mark.parametrize(("model", "agree"), mostly_slow(WRAPPED, WRAPPED[:1]))
def test_trains_saves_resumes_and_evaluates_like_the_plain_model(tmp_path: Path, model: str, agree: str) -> None:
    plain = run(job_of(tmp_path / "plain", "Net", AGREE[agree]))[0]
    job = job_of(tmp_path / "wrapped", model, AGREE[agree])
    found = run(job)[0]
    wanted, saved = load_file(plain.folder / "model.safetensors"), load_file(found.folder / "model.safetensors")
    assert list(saved) == list(wanted)
    assert all(torch.equal(saved[name], value) for name, value in wanted.items())
    Net().load_state_dict(saved)
    assert evaluate_run(found.folder) == evaluate_run(plain.folder)
    assert evaluate_run(found.folder)[1] == f"test accuracy {found.metrics['metric']:.4f}"
    helpers.forget_after(found.folder, 1)
    again = run(Job.load(found.folder / "job.toml"), found.folder)[0]
    assert (helpers.vector(again.model) == helpers.vector(found.model)).all()


@pytest.mark.parametrize("optimizer", [{"name": "Adam", "lr": 0.01}, slow({"name": "Adafactor", "lr": 0.01})])
def test_checkpoints_with_names_of_older_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: helpers.Tables
) -> None:
    job = job_of(tmp_path, "partly_compiled", AGREE["shared"]).override([f"optimizer.name={optimizer['name']}"])
    whole = run(job)[0]
    with monkeypatch.context() as older:
        for module in (replica, untrained, keeper):
            older.setattr(module, "named_parameters", lambda model: model.named_parameters())
        for module in (untrained, keeper):
            older.setattr(module, "plain_name", lambda name: name)
        old = run(job)[0]
    assert b"first._orig_mod.0.weight" in next((old.folder / "checkpoints").iterdir()).read_bytes()
    helpers.forget_after(old.folder, 1)
    again = run(job, old.folder)[0]
    assert (helpers.vector(again.model) == helpers.vector(whole.model)).all()
    assert all(torch.equal(again.model.state_dict()[name], value) for name, value in whole.model.state_dict().items())


def test_parameter_names() -> None:
    assert plain_name("_orig_mod.a._orig_mod.weight") == "a.weight"
    assert plain_name("worker/0/buffer/_orig_mod.a") == "worker/0/buffer/a"
    assert plain_name("a.my_orig_mod.weight") == "a.my_orig_mod.weight"
    model = partly_compiled()
    assert list(plain_state(model)) == list(Net().state_dict())
    assert [slot.name for slot in Replica(model).layout.slots] == [name for name, _ in Net().named_parameters()]
    assert Replica(model).layout.fingerprint() == Replica(Net()).layout.fingerprint()


def test_loaded_state_must_match_the_model() -> None:
    tensors = Net().state_dict()
    load_plain_state(compiled(), tensors)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_plain_state(compiled(), {name: value for name, value in tensors.items() if name != "scale"})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load_plain_state(compiled(), {**tensors, "more": torch.zeros(1)})


class Stateful(nn.Linear):
    """Keeps a value other than a tensor in its state_dict."""

    def get_extra_state(self) -> Any:
        return {"version": 1}

    def set_extra_state(self, state: Any) -> None:
        assert state == {"version": 1}


def test_non_tensor_extra_state_stays_with_the_model() -> None:
    model = Stateful(2, 2)
    assert list(plain_state(model)) == ["weight", "bias"]
    load_plain_state(Stateful(2, 2), plain_state(model))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Net()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (on_meta, "scale is on the meta device, so it has no values"),
    "a layer on meta": (
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "1.weight is on the meta"
    ),
    "data parallel": (lambda: nn.DataParallel(Net()), "it is a DataParallel, which distributes the model itself"),
    "inside": (lambda: nn.Sequential(nn.DataParallel(Net())), "layer 0 of it is a DataParallel"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_with_a_message_on_every_rank(tmp_path: Path, what: str) -> None:
    make, words = REFUSED[what]

    def body(comm: Communicator) -> None:
        with pytest.raises(ModelError, match=words) as caught:
            helpers.quiet_train(comm, helpers.make_job(tmp_path, model=make))
        assert caught.value.everywhere

    World(2).run(body)
    assert not any(tmp_path.iterdir())


def test_distributed_wrappers_are_recognised_by_module() -> None:
    class Fake(nn.Module):
        pass

    Fake.__module__ = "torch.distributed.fsdp._fully_shard._fully_shard"
    with pytest.raises(ModelError, match="is a Fake, which distributes the model itself"):
        check_model("model", nn.Sequential(Fake()))
