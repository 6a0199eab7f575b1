"""Checkpoints and models on disk: exact to the bit, never partial, never another model's."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain import Job
from hpctrain.comm.base import BFLOAT16
from hpctrain.comm.virtual.world import World
from hpctrain.errors import CheckpointError
from hpctrain.replica.state import Section, State
from hpctrain.run.api import train
from hpctrain.run.checkpoint import (
    FORMAT,
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model,
    save_checkpoint,
    save_model,
)
from hpctrain.run.folder import Narrator
from hpctrain.run.untrained import Untrained

NAMES = {"a.weight": (2, 3), "b": (), "h": (4,)}


def checkpoint(cursor: int = 7) -> Checkpoint:
    torch.manual_seed(cursor)
    flat = torch.randn(32)
    return Checkpoint(
        "f00d",
        {"a.weight": flat[:6].view(2, 3), "b": flat[16], "h": torch.randn(4).bfloat16()},
        State(
            0,
            32,
            {
                "optimizer": Section(
                    {"exp_avg": np.random.default_rng(0).normal(size=32), "half": np.ones(32, BFLOAT16)},
                    {"a.weight": {"row/var": np.ones((2, 1))}},
                    {"0": {"step": ["float32", 3.0], "mu": ["float64", 0.1]}},
                )
            },
            {"versions": 3.0},
            {"seen": [1, 2]},
        ),
        [
            {"random": torch.get_rng_state(), "buffer/n": torch.tensor(3), "buffer/m": torch.ones(2).bfloat16()},
            {
                "random": torch.get_rng_state().flip(0),
                "buffer/f": torch.tensor([True, False]),
                "buffer/e": torch.ones(0),
            },
        ],
        {"cursor": cursor, "books": {"loss": 0.1 + 0.2}},
    )


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_round_trip_bit_for_bit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=2)
    found, wanted = load_checkpoint(path, "f00d", NAMES), checkpoint()
    assert all(same(found.parameters[name], value) for name, value in wanted.parameters.items())
    for own, expected in zip(found.workers, wanted.workers, strict=True):
        assert own.keys() == expected.keys()
        assert all(same(own[name], value) for name, value in expected.items())
    for (place, a), (wanted_place, b) in zip(found.state.arrays(), wanted.state.arrays(), strict=True):
        assert (place, a.dtype, a.shape, a.tobytes()) == (wanted_place, b.dtype, b.shape, b.tobytes())
    assert found.state.head() == wanted.state.head()
    assert (found.progress, found.state.high) == (wanted.progress, 32)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_checkpoint_truncated_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=1)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for length in [*range(0, head, 7), *range(head, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path, "f00d", NAMES)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="truncated"):
        load_checkpoint(path, "f00d", NAMES)


@pytest.mark.parametrize(
    "header",
    [
        None,
        {},
        {"hpctrain": "{"},
        {"hpctrain": "[1]"},
        {"hpctrain": '{"format": "hpctrain-checkpoint-0"}'},
        {"hpctrain": json.dumps({"format": FORMAT})},
        {"hpctrain": json.dumps({"format": FORMAT, "fingerprint": "f00d"})},
        {"hpctrain": json.dumps({"format": FORMAT, "fingerprint": "f00d", "state": 3})},
        {"hpctrain": "[" * 100_000},
    ],
)
def test_foreign_safetensors_files_are_refused(tmp_path: Path, header: dict[str, str] | None) -> None:
    path = tmp_path / "000000000007.safetensors"
    save_file({"x": torch.ones(3)}, path, header)
    with pytest.raises(CheckpointError, match=str(path)) as caught:
        load_checkpoint(path, "f00d", NAMES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle of torch's", b"\xff" * 8, os.urandom(4096)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or not a safetensors file"):
        load_model(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none.safetensors does not exist"):
        load_model(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({**NAMES, "c": (1,)}, "it has no parameter c, which this model has"),
        ({**NAMES, "a.weight": (3, 2)}, r"its a.weight has shape \(2, 3\), this model's \(3, 2\)"),
        ({"a.weight": (2, 3), "b": ()}, "its parameter h is not in this model"),
        (NAMES, "the precision, or the order or groups"),
    ],
)
def test_checkpoint_of_other_model_is_refused(tmp_path: Path, names: dict[str, tuple[int, ...]], message: str) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=1)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path, "beef", names)


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for cursor in (5, 40, 300, 10**12 + 5, 10**13):
        save_checkpoint(tmp_path, checkpoint(cursor), keep=3)
    assert [int(path.stem) for path in list_checkpoints(tmp_path)] == [300, 10**12 + 5, 10**13]
    (tmp_path / "checkpoints" / "zbest.safetensors").touch()  # the user's own file
    save_checkpoint(tmp_path, checkpoint(2 * 10**13), keep=1)
    assert [int(path.stem) for path in list_checkpoints(tmp_path)] == [2 * 10**13]
    assert (tmp_path / "checkpoints" / "zbest.safetensors").exists()
    assert list_checkpoints(tmp_path / "nothing") == []


def test_checkpoint_is_replaced_atomically(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(), keep=1)
    other = checkpoint()
    other.fingerprint = "beef"
    path = save_checkpoint(tmp_path, other, keep=1)
    assert load_checkpoint(path, "beef", NAMES).fingerprint == "beef"


@pytest.mark.parametrize("name", ["checkpoints", "."])
def test_unwritable_checkpoint_folder(tmp_path: Path, name: str) -> None:
    """A file is in the folder's place (permissions would not stop root)."""
    folder = tmp_path / "run"
    if name == ".":
        folder.write_text("a file")
    else:
        folder.mkdir()
        (folder / name).write_text("a file")
    with pytest.raises(CheckpointError, match=r"000000000007.safetensors cannot be written"):
        save_checkpoint(folder, checkpoint(), keep=1)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_checkpoint(tmp_path, checkpoint(), keep=1)


