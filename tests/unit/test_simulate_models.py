"""Models that were never run: what the simulator says of them from their flops."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.task import net, small_job
from hpctrain.data.splits import Splits
from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.run.prepare import prepare_evaluation
from hpctrain.simulate.calibration import Calibration, ModelWork, PassWork
from hpctrain.simulate.command import with_work
from hpctrain.simulate.flops import count, counted
from hpctrain.simulate.measure import measure
from hpctrain.simulate.summary import predict
from tests.unit.test_simulate import BACKWARD, FORWARD, calibration, intervals, simulate

FORWARD_FLOPS = 2 * (7 * 13 + 13 * 5 + 5 * 3)  # of `net`, for a sample
BACKWARD_FLOPS = FORWARD_FLOPS + 2 * (13 * 5 + 5 * 3)  # of all weights, and of all inputs but the first


def known(factor: float = 1.0) -> Calibration:
    """Of a model with `factor` times as many flops and operators as `net`, and other parameters."""
    passes = counted(small_job("unused")).work
    work = ModelWork(
        forward=PassWork(flops=factor * FORWARD_FLOPS, operators=int(factor * passes.forward.operators)),
        backward=PassWork(flops=factor * BACKWARD_FLOPS, operators=int(factor * passes.backward.operators)),
    )
    base = calibration()
    return calibration(model=base.model.model_copy(update={"parameters": 5000, "work": work, "name": "other"}))


class Reading(nn.Module):
    """Cannot run without values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.inner(inputs if float(inputs.sum()) < 1e9 else 2 * inputs)
        return out


class Looking(nn.Module):
    """Has no flops: looks rows of a table up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 3, sparse=True)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.table((inputs[:, 0] > 0).long())
        return out


@torch.library.custom_op("hpctrain_tests::doubled", mutates_args=())
def doubled(value: Tensor) -> Tensor:
    return value * 2.0


doubled.register_autograd(lambda ctx, gradient: gradient * 2.0)


class Foreign(nn.Module):
    """Uses an operator that torch knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = doubled(self.inner(inputs))
        return out


class Answer:
    """An output that hides its tensors."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class Answering(nn.Module):
    """Computes its own loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, inputs: Tensor, targets: Tensor) -> Answer:
        return Answer(nn.functional.cross_entropy(self.inner(inputs), targets))


