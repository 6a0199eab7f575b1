"""Optimizers on stretches of the arena: the same results whole or cut; their state survives other cuts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hpctrain import Job
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, ModelError
from hpctrain.job import registry
from hpctrain.replica.layout import Layout, slice_bounds
from hpctrain.replica.muon import MuonAdamW, orthogonal
from hpctrain.replica.optimizer import ELEMENTWISE, OptimizerChoice, decay, without_dynamo
from hpctrain.replica.replica import Replica
from hpctrain.replica.signsgd import SignSGD
from hpctrain.replica.state import State, merge
from hpctrain.replica.update import Update, make_update
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "SGD": [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "maximize": True},
    ],
    "Adam": [{"lr": 0.01}, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}],
    "AdamW": [{"lr": 0.01, "weight_decay": 0.1}],
    "RMSprop": [{"lr": 0.01}, {"lr": 0.01, "centered": True, "momentum": 0.9}],
    "ASGD": [{"lr": 0.01, "t0": 3}],
}
CASES = [(name, options) for name in sorted(ELEMENTWISE) for options in OPTIONS.get(name, [{"lr": 0.01}])]
WHOLE: list[tuple[str, dict[str, Any]]] = [("Adafactor", {"lr": 0.01})]
if hasattr(torch.optim, "Muon"):
    WHOLE.append(("Muon", {"lr": 0.01, "momentum": 0.9}))
WHOLE.append(("MuonAdamW", {"lr": 0.01}))


class Net(nn.Module):
    def __init__(self, vectors: bool = True) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(5, 7, bias=vectors), nn.Linear(7, 3, bias=vectors)
        if vectors:
            self.scale = nn.Parameter(torch.tensor(2.0))
        self.double()


def choice_of(name: str, options: dict[str, Any]) -> OptimizerChoice:
    return OptimizerChoice.of(registry.resolve("optimizer", name), options)


def gradients(layout: Layout, steps: int) -> list[Tensor]:
    """Flat gradients, zero where the padding is."""
    torch.manual_seed(2)
    mask = torch.zeros(layout.length, dtype=torch.float64)
    for slot in layout.slots:
        mask[slot.offset : slot.offset + slot.size] = 1
    return [torch.randn(layout.length, dtype=torch.float64) * mask for _ in range(steps)]


def flat_values(model: nn.Module, layout: Layout) -> Tensor:
    values, named = torch.zeros(layout.length, dtype=torch.float64), dict(model.named_parameters())
    for slot in layout.slots:
        values[slot.offset : slot.offset + slot.size] = named[slot.name].detach().reshape(-1)
    return values


def by_torch(model: nn.Module, layout: Layout, name: str, options: dict[str, Any], groups: Any, steps: int) -> Tensor:
    """The values after this many steps of torch's optimizer on the model itself, with halved rates in odd steps."""
    optimizer = registry.resolve("optimizer", name)(groups or model.parameters(), **options)
    named = dict(model.named_parameters())
    rates = [group["lr"] for group in optimizer.param_groups]
    for step, gradient in enumerate(gradients(layout, steps)):
        for slot in layout.slots:
            named[slot.name].grad = gradient[slot.offset : slot.offset + slot.size].view(slot.shape).clone()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(step)
        optimizer.step()
    return flat_values(model, layout)


def factor(step: int) -> float:
    return 0.5 if step % 2 else 1.0


class Cut:
    """The arena cut into `parts`, each with its own update."""

    def __init__(self, choice: OptimizerChoice, layout: Layout, values: Tensor, parts: int) -> None:
        bounds = slice_bounds(layout, parts, choice.elementwise)
        self.layout, self.values = layout, values.clone()
        pairs = zip(bounds, bounds[1:], strict=False)
        self.updates = [make_update(choice, layout, self.values[low:high], low, high) for low, high in pairs]

    def step(self, gradient: Tensor, rate: float) -> None:
        for update in self.updates:
            update.apply(gradient[update.low : update.high], rate)

    def state(self) -> State:
        return merge([update.state() for update in self.updates], self.layout.length)

    def load(self, state: State) -> None:
        for update in self.updates:
            names = [slot.name for slot in self.layout.slots_in(update.low, update.high)]
            update.load(state.cut(update.low, update.high, names))


