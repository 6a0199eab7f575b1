"""16 bits on the wire: what they cost in precision, and that all ranks end with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.codecs import codec_by
from hpctrain.codecs.half import BFloat16, Float16
from hpctrain.codecs.wire import Plain, WireCodec
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.replica.layout import joined
from hpctrain.replica.tensors import as_array, as_tensor
from hpctrain.strategies.sums import FEWEST, StretchSums
from tests import helpers

PRECISION = {"none": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative, of the nearest value
WIRE = [(Plain(), 0.0), (BFloat16(), 2.0**-8), (Float16(), 2.0**-11)]


def _sent(codec: WireCodec, values: torch.Tensor) -> torch.Tensor:
    length, dtype = codec.shape(values)
    message = torch.empty(length, dtype=dtype)
    codec.encode(values, message)
    found = torch.full_like(values, 7.0)
    codec.decode(message, found)
    added = torch.ones_like(values)
    codec.decode(message, added, add=True)
    torch.testing.assert_close(added, found + 1, rtol=1e-6, atol=1e-6, equal_nan=True)
    return found


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("codec", "precision"), WIRE)
def test_values_arrive_to_the_nearest(codec: WireCodec, precision: float, dtype: torch.dtype, size: float):
    values = (torch.randn(300_000, generator=torch.Generator().manual_seed(0)) * size).to(dtype)
    found = _sent(codec, values)
    large = values.abs() > values.abs().max() * 2.0**-20
    assert ((found - values).abs() <= precision * values.abs())[large].all()
    assert (found - values).abs().max() <= precision * values.abs().max()


@pytest.mark.parametrize("codec", [codec for codec, _ in WIRE])
@pytest.mark.parametrize("values", [[], [0.0, 0.0], [float("inf"), 1.0], [float("nan"), 1.0], [3e38, -1e38], [1e-45]])
def test_unusual_values_arrive(codec: WireCodec, values: list[float]):
    given = torch.tensor(values)
    found = _sent(codec, given)
    assert torch.equal(found.isfinite(), given.isfinite())
    assert torch.equal(found == 0, given == 0) or values == [1e-45]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("name", PRECISION)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_ranks_get_the_same_sum(name: Any, size: int, dtype: torch.dtype):
    """Of stretches shorter than the number of ranks, too."""
    bounds = [(0, 1000), (1000, 1002), (1002, 5000)]

    def body(comm: Communicator) -> tuple[np.ndarray, np.ndarray]:
        given = (0.01 * torch.randn(5000, generator=torch.Generator().manual_seed(comm.rank))).to(dtype)
        arena = comm.arena(5000, as_array(given).dtype)
        values = as_tensor(arena.mine)
        sums = StretchSums(comm, codec_by(name), values, 700)
        for _ in range(2):  # memory is used again
            values.copy_(given)
            for low, high in bounds:
                sums.start(low, high)
                sums.poll()
            sums.finish()
        assert not len(sums)
        return given.double().numpy(), values.double().numpy()

    found = World(size, nodes=range(size)).run(body)
    exact = sum(given for given, _ in found)
    for _, total in found:
        np.testing.assert_array_equal(total, found[0][1])
    rounding = (size + 1) * max(PRECISION[name], 2.0**-23 if dtype is torch.float32 else 2.0**-8)
    assert np.abs(found[0][1] - exact).max() <= rounding * 0.04


@pytest.mark.parametrize("name", ["int8", "topk"])
def test_ranks_do_not_all_send_to_the_same_one_first(name: Any, monkeypatch: pytest.MonkeyPatch):
    """Its link would be full and the others' idle."""
    first, send = dict[int, int](), VirtualCommunicator.start_send

    def note(comm: VirtualCommunicator, buffer: Any, dest: int, tag: int) -> Any:
        first.setdefault(comm.rank, dest)
        return send(comm, buffer, dest, tag)

    def body(comm: Communicator) -> None:
        sums = StretchSums(comm, codec_by(name), as_tensor(comm.arena(5000, np.dtype(np.float32)).mine), 700)
        sums.start(0, 5000)
        sums.finish()

    monkeypatch.setattr(VirtualCommunicator, "start_send", note)
    World(4, nodes=range(4)).run(body)
    assert sorted(first.values()) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", PRECISION)
def test_sums_arrive_in_order_and_few_are_under_way_at_once(name: Any):
    """More are where the network was found idle; another operation's wait lets them go on."""

    def body(comm: Communicator) -> None:
        values = as_tensor(comm.arena(10_000, np.dtype(np.float32)).mine)
        values.fill_(comm.rank + 1)
        sums = StretchSums(comm, codec_by(name), values, 100)
        sums.start(5000, 10_000)
        sums.start(0, 5000)
        assert sums._under_way() == FEWEST
        request, table = comm.start_gather_rows(np.array([comm.rank + 0.5]))
        sums.wait_for(request)
        assert table[:, 0].tolist() == [0.5, 1.5]
        comm.sleep(1.0)
        sums.poll()
        assert sums._under_way() == 2 * FEWEST
        found = []
        for low, high in sums.arrivals():
            assert (values[low:high] == 3).all()
            found.append(low)
        assert found == [*range(5000, 10_000, 100), *range(0, 5000, 100)]

    World(2, nodes=range(2), network=LinkNetwork(1000, 1e9)).run(body)


def test_short_stretches_are_joined():
    found = joined([(8, 10), (10, 12), (12, 13), (0, 5), (5, 6), (6, 8)], 4)
    assert list(found) == [(8, 12), (12, 13), (0, 5), (5, 8)]
    assert list(joined([], 4)) == []


@pytest.mark.parametrize("nodes", [(0, 1), (0, 1, 2), (0, 0, 1, 1)])
@pytest.mark.parametrize("codec", ["bfloat16", "float16"])
@pytest.mark.parametrize("exchange", ["auto", "message", "shared"])
def test_training_with_a_codec_is_close(tmp_path: Path, codec: str, exchange: str, nodes: tuple[int, ...]):
    def run(**keys: Any) -> list[np.ndarray]:
        strategy = {"name": "all_reduce", "bucket_mb": 0.0005, "exchange": exchange, **keys}
        job = helpers.make_job(tmp_path, strategy=strategy, train={"precision": "float64"})
        found = World(len(nodes), nodes=nodes).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
        assert all(np.array_equal(vector, found[0]) for vector in found), "replicas are equal to the bit"
        return found

    distance = helpers.difference(run(codec=codec)[0], run()[0])
    assert 1e-12 < distance < 0.01
