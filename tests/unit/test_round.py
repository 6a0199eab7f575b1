"""What every round must handle under any strategy: the weight of its loss, non-finite gradients, parameters that no
loss depends on, and gradient stretches that are sent only when final."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from hpctrain.clock.decisions import Ask
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError, NanError
from hpctrain.job import Job
from hpctrain.run.api import session, train
from hpctrain.run.folder import Narrator
from hpctrain.strategies.contribution import Contribution, RoundTotals
from tests import helpers
from tests.marks import mostly_slow, slow
from tests.unit.test_losses import pair

SIZE = 4
SOME = np.arange(40) % 3 == 0  # parameters that a loss depends on
ADAMW = {"name": "AdamW", "lr": 0.02, "weight_decay": 0.3}
MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def trained(tmp_path: Path, agree: str, size: int = SIZE, **tables: Any) -> tuple[Any, Job]:
    """(parameters, job) of `size` ranks in float64, equal on all of them."""
    strategy, _ = helpers.SYNCHRONOUS[agree]
    strategy = {**strategy, "servers": size} if strategy.get("servers") == -1 else strategy
    keys = {"steps": 24, "batch_size": 3, "precision": "float64", **tables.pop("train", {})}
    job = helpers.make_job(tmp_path, strategy=strategy, train=keys, **tables)

    def body(comm: Communicator) -> Any:
        return helpers.vector(helpers.quiet_train(comm, job).model)

    found = World(size).run(body)
    assert all((each == found[0]).all() for each in found)
    return found[0], job


# -- weights of the loss ---------------------------------------------------------------------------------------
def ignoring(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, ignore_index=-100, weight=torch.tensor([1.0, 3.0, 0.5]).double())


def not_class_0(outputs: Tensor, targets: Tensor) -> Tensor:
    total, count = pair(outputs, targets)
    return total / count


@pytest.mark.parametrize("agree", mostly_slow(helpers.SYNCHRONOUS, ("shared", "message", "servers")))
@pytest.mark.parametrize("loss", ["class weights", slow("pair")])
def test_mean_is_over_the_weight_of_the_whole_round(tmp_path: Path, agree: str, loss: str):
    keys: Any
    if loss == "pair":
        keys, data, reference = "tests.unit.test_losses:pair", helpers.points(), not_class_0
    else:
        keys, data, reference = {"name": "cross_entropy", "weight": [1.0, 3.0, 0.5]}, helpers.some_count(), ignoring
    found, job = trained(
        tmp_path, agree, optimizer=MOMENTUM, data=data, loss=keys, train={"batch_size": 2, "accumulate": 3}
    )
    wanted = helpers.plain(job, helpers.workers_of(agree, SIZE), data=data, loss=reference)
    assert helpers.difference(found, wanted) < 1e-10


@pytest.mark.parametrize("strategy", [helpers.SYNCHRONOUS["shared"][0], helpers.served("sync"), helpers.served()])
def test_round_without_counting_targets_has_a_zero_gradient(tmp_path: Path, strategy: helpers.Tables):
    inputs, targets = helpers.points().tensors
    nothing = TensorDataset(inputs, torch.full_like(targets, -100))

    def body(comm: Communicator) -> Any:
        job = helpers.make_job(tmp_path, strategy=strategy, data=nothing)
        return helpers.vector(helpers.quiet_train(comm, job).model)

    torch.manual_seed(0)
    untouched = helpers.vector(helpers.net())
    assert all((found == untouched).all() for found in World(3).run(body))


def test_evaluation_weights_the_loss_in_the_same_way(tmp_path: Path):
    data = helpers.some_count()
    keys = {"precision": "float64"}
    job = helpers.make_job(tmp_path, data=(data, data), metric="tests.helpers:no_metric", train=keys)
    result = World(3).run(lambda comm: helpers.quiet_train(comm, job))[0]
    inputs, targets = data.tensors
    with torch.no_grad():
        wanted = functional.cross_entropy(result.model(inputs.double()), targets)
    assert result.metrics["loss"] == pytest.approx(float(wanted), rel=1e-12)


# -- parameters without a gradient -------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("agree", ["shared", slow("message"), slow("colocated")])
def test_weights_and_missing_gradients_with_small_rounds(tmp_path: Path, agree: str, size: int):
    """In some of them no target counts, or a parameter has no gradient on any worker."""
    strategy, servers = helpers.SYNCHRONOUS[agree]
    found = World(size).run(lambda comm: helpers.uneven_rounds(comm, tmp_path, strategy, servers))
    assert max(found) < 1e-10


@pytest.mark.parametrize("agree", ["shared", "message"])
def test_weights_and_missing_gradients_on_several_nodes(tmp_path: Path, agree: str):
    strategy, servers = helpers.SYNCHRONOUS[agree]
    found = World(5, nodes=[0, 0, 0, 1, 1]).run(lambda comm: helpers.uneven_rounds(comm, tmp_path, strategy, servers))
    assert max(found) < 1e-10


@pytest.mark.parametrize(
    "optimizer", [ADAMW, slow(MOMENTUM), slow({"name": "Adafactor", "lr": 0.02, "weight_decay": 0.3})]
)
@pytest.mark.parametrize("agree", mostly_slow(helpers.SYNCHRONOUS, ("shared", "message", "servers")))
def test_parameters_without_a_gradient_are_left_alone(tmp_path: Path, agree: str, optimizer: helpers.Tables):
    """As torch does in one process with the whole batch, which counts the steps of each parameter separately."""
    if optimizer["name"] == "Adafactor" and agree == "shared":
        pytest.skip("not elementwise: goes by messages")
    found, job = trained(tmp_path, agree, model=helpers.Sometimes, optimizer=optimizer)
    wanted = helpers.plain(job, helpers.workers_of(agree, SIZE), helpers.Sometimes)
    assert helpers.difference(found, wanted) < 1e-10


@pytest.mark.parametrize("optimizer", [ADAMW, slow(MOMENTUM)])
@pytest.mark.parametrize("strategy", [helpers.SYNCHRONOUS["shared"][0], helpers.SYNCHRONOUS["servers"][0]])
def test_state_without_a_gradient_survives_checkpoints_and_phases(
    tmp_path: Path, strategy: helpers.Tables, optimizer: helpers.Tables
):
    """Resumed in mid-run, or moved from one cut of the arena to another: the same result."""
    keys = {"steps": 24, "batch_size": 3, "checkpoint_every": {"steps": 7}, "keep_checkpoints": 9}
    keys["precision"] = "float64"
    served = helpers.served("sync", servers=2, colocated=True)
    split = [
        {"strategy": strategy, "until": {"rule": "after", "steps": 5}},
        {"strategy": served, "until": {"rule": "after", "steps": 8}},
        {"strategy": strategy},
    ]

    def body(comm: Communicator) -> tuple[Any, Any, Any]:
        job = helpers.make_job(tmp_path, model=helpers.Sometimes, optimizer=optimizer, strategy=strategy, train=keys)
        whole = helpers.quiet_train(comm, job)
        first = helpers.vector(whole.model)
        if comm.rank == 0:
            helpers.forget_after(whole.folder, 1)
        comm.barrier()
        again = helpers.vector(helpers.quiet_train(comm, job, resume=whole.folder).model)
        if strategy["name"] != "all_reduce":
            return first, again, first
        job = helpers.make_job(tmp_path, model=helpers.Sometimes, optimizer=optimizer, phases=split, train=keys)
        return first, again, helpers.vector(helpers.quiet_train(comm, job).model)

    first, again, switched = World(SIZE).run(body)[0]
    assert (again == first).all()
    assert helpers.difference(switched, first) < 1e-10


@pytest.mark.parametrize("keys", [{}, {"momentum_correction": True}])
@pytest.mark.parametrize("optimizer", [ADAMW, slow(MOMENTUM)])
def test_asynchronous_updates_skip_parameters_without_a_gradient(
    tmp_path: Path, optimizer: helpers.Tables, keys: helpers.Tables
):
    """Also in a resumed run, and with velocities per worker."""

    def body(comm: Communicator) -> list[Any]:
        job = helpers.make_job(
            tmp_path, model=helpers.Sometimes, optimizer=optimizer, strategy=helpers.served(servers=2, **keys),
            train={"steps": 24, "checkpoint_every": {"steps": 10}, "keep_checkpoints": 9},
        )  # fmt: skip
        result = helpers.quiet_train(comm, job)
        if comm.rank == 0:
            helpers.forget_after(result.folder, 0)
        comm.barrier()
        again = helpers.quiet_train(comm, job, resume=result.folder)
        return [run.model.get_parameter("never.weight").detach().numpy().copy() for run in (result, again)]

    torch.manual_seed(0)
    before = helpers.Sometimes().never.weight.detach().numpy()
    for found in World(5).run(body):
        assert all((weight == before).all() for weight in found)


def test_parameters_without_a_gradient_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(7, 3), nn.Linear(2, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.used(inputs)

    def body(comm: Communicator) -> None:
        train(helpers.make_job(tmp_path, model=Unused, train={"steps": 3}), comm)

    World(2).run(body)
    out = capsys.readouterr().out
    warning = "warning: parameters spare.weight, spare.bias did not contribute to the loss of the first step"
    assert out.count(warning) == 1


# -- what is not trained though it was meant to be ---------------------------------------------------------------
def frozen_first() -> nn.Module:
    model = helpers.net()
    model.get_submodule("0").requires_grad_(False)
    return model


def test_unfreezing_a_parameter_outside_the_arena_is_refused(tmp_path: Path):
    def body(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path, model=frozen_first), comm, out=Narrator(enabled=False)) as s:
            for step, batch in enumerate(s.batches()):
                if step == 2:
                    s.model.get_submodule("0").requires_grad_(True)
                s.step(s.loss(s.model(batch.inputs), batch.targets))

    with pytest.raises(ModelError, match=r"parameter 0.weight was frozen .* start with it trainable, freeze"):
        World(2).run(body)


@pytest.mark.parametrize("agree", ["shared", "message", "overlap", "servers"])
def test_freezing_and_unfreezing_in_the_loop_works(tmp_path: Path, agree: str):
    """As the error message advises: equal to torch."""
    strategy, _ = helpers.SYNCHRONOUS[agree]
    keys = {"steps": 12, "batch_size": 3, "precision": "float64"}
    job = helpers.make_job(tmp_path, strategy=strategy, optimizer=ADAMW, train=keys)

    def body(comm: Communicator) -> Any:
        with session(job, comm, out=Narrator(enabled=False)) as s:
            for step, batch in enumerate(s.batches()):
                s.model.get_submodule("0").requires_grad_(step >= 5)
                s.step(s.loss(s.model(batch.inputs), batch.targets))
        return helpers.vector(s.model)

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.steps = helpers.net(), 0

        def forward(self, inputs: Tensor) -> Tensor:
            self.net.get_submodule("0").requires_grad_(self.steps >= 5)
            self.steps += 1
            return self.net(inputs)

    wanted = helpers.plain(job, helpers.workers_of(agree, SIZE), Frozen)
    assert helpers.difference(World(SIZE).run(body)[0], wanted) < 1e-10


def test_parameters_outside_the_model_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def body(comm: Communicator) -> None:
        head = nn.Linear(3, 3)
        with session(helpers.make_job(tmp_path, train={"steps": 3}), comm) as s:
            for batch in s.batches():
                batch.inputs.requires_grad_()  # a leaf, but no parameter
                s.step(s.loss(head(s.model(batch.inputs)), batch.targets))

    World(2).run(body)
    out = capsys.readouterr().out
    assert out.count("warning: the loss depends on parameters of shape (3,), of shape (3, 3) of no module in the") == 1


# -- gradients that are not finite -----------------------------------------------------------------------------
class _Poison(torch.autograd.Function):
    """The identity, except that the gradient is not finite where `bad`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, bad: bool) -> Tensor:
        ctx.bad = bad
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient * torch.inf if ctx.bad else gradient), None