def groups_of(model: Any) -> list[dict[str, Any]]:
    return [
        {"params": [model.one.weight, model.scale], "lr": 0.03},
        {"params": [model.two.weight, model.one.bias, model.two.bias], "weight_decay": 0.2},
    ]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_elementwise_optimizers_can_be_cut_anywhere(name: str, options: dict[str, Any], grouped: bool) -> None:
    model = Net()
    groups: Any = groups_of(model) if grouped else None
    if name == "Rprop" and grouped:  # has no weight decay
        groups[1].pop("weight_decay")
    choice, layout = choice_of(name, options), Replica(model, groups).layout
    choice.check(layout)
    assert choice.elementwise
    start = flat_values(model, layout)
    cuts = [Cut(choice, layout, start, parts) for parts in (1, 3, 40)]
    for step, gradient in enumerate(gradients(layout, 6)):
        for cut in cuts:
            cut.step(gradient, factor(step))
    wanted = by_torch(model, layout, name, options, groups, 6)
    assert not torch.equal(wanted, start)
    for cut in cuts:
        torch.testing.assert_close(cut.values, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("name", "options"), WHOLE)
def test_other_optimizers_are_cut_between_parameters(name: str, options: dict[str, Any]) -> None:
    model = Net(vectors=name != "Muon")
    choice, layout = choice_of(name, options), Replica(model).layout
    choice.check(layout)
    assert not choice.elementwise
    cuts = [Cut(choice, layout, flat_values(model, layout), parts) for parts in (1, 2, 9)]
    for step, gradient in enumerate(gradients(layout, 6)):
        for cut in cuts:
            cut.step(gradient, factor(step))
    wanted = by_torch(model, layout, name, options, None, 6)
    for cut in cuts:
        torch.testing.assert_close(cut.values, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 2), (2, 40)])
@pytest.mark.parametrize(("name", "options"), CASES + WHOLE)
def test_state_moves_to_another_cut_exactly(name: str, options: dict[str, Any], before: int, after: int) -> None:
    model = Net(vectors=name != "Muon")
    choice, layout = choice_of(name, options), Replica(model).layout
    old = Cut(choice, layout, flat_values(model, layout), before)
    steps = gradients(layout, 6)
    for step, gradient in enumerate(steps[:3]):
        old.step(gradient, factor(step))
    state = old.state()
    state.optimizer.numbers = json.loads(json.dumps(state.optimizer.numbers))
    new = Cut(choice, layout, old.values, after)
    new.load(state)
    assert_equal(new.state(), state)
    for array in state.optimizer.flat.values():  # the new one has copies
        array.fill(7)
    for step, gradient in enumerate(steps[3:], 3):
        old.step(gradient, factor(step))
        new.step(gradient, factor(step))
    assert torch.equal(new.values, old.values)
    assert_equal(new.state(), old.state())


def assert_equal(one: State, other: State) -> None:
    assert [path for path, _ in one.arrays()] == [path for path, _ in other.arrays()]
    for (path, a), (_, b) in zip(one.arrays(), other.arrays(), strict=True):
        assert a.shape == b.shape, path
        assert a.dtype == b.dtype, path
        assert a.tobytes() == b.tobytes(), path
    assert one.optimizer.numbers == other.optimizer.numbers


@pytest.mark.parametrize(("name", "options"), CASES + WHOLE)
def test_state_before_the_first_step(name: str, options: dict[str, Any]) -> None:
    model = Net(vectors=name != "Muon")
    choice, layout = choice_of(name, options), Replica(model).layout
    old = Cut(choice, layout, flat_values(model, layout), 2)
    new = Cut(choice, layout, old.values, 3)
    new.load(old.state())
    for gradient in gradients(layout, 2):
        old.step(gradient, 1.0)
        new.step(gradient, 1.0)
    assert torch.equal(new.values, old.values)


@pytest.mark.parametrize("name", ["Adam", "Adafactor"])
def test_state_is_a_copy(name: str) -> None:
    choice, layout = choice_of(name, {"lr": 0.1}), Replica(Net()).layout
    cut = Cut(choice, layout, torch.zeros(layout.length, dtype=torch.float64), 1)
    first, second = gradients(layout, 2)
    cut.step(first, 1.0)
    state = cut.state()
    kept = [array.copy() for _, array in state.arrays()]
    cut.step(second, 1.0)
    assert all((array == before).all() for (_, array), before in zip(state.arrays(), kept, strict=True))


