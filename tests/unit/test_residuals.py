"""What lossy messages leave out: added to the next ones, in units of the mean, kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from hpctrain.codecs import CodecTable, codec_by
from hpctrain.codecs.options import JOINT
from hpctrain.codecs.wire import WireCodec
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.job import Job
from hpctrain.replica.layout import Slot
from hpctrain.replica.state import REST, Own
from hpctrain.replica.tensors import as_tensor
from hpctrain.run.api import train
from hpctrain.run.resume import Resume
from hpctrain.strategies.exchange import BucketExchange
from hpctrain.strategies.parameter_server.links import Packet
from hpctrain.strategies.parameter_server.worker import ParameterServer
from hpctrain.strategies.shared import SharedBucketExchange
from hpctrain.strategies.sums import StretchSums
from tests import helpers
from tests.marks import slow

LENGTH = 1000
TOPK = CodecTable(name="topk", keep=0.05, block=64)
REMEMBERING = [
    TOPK,
    CodecTable(name="topk", keep=0.1, bits=2),
    CodecTable(name="sign", block=64),
    CodecTable(name="demo"),
    CodecTable(name="powersgd"),
    CodecTable(name="acp", rank=3),
]
SLOTS = [Slot("first", (20, 30), 0, 600), Slot("second", (10, 5, 7), 600, 350), Slot("bias", (50,), 950, 50)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("size", [2, 3, slow(5)])
@pytest.mark.parametrize("table", REMEMBERING, ids=str)
def test_nothing_is_lost_in_the_long_run(table: CodecTable, size: int):
    """What has been applied, and what all ranks still have left out, is the sum of all means. The divisor of a round is
    not that of the one before."""
    rounds, divisors = 12, [size, size, 0.3 * size, size, 1.7]

    def body(comm: Communicator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        values = as_tensor(comm.arena(LENGTH, np.dtype(np.float64)).mine)
        sums = StretchSums(comm, codec_by(table), values, 300, SLOTS)
        random = torch.Generator().manual_seed(comm.rank)
        given, applied = torch.zeros(LENGTH, dtype=torch.float64), torch.zeros(LENGTH, dtype=torch.float64)
        for number in range(rounds):
            divisor = divisors[number % len(divisors)]
            sums.begin(number, divisor)
            values.copy_(torch.randn(LENGTH, generator=random, dtype=torch.float64))
            given.add_(values, alpha=1 / divisor)
            sums.start(600, LENGTH)
            sums.start(0, 600)
            sums.finish()
            sums.divisor = divisor
            applied.add_(values, alpha=1 / divisor)
        own = sums.own()
        return given.numpy(), applied.numpy(), own.arrays[REST] / own.numbers[REST]["divisor"]

    found = World(size, nodes=range(size)).run(body)
    wanted, kept = sum(given for given, _, _ in found), sum(rest for _, _, rest in found)
    for _, applied, _ in found:
        np.testing.assert_array_equal(applied, found[0][1])
    np.testing.assert_allclose(found[0][1] + kept, wanted, rtol=0, atol=1e-9 if table.name != "demo" else 1e-6)
    assert np.abs(kept).max() > 0.1, "something is left out, so that the test tests something"


STRATEGIES: dict[str, tuple[helpers.Tables, type]] = {
    "all_reduce": ({"bucket_mb": 0.0005}, StretchSums),
    "local_sgd": ({"every": 2}, StretchSums),
    "parameter_server": ({"mode": "sync", "servers": 1, "chunk_mb": 0.0005}, ParameterServer),
}


RESUMED = [
    *((strategy, TOPK) for strategy in STRATEGIES),
    *(slow(strategy, CodecTable(name="sign")) for strategy in STRATEGIES),
]
LOW_RANK = [
    ("all_reduce", CodecTable(name="powersgd", rank=1)),
    ("local_sgd", CodecTable(name="acp", rank=1)),
    slow("all_reduce", CodecTable(name="acp", rank=1)),
    slow("local_sgd", CodecTable(name="powersgd", rank=1)),
]


@pytest.mark.parametrize("nodes", [(0, 1), (0, 1, 2), (0, 0, 1, 1), (0, 0, 1)])
@pytest.mark.parametrize(("strategy", "table"), RESUMED + LOW_RANK, ids=str)
def test_a_resumed_run_has_the_same_bits(
    tmp_path: Path, table: CodecTable, strategy: str, nodes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
):
    """Which it has not without what was left out."""
    keys, keeper = STRATEGIES[strategy]
    tables: Any = {"strategy": {"name": strategy, "codec": table.plain(), **keys}}
    tables["train"] = {"steps": 8, "batch_size": 3, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9}

    def body(comm: Communicator) -> tuple[Any, Any]:
        job = helpers.make_job(tmp_path, **tables)
        whole = helpers.quiet_train(comm, job)
        first = helpers.vector(whole.model)
        if comm.rank == 0:
            helpers.forget_after(whole.folder, 0)
        comm.barrier()
        return first, helpers.vector(helpers.quiet_train(comm, job, resume=whole.folder).model)

    def same() -> bool:
        return all((again == first).all() for first, again in World(len(nodes), nodes=nodes).run(body))

    assert same()
    load = cast(Any, keeper).load_own
    if table.name in JOINT:  # whose factors are kept besides

        def forget(self: Any, own: Own) -> None:
            load(self, Own({key: array for key, array in own.arrays.items() if key == REST}, own.numbers))

        monkeypatch.setattr(keeper, "load_own", forget)
        assert not same()
    monkeypatch.setattr(keeper, "load_own", lambda self, own: None)
    assert not same()


def test_runs_resume_without_it_on_other_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Slices of the arena are then other ones."""
    strategy = {"name": "all_reduce", "codec": TOPK.plain(), "bucket_mb": 0.0005}
    train = {"steps": 4, "batch_size": 3, "checkpoint_every": {"steps": 2}}
    job = helpers.make_job(tmp_path, strategy=strategy, train=train)
    folder = World(4, nodes=(0, 0, 1, 1)).run(lambda comm: helpers.quiet_train(comm, job))[0].folder
    more = helpers.make_job(tmp_path, strategy=strategy, train={**train, "steps": 6})
    World(4, nodes=range(4)).run(lambda comm: train_again(comm, more, folder))
    assert capsys.readouterr().out.count("left out is lost") == 1