class Poisoned(nn.Module):
    """Sample 99's gradient of `hidden.bias` is not finite, the loss is. The quick check only covers `wide`."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.hidden, self.last = nn.Linear(7, 3000), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        bias = _Poison.apply(self.hidden.bias, bool((inputs[:, 0] == 99).any()))
        return self.last(functional.linear(inputs, self.hidden.weight) + bias) + self.wide(inputs).mean()


class PoisonedFirst(Poisoned):
    """With that parameter at the beginning of the arena."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.hidden = nn.Linear(7, 1), nn.Linear(7, 7)


def one_bad(place: int) -> TensorDataset:
    inputs, targets = helpers.points().tensors
    inputs[place, 0] = 99
    return TensorDataset(inputs, targets)


def poisoned_run(tmp_path: Path, model: type, strategy: helpers.Tables, **train: Any) -> str:
    """The error of a run in which worker 1's third step has the bad sample."""
    size = 3 if strategy.get("colocated") else 3 + strategy.get("servers", 0)
    data = one_bad(2 * 6 * 3 + 7)
    keys = {"steps": 8, "checkpoint_every": {"steps": 1}, "keep_checkpoints": 2, **train}

    def body(comm: Communicator) -> None:
        job = helpers.make_job(
            tmp_path, model=model, strategy=strategy, data={"name": data, "shuffle": False}, train=keys
        )
        helpers.quiet_train(comm, job)

    with pytest.raises(NanError) as raised:
        World(size).run(body)
    for path in tmp_path.glob("*/checkpoints/*.safetensors"):
        assert_finite(path)
    assert not list(tmp_path.glob("*/model.safetensors"))
    return str(raised.value)