@pytest.mark.parametrize("name", ["Adam", "Adafactor"])
def test_state_is_handed_over_without_copies(name: str) -> None:
    choice, layout = choice_of(name, {"lr": 0.1}), Replica(Net()).layout
    before, after = (
        make_update(choice, layout, torch.zeros(layout.length, dtype=torch.float64), 0, layout.length) for _ in "12"
    )
    before.apply(gradients(layout, 1)[0], 1.0)
    state = before.view()
    after.load_in_place(state)
    assert_equal(after.view(), state)
    for (_, lent), (_, has) in zip(state.arrays(), after.view().arrays(), strict=True):
        assert np.shares_memory(lent, has)


@pytest.mark.parametrize("more", [{"foreach": True}, {"foreach": False}, {"fused": True}])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_implementations_agree(name: str, more: dict[str, Any]) -> None:
    model = Net()
    layout, plain = Replica(model).layout, {"lr": 0.01}
    one, other = (Cut(choice_of(name, o), layout, flat_values(model, layout), 2) for o in (plain, {**plain, **more}))
    for gradient in gradients(layout, 4):
        one.step(gradient, 1.0)
        other.step(gradient, 1.0)
    other_again = Cut(choice_of(name, {**plain, **more}), layout, other.values, 3)
    other_again.load(other.state())
    for cut in (one, other, other_again):
        cut.step(gradients(layout, 1)[0], 1.0)
        torch.testing.assert_close(cut.values, one.values, rtol=1e-12, atol=1e-13)


# -- what is refused ------------------------------------------------------------------------------------------
class Own(torch.optim.SGD):
    """A user's optimizer, not known to be elementwise."""