class Broken(nn.Module):
    """Cannot run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, inputs: Tensor) -> Tensor:
        raise ValueError("no such thing")


@pytest.mark.parametrize(("model", "loss"), [(net, "cross_entropy"), (Reading, "cross_entropy"), (Answering, "model")])
def test_passes_are_counted_with_and_without_values(model: Any, loss: str, tmp_path: Path) -> None:
    found = counted(small_job(tmp_path, model=model, loss={"name": loss}))
    assert found.work.forward.flops == FORWARD_FLOPS
    assert found.work.backward.flops == BACKWARD_FLOPS
    assert [name.removeprefix("inner.").partition(".")[0] for name in found.order] == ["4", "4", "2", "2", "0", "0"]
    assert sum(found.shares) == pytest.approx(1.0)
    assert sum(found.shares[-2:]) == pytest.approx(2 * 7 * 13 / BACKWARD_FLOPS)  # of the first layer, which is the last


def test_counting_makes_batches_as_training_does(tmp_path: Path) -> None:
    """Of samples of different lengths."""
    made = small_job(tmp_path, data={"name": ragged, "collate": padded}, model=nn.Linear(3, 2), loss={"name": "mse"})
    assert counted(made).work.forward.flops > 0


def ragged() -> Splits:
    return Splits([(torch.ones(1 + index % 3), torch.zeros(2)) for index in range(30)])


def padded(samples: list[Any]) -> tuple[Tensor, Tensor]:
    rows = torch.nn.utils.rnn.pad_sequence([pair[0] for pair in samples], batch_first=True)
    return torch.nn.functional.pad(rows, (0, 3 - rows.shape[1])), torch.stack([pair[1] for pair in samples])


def test_counting_leaves_the_model_alone(tmp_path: Path) -> None:
    job = small_job(tmp_path, model=Reading)

    def body(comm: Communicator) -> None:
        parts = prepare_evaluation(job, comm)
        before = [p.clone() for p in parts.model.parameters()]
        state = torch.default_generator.get_state()
        count(parts)
        assert torch.equal(state, torch.default_generator.get_state())
        assert all(p.grad is None for p in parts.model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))

    World(1, [0]).run(body)


@pytest.mark.parametrize("learn", [False, True])
def test_model_that_was_never_run_takes_time_by_its_operations(learn: bool, tmp_path: Path) -> None:
    """The calibrated model does four times as much, in as much time."""
    quick = {"hosts": [{"count": 2}], "link": {"mbit_per_s": 1e6}}
    found = simulate(small_job(tmp_path, strategy={"name": "local_sgd"}), quick, known(4.0), learn=learn)
    assert found.from_flops
    assert fmean(intervals(found)[0][:-1]) / 1e9 == pytest.approx((FORWARD + BACKWARD) / 4, rel=0.1)


def test_other_model_has_a_wider_error_bar(tmp_path: Path) -> None:
    alone: dict[str, Any] = {"hosts": [{}]}
    same = predict(simulate(small_job(tmp_path), alone), calibration())
    other = predict(simulate(small_job(tmp_path), alone, known()), known())
    assert other.step == pytest.approx(same.step)
    assert (same.error, other.error) == pytest.approx((calibration().error, calibration().error_other_model), abs=0.02)


def test_batches_of_another_model_may_have_any_size(tmp_path: Path) -> None:
    assert simulate(small_job(tmp_path, train={"batch_size": 500}), known=known()).from_flops


def test_same_parameters_with_other_samples_are_another_model(tmp_path: Path) -> None:
    """A convolution over images of twice the size."""

    def job(size: int) -> Job:
        data = TensorDataset(torch.randn(50, 1, size, size), torch.randint(3, (50,)))
        return small_job(tmp_path, model=small_convolution, data=(data, data), train={"precision": "float32"})

    calibrated = with_work(measure(job(8), [0, 0]), job(8))
    assert not simulate(job(8), known=calibrated).from_flops
    larger = simulate(job(16), known=calibrated)
    assert larger.from_flops


def test_calibration_keeps_what_its_model_does_and_what_checkpoints_take(tmp_path: Path) -> None:
    found = with_work(measure(small_job(tmp_path), [0, 0]), small_job(tmp_path))
    assert found.model.work is not None
    assert found.model.work.forward.flops == FORWARD_FLOPS
    assert found.spans["checkpoint"].most == 216 * 8  # bytes of the arena
    assert found.spans["checkpoint"].seconds(216 * 8) > 0
    found.save(tmp_path / "known.toml")
    assert Calibration.load(tmp_path / "known.toml") == found


def small_convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Looking, "operations it takes is not known .torch counts none for its operators.; calibrate with this job"),
        (Foreign, "not known .torch does not know what its operator hpctrain_tests.doubled takes.; calibrate with"),
        (Broken, "not known .a pass to count them raised ValueError: no such thing.; calibrate with this job"),
    ],
)
def test_model_whose_flops_nobody_knows_is_refused(model: Any, words: str, tmp_path: Path) -> None:
    job = small_job(tmp_path, model=model, train={"precision": "float32"})
    with pytest.raises(ClusterError, match=words):
        simulate(job, known=known())
    assert not list(tmp_path.iterdir())


def test_such_a_model_is_simulated_if_it_was_measured(tmp_path: Path) -> None:
    """What cannot be counted is needed for other models only."""
    job = small_job(tmp_path, model=Foreign, strategy={"name": "all_reduce"})
    calibrated = with_work(measure(job, [0, 0]), job)
    assert calibrated.model.work is None
    assert not simulate(job, known=calibrated).from_flops
