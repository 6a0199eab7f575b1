"""All-reduce over virtual ranks: equal to one process, on one node and on several, with every exchange."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.errors import JobError, NanError
from hpctrain.replica.update import SlicedUpdate
from hpctrain.strategies.all_reduce import AllReduce
from hpctrain.strategies.clipping import clip_factor
from hpctrain.strategies.exchange import BucketExchange, MessageExchange
from hpctrain.strategies.shared import SharedBucketExchange, SharedExchange
from hpctrain.strategies.sums import StretchSums
from hpctrain.trace.schema import KIND_CODES
from tests import helpers
from tests.marks import slow

MESSAGES = ["message", "ring", "halving", "tree", "hierarchical", "overlap"]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _distance(folder: Path, agree: str, recipe: str, precision: str, size: int, nodes=None) -> float:
    world = World(size, nodes=nodes)
    found = world.run(lambda comm: helpers.equivalence(comm, folder, agree, recipe, precision))
    return max(found)


@pytest.mark.parametrize("recipe", ["momentum", slow("clip"), slow("accumulate")])
@pytest.mark.parametrize("agree", ["shared", "message", "overlap"])
def test_sgd_equals_one_process_in_float32(tmp_path: Path, agree: str, recipe: str):
    assert _distance(tmp_path, agree, recipe, "float32", 4) < 1e-5


@pytest.mark.parametrize("size", [2, slow(1), slow(3), slow(5), slow(8)])
@pytest.mark.parametrize("agree", ["shared", *MESSAGES])
def test_any_number_of_ranks(tmp_path: Path, agree: str, size: int):
    assert _distance(tmp_path, agree, "all", "float64", size) < 1e-10


NODES = [(0, 0, 1, 1), (0, 1, 1, 1), (0, 0, 0, 1, 1), (0, 1, 2), (0, 1, 0, 1)]


@pytest.mark.parametrize("nodes", [slow(nodes) if nodes != NODES[2] else nodes for nodes in NODES])
@pytest.mark.parametrize("agree", ["shared", "shared buckets", "hierarchical", "overlap"])
def test_several_nodes(tmp_path: Path, agree: str, nodes: tuple[int, ...]):
    assert _distance(tmp_path, agree, "all", "float64", len(nodes), nodes) < 1e-10


def test_some_ranks_get_no_sample_when_a_round_is_small(tmp_path: Path):
    job = helpers.make_job(
        tmp_path,
        data={"name": "tests.helpers:points", "samples": 10},
        train={"steps": 9, "batch_size": 1, "precision": "float64"},
    )
    found = World(4).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
    one = job.override(["train.batch_size=4"])
    alone = World(1).run(lambda comm: helpers.vector(helpers.quiet_train(comm, one).model))
    for vector in found:
        assert helpers.difference(vector, alone[0]) < 1e-10


def test_non_elementwise_optimizer_runs_replicated(tmp_path: Path):
    def run(size: int, batch: int) -> list[np.ndarray]:
        job = helpers.make_job(
            tmp_path,
            optimizer={"name": "Adafactor", "lr": 0.01},
            train={"steps": 9, "batch_size": batch, "precision": "float64"},
        )
        return World(size).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))

    assert helpers.difference(run(4, 6)[3], run(1, 24)[0]) < 1e-9


@pytest.mark.parametrize("optimizer", ["SGD", slow("Adam")])
@pytest.mark.parametrize(
    ("agree", "nodes"), [("shared", (0, 0, 0)), slow("overlap", (0, 0)), ("shared buckets", (0, 0, 1, 1))]
)
def test_resumed_run_has_the_same_bits(tmp_path: Path, agree: str, nodes: tuple[int, ...], optimizer: str):
    keys = {"name": optimizer, "lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    strategy, _ = helpers.SYNCHRONOUS[agree]
    World(len(nodes), nodes=nodes).run(lambda comm: helpers.resumed_bits(comm, tmp_path, strategy, keys))


@pytest.mark.parametrize("agree", ["shared", "message", "overlap"])
def test_non_finite_loss_error_names_rank_and_step(tmp_path: Path, agree: str):
    strategy, _ = helpers.SYNCHRONOUS[agree]
    messages = World(3).run(lambda comm: helpers.nan_error(comm, tmp_path, strategy))
    assert len(set(messages)) == 1
    assert "loss is nan on rank 0 in step 2 " in messages[0]


def test_non_finite_gradient_is_detected_when_clipping(tmp_path: Path):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.inf

    job = helpers.make_job(
        tmp_path,
        loss=lambda outputs, targets: Steep.apply(torch.nn.functional.cross_entropy(outputs, targets)),
        train={"clip_norm": 1.0},
    )
    with pytest.raises(NanError, match="rank 0 in step 0"):
        World(2).run(lambda comm: helpers.quiet_train(comm, job))


@pytest.mark.parametrize(
    ("strategy", "nodes", "kind"),
    [
        ({}, (0, 0), SharedExchange),
        ({}, (0, 1), BucketExchange),
        ({}, (0, 1, 2), BucketExchange),
        ({}, (0, 0, 1, 1), SharedBucketExchange),
        ({}, (0, 0, 1), SharedBucketExchange),
        ({"exchange": "shared"}, (0, 1), SharedExchange),
        ({"algorithm": "ring"}, (0, 1), SharedExchange),
        ({"exchange": "shared"}, (0, 0, 1), SharedExchange),
        ({"exchange": "shared", "codec": "bfloat16"}, (0, 0, 1), SharedBucketExchange),
        ({"exchange": "shared", "codec": "bfloat16"}, (0, 0), SharedExchange),
        ({"codec": "bfloat16"}, (0, 1), BucketExchange),
        ({"exchange": "message"}, (0, 1), MessageExchange),
        ({"exchange": "message", "overlap": True}, (0, 0), BucketExchange),
    ],
)
def test_exchange_suits_the_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: dict[str, Any], nodes: tuple[int, ...], kind: type
):
    made: list[type] = []
    make = AllReduce.make_exchange

    def noted(self: AllReduce) -> Any:
        exchange = make(self)
        made.append(type(exchange))
        return exchange

    monkeypatch.setattr(AllReduce, "make_exchange", noted)
    job = helpers.make_job(tmp_path, strategy={"name": "all_reduce", **strategy}, train={"steps": 2})
    World(len(nodes), nodes=nodes).run(lambda comm: helpers.quiet_train(comm, job))
    assert made == [kind] * len(nodes)


def test_started_sums_are_polled_in_every_hook_of_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MPI moves data only while a call is inside it."""
    polls: list[int] = []
    poll = BucketExchange.poll

    def noted(self: BucketExchange) -> None:
        polls.append(len(self._sums))
        poll(self)

    monkeypatch.setattr(BucketExchange, "poll", noted)
    options = {"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.0005}
    job = helpers.make_job(tmp_path, strategy=options, train={"steps": 3})
    results = World(2).run(lambda comm: helpers.quiet_train(comm, job))
    parameters = len([p for p in results[0].model.parameters() if p.requires_grad])
    assert len(polls) == 2 * 3 * parameters
    assert max(polls) > 0


def test_error_of_a_loss_waits_for_started_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """MPI writes into the arenas until then, and they are freed."""
    left: list[int] = []
    settle = BucketExchange.settle

    def noted(self: BucketExchange) -> None:
        settle(self)
        left.append(len(self._sums))

    monkeypatch.setattr(BucketExchange, "settle", noted)
    strategy = {"name": "all_reduce"}
    World(2, nodes=(0, 1)).run(lambda comm: helpers.nan_error(comm, tmp_path, strategy))
    assert left == [0] * 2 * (1 + 1 + 1), "once in each of two rounds, and once before the error, on both ranks"


@pytest.mark.parametrize("nodes", [(0, 1), (0, 0, 1, 1)])
def test_parameters_are_updated_while_gradients_are_still_on_their_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: tuple[int, ...]
):
    """With the same result as all at once, also where a parameter has no gradient in some rounds."""
    under_way: list[int] = []
    arrivals = StretchSums.arrivals

    def noted(self: StretchSums) -> Iterator[Any]:
        for piece in arrivals(self):
            yield piece
            under_way.append(len(self))  # the piece has been updated

    def trained() -> Any:
        strategy, optimizer = {"name": "all_reduce", "bucket_mb": 0.0001}, {"name": "AdamW", "lr": 0.01}
        job = helpers.make_job(tmp_path, strategy=strategy, optimizer=optimizer, model=helpers.Sometimes)
        world = World(len(nodes), nodes=nodes, network=LinkNetwork(bandwidth=1e6))
        return world.run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]

    updates: list[Any] = []
    apply = SlicedUpdate.apply

    def counted(self: SlicedUpdate, *given: Any, **keys: Any) -> None:
        updates.append(len(under_way))
        apply(self, *given, **keys)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StretchSums, "arrivals", noted)
        patch.setattr(SlicedUpdate, "apply", counted)
        found = trained()
    assert len(set(updates)) > 8 * len(set(nodes)), "one update after another, between arrivals"
    assert max(under_way) > 0
    monkeypatch.setattr(AllReduce, "descend", lambda self, r: self.optimize(self.exchange.reduce(r.divisor), r))
    np.testing.assert_array_equal(found, trained())