class Greedy(torch.optim.Optimizer):
    """Accepts any option, needs a closure."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, options)

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        return closure()


class OwnLbfgs(torch.optim.LBFGS):
    pass


@pytest.mark.parametrize(
    ("optimizer", "options", "elementwise", "message"),
    [
        (torch.optim.LBFGS, {"lr": 1}, None, "several times per step"),
        (OwnLbfgs, {"lr": 1}, None, "several times per step"),
        (torch.optim.SparseAdam, {"lr": 1}, None, "dense gradients"),
        (torch.optim.SGD, {"lr": 1, "momentun": 1}, None, r"optimizer.momentun: SGD .*did you mean momentum\?"),
        (torch.optim.SGD, {"lr": -1.0}, None, "SGD with lr = -1.0: Invalid learning rate"),
        (torch.optim.SGD, {"lr": "big"}, None, "SGD with lr = 'big'"),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, None, "Nesterov momentum requires"),
        (torch.optim.Adam, {"lr": 0.1, "betas": 3}, None, "Adam with lr = 0.1, betas = 3"),
        (torch.optim.Adam, {"lr": 0.1, "fused": True, "foreach": True}, None, "fused"),
        (torch.optim.Adam, {"lr": 0.1, "capturable": True}, None, "capturable"),
        (torch.optim.SGD, {"lr": 0.1, "differentiable": True}, None, "SGD with lr = 0.1, differentiable = True"),
        (torch.optim.RMSprop, {"lr": 0.1, "fused": True}, None, "optimizer.fused: RMSprop has no such argument"),
        (torch.optim.Adafactor, {"lr": 0.1}, True, "elementwise = true: Adafactor needs whole parameters"),
        (Greedy, {"lr": 0.1, "anything": 1}, None, "closure"),
    ],
)
def test_refused(optimizer: Any, options: dict[str, Any], elementwise: bool | None, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        OptimizerChoice.of(optimizer, options, elementwise)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("optimizer", "options", "fused"),
    [
        (torch.optim.SGD, {}, True),
        (torch.optim.AdamW, {}, True),
        (torch.optim.Adam, {"fused": False}, False),
        (torch.optim.Adam, {"foreach": True}, None),
        (torch.optim.RMSprop, {}, None),
        (type("Own", (torch.optim.SGD,), {"__module__": "mine"}), {}, None),
    ],
)
def test_update_on_a_gpu_is_one_kernel(
    monkeypatch: pytest.MonkeyPatch, optimizer: Any, options: dict[str, Any], fused: bool | None
) -> None:
    """Which implementation is asked for; without a GPU the trial step is left out."""
    monkeypatch.setattr(OptimizerChoice, "_try", lambda self, device: None)
    monkeypatch.setattr(OptimizerChoice, "_normalises", lambda self, device: False)
    assert OptimizerChoice.of(optimizer, options, True, "cuda:0").options.get("fused") is fused
    assert OptimizerChoice.of(optimizer, options, True, "cpu").options == options


EVERY = ["ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]


@pytest.mark.parametrize("name", [*EVERY, "Adafactor"])
def test_optimizers_without_dynamo_have_the_same_bits(name: str) -> None:
    cls = registry.resolve("optimizer", name)
    found = []
    for each in (cls, cast(Any, without_dynamo(cls))):
        torch.manual_seed(3)
        parameters = [torch.nn.Parameter(torch.randn(3, 5)) for _ in range(2)]
        optimizer = each(parameters, lr=0.01)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(3, 5)
            optimizer.step()
        found.append(torch.cat([p.detach().view(-1) for p in parameters]))
        assert isinstance(optimizer, cls)
    assert torch.equal(*found)


def test_training_does_not_import_torchs_compiler() -> None:
    """It takes longer than torch itself."""
    code = (
        "import sys, torch\n"
        "from hpctrain.replica.optimizer import OptimizerChoice\n"
        f"for name in {EVERY}:\n"
        "    OptimizerChoice.of(getattr(torch.optim, name), {'lr': 0.1})\n"
        "from hpctrain.replica.muon import MuonAdamW\n"
        "OptimizerChoice.of(MuonAdamW, {'lr': 0.1})\n"
        "from hpctrain.job import Job\n"
        "from hpctrain.run.api import train\n"
        "from hpctrain.run.folder import Narrator\n"
        "import tempfile\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    job = Job(train={'steps': 2}, device='cpu', output=folder)\n"
        "    train(job, out=Narrator(enabled=False))\n"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'pandas', 'bokeh'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_only_torchs_optimizers_are_known_to_be_elementwise() -> None:
    assert OptimizerChoice.of(torch.optim.SGD, {"lr": 0.1}).elementwise
    assert not OptimizerChoice.of(torch.optim.SGD, {"lr": 0.1}, False).elementwise
    assert not OptimizerChoice.of(Own, {"lr": 0.1}).elementwise
    assert OptimizerChoice.of(Own, {"lr": 0.1}, True).elementwise


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_accepts_matrices_only() -> None:
    choice = choice_of("Muon", {"lr": 0.01})
    with pytest.raises(ModelError, match=r"'Muon': parameter scale: Muon only supports 2D"):
        choice.check(Replica(Net()).layout)
    convolution = nn.Conv2d(2, 2, 3, bias=False)
    with pytest.raises(ModelError, match="parameter weight"):
        choice.check(Replica(convolution).layout)


def test_all_of_torchs_optimizers_are_known() -> None:
    """A new optimizer class in torch must be classified: is it elementwise?"""
    own = {n for n, c in vars(torch.optim).items() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    assert own - {"Optimizer"} <= ELEMENTWISE | {"LBFGS", "SparseAdam", "Adafactor", "Muon"}


# -- groups ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, r"optimizer.groups: group 1 has momentun: SGD .*did you mean momentum\?"),
        ({"lr": -1.0}, "lr = -1.0"),
        ({"momentum": 0.9, "nesterov": True, "dampening": 0.5}, "Nesterov"),
    ],
)
def test_options_of_groups_are_checked(options: dict[str, Any], message: str) -> None:
    model = Net()
    groups: Any = groups_of(model)
    groups[1] = {"params": groups[1]["params"], **options}
    with pytest.raises(ModelError, match=message):
        choice_of("SGD", {"lr": 0.1}).check(Replica(model, groups).layout)


def test_weight_decay_skips_vectors() -> None:
    model = Net()
    layout = Replica(model, decay(model)).layout
    start = flat_values(model, layout)
    cut = Cut(choice_of("SGD", {"lr": 1.0, "weight_decay": 0.25}), layout, start, 3)
    cut.step(torch.zeros_like(start), 1.0)
    for slot in layout.slots:
        here = slice(slot.offset, slot.offset + slot.size)
        share = 0.75 if len(slot.shape) >= 2 else 1.0
        torch.testing.assert_close(cut.values[here], start[here] * share)


# -- cuts -----------------------------------------------------------------------------------------------------
@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(1, 30), st.booleans(), st.booleans())
def test_slice_bounds(sizes: list[int], parts: int, elementwise: bool, double: bool) -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
    layout = Replica(model.double() if double else model).layout
    bounds = slice_bounds(layout, parts, elementwise)
    assert bounds == slice_bounds(layout, parts, elementwise, [7] * parts)
    assert len(bounds) == parts + 1
    assert (bounds[0], bounds[-1]) == (0, layout.length)
    assert bounds == sorted(bounds)
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if elementwise:
        unit = 64 // layout.dtype.itemsize
        assert all(bound % unit == 0 for bound in bounds)
        assert max(lengths) - min(lengths) <= unit
    else:
        assert set(bounds) <= set(layout.cuts)
        largest = max((slot.size for slot in layout.slots), default=0) + 64
        assert max(lengths) <= layout.length / parts + largest
        inside = [s.name for a, b in zip(bounds, bounds[1:], strict=False) for s in layout.slots_in(a, b) if s.size]
        assert inside == [slot.name for slot in layout.slots if slot.size]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=9), st.integers(0, 5000), st.booleans())
def test_slices_in_proportion_to_weights(weights: list[int], size: int, elementwise: bool) -> None:
    layout = Replica(nn.ParameterList([nn.Parameter(torch.zeros(16)) for _ in range(size // 16 + 1)])).layout
    bounds = slice_bounds(layout, len(weights), elementwise, weights)
    assert (bounds[0], bounds[-1]) == (0, layout.length) and bounds == sorted(bounds)
    for place, bound in enumerate(bounds):
        assert abs(bound - layout.length * sum(weights[:place]) / sum(weights)) <= 16


# -- in a run -------------------------------------------------------------------------------------------------
def two_rates(model: Any, last: float = 0.01) -> list[dict[str, Any]]:
    return [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": last, "weight_decay": 0.3}]


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2))


def few_samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(4)
    return TensorDataset(torch.randn(30, 3, generator=generator), torch.randint(0, 2, (30,), generator=generator))


def run(tmp_path: Any, ranks: int, batch: int, groups: Any, strategy: Any = "all_reduce", name: str = "SGD") -> Any:
    more = {"momentum": 0.9} if name == "SGD" else {}
    job = Job(
        model=small_model,
        data=few_samples,
        optimizer={"name": name, "lr": 0.1, "groups": groups, **more},
        train={"epochs": 2, "batch_size": batch, "precision": "float64"},
        strategy=strategy,
        output=str(tmp_path),
        trace={"enabled": False},
    )
    narrator = Narrator(enabled=False)
    return World(ranks).run(lambda comm: train(job, comm, out=narrator))[0].model.state_dict()


@pytest.mark.parametrize("name", ["SGD", "Adafactor"])
@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "sync", "servers": 2}])
def test_groups_in_a_run(tmp_path: Any, strategy: Any, name: str) -> None:
    groups = {"name": two_rates, "last": 0.02}
    alone, uniform = (run(tmp_path, 1, 8, g, name=name) for g in (groups, None))
    several = run(tmp_path, 2 if strategy == "all_reduce" else 4, 4, groups, strategy, name)
    assert not torch.allclose(alone["1.weight"], uniform["1.weight"])
    for key, value in alone.items():
        torch.testing.assert_close(several[key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda model: [{"params": model[0].parameters()}], "1.weight is listed 0 times"),
        (lambda model: [{"params": model.parameters(), "momentun": 1}], "group 0 has momentun"),
        (lambda model: None, None),
        ({"name": two_rates, "first": 1}, "has no keyword first; it takes last"),
    ],
)
def test_groups_refused_by_a_run(tmp_path: Any, groups: Any, message: str | None) -> None:
    if message is None:  # no groups: all parameters are treated alike
        run(tmp_path, 1, 8, groups)
        return
    with pytest.raises(HpctrainError, match=message):
        run(tmp_path, 2, 4, groups)


# -- what asynchronous updates need ------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "RMSprop", "AdamW"])
def test_optimizers_with_gradient_independent_step_size_are_recognised(name: str) -> None:
    assert choice_of(name, {"lr": 0.1}).adaptive == (name != "SGD")


def update_of(name: str, options: dict[str, Any]) -> tuple[Update, Tensor]:
    """An update over all of a small model, and the values that it changes."""
    replica = Replica(Net())
    values = torch.zeros(replica.layout.length, dtype=torch.float64)
    return make_update(choice_of(name, options), replica.layout, values, 0, replica.layout.length), values


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_momentum_scale_applies_to_one_update(name: str) -> None:
    """Half the momentum in one update, all of it in the next; compared with torch with the same settings."""
    key: dict[str, Any] = {"momentum": 0.8} if name == "SGD" else {"betas": (0.8, 0.99)}
    half: dict[str, Any] = {"momentum": 0.4} if name == "SGD" else {"betas": (0.4, 0.99)}
    update, values = update_of(name, {"lr": 0.1, **key})
    plain = torch.zeros_like(values, requires_grad=True)
    optimizer = registry.resolve("optimizer", name)([plain], lr=0.1, **key)
    for step, momentum in enumerate((1.0, 1.0, 0.5, 1.0)):
        plain.grad = torch.full_like(values, step + 1.0)
        optimizer.param_groups[0].update(half if momentum == 0.5 else key)
        optimizer.step()
        update.apply(torch.full_like(values, step + 1.0), 1.0, momentum)
    mask = values != 0
    torch.testing.assert_close(values[mask], plain.detach()[mask], rtol=1e-12, atol=0)
    assert mask.any()


@pytest.mark.parametrize("nesterov", [False, True])
def test_each_worker_has_its_own_velocity(nesterov: bool) -> None:
    """Compared with one torch optimizer per worker, all on the same parameters."""
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "nesterov": nesterov}
    update, values = update_of("SGD", options)
    plain = torch.zeros_like(values, requires_grad=True)
    optimizers = [torch.optim.SGD([plain], **{**options, "nesterov": True}) for _ in range(3)]
    for step, worker in enumerate((0, 1, 0, 2, 1, 0, 0)):
        plain.grad = torch.full_like(values, step + 1.0)
        optimizers[worker].step()
        update.apply(torch.full_like(values, step + 1.0), 1.0, worker=worker)
    mask = values != 0
    torch.testing.assert_close(values[mask], plain.detach()[mask], rtol=1e-12, atol=0)
    assert mask.any()


def test_velocity_handed_on_is_the_mean_of_the_workers() -> None:
    """One of three workers has not pushed: its velocity is still the one it was given."""
    update, values = update_of("SGD", {"lr": 1e-3, "momentum": 0.5})
    update.apply(torch.full_like(values, 8.0), 1.0)
    for worker, gradient in ((0, 1.0), (2, 2.0), (0, 3.0)):  # v = v / 2 + g: 8 -> 5 -> 5.5, 8, 8 -> 6
        update.apply(torch.full_like(values, gradient), 1.0, worker=worker)
    with update.common_velocity(3):
        assert velocity(update) == pytest.approx((5.5 + 8.0 + 6.0) / 3)
    assert velocity(update) == 8.0


def velocity(update: Update) -> float:
    return float(abs(update.state().optimizer.flat["momentum_buffer"]).max())


@pytest.mark.parametrize(("own", "sharpness", "stable"), [(False, 2.0, True), (False, 4.0, False), (True, 12.0, True)])
def test_velocity_per_worker_is_stable_on_sharper_losses(own: bool, sharpness: float, stable: bool) -> None:
    """16 workers in turn, each with a parabola's gradient at its last pull; rate 0.05 / 16, momentum 0.9."""
    update, values = update_of("SGD", {"lr": 0.05 / 16, "momentum": 0.9})
    values.fill_(1.0)
    seen = [values.clone() for _ in range(16)]
    for step in range(16 * 200):
        worker = step % 16
        update.apply(sharpness * seen[worker], 1.0, worker=worker if own else None)
        seen[worker] = values.clone()
    last = float(values.abs().max())
    assert last < 1e-3 if stable else not last < 10


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Muon"])
def test_adaptive_optimizers_have_one_state_for_all_workers(name: str) -> None:
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    options = {"lr": 0.1, **({} if name == "Adam" else {"momentum": 0.5})}
    (each, values), (one, others) = ((matrices(options) if name == "Muon" else update_of(name, options)) for _ in "ab")
    for worker in (0, 1, 0):
        each.apply(torch.ones_like(values), 1.0, worker=worker)
        one.apply(torch.ones_like(others), 1.0)
    assert torch.equal(values, others)