def test_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, checkpoint(), keep=1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpctrain.run.checkpoint.os.fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(), keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [path]
    load_checkpoint(path, "f00d", NAMES)


def test_model_is_a_plain_world_readable_safetensors_file(tmp_path: Path) -> None:
    before, path = os.umask(0o022), tmp_path / "model.safetensors"
    try:
        save_model(path, nn.Linear(2, 3).state_dict(), {"framework": "pt"})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644
    assert sorted(load_file(path)) == sorted(load_model(path)) == ["bias", "weight"]


# -- a worker's own tensors, end to end -----------------------------------------------------------------------
class Odd(nn.Module):
    """Buffers of every kind, changed in every step, differently on each worker."""

    scalar: Tensor
    count: Tensor
    flags: Tensor
    turned: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scalar", torch.tensor(0.0))
        self.register_buffer("count", torch.tensor(0, dtype=torch.int32))
        self.register_buffer("flags", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("turned", torch.zeros(3, 2).t())
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.scalar += x.mean()
                self.count += len(x)
                self.flags[int(self.count) % 3] ^= True
                self.turned += x.mean(0)
                self.scratch += 1
        out: Tensor = self.norm(self.drop(self.line(x))) + self.scalar * 0.01
        return out


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(48, 3, generator=generator), torch.randint(0, 2, (48,), generator=generator))


def run(job: Job, ranks: int, resume: Path | None = None) -> list[Any]:
    """(run folder, model's tensors, the worker's own buffers before averaging) of every rank."""
    own: dict[int, dict[str, Tensor]] = {}
    settle = Untrained.settle

    def spy(untrained: Untrained, workers: Any, comm: Any) -> None:
        if workers is not None:
            own[comm.rank] = {name: buffer.clone() for name, buffer in untrained.buffers().items()}
        settle(untrained, workers, comm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Untrained, "settle", spy)
        results = World(ranks).run(lambda comm: train(job, comm, resume, Narrator(enabled=False)))
    return [(r.folder, r.model.state_dict(), own.get(rank)) for rank, r in enumerate(results)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "sync"}])
def test_workers_resume_with_their_own_buffers(tmp_path: Path, precision: str, strategy: Any) -> None:
    job = Job(
        model=Odd,
        data=partial(samples),
        optimizer="Adam",
        train={"steps": 6, "batch_size": 4, "precision": precision, "checkpoint_every": {"steps": 3}},
        strategy=strategy,
        output=str(tmp_path),
        trace={"enabled": False},
    )
    whole = run(job, 3)
    folder = whole[0][0]
    kept = list_checkpoints(folder)
    assert len(kept) == 2
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    (again / "checkpoints" / kept[1].name).unlink()
    (again / "model.safetensors").unlink()
    resumed = run(job, 3, again)
    workers = 3 if strategy == "all_reduce" else 2
    assert not torch.equal(whole[0][2]["scalar"], whole[1][2]["scalar"])
    for rank in range(workers):
        for before, after in zip(whole[rank][1:], resumed[rank][1:], strict=True):
            assert before.keys() == after.keys()
            assert all(same(after[name], value) for name, value in before.items()), rank