class Counting(torch.optim.SGD):
    """A user's optimizer that counts its steps."""

    def __init__(self, *given: Any, **keys: Any) -> None:
        super().__init__(*given, **keys)
        self.steps = 0

    def step(self, closure: Any = None) -> Any:
        self.steps += 1
        for group in self.param_groups:
            group["lr"] /= self.steps
        return super().step(closure)


def test_a_users_optimizer_takes_one_step_a_round(tmp_path: Path):
    def trained(**strategy: Any) -> Any:
        optimizer = {"name": Counting, "lr": 0.1, "elementwise": True}
        job = helpers.make_job(tmp_path, strategy={"name": "all_reduce", **strategy}, optimizer=optimizer)
        return World(2, nodes=(0, 1)).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]

    assert helpers.difference(trained(bucket_mb=0.0005), trained(exchange="message")) < 1e-6


def test_nodes_begin_to_sum_during_backward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As soon as the node's ranks have a bucket, which they share, its owner sends it."""
    early: list[int] = []
    gather = SharedBucketExchange.gather

    def noted(self: SharedBucketExchange, row: object) -> object:
        early.append(len(self._sums) if self._sums is not None else 0)
        return gather(self, row)

    monkeypatch.setattr(SharedBucketExchange, "gather", noted)
    monkeypatch.setattr(StretchSums, "poll", lambda self: None)
    job = helpers.make_job(tmp_path, strategy={"name": "all_reduce", "bucket_mb": 0.0005}, train={"steps": 3})
    World(4, nodes=(0, 0, 1, 1)).run(lambda comm: helpers.quiet_train(comm, job))
    for step in (early[4:8], early[8:12]):  # in the first step the hooks' order is not known
        assert sorted(map(bool, step)) == [False, False, True, True], "on the rank of each node that comes last"


