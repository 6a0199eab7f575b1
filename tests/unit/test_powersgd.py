"""Sums of matrices by their factors: as the published algorithms say, what they send, and matrices of all kinds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpctrain.codecs.joint import JointCodec, WholeParameters
from hpctrain.codecs.powersgd import AlternatingPowerSGD, LowRank, LowRankShape, PowerSGD
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.errors import ModelError
from hpctrain.replica.layout import NUMPY_DTYPES, Slot
from hpctrain.replica.tensors import as_tensor
from hpctrain.run.resume import Resume
from hpctrain.strategies.sums import StretchSums
from tests import helpers

SHAPES: list[tuple[int, ...]] = [
    (12, 30), (30,), (6, 4, 3, 3), (6,), (1, 40), (40, 1), (3, 3), (), (0, 5), (20, 6), (2, 50)
]  # fmt: skip
KINDS: list[type[LowRank]] = [PowerSGD, AlternatingPowerSGD]
MLP = [(1024, 784), (1024,), (1024, 1024), (1024,), (10, 1024), (10,)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _slots(shapes: Sequence[tuple[int, ...]], unit: int = 16) -> list[Slot]:
    """As in an arena: each begins at a multiple of `unit` elements."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    offsets = accumulate((-(-size // unit) * unit for size in sizes[:-1]), initial=0)
    return [
        Slot(f"p{n}", shape, at, size) for n, (shape, at, size) in enumerate(zip(shapes, offsets, sizes, strict=True))
    ]


def _length(slots: Sequence[Slot]) -> int:
    return slots[-1].offset + slots[-1].size + 7


def _given(slots: Sequence[Slot], seed: int, dtype: torch.dtype) -> Tensor:
    """Random gradients, with nothing between parameters."""
    random, flat = torch.Generator().manual_seed(seed), torch.zeros(_length(slots), dtype=torch.float64)
    for slot in slots:
        flat[slot.offset : slot.offset + slot.size] = torch.randn(slot.size, generator=random, dtype=torch.float64)
    return flat.to(dtype)


def _sums(
    codec: JointCodec, rounds: Sequence[Sequence[Tensor]], slots: Sequence[Slot], size: int = 300, network: Any = None
) -> list[list[Tensor]]:
    """What the ranks have after each round, by rank; `rounds[r][i]`: what rank i gives."""
    ranks, dtype = len(rounds[0]), rounds[0][0].dtype

    def body(comm: Communicator) -> list[Tensor]:
        values = as_tensor(comm.arena(_length(slots), NUMPY_DTYPES[dtype]).mine)
        sums, found = StretchSums(comm, codec, values, size, slots), []
        for number, given in enumerate(rounds):
            sums.begin(number, ranks)
            values.copy_(given[comm.rank])
            sums.start(0, _length(slots))
            sums.finish()
            sums.divisor = ranks
            found.append(values.clone())
        sums.free()
        return found

    return World(ranks, nodes=range(ranks), network=network).run(body)


def _matrix(flat: Tensor, slot: Slot) -> Tensor:
    return flat[slot.offset : slot.offset + slot.size].view(slot.shape[0], -1)


def _gram_schmidt(matrix: Tensor) -> Tensor:
    """As in the paper."""
    columns: list[Tensor] = []
    for column in matrix.T:
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


