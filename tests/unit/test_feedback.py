"""What ranks do about what their messages leave out: as the published algorithms say, kept in checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hpctrain.codecs import CodecTable, codec_by, wire_codec_by
from hpctrain.codecs.options import WarmUp
from hpctrain.codecs.topk import TopK
from hpctrain.codecs.wire import WireCodec
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import HpctrainError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.replica.state import CODEC
from hpctrain.replica.tensors import as_tensor
from hpctrain.strategies.sums import StretchSums
from tests import helpers
from tests.marks import mostly_slow

LENGTH, ROUNDS = 640, 8
DGC: dict[str, Any] = {"name": "topk", "keep": 0.1, "block": 64, "momentum": 0.8}
EF21: dict[str, Any] = {"name": "topk", "keep": 0.1, "block": 64, "feedback": "ef21", "momentum": 0.7}
EF21_PLAIN: dict[str, Any] = {**EF21, "momentum": 0.0}
DEMO: dict[str, Any] = {"name": "demo", "decay": 0.9}
DECAYING: dict[str, Any] = {"name": "topk", "keep": 0.1, "block": 64, "decay": 0.9}
WARM: dict[str, Any] = {**DGC, "warmup": {"samples": 40}}
TABLES = [DGC, EF21, EF21_PLAIN, DEMO, DECAYING]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _gradient(rank: int, round: int) -> Tensor:
    random = torch.Generator().manual_seed(100 * rank + round)
    return torch.randn(LENGTH, generator=random, dtype=torch.float64) + torch.linspace(-1, 1, LENGTH)


def _compressed(table: dict[str, Any], values: Tensor) -> Tensor:
    codec = wire_codec_by(CodecTable(name=table["name"], keep=table.get("keep"), block=table.get("block")))
    assert codec is not None
    message = torch.empty(codec.shape(values)[0], dtype=torch.uint8)
    codec.encode(values, message)
    found = torch.empty_like(values)
    codec.decode(message, found)
    return found


def _momentum_correction(table: dict[str, Any], ranks: int) -> list[Tensor]:
    """Lin et al. 2018, algorithm 4, without clipping: u = m u + g; v = v + u; what is sent of v leaves v and u."""
    u, v, sums = ([torch.zeros(LENGTH).double() for _ in range(ranks)] for _ in range(3))
    sums = []
    for round in range(ROUNDS):
        total = torch.zeros(LENGTH).double()
        for rank in range(ranks):
            u[rank] = table["momentum"] * u[rank] + _gradient(rank, round)
            v[rank] = v[rank] + u[rank]
            sent = _compressed(table, v[rank])
            mask = sent == 0
            u[rank], v[rank] = u[rank] * mask, v[rank] * mask
            total += sent
        sums.append(total)
    return sums


def _ef21(table: dict[str, Any], ranks: int) -> list[Tensor]:
    """Fatkhullin et al. 2023, algorithm 1, with eta = 1 - momentum, from v = the first gradient and g = 0."""
    eta = 1 - table["momentum"]
    v = [_gradient(rank, 0) for rank in range(ranks)]
    g = [torch.zeros(LENGTH).double() for _ in range(ranks)]
    sums = []
    for round in range(ROUNDS):
        for rank in range(ranks):
            v[rank] = (1 - eta) * v[rank] + eta * _gradient(rank, round)
            g[rank] = g[rank] + _compressed(table, v[rank] - g[rank])
        sums.append(sum(g, torch.zeros(LENGTH).double()))
    return sums


def _decoupled(table: dict[str, Any], ranks: int) -> list[Tensor]:
    """Peng et al. 2024, algorithm 1, up to the sum: m = decay m + g; q = the fast components of m; m = m - q."""
    m = [torch.zeros(LENGTH).double() for _ in range(ranks)]
    sums = []
    for round in range(ROUNDS):
        total = torch.zeros(LENGTH).double()
        for rank in range(ranks):
            m[rank] = table["decay"] * m[rank] + _gradient(rank, round)
            sent = _compressed(table, m[rank])
            m[rank] -= sent
            total += sent
        sums.append(total)
    return sums


PUBLISHED: list[tuple[dict[str, Any], Callable[[dict[str, Any], int], list[Tensor]]]] = [
    (DGC, _momentum_correction),
    (EF21, _ef21),
    (EF21_PLAIN, _ef21),
    (DEMO, _decoupled),
    (DECAYING, _decoupled),
]


def _name(value: Any) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("table", "published"), PUBLISHED, ids=_name)
def test_sums_are_those_of_the_published_algorithm(
    table: dict[str, Any], published: Callable[[dict[str, Any], int], list[Tensor]], size: int
):
    """Also where rounds are divided by other numbers: what is kept is in units of the mean."""
    divisors = [size, size, 0.5 * size, size, 1.5]

    def body(comm: Communicator) -> list[Tensor]:
        values = as_tensor(comm.arena(LENGTH, np.dtype(np.float64)).mine)
        sums, found = StretchSums(comm, codec_by(CodecTable(**table)), values, LENGTH), []
        for round in range(ROUNDS):
            divisor = divisors[round % len(divisors)]
            sums.begin(round, divisor)
            values.copy_(_gradient(comm.rank, round)).mul_(divisor)
            sums.start(0, LENGTH)
            sums.finish()
            sums.divisor = divisor
            found.append(values.clone().div_(divisor))
        return found

    expected, ranks = published(table, size), World(size, nodes=range(size)).run(body)
    for found in ranks:
        for round, (got, wanted) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
            assert torch.equal(got, ranks[0][round])


def test_what_is_kept_is_of_no_use_to_another_kind_of_codec():
    """A rest alone, without what belongs to it, would be added wrongly."""

    def body(comm: Communicator) -> list[bool]:
        made = []
        for table in (DGC, EF21, DECAYING):
            values = as_tensor(comm.arena(LENGTH, np.dtype(np.float32)).mine)
            sums = StretchSums(comm, codec_by(CodecTable(**table)), values, LENGTH)
            values.copy_(_gradient(comm.rank, 0))
            sums.start(0, LENGTH)
            sums.finish()
            made.append(sums)
        assert set(made[0].own().arrays) == {f"{CODEC}rest", f"{CODEC}velocity"}
        return [one.load_own(other.own()) is None for one in made for other in made]

    for found in World(2, nodes=(0, 1)).run(body):
        assert found == [one == other for one in range(3) for other in range(3)]


RESUMED = [(table, nodes) for table in (DGC, EF21, DEMO, WARM) for nodes in ((0, 1), (0, 0, 1, 1))]


@pytest.mark.parametrize(("table", "nodes"), mostly_slow(RESUMED, RESUMED[:4:3] + RESUMED[6:7]), ids=str)
@pytest.mark.parametrize("strategy", [{"name": "all_reduce", "bucket_mb": 0.0005}, {"name": "local_sgd", "every": 2}])
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, strategy: dict[str, Any], table: dict[str, Any], nodes: tuple[int, ...], monkeypatch: Any
):
    """With velocities and sums, in the middle of a warm-up; and not without them."""
    train = {"steps": 8, "batch_size": 3, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9}

    def body(comm: Communicator) -> bool:
        optimizer = {"name": "SGD", "lr": 0.05}
        job = helpers.make_job(tmp_path, strategy={**strategy, "codec": table}, train=train, optimizer=optimizer)
        whole = helpers.quiet_train(comm, job)
        first = helpers.vector(whole.model)
        if comm.rank == 0:
            helpers.forget_after(whole.folder, 0)
        comm.barrier()
        return bool((helpers.vector(helpers.quiet_train(comm, job, resume=whole.folder).model) == first).all())

    assert all(World(len(nodes), nodes=nodes).run(body))
    load = StretchSums.load_own

    def forget(self: StretchSums, own: Any) -> str | None:
        why = load(self, own)
        for array in self._kept.values():
            array.zero_()
        return why

    monkeypatch.setattr(StretchSums, "load_own", forget)
    assert all(World(len(nodes), nodes=nodes).run(body)) == (table is DEMO), "which has a rest only"


# The warm-up


@pytest.mark.parametrize(("keep", "shares"), [(0.001, [0.25, 0.0629, 0.0158, 0.00398]), (0.5, [0.5] * 4)])
def test_more_is_kept_at_first(keep: float, shares: list[float]):
    """As published for 0.1 %: 25 %, 6.25 %, 1.5625 %, 0.4 %, one epoch each."""
    codec, found = TopK(keep, warmup=400), []
    for codec.position in (0, 99, 100, 200, 399, 400, 10**9):
        found.append(codec.keep)
    expected = [shares[0], shares[0], shares[1], shares[2], shares[3], keep, keep]
    assert found == pytest.approx(expected, rel=0.02)


def test_warm_ups_are_counted_in_samples_or_epochs():
    for warmup, epoch, length in ((WarmUp(samples=400), None, 400), (WarmUp(epochs=2.5), 100, 250)):
        codec = codec_by(CodecTable(name="topk", warmup=warmup), epoch=epoch)
        assert isinstance(codec, TopK)
        codec.position = length - 1
        assert codec.keep > 0.01
        codec.position = length
        assert codec.keep == 0.01
    with pytest.raises(JobError, match=r"stream of unknown length.*set codec\.warmup\.samples"):
        codec_by(CodecTable(name="topk", warmup=WarmUp(epochs=1)))


def test_messages_get_shorter_during_the_warm_up():
    def body(comm: Communicator) -> list[int]:
        codec = codec_by(CodecTable(name="topk", keep=0.01, warmup=WarmUp(samples=8)))
        assert isinstance(codec, WireCodec)
        values, sent = as_tensor(comm.arena(8192, np.dtype(np.float32)).mine), []
        sums = StretchSums(comm, codec, values, 4096)
        for position in range(0, 12, 2):
            values.copy_(torch.randn(8192, generator=torch.Generator().manual_seed(position + comm.rank)))
            sums.begin(position, 2.0)
            sums.start(0, 8192)
            sums.finish()
            sent.append(codec.nbytes(values))
            assert int((values != 0).sum()) <= 2 * sent[-1] // 6
        return sent

    first, second = World(2, nodes=(0, 1)).run(body)
    assert first == second
    assert first == sorted(first, reverse=True)
    assert first[0] == 2 * 1024 * 6
    assert first[-1] == 2 * 41 * 6


# Mistakes

MISTAKES = [
    ({"name": "topk", "momentum": 0.9, "decay": 0.9}, "has decay and momentum, which both say"),
    ({"name": "topk", "feedback": "ef21", "decay": 0.9}, "has decay and feedback, which both say"),
    ({"name": "demo", "momentum": 0.9}, 'has momentum with name = "demo", which needs feedback = "ef21"'),
    ({"name": "sign", "momentum": 0.9}, 'has momentum with name = "sign", where it has no effect; set name = "topk"'),
    ({"name": "int8", "decay": 0.9}, 'has decay with name = "int8"'),
    ({"name": "topk", "momentum": 1.0}, "codec.momentum = 1.0: must be a number, at least 0 and below 1"),
    ({"name": "topk", "decay": 0.0}, "codec.decay = 0.0: must be a number, above 0 and at most 1"),
    ({"name": "topk", "feedback": "ef22"}, 'codec.feedback = "ef22": must be one of "residual", "ef21"'),
    ({"name": "topk", "warmup": {}}, "must have one of epochs and samples"),
    ({"name": "topk", "warmup": {"epochs": 1, "samples": 1}}, "must have one of epochs and samples"),
    ({"name": "demo", "warmup": {"epochs": 1}}, 'has warmup with name = "demo"'),
]


@pytest.mark.parametrize(("table", "sentence"), MISTAKES, ids=str)
def test_every_mistake_is_one_message(table: dict[str, Any], sentence: str):
    with pytest.raises(JobError) as caught:
        Job(strategy={"name": "all_reduce", "codec": table})
    [line] = str(caught.value).splitlines()
    assert sentence in line
    assert line.startswith("strategy.codec")


@pytest.mark.parametrize("key", ["momentum", "feedback", "warmup"])
def test_servers_refuse_what_is_for_rounds(key: str):
    value = {"momentum": 0.9, "feedback": "ef21", "warmup": {"epochs": 1}}[key]
    with pytest.raises(JobError, match=rf"has codec\.{key}, .*; leave {key} out"):
        Job(strategy={"name": "parameter_server", "codec": {"name": "topk", key: value}})


SGD, NESTEROV, ADAM = {"name": "SGD"}, {"name": "SGD", "momentum": 0.9}, {"name": "Adam"}
BESIDE = [
    ({"name": "all_reduce"}, DGC, NESTEROV, "codec.momentum gives the codec a momentum of its own, 0.8, beside that"),
    ({"name": "all_reduce"}, {"name": "topk", "feedback": "ef21"}, ADAM, "codec.feedback gives the codec a momentum"),
    ({"name": "all_reduce"}, DEMO, NESTEROV, "strategy.codec.decay gives the codec a momentum of its own, 0.9, beside"),
    ({"name": "parameter_server"}, DEMO, NESTEROV, 'optimizer "SGD", 0.9; use an optimizer without momentum'),
    ({"name": "diloco"}, DECAYING, SGD, "beside strategy.outer_momentum = 0.9; set that to 0, or leave"),
    ({"name": "all_reduce"}, DGC, SGD, ""),
    ({"name": "all_reduce"}, EF21_PLAIN, ADAM, ""),
    ({"name": "diloco", "outer_momentum": 0.0}, DECAYING, NESTEROV, ""),
    ({"name": "local_sgd"}, DGC, NESTEROV, ""),
]


@pytest.mark.parametrize(("strategy", "codec", "optimizer", "sentence"), BESIDE, ids=lambda value: str(value)[:40])
def test_two_momenta_are_refused(
    tmp_path: Path, strategy: dict[str, Any], codec: dict[str, Any], optimizer: dict[str, Any], sentence: str
):
    """Where both are of the same gradients, or changes."""
    tables: Any = {"strategy": {**strategy, "codec": codec}, "optimizer": optimizer, "train": {"steps": 1}}
    job = helpers.make_job(tmp_path, **tables)

    def body(comm: Communicator) -> str:
        try:
            helpers.quiet_train(comm, job)
        except HpctrainError as error:
            assert isinstance(error, ModelError)
            return str(error)
        return ""

    found = World(3, nodes=(0, 1, 2)).run(body)
    assert all((sentence in each and len(each.splitlines()) == 1) if sentence else each == "" for each in found), found
