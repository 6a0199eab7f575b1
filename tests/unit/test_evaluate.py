"""Evaluation: every sample once, over any number of workers, and nothing left changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import IterableDataset, TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual import World
from hpctrain.evaluate import evaluate


class Numbers(IterableDataset[Any]):
    """A stream that does not tell its length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for number in range(self.count):
            yield torch.tensor([float(number)]), torch.tensor([0.0])


class Measured(Numbers):
    def __len__(self) -> int:
        return self.count


def in_memory(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(float(count))[:, None], torch.zeros(count, 1))


def largest(outputs: Tensor, targets: Tensor) -> float:
    return float(outputs.sum() / len(outputs))


def measure(model: nn.Module, dataset: Any, comm: Communicator, batch_size: int = 4) -> tuple[float, float]:
    return evaluate(model, dataset, mse_loss, largest, comm, batch_size, lambda batch: batch, nullcontext)[:2]


@pytest.mark.parametrize("kind", [in_memory, Numbers, Measured])
@pytest.mark.parametrize("count", [1, 3, 16, 37])
@pytest.mark.parametrize("ranks", [1, 3, 5])
def test_every_sample_once(kind: Any, count: int, ranks: int) -> None:
    """The means do not depend on the ranks, of which some may have no sample."""
    results = World(ranks).run(lambda comm: measure(nn.Identity(), kind(count), comm))
    squares = sum(number**2 for number in range(count)) / count
    assert results == [pytest.approx((squares, (count - 1) / 2))] * ranks
    assert len(set(results)) == 1


def test_nothing_is_left_changed() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.frozen = nn.BatchNorm1d(1), nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            torch.rand(3)
            out: Tensor = self.norm(self.frozen(x))
            return out

    def body(comm: Communicator) -> None:
        torch.manual_seed(comm.rank)
        model = Noisy().train()
        model.frozen.eval()
        modes = [module.training for module in model.modules()]
        state = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        measure(model, in_memory(9), comm)
        assert [module.training for module in model.modules()] == modes
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(p.grad is None for p in model.parameters())
        assert torch.is_grad_enabled()

    World(2).run(body)


def test_modes_are_put_back_after_an_error() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = Broken().train()
    with pytest.raises(ZeroDivisionError):
        World(1).run(lambda comm: measure(model, in_memory(3), comm))
    assert model.training