ROUNDS = 9


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_are_those_of_the_published_algorithms(kind: type[LowRank], ranks: int):
    """Algorithms 1 and 2 of PowerSGD, and ACP-SGD, in one process on the sum of all that was given."""
    slots, codec = _slots([(12, 30), (6, 4, 3, 3)]), kind(2)
    rounds = [[_given(slots, 10 * r + i, torch.float64) for i in range(ranks)] for r in range(ROUNDS)]
    found = _sums(codec, rounds, slots)
    for slot in slots:
        shape, memory, left_out = codec.shape(slot), codec.memory(slot, torch.float64), torch.tensor(0.0)
        p, q = memory[: -shape.right].view(2, -1).T, memory[-shape.right :].view(2, -1).T
        for number, given in enumerate(rounds):
            total = _matrix(torch.stack(list(given)).sum(0), slot) + left_out
            if kind is PowerSGD:
                p = _gram_schmidt(total @ q)
                q = total.T @ p
            elif number % 2 == 0:
                q = _gram_schmidt(q)
                p = total @ q
            else:
                p = _gram_schmidt(p)
                q = total.T @ p
            left_out = total - p @ q.T
            torch.testing.assert_close(_matrix(found[0][number], slot), p @ q.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_get_the_same_bits(kind: type[LowRank], dtype: torch.dtype):
    """Of parameters of all shapes; vectors are exact, and what a matrix leaves out arrives later."""
    slots, codec, ranks = _slots(SHAPES), kind(2), 3
    rounds = [[_given(slots, 10 * r + i, dtype) for i in range(ranks)] for r in range(30)]
    found = _sums(codec, rounds, slots)
    for other in found[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found[0], other, strict=True))
    exact = [torch.stack([each.double() for each in given]).sum(0) for given in rounds]
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 2.0**-22)
    far, size = torch.stack(exact).sum(0), float(max(each.abs().max() for each in exact))
    far -= torch.stack([each.double() for each in found[0]]).sum(0)
    for slot in slots:
        here = slice(slot.offset, slot.offset + slot.size)
        if not codec.shape(slot).rank:
            for sums, wanted in zip(found[0], exact, strict=True):
                torch.testing.assert_close(sums[here].double(), wanted[here], rtol=rounding, atol=rounding * size)
        elif slot.size:
            assert far[here].abs().max() < 15 * size, "of 30 rounds"
    between = torch.ones(_length(slots), dtype=torch.bool)
    for slot in slots:
        between[slot.offset : slot.offset + slot.size] = False
    assert not found[0][-1][between].any()


def test_matrices_are_sent_by_factors_only_where_that_saves_something():
    codec = PowerSGD(4)
    found = [codec.shape(slot) for slot in _slots(SHAPES)]
    assert [(shape.rows, shape.columns, shape.rank) for shape in found] == [
        (12, 30, 4), (1, 30, 0), (6, 36, 4), (1, 6, 0), (1, 40, 0), (40, 1, 0), (3, 3, 0), (1, 1, 0), (1, 0, 0),
        (20, 6, 4), (2, 50, 0),
    ]  # fmt: skip
    assert codec.shape(Slot("", (3, 100), 0, 300)) == LowRankShape(3, 100, 0)  # cut to 3, which is all of it
    assert PowerSGD(99).shape(Slot("", (30, 30), 0, 900)).rank == 0
    with pytest.raises(ValueError, match="rank must be at least 1"):
        PowerSGD(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_enough_loses_nothing(kind: type[LowRank]):
    """Once the spaces have been found, if all ranks give matrices from the same ones of that rank."""
    slots, random = _slots([(30, 40)]), torch.Generator().manual_seed(1)
    left, right = (torch.randn(rows, 2, generator=random, dtype=torch.float64) for rows in (30, 40))
    rounds: list[list[Tensor]] = []
    for _ in range(4):
        rounds.append([torch.zeros(_length(slots), dtype=torch.float64) for _ in range(2)])
        for flat in rounds[-1]:
            middle = torch.randn(2, 2, generator=random, dtype=torch.float64)
            _matrix(flat, slots[0]).copy_(left @ middle @ right.T)
    found = _sums(kind(2), rounds, slots)[0]
    lost = sum((sum(given) - sums for given, sums in zip(rounds, found, strict=True)), torch.tensor(0.0))
    assert isinstance(lost, Tensor)
    assert lost.abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_arrive(kind: type[LowRank], bad: float):
    """In the matrix that has them, at least, in every round; others are not touched."""
    slots = _slots([(12, 30), (30,), (12, 30)])
    for round in range(2):
        rounds = [[_given(slots, 10 * r + i, torch.float32) for i in range(2)] for r in range(round + 1)]
        _matrix(rounds[round][1], slots[0])[3, 4] = bad
        found = _sums(kind(2), rounds, slots)[0][round]
        assert not _matrix(found, slots[0]).isfinite().all()
        assert _matrix(found, slots[2]).isfinite().all()
        assert found[slots[1].offset :].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e15])
