"""A model's tensors in a job's precision: what takes part in training is cast, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError
from hpctrain.run.precision import bring
from tests import helpers

CPU = torch.device("cpu")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Mixed(nn.Module):
    """One buffer and one frozen parameter of every dtype, in a model of dtype `own`."""

    def __init__(self, own: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.line = nn.Linear(2, 2, dtype=own)
        self.norm = nn.BatchNorm1d(2, dtype=own)
        for dtype in (*FLOATS, torch.complex64, torch.int8, torch.bool, torch.float8_e4m3fn):
            name = str(dtype).removeprefix("torch.")
            self.register_buffer(f"b_{name}", torch.ones(3).to(dtype))
            self.register_parameter(f"f_{name}", nn.Parameter(torch.ones(3).to(dtype), requires_grad=False))
        self.register_buffer("b_complex128", torch.ones(3, dtype=torch.complex128), persistent=False)
        self.register_buffer("nothing", None)


@pytest.mark.parametrize("own", FLOATS)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float64, torch.bfloat16])
def test_only_tensors_of_the_models_dtype_are_cast(own: torch.dtype, wanted: torch.dtype) -> None:
    model = Mixed(own)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    dtypes = {name: tensor.dtype for name, tensor in before.items()}
    assert bring(model, CPU, wanted) is model
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert {n: t.dtype for n, t in after.items()} == {n: wanted if d is own else d for n, d in dtypes.items()}
    assert all(after[name] is p for name, p in before.items() if isinstance(p, nn.Parameter))
    assert after["norm.running_mean"].dtype is wanted


def test_trainable_parameters_of_several_dtypes_become_one() -> None:
    model = bring(nn.Sequential(nn.Linear(2, 2).half(), nn.Linear(2, 2).double()), CPU, torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


class Rotated(nn.Module):
    """Rotary position embedding: a complex buffer that turns pairs of features."""

    turn: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)
        self.register_buffer("turn", torch.polar(torch.ones(4), torch.linspace(0.3, 2, 4)))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype is torch.bfloat16 else x
        turned = torch.view_as_real(torch.view_as_complex(wide.view(-1, 4, 2)) * self.turn).reshape(-1, 8)
        out: Tensor = self.last(turned.to(x.dtype))
        return out


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16", "mixed_bfloat16"])
def test_rotary_embeddings_stay_complex_in_the_saved_model(tmp_path: Path, precision: str) -> None:
    inputs = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, torch.arange(24) % 3)
    job = helpers.make_job(
        tmp_path, model=Rotated, data=(data, data), train={"steps": 3, "batch_size": 4, "precision": precision}
    )
    results = World(2).run(lambda comm: helpers.quiet_train(comm, job))
    saved = load_file(results[0].folder / "model.safetensors")
    assert torch.equal(saved["turn"], Rotated().turn)
    assert all(torch.equal(result.model.get_buffer("turn"), saved["turn"]) for result in results)


# -- memory shared by several elements --------------------------------------------------------------------------
def test_shared_elements_are_separated_and_names_stay_tied() -> None:
    model: Any = nn.Module()
    model.line = nn.Linear(2, 2)
    model.inner = nn.Module()
    windows = torch.arange(6.0).unfold(0, 3, 1)
    for place in (model, model.inner):
        place.register_buffer("windows", windows)
    model.register_buffer("scale", torch.ones(()).expand(4))
    model.frozen = nn.Parameter(torch.ones(1).expand(4), requires_grad=False)
    table = torch.arange(12.0).view(3, 4).t()
    model.register_buffer("table", table)
    model.register_buffer("row", table[0])
    bring(model, CPU, torch.float32)
    assert model.windows is model.inner.windows
    assert torch.equal(model.windows, windows)
    for tensor in (model.windows, model.scale, model.frozen):
        with torch.no_grad():
            tensor.copy_(tensor + 1)
    assert model.scale.tolist() == model.frozen.tolist() == [2.0] * 4
    assert model.table is table
    model.table[0, 0] = 7.0
    assert float(model.row[0]) == 7.0


# -- refused models ---------------------------------------------------------------------------------------------
def _with(name: str, tensor: Tensor, **how: Any) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer(name, tensor, **how)
    return model


def _complex() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].turn = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return model


def _sparse(trained: bool) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].edges = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=trained)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "complex parameter": (_complex, r"^parameter 0.turn is complex64, .* use torch.view_as_complex in forward$"),
    "sparse parameter": (lambda: _sparse(True), r"^parameter 0.edges is sparse, .* make it dense$"),
    "sparse frozen": (lambda: _sparse(False), r"^parameter 0.edges is sparse, which model.safetensors cannot hold"),
    "sparse buffer": (lambda: _with("edges", torch.eye(2).to_sparse_csr()), r"^buffer 0.edges is sparse, .*persistent"),
    "complex128 buffer": (
        lambda: _with("turn", torch.ones(2, dtype=torch.complex128)),
        r"^buffer 0.turn is complex128, which model.safetensors cannot hold; .*persistent=False",
    ),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_by_name(what: str) -> None:
    make, words = REFUSED[what]
    with pytest.raises(ModelError, match=words):
        bring(make(), CPU, torch.float32)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_quantised_values_are_refused_by_name() -> None:
    codes = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    with pytest.raises(ModelError, match=r"^buffer 0.codes is quantised \(qint8\), .*dequantize"):
        bring(_with("codes", codes, persistent=False), CPU, torch.float32)


def test_unsaved_tensors_may_be_sparse_or_complex128() -> None:
    bring(_with("edges", torch.eye(2).to_sparse(), persistent=False), CPU, torch.float64)
    bring(_with("turn", torch.ones(2, dtype=torch.complex128), persistent=False), CPU, torch.float64)
