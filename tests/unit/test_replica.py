"""The replica: the contents of the arenas, how they are placed, and what breaks them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpctrain.comm.base import BFLOAT16, Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError
from hpctrain.replica.arenas import Placement
from hpctrain.replica.buckets import Buckets
from hpctrain.replica.layout import ALIGNMENT
from hpctrain.replica.replica import Replica
from hpctrain.replica.tensors import as_array, as_tensor


def alone(body: Callable[[Communicator], Any]) -> Any:
    return World(1).run(body)[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(x))
        return out


def test_tied_weights_are_stored_once_and_get_both_gradients() -> None:
    def body(comm: Communicator) -> None:
        model = Tied()
        twin = copy.deepcopy(model)
        replica = Replica(model)
        replica.place(comm, "rank")
        assert [slot.name for slot in replica.layout.slots] == ["embed.weight"]
        for net in (model, twin):
            net(torch.tensor([1, 2])).square().sum().backward()
        assert twin.embed.weight.grad is not None
        assert torch.equal(replica.gradient[:15].view(5, 3), twin.embed.weight.grad)
        replica.check()
        with torch.no_grad():
            replica.values[:15] = 7
        assert (model.head.weight == 7).all()

    alone(body)


def test_frozen_parameters_are_left_out() -> None:
    def body(comm: Communicator) -> None:
        model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
        model[0].weight.requires_grad_(False)
        frozen = model[0].weight.clone()
        replica = Replica(model)
        assert [slot.name for slot in replica.layout.slots] == ["0.bias", "1.weight", "1.bias"]
        replica.place(comm, "rank")
        replica.values.fill_(1.0)
        assert torch.equal(model[0].weight, frozen)
        replica.check()

    alone(body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_layout(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1)).to(dtype)
    layout = Replica(model).layout
    unit = ALIGNMENT // layout.dtype.itemsize
    assert all(slot.offset % unit == 0 for slot in layout.slots)
    assert layout.length % unit == 0
    assert layout.parameters == 26
    assert layout.cuts == [*(slot.offset for slot in layout.slots), layout.length]
    assert [(g.low, g.high, g.options) for g in layout.groups] == [(0, layout.length, {})]
    assert [s.name for s in layout.slots_in(unit, layout.length)] == ["0.bias", "1.weight", "1.bias"]


def test_scalars_and_empty_parameters() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))
            self.none = nn.Parameter(torch.zeros(0, 4))
            self.row = nn.Parameter(torch.ones(1))

    def body(comm: Communicator) -> None:
        model = Odd()
        replica = Replica(model)
        replica.place(comm, "rank")
        assert model.scale.shape == ()
        assert model.none.shape == (0, 4)
        (model.scale * model.row.sum() + model.none.sum()).backward()
        replica.check()
        assert [float(replica.gradient[slot.offset]) for slot in replica.layout.slots if slot.size] == [1.0, 3.0]

    alone(body)


@pytest.mark.parametrize("kind", ["transposed", "channels_last", "expanded"])
def test_non_contiguous_parameters_keep_their_values(kind: str) -> None:
    def body(comm: Communicator) -> None:
        model: Any = nn.Conv2d(3, 4, 2)
        if kind == "transposed":
            model.weight = nn.Parameter(torch.randn(2, 2, 3, 4).permute(3, 2, 0, 1))
        elif kind == "channels_last":
            model = model.to(memory_format=torch.channels_last)
        else:
            model.bias = nn.Parameter(torch.ones(1).expand(4))
        twin, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
        replica = Replica(model)
        replica.place(comm, "rank")
        assert torch.equal(model.weight, twin.weight)
        torch.testing.assert_close(model(x), twin(x))
        model(x).square().sum().backward()
        twin(x).square().sum().backward()
        replica.check()
        torch.testing.assert_close(model.weight.grad, twin.weight.grad)
        torch.testing.assert_close(replica.gradient[: model.weight.numel()], twin.weight.grad.reshape(-1))

    alone(body)


# -- what is refused ------------------------------------------------------------------------------------------
def test_models_that_cannot_be_trained_are_refused() -> None:
    frozen = nn.Linear(2, 2)
    frozen.requires_grad_(False)
    with pytest.raises(ModelError, match="no trainable parameters"):
        Replica(frozen)
    with pytest.raises(ModelError, match="no trainable parameters"):
        Replica(nn.ReLU())
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(ModelError, match=r"one dtype .*torch.float32, torch.float64"):
        Replica(mixed)
    mixed[1].requires_grad_(False)
    assert len(Replica(mixed).layout.slots) == 2
    with pytest.raises(ModelError, match="complex64"):
        Replica(nn.Linear(2, 2, dtype=torch.complex64))


def _assign(model: nn.Module) -> None:
    twin = copy.deepcopy(model).state_dict()
    model.load_state_dict(twin, assign=True)


def _replace(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _data(model: Any) -> None:
    model[1].bias.data = torch.zeros(2)


def _clone_gradient(model: Any) -> None:
    model[1].bias.grad = model[1].bias.grad.clone()


BREAKS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "to": (lambda model: model.to(torch.float64), "0.weight no longer lies"),
    "half": (lambda model: model.half(), "0.weight no longer lies"),
    "p.data": (_data, "1.bias no longer lies"),
    "zero_grad": (lambda model: model.zero_grad(set_to_none=True), "gradient of 0.weight"),
    "grad": (_clone_gradient, "gradient of 1.bias"),
    "assign": (_assign, "0.weight no longer lies"),
    "new parameter": (_replace, "0.weight no longer lies"),
    "deleted": (lambda model: delattr(model[0], "weight"), "0.weight no longer lies"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_views_are_detected(name: str) -> None:
    breaks, message = BREAKS[name]

    def body(comm: Communicator) -> None:
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        replica = Replica(model)
        replica.place(comm, "rank")
        replica.check()
        breaks(model)
        with pytest.raises(ModelError, match=message):
            replica.check()

    alone(body)


def test_in_place_changes_are_accepted() -> None:
    def body(comm: Communicator) -> None:
        model: Any = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        replica = Replica(model)
        replica.place(comm, "rank")
        model.load_state_dict(copy.deepcopy(model).state_dict())
        model.zero_grad(set_to_none=False)
        nn.init.ones_(model[0].weight)
        model.to(torch.float32).train().eval()
        replica.check()
        assert (replica.values[:6] == 1).all()

    alone(body)


# -- placing --------------------------------------------------------------------------------------------------
PLACEMENTS: list[Placement] = ["rank", "node", "node", "rank", "copies", "node", "copies", "rank", "rank", "node"]


def test_arenas_keep_values_when_placed_again() -> None:
    def body(comm: Communicator) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        before = [p.detach().clone() for p in model.parameters()]
        replica = Replica(model)
        for placement in PLACEMENTS:
            replica.place(comm, placement)
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            assert not replica.gradient.any()
            replica.check()
            model(torch.ones(1, 7)).sum().backward()
            assert replica.gradient.any()
        arena = replica.values
        replica.release()
        comm.barrier()
        arena.fill_(9)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert all(p.grad is None for p in model.parameters())
        replica.check()

    World(3, nodes=[0, 0, 1]).run(body)


def test_parameters_exist_once_per_node_when_shared() -> None:
    def body(comm: Communicator) -> float:
        model = nn.Linear(4, 1)
        replica = Replica(model)
        with torch.no_grad():
            model.weight.fill_(comm.rank)
        replica.place(comm, "node")
        assert float(model.weight[0, 0].detach()) == (0 if comm.rank < 2 else 2)
        comm.barrier()
        if comm.rank == 0:
            replica.values.fill_(9)
        comm.barrier()
        seen = float(model.weight[0, 0].detach())
        replica.place(comm, "rank")  # from now on each rank has its own
        replica.values.fill_(float(comm.rank))
        comm.barrier()
        assert float(model.weight[0, 0].detach()) == comm.rank
        return seen

    assert World(4, nodes=[0, 0, 1, 1]).run(body) == [9, 9, 2, 2]


def test_shared_arenas_are_kept_for_reuse() -> None:
    """With private placement in between, values are copied both ways; only other ranks need other arenas."""

    def body(comm: Communicator) -> None:
        replica = Replica(nn.Linear(3, 2))
        half = comm.split(comm.rank // 2, comm.rank)
        assert half is not None
        assert not replica.keeps_shared(comm, "node")
        replica.place(comm, "node")
        shared = replica.value_arena
        assert replica.keeps_shared(comm, "node")
        assert not replica.keeps_shared(half, "node")
        replica.place(comm, "rank")
        assert replica.keeps_shared(comm, "node")
        assert len(replica.gradient_arena.parts) == 1
        replica.values.fill_(comm.rank + 1.0)
        replica.gradient.fill_(7.0)
        replica.place(comm, "node")
        assert replica.value_arena is shared
        assert all((p == 1.0).all() for p in replica.model.parameters())
        assert not replica.gradient.any()
        replica.place(half, "node")
        assert replica.value_arena is not shared
        replica.release()
        assert not replica.keeps_shared(half, "node")

    World(4).run(body)


def test_only_a_placed_replica_has_arenas() -> None:
    def body(comm: Communicator) -> None:
        replica = Replica(nn.Linear(2, 1))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="call place"):
                replica.value_arena  # noqa: B018
            with pytest.raises(RuntimeError, match="call place"):
                replica.gradient_arena  # noqa: B018
            replica.place(comm, "rank")
            replica.gradient.fill_(3.0)
            assert (replica.gradient_arena.mine == 3.0).all()
            assert as_array(replica.values)[:3].tolist() == replica.value_arena.mine[:3].tolist()
            replica.release()

    alone(body)


# -- groups ---------------------------------------------------------------------------------------------------
def test_groups_order_the_arena() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    groups: list[dict[str, Any]] = [
        {"params": [("b", model[0].bias), ("c", model[1].bias)], "lr": 0.5},
        {"params": model[1].weight},
        {"params": iter([model[0].weight]), "momentum": 0.1},
        {"params": []},
    ]
    layout = Replica(model, groups).layout
    assert [slot.name for slot in layout.slots] == ["0.bias", "1.bias", "1.weight", "0.weight"]
    assert [group.options for group in layout.groups] == [{"lr": 0.5}, {}, {"momentum": 0.1}]
    assert [group.low for group in layout.groups[1:]] == [group.high for group in layout.groups[:-1]]
    assert layout.groups[-1].high == layout.length
    whole = Replica(model).layout.fingerprint()
    assert layout.fingerprint() != whole
    in_order = [{"params": model[0].parameters()}, {"params": model[1].parameters()}]
    assert Replica(model, in_order).layout.fingerprint() != whole


def test_frozen_parameters_may_be_in_groups() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    layout = Replica(model, [{"params": list(model.parameters())}]).layout
    assert [slot.name for slot in layout.slots] == ["weight"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (lambda m: [{"params": [m.weight]}], "bias is listed 0 times"),
        (lambda m: [{"params": [m.weight, m.bias]}, {"params": [m.weight]}], "weight is listed 2 times"),
        (lambda m: [{"params": [m.weight, m.weight, m.bias]}], "weight is listed 2 times"),
        (lambda m: [{"parameters": [m.weight]}], "group 0 is not a dictionary with params"),
        (lambda m: [m.weight, m.bias], "group 0 is not a dictionary with params"),
        (lambda m: {"params": [m.weight]}, "returned a dict; expected a list"),
        (lambda m: None, None),
        (lambda m: 3, "returned a int; expected a list"),
        (lambda m: [{"params": ["weight", "bias"]}], "group 0 lists a str"),
        (lambda m: [{"params": [*m.parameters(), nn.Parameter(torch.ones(2))]}], r"shape \(2,\) that is not"),
    ],
)
def test_refused_groups(groups: Callable[[nn.Linear], Any], message: str | None) -> None:
    model = nn.Linear(3, 3)
    if message is None:
        Replica(model, groups(model))
        return
    with pytest.raises(ModelError, match=message):
        Replica(model, groups(model))


def test_fingerprint_distinguishes_models() -> None:
    def print_of(*layers: nn.Module) -> str:
        return Replica(nn.Sequential(*layers)).layout.fingerprint()

    same = print_of(nn.Linear(2, 3))
    assert same == print_of(nn.Linear(2, 3))
    others = [nn.Linear(3, 2), nn.Linear(2, 3).double(), nn.Linear(2, 3, bias=False)]
    assert len({same, *map(print_of, others)}) == 4


# -- arrays ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (5,), (0,)])
def test_arrays_and_tensors_share_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=dtype)
    array = as_array(tensor)
    assert array.shape == shape
    assert (array.dtype == BFLOAT16) == (dtype == torch.bfloat16)
    back = as_tensor(array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    tensor.fill_(1)
    assert np.all(array.astype(np.float64) == 1)


# -- buckets --------------------------------------------------------------------------------------------------
def test_buckets_are_ready_from_the_end_once_each_in_one_order() -> None:
    def body(comm: Communicator) -> None:
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(5)])
        replica = Replica(model)
        replica.place(comm, "rank")
        ready: list[tuple[int, int]] = []
        buckets = Buckets(replica, 2000, lambda low, high: ready.append((low, high)), lambda: None)
        model(torch.ones(1, 16)).sum().backward()
        assert ready == []  # not the last micro-batch
        buckets.arm()
        model(torch.ones(1, 16)).sum().backward()
        assert ready == []  # the first round shows whether hooks are called once
        buckets.flush()
        whole = list(ready)
        ready.clear()
        buckets.arm()
        model(torch.ones(1, 16)).sum().backward()
        assert ready == whole
        assert ready[0][1] == replica.layout.length
        assert [high for _, high in ready[1:]] == [low for low, _ in ready[:-1]]
        assert ready[-1][0] == 0
        assert all((high - low) * 4 >= 2000 for low, high in ready[:-1])
        buckets.flush()
        assert ready == whole
        ready.clear()
        buckets.flush()  # a round without a sample on this rank
        assert ready == whole
        ready.clear()
        buckets.arm()
        model[2](torch.ones(1, 16)).sum().backward()  # most parameters took no part
        assert ready == []
        buckets.flush()
        assert ready == whole
        buckets.remove()
        buckets.arm()
        ready.clear()
        model(torch.ones(1, 16)).sum().backward()
        assert ready == []

    alone(body)