def train_again(comm: Communicator, job: Job, folder: Path) -> None:
    train(job, comm, resume=Resume(folder, changes="take"))


@pytest.mark.parametrize("weight", [50.0, 0.02])
def test_weights_of_losses_do_not_matter(tmp_path: Path, weight: float):
    """As in sums over tokens: a constant factor of all weights changes nothing."""

    def trained(factor: float) -> np.ndarray:
        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
            return nn.functional.cross_entropy(outputs, targets, reduction="sum") * factor, len(targets) * factor

        strategy = {"name": "all_reduce", "codec": TOPK.plain(), "bucket_mb": 0.0005}
        job = helpers.make_job(tmp_path, strategy=strategy, loss=loss, train={"steps": 20, "precision": "float64"})
        return World(2, nodes=(0, 1)).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]

    assert helpers.difference(trained(weight), trained(1.0)) < 1e-9


def test_a_push_that_does_not_count_leaves_no_trace():
    """Pushes of full and short batches, one of which is dropped: the server's updates and what is kept are all that was
    computed but for that one."""

    def body(comm: Communicator) -> None:
        random = torch.Generator().manual_seed(0)
        chunk, rest = torch.zeros(LENGTH), torch.zeros(LENGTH)
        codec = codec_by(TOPK)
        assert isinstance(codec, WireCodec)
        packet, weight = Packet(comm, chunk, codec, rest=rest), 1.0
        given, applied, arrived = torch.zeros(LENGTH), torch.zeros(LENGTH), torch.zeros(LENGTH)
        for step, (share, counts) in enumerate([(1.0, True), (0.25, True), (1.0, False), (0.0, True), (0.5, True)]):
            chunk.copy_(torch.randn(LENGTH, generator=random) * share)
            given += chunk / (share or 1.0)
            packet.pack(step, share / weight)
            weight = share or weight
            packet.unpack(arrived)
            if counts:
                applied += arrived / weight
            else:
                packet.take_back()
                given -= chunk / (share or 1.0)
        torch.testing.assert_close(applied + rest / weight, given, rtol=0, atol=1e-5)
        assert rest.abs().max() > 0.1

    World(1).run(body)


@pytest.mark.parametrize("keys", [{"nan": "skip"}, {"precision": "mixed_float16"}])
@pytest.mark.parametrize("nodes", [(0, 1), (0, 0, 1, 1)])
def test_what_may_be_skipped_is_not_sent_during_backward(tmp_path: Path, nodes: tuple[int, ...], keys: dict[str, str]):
    """A gradient that is not finite would otherwise stay in what the next messages are to make up for."""
    sizes: list[int] = []

    def body(comm: Communicator) -> np.ndarray:
        strategy = {"name": "all_reduce", "codec": {"name": "topk", "keep": 0.1}}
        job = helpers.make_job(tmp_path, strategy=strategy, train={"steps": 4, "batch_size": 3, **keys})
        return helpers.vector(helpers.quiet_train(comm, job).model)

    with pytest.MonkeyPatch.context() as patch:
        for cls in (BucketExchange, SharedBucketExchange):
            make: Any = cls.__init__

            def noted(self: Any, *given: Any, make: Any = make) -> None:
                make(self, *given)
                sizes.append(self.bucket_bytes)

            patch.setattr(cls, "__init__", noted)
        found = World(len(nodes), nodes=nodes).run(body)
    assert sizes
    assert not any(sizes)
    assert all(np.isfinite(vector).all() for vector in found)