def assert_finite(path: Path) -> None:
    from safetensors.torch import load_file

    assert all(torch.isfinite(tensor).all() for tensor in load_file(path).values() if tensor.is_floating_point())


@pytest.mark.parametrize("clip", [None, slow(1.0)])
@pytest.mark.parametrize("agree", [name for name in helpers.SYNCHRONOUS if name != "all_serve"])
def test_nan_gradient_is_detected_in_its_step(tmp_path: Path, agree: str, clip: float | None):
    strategy = helpers.SYNCHRONOUS[agree][0]
    message = poisoned_run(tmp_path, Poisoned, strategy, clip_norm=clip)
    assert "the gradient of parameter hidden.bias" in message
    assert "in step 2 (phase 0)" in message
    if strategy["name"] == "all_reduce" and strategy.get("exchange") == "message" and agree != "overlap":
        assert "summed over the workers, is not finite" in message
    else:
        assert "is not finite on rank 1" in message


@pytest.mark.parametrize("mode", ["async", "bounded"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_nan_gradient_is_detected_in_asynchronous_phases(tmp_path: Path, mode: str, optimizer: str):
    data = one_bad(30)

    def body(comm: Communicator) -> None:
        job = helpers.make_job(
            tmp_path, model=Poisoned, strategy=helpers.served(mode), optimizer=optimizer,
            data={"name": data, "shuffle": False},
        )  # fmt: skip
        helpers.quiet_train(comm, job)

    with pytest.raises(NanError, match=r"the gradient of parameter hidden.bias is not finite on rank [01] in step "):
        World(3).run(body)


@pytest.mark.parametrize("agree", ["shared", "message", "ring", "overlap", "servers"])
def test_quick_check_finds_the_rank_before_the_exchange(tmp_path: Path, agree: str):
    """Everything in backward after the fault is not finite, so it is visible where backward ends."""
    message = poisoned_run(tmp_path, PoisonedFirst, helpers.SYNCHRONOUS[agree][0])
    assert "the gradient of parameter hidden.bias is not finite on rank 1 in step 2" in message


@pytest.mark.parametrize("agree", mostly_slow(helpers.SYNCHRONOUS, ("shared", "message", "servers")))
def test_nan_skip_leaves_steps_with_nan_gradients_out(tmp_path: Path, agree: str):
    found, _ = trained(
        tmp_path, agree, model=Poisoned, data={"name": one_bad(40), "shuffle": False}, train={"nan": "skip"}
    )
    assert np.isfinite(found).all()


@pytest.mark.parametrize("strategy", [helpers.SYNCHRONOUS["message"][0], helpers.served(colocated=True)])
def test_non_finite_checkpoints_and_models_are_not_saved(
    tmp_path: Path, strategy: helpers.Tables, capsys: pytest.CaptureFixture[str]
):
    """The update overflows with finite gradients; the next loss would show it, but there is none."""

    def body(comm: Communicator) -> None:
        job = helpers.make_job(
            tmp_path, strategy=strategy, optimizer={"name": "SGD", "lr": 100.0}, loss="tests.unit.test_round:exploding",
            train={"steps": 6, "checkpoint_every": {"steps": 2}, "keep_checkpoints": 1}, data={"queue": "static"},
        )  # fmt: skip
        train(job, comm)

    CALLS.clear()
    with pytest.raises(NanError, match=r"parameter [\w.]+ is not finite at the end of the run, so no model is saved"):
        World(1).run(body)
    [folder] = tmp_path.iterdir()
    assert not (folder / "model.safetensors").exists()
    [kept] = (folder / "checkpoints").glob("*.safetensors")
    assert kept.stem == f"{4 * 6:012d}"
    assert_finite(kept)
    assert "is not finite; older ones are kept" in capsys.readouterr().out


def exploding(outputs: Tensor, targets: Tensor) -> Tensor:
    """In the sixth step its gradient is as large as float32 can be."""
    CALLS.append(None)
    return functional.cross_entropy(outputs, targets) * (1e38 if len(CALLS) == 6 else 1e-5)


CALLS: list[None] = []


def test_buffers_with_nan_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The step is skipped, but batch norm has seen the bad batch."""
    splits = helpers.pictures()
    splits.train.tensors[0][3] = torch.nan
    job = helpers.make_job(tmp_path, model="tests.helpers:noisy_net", data=splits, train={"epochs": 1, "nan": "skip"})
    World(2).run(lambda comm: train(job, comm))
    assert "warning: buffer 1.running_mean of the saved model holds NaN" in capsys.readouterr().out


def test_gradients_with_overflowing_squares_count_as_finite(tmp_path: Path):
    def body(comm: Communicator) -> Any:
        job = helpers.make_job(tmp_path, loss="tests.unit.test_round:huge", optimizer={"name": "SGD", "lr": 1e-30})
        return helpers.vector(helpers.quiet_train(comm, job).model)

    assert np.isfinite(World(2).run(body)[0]).all()


def huge(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets) * 1e25


# -- overlap -----------------------------------------------------------------------------------------------------
class Reentrant(nn.Module):
    """A block that is used three times, each under reentrant checkpointing; optionally only from some pass on."""

    def __init__(self, first: int = 0) -> None:
        super().__init__()
        self.first, self.block, self.last = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.passes, self.since = 0, first

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        self.passes += 1
        for _ in range(3 if self.passes > self.since else 1):
            if self.passes > self.since:
                hidden = checkpoint(self._block, hidden, use_reentrant=True)
            else:
                hidden = self._block(hidden)
        return self.last(hidden)

    def _block(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.block(hidden))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_overlap_sends_reused_parameters_once_final(tmp_path: Path, accumulate: int):
    keys = {"accumulate": accumulate}
    plain_, _ = trained(tmp_path, "message", model=Reentrant, train=keys)
    overlapped, _ = trained(tmp_path, "overlap", model=Reentrant, train=keys)
    assert (plain_ == overlapped).all()


def test_overlap_refuses_unforeseen_reuse(tmp_path: Path):
    with pytest.raises(ModelError, match=r"the gradient of parameter (last|block|first).* was still being added to"):
        trained(tmp_path, "overlap", model={"name": Reentrant, "first": 4})


# -- what goes over the wire -------------------------------------------------------------------------------------
def test_rows_return_what_was_put_into_them():
    used = np.arange(70) % 3 > 0
    for part in (
        Contribution(5, 2.5, 0.25, Ask.INTERRUPT | Ask.CHECKPOINT, 7, used, 0.125),
        Contribution(0, 0.0, float("inf"), Ask.NOTHING, 0, None),
    ):
        assert repr(Contribution.decode(part.encode(70), 70)) == repr(part)


def test_round_combines_its_rows():
    one = Contribution(4, 2.0, 3.0, Ask.INTERRUPT, 0, np.array([True, False, False]))
    two = Contribution(4, 6.0, 1.0, Ask.NOTHING, 0, np.array([False, False, True]))
    found = RoundTotals.of([one, two])
    assert (found.samples, found.weight, found.loss, found.wish, found.skip) == (8, 8.0, 1.5, Ask.INTERRUPT, False)
    assert found.used is not None
    assert found.used.tolist() == [True, False, True]
    assert RoundTotals.of([one, Contribution(4, 1.0, 1.0, Ask.NOTHING)]).used is None
    assert RoundTotals.of([one, Contribution(4, 1.0, 1.0, Ask.NOTHING, bad=2)]).faulty == 1
    scaled = RoundTotals.of([one, Contribution(4, 1.0, 1.0, Ask.NOTHING, bad=-2)])
    assert (scaled.faulty, scaled.overflow, scaled.skip) == (None, True, True)


@pytest.mark.parametrize(
    "parts",
    [
        [Contribution(3, 3.0, 0.5, Ask.NOTHING), Contribution(2, 2.0, 1.5, Ask.CHECKPOINT, used=SOME)],
        [Contribution(3, 3.0, 0.5, Ask.NOTHING, used=SOME), Contribution(2, 2.0, 1.5, Ask.STOP, used=~SOME)],
        [Contribution(3, 3.0, 0.5, Ask.NOTHING, bad=-1), Contribution(2, 2.0, float("nan"), Ask.NOTHING)],
        [Contribution(1, 1.0, 0.5, Ask.NOTHING, bad=4, used=SOME), Contribution.nothing(Ask.LEAVE, SOME.size)],
    ],
)
def test_totals_of_encoded_rows_are_those_of_contributions(parts: list[Contribution]) -> None:
    table = np.array([part.encode(SOME.size) for part in parts])
    rows, whole = RoundTotals.of_rows(table, SOME.size), RoundTotals.of(parts)
    assert (rows.used is None) == (whole.used is None)
    if whole.used is not None:
        assert rows.used is not None
        assert rows.used.tolist() == whole.used.tolist()
    assert replace(rows, used=None, loss=0.0) == replace(whole, used=None, loss=0.0)
    assert rows.loss == pytest.approx(whole.loss, nan_ok=True)
