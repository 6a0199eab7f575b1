"""What traces record of operations on device memory, over virtual ranks and a stand-in for CuPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.analysis import Analysis
from hpctrain.comm.base import Communicator
from hpctrain.comm.device.communicator import REDUCE_LANE, DeviceCommunicator
from hpctrain.comm.device.direct import DirectCommunicator
from hpctrain.comm.device.gpu import SlotPool
from hpctrain.comm.device.staged import StagedCommunicator
from hpctrain.trace import Kind, open_run
from hpctrain.trace.schema import THREADS, is_communication
from hpctrain.trace.totals import format_totals
from tests import helpers
from tests.stand_in_cupy import Cuda
from tests.traces import HandMade

SLOT = 64  # bytes


def traced(kind: type[DeviceCommunicator], body: Any) -> list[np.ndarray[Any, Any]]:
    """Every rank's spans of `body(communicator, stand-in)`."""

    def rank(inner: Communicator) -> None:
        cuda = Cuda()
        body(kind.around(inner, gpu := cuda.gpu(), SlotPool(gpu, SLOT)), cuda)

    return [rows["spans"] for rows in helpers.traced(2, rank)[1]]


@pytest.mark.parametrize("kind", [StagedCommunicator, DirectCommunicator])
@pytest.mark.parametrize("algorithm", ["library", "ring"])
def test_an_all_reduce_of_device_memory_is_communication_as_a_whole(
    kind: type[DeviceCommunicator], algorithm: str
) -> None:
    def body(comm: DeviceCommunicator, cuda: Cuda) -> None:
        comm.recorder.drain()
        comm.all_reduce(cuda.array(np.ones(100, np.float32)), "sum", algorithm)

    for spans in traced(kind, body):
        assert is_communication(spans).all(), spans
        around = spans[(spans["kind"] == Kind.REDUCE) & (spans["id"] < 0)]
        assert len(around) > 0 or (kind, algorithm) == (DirectCommunicator, "library")
        assert not around["bytes"].any()  # counted where they are sent


def test_a_sum_over_shared_memory_is_computation(tmp_path: Path) -> None:
    keys = {"strategy": {"name": "all_reduce", "exchange": "shared"}}
    _, traces = helpers.traced(2, lambda comm: helpers.quiet_train(comm, helpers.make_job(tmp_path, **keys)))
    for rows in traces:
        own = rows["spans"][(rows["spans"]["kind"] == Kind.REDUCE) & (rows["spans"]["id"] < 0)]
        assert len(own) == 8  # one per step
        assert not is_communication(own).any()


def test_copies_around_an_all_reduce_are_transfer_not_waiting(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("forward", 1.0, 2.0, 0)
        run[0].span("reduce", 2.0, 5.0, 0)  # copies
        run[0].span("wait", 5.0, 6.0, 0)
        run[0].span("reduce", 6.0, 8.0, 0, bytes=400, flops=200.0)  # a sum over shared memory
        run[0].span("reduce", 8.0, 8.5, 0, bytes=4000)  # by NCCL
        run[0].done(9.0, 0)
    analysis = Analysis(open_run(tmp_path))
    assert analysis.times["communication_s"].tolist() == [pytest.approx(0.0045)]
    assert analysis.times["useful_s"].tolist() == [pytest.approx(0.003)]
    assert analysis.waits["seconds"].sum() == pytest.approx(0.001)


def test_spans_of_the_thread_that_reduces_are_read_and_named(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("backward", 1.0, 5.0, 0)
        run[0].span("reduce", 2.0, 4.0, 0, bytes=4000, lane=REDUCE_LANE)
        run[0].done(6.0, 0)
    found = open_run(tmp_path)
    assert found.spans()["lane"].tolist() == [0, REDUCE_LANE]
    assert not found.notes
    assert THREADS[REDUCE_LANE] in format_totals(found)
    analysis = Analysis(found)
    assert analysis.traffic["bytes"].tolist() == [4000]
    assert analysis.convergence["bytes"].tolist() == [4000]