@pytest.mark.parametrize(("codec", "kinds"), [("none", ["reduce"]), ("bfloat16", ["send", "recv"])])
def test_waits_for_buckets_are_in_the_trace(tmp_path: Path, codec: str, kinds: list[str]):
    """As the second span of each operation, which the report's overlap is computed from."""
    strategy = {"name": "all_reduce", "bucket_mb": 0.0005, "codec": codec}
    job = helpers.make_job(tmp_path, strategy=strategy, train={"steps": 3})
    slow_link = LinkNetwork(bandwidth=1e5, eager_limit=-1)
    _, traces = helpers.traced(2, lambda comm: helpers.quiet_train(comm, job), nodes=(0, 1), network=slow_link)
    for trace in traces:
        spans = trace["spans"]
        waits = [spans[(spans["kind"] == KIND_CODES[kind]) & (spans["end_ns"] > spans["start_ns"])] for kind in kinds]
        assert sum(len(np.unique(found["id"][found["step"] > 0])) for found in waits) >= 4


@pytest.mark.parametrize("key", [{"overlap": True}, {"codec": "bfloat16"}])
def test_overlap_and_codecs_require_the_library_algorithm(key: dict[str, object]):
    with pytest.raises(JobError, match=f"has {next(iter(key))} = .*which needs algorithm"):
        helpers.make_job("runs", strategy={"name": "all_reduce", "algorithm": "ring", **key})


def test_clip_factor_is_torchs():
    gradient = torch.tensor([3.0, 4.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = gradient.clone()
    torch.nn.utils.clip_grad_norm_([parameter], 2.0)
    torch.testing.assert_close(gradient * clip_factor(25.0, 2.0), parameter.grad, rtol=1e-14, atol=0)
    assert clip_factor(1.0, 2.0) == 1.0