def matrices(options: dict[str, Any]) -> tuple[Update, Tensor]:
    """Like `update_of`, with matrices only."""
    replica = Replica(Net(vectors=False))
    values = torch.zeros(replica.layout.length, dtype=torch.float64)
    choice = OptimizerChoice.of(torch.optim.Muon, options)
    return make_update(choice, replica.layout, values, 0, replica.layout.length), values


class Listing(torch.optim.SGD):
    """Keeps a list per parameter."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["seen"] = [1]


class Counting(torch.optim.SGD):
    """Has one step count for all parameters."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1
        return super().step(closure)


def test_state_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Listing keeps seen, a list, for each parameter.* tensors and numbers"):
        OptimizerChoice.of(Listing, {"lr": 0.1})
    with pytest.raises(ModelError, match=r"row of shape \(2,\) for .*leave optimizer.elementwise out"):
        OptimizerChoice.of(Rowed, {"lr": 0.1}, elementwise=True)


class Rowed(torch.optim.SGD):
    """Keeps a pair per parameter."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["row"] = torch.zeros(2)


def test_global_step_counts_do_not_cross_a_switch(tmp_path: Any) -> None:
    def job(**how: Any) -> Job:
        return Job(
            model=small_model, data=few_samples(), metric="tests.helpers:no_metric", output=str(tmp_path),
            optimizer={"name": Counting, "lr": 0.1}, train={"steps": 4, "batch_size": 4}, **how,
        )  # fmt: skip

    quiet = Narrator(enabled=False)
    assert World(2).run(lambda comm: train(job(strategy="all_reduce"), comm, out=quiet).samples)
    phases = [{"strategy": "all_reduce", "until": {"rule": "after", "steps": 2}}, {"strategy": "all_reduce"}]
    with pytest.raises(ModelError, match="Counting counts count for all parameters together"):
        World(2).run(lambda comm: train(job(phases=phases), comm, out=quiet))


# -- Muon --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (12, 12)])
def test_updates_of_muon_are_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(3)
    matrix = torch.randn(shape, dtype=torch.float64)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = torch.linalg.svdvals(orthogonal(matrix, 5))
    assert 0.6 < float(found.min()) <= float(found.max()) < 1.3
    assert float((left.mT @ orthogonal(matrix, 5) @ right.mT).diagonal().min()) > 0.6


def test_muon_updates_what_is_no_matrix_as_adamw_does() -> None:
    """So does it with matrices of groups that say so, and with no other ones."""
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
    mine, other = Net(), Net()
    groups = [{"params": mine.one.parameters()}, {"params": [*mine.two.parameters(), mine.scale], "matrices": False}]
    optimizers = [MuonAdamW(groups, **options), torch.optim.AdamW(other.parameters(), **options)]
    for _ in range(4):
        mine.zero_grad()
        (mine.two(torch.tanh(mine.one(torch.ones(2, 5).double()))) * mine.scale).square().sum().backward()
        for own, theirs in zip(mine.parameters(), other.parameters(), strict=True):
            theirs.grad = None if own.grad is None else own.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    named = zip(mine.named_parameters(), other.parameters(), strict=True)
    different = [name for (name, a), b in named if not torch.allclose(a, b, rtol=0, atol=1e-12)]
    assert different == ["one.weight"]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_matrices_are_updated_as_by_torchs_muon() -> None:
    """But for the rounding of its iteration, which is in bfloat16."""
    torch.manual_seed(4)
    begun = torch.randn(6, 9)
    mine, other = nn.Parameter(begun.clone()), nn.Parameter(begun.clone())
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95}
    pairs: list[Any] = [(MuonAdamW([mine], **options), mine)]
    pairs += [(torch.optim.Muon([other], adjust_lr_fn="match_rms_adamw", **options), other)]
    for step in range(5):
        gradient = torch.randn(6, 9, generator=torch.Generator().manual_seed(step))
        for optimizer, parameter in pairs:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert float((mine - other).detach().norm() / (mine - begun).detach().norm()) < 0.02


def test_signs_alone_move_parameters():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = OptimizerChoice.of(SignSGD, {"lr": 0.1, "weight_decay": 0.5})
    assert optimizer.elementwise
    assert optimizer.divisible
    assert optimizer.adaptive
    weight.grad = torch.tensor([1e-9, 0.0, -50.0])
    optimizer.build([weight]).step()
    expected = torch.tensor([0.95 - 0.1, -1.9, 2.85 + 0.1])
    torch.testing.assert_close(weight.detach(), expected)
    with pytest.raises(ModelError, match="must not be negative; given: -1"):
        OptimizerChoice.of(SignSGD, {"lr": -1.0})