def test_the_size_of_values_does_not_matter(kind: type[LowRank], scale: float):
    slots = _slots([(12, 30), (40, 20)])
    rounds = [[_given(slots, 10 * r + i, torch.float32) for i in range(2)] for r in range(6)]
    scaled = [[each * scale for each in given] for given in rounds]
    wanted, found = _sums(kind(2), rounds, slots)[0], _sums(kind(2), scaled, slots)[0]
    for one, other in zip(wanted, found, strict=True):
        torch.testing.assert_close(other / scale, one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_without_a_gradient_loses_nothing(kind: type[LowRank]):
    """Of zeros come zeros, and factors that are as good as before."""
    slots = _slots([(30, 40), (12, 30)])
    rounds = [[_given(slots, 10 * r + i, torch.float32) for i in range(2)] for r in range(3)]
    none = [[torch.zeros(_length(slots))] * 2] * 2
    found, wanted = _sums(kind(2), none + rounds, slots)[0], _sums(kind(2), rounds, slots)[0]
    assert not any(sums.any() for sums in found[:2])
    assert all(torch.equal(one, other) for one, other in zip(found[2:], wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_worker_sends_nothing_and_is_exact(kind: type[LowRank], monkeypatch: pytest.MonkeyPatch):
    slots = _slots(SHAPES)
    given = _given(slots, 0, torch.float32)
    monkeypatch.setattr(WholeParameters, "__init__", None)  # nothing is kept either
    assert torch.equal(_sums(kind(1), [[given]], slots)[0][0], given)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_under_way_do_not_mix(kind: type[LowRank]):
    """Ranks enter the stages of several sums in different orders, since each is late at another time."""
    slots = _slots([(20, 30)] * 12)
    rounds = [[_given(slots, 10 * r + i, torch.float64) for i in range(3)] for r in range(3)]
    wanted = _sums(kind(2), rounds, slots, size=10**6)

    def body(comm: Communicator) -> list[Tensor]:
        values = as_tensor(comm.arena(_length(slots), NUMPY_DTYPES[torch.float64]).mine)
        sums, found = StretchSums(comm, kind(2), values, 600, slots), []
        for given in rounds:
            values.copy_(given[comm.rank])
            for low, high in pairwise([*(slot.offset for slot in slots), _length(slots)]):
                sums.start(low, high)
                comm.sleep(1e-4 * ((7 * low + comm.rank) % 5))
                for _ in range((low + comm.rank) % 3):
                    sums.poll()
            assert list(sums.pieces(0, _length(slots)))[:2] == [(0, 608), (608, 1216)]
            sums.finish()
            found.append(values.clone())
        return found

    for found, same in zip(World(3, nodes=range(3), network=LinkNetwork(1000, 1e7)).run(body), wanted, strict=True):
        for one, other in zip(found, same, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def _sent(kind: type[LowRank], rounds: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The elements of one rank's messages for the gradients of MLP."""
    sent, slots = list[int](), _slots(MLP)
    start: Any = VirtualCommunicator.start_all_reduce

    def noted(self: Communicator, buffer: Any, operation: Any = "sum") -> Any:
        if self.rank == 0:
            assert buffer.dtype == np.float32
            sent.append(buffer.size)
        return start(self, buffer, operation)

    monkeypatch.setattr(VirtualCommunicator, "start_all_reduce", noted)
    given = [_given(slots, rank, torch.float32) for rank in range(2)]
    _sums(kind(2), [given] * rounds, slots, size=10**9)
    return sent


LEFT, RIGHT = 2 * (1024 + 1024 + 10), 2 * (784 + 1024 + 1024)
VECTORS, MATRICES = 1024 + 1024 + 10, 1024 * 784 + 1024 * 1024 + 10 * 1024


def test_what_is_sent_of_a_perceptron(monkeypatch: pytest.MonkeyPatch):
    """190 times less than its matrices with PowerSGD, 157 times less with its biases; half as much with ACP-SGD."""
    assert _sent(PowerSGD, 1, monkeypatch) == [LEFT + VECTORS, RIGHT]
    assert round(MATRICES / (LEFT + RIGHT), 1) == 190.4
    assert round((MATRICES + VECTORS) / (LEFT + RIGHT + VECTORS), 1) == 157.4


def test_what_is_sent_of_it_in_turn(monkeypatch: pytest.MonkeyPatch):
    assert _sent(AlternatingPowerSGD, 3, monkeypatch) == [LEFT + VECTORS, RIGHT + VECTORS, LEFT + VECTORS]


@pytest.mark.parametrize("nodes", [(0, 1), (0, 0, 1, 1), (0, 0, 0, 1, 1)])
@pytest.mark.parametrize("codec", ["powersgd", "acp"])
@pytest.mark.parametrize("exchange", ["auto", "message", "shared"])
def test_convolutions_train_alike_on_all_ranks(tmp_path: Path, codec: str, exchange: str, nodes: tuple[int, ...]):
    """Slices between nodes are cut between parameters, so that some ranks own none."""

    def run(**keys: Any) -> list[np.ndarray]:
        strategy = {"name": "all_reduce", "bucket_mb": 0.0005, "exchange": exchange, **keys}
        job = helpers.make_job(
            tmp_path, model=helpers.noisy_net, data={"name": helpers.pictures}, strategy=strategy, seed=3
        )
        found = World(len(nodes), nodes=nodes).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
        assert all(np.array_equal(vector, found[0]) for vector in found), "replicas are equal to the bit"
        return found

    assert np.isfinite(run(codec={"name": codec, "rank": 1})[0]).all()


@pytest.mark.parametrize("codec", ["none", "topk", "acp", {"name": "powersgd", "rank": 2}])
@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, {"name": "local_sgd", "every": 2}], ids=str)
def test_a_resumed_run_may_have_another_codec(tmp_path: Path, strategy: helpers.Tables, codec: Any):
    """It starts with new factors then."""

    def body(comm: Communicator) -> np.ndarray:
        def job(codec: Any) -> Any:
            tables: Any = {"strategy": {**strategy, "codec": codec}}
            tables["train"] = {"steps": 8, "batch_size": 3, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9}
            return helpers.make_job(tmp_path, **tables)

        whole = helpers.quiet_train(comm, job({"name": "powersgd", "rank": 1}))
        if comm.rank == 0:
            helpers.forget_after(whole.folder, 0)
        comm.barrier()
        return helpers.vector(helpers.quiet_train(comm, job(codec), resume=Resume(whole.folder, changes="take")).model)

    found = World(2, nodes=range(2)).run(body)
    assert np.isfinite(found[0]).all()
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ["powersgd", "acp"])
@pytest.mark.parametrize(
    ("model", "rank", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(7, 13), nn.Linear(13, 3)), 5, "for 0.weight, a matrix of 13 x 7, it must be "),
        (lambda: nn.Sequential(nn.Linear(7, 1), nn.Linear(1, 3)), 1, "has no matrix that low rank makes smaller"),
    ],
)
def test_a_rank_that_compresses_nothing_is_refused(
    tmp_path: Path, name: str, model: Callable[[], nn.Module], rank: int, words: str
):
    strategy = {"name": "all_reduce", "codec": {"name": name, "rank": rank}}
    job = helpers.make_job(tmp_path, model=model, strategy=strategy)
    with pytest.raises(ModelError) as caught:
        World(2, nodes=(0, 1)).run(lambda comm: helpers.quiet_train(comm, job))
    assert f'strategy.codec = "{name}": ' in str(caught.value)
    assert words in str(caught.value)
