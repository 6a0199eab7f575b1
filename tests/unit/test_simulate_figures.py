"""What the simulator's figures count: computing in all lanes of a rank, and bytes that are under way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.comm.phantom import Phantom
from hpctrain.comm.virtual.flows import FlowNetwork, MessageCosts
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.task import small_job
from hpctrain.hosts import Description
from hpctrain.simulate.calibration import Calibration, MeasuredCost
from hpctrain.simulate.recording import COMPUTING, ComputingClock, OpenSpans
from hpctrain.simulate.summary import predict
from hpctrain.trace import open_run
from tests.unit.test_simulate import KINDS, calibration, simulate

SERVERS = [
    ({"servers": 2, "colocated": True, "mode": "sync"}, 2),
    ({"servers": 2, "colocated": True}, 2),
    ({"servers": 1}, 3),
]


def costly() -> Calibration:
    """A server's work takes as long as a pass."""
    return calibration(spans={kind: MeasuredCost(each_s=2e-6) for kind in KINDS} | {"data": MeasuredCost()})


def union(spans: Any, first: int, last: int) -> float:
    """Seconds in which one of the spans is open, between two times."""
    total, reached = 0, first
    for start, end in sorted(zip(spans["start_ns"], spans["end_ns"], strict=True)):
        start, end = max(start, reached), min(end, last)
        if end > start:
            total, reached = total + end - start, end
    return total / 1e9


@pytest.mark.parametrize(("keys", "hosts"), SERVERS, ids=["sync beside", "async beside", "dedicated"])
def test_rank_computes_in_its_own_lane_and_in_that_of_the_server_beside_it(
    keys: dict[str, Any], hosts: int, tmp_path: Path
) -> None:
    strategy = {"name": "parameter_server", **keys}
    job = small_job(tmp_path, strategy=strategy, train={"steps": 20}, trace={"enabled": True})
    found = simulate(job, {"hosts": [{"count": hosts}]}, costly())
    stretch, run = found.stretch, open_run(found.folder)
    for rank in range(hosts):
        spans = run.spans(rank=rank)
        own = spans[spans["kind"].isin(COMPUTING) & ~((spans["kind"] == "reduce") & (spans["id"] >= 0))]
        assert (own["lane"].nunique() == 2) == ("colocated" in keys)
        expected = union(own, stretch.first.time, stretch.last.time)
        assert stretch.computing(rank) == pytest.approx(expected, rel=1e-6)
        assert 0 < stretch.computing(rank) <= stretch.seconds


@pytest.mark.parametrize(("keys", "hosts"), SERVERS, ids=["sync beside", "async beside", "dedicated"])
def test_ranks_without_traces_compute_as_much(keys: dict[str, Any], hosts: int, tmp_path: Path) -> None:
    shares = []
    for enabled in (True, False):
        job = small_job(tmp_path, strategy={"name": "parameter_server", **keys}, trace={"enabled": enabled})
        shares.append(predict(simulate(job, {"hosts": [{"count": hosts}]}, costly()), costly()).computing)
    assert shares[0] == shares[1]
    assert min(shares[0].values()) > 0.1


def test_time_in_several_lanes_counts_once() -> None:
    clock = ComputingClock()
    worker, server = OpenSpans(clock), OpenSpans(clock)
    worker.open("backward", -1, 10)
    server.open("update", -1, 20)
    worker.open("wait", -1, 30)  # within backward
    server.close(40)
    assert clock.until(50) == 30
    worker.close(60)
    assert clock.until(65) == 35
    worker.open("reduce", 7, 70)  # a sum over ranks
    worker.open("reduce", -1, 75)  # the rank's own sums in it
    worker.close(80)
    worker.close(90)
    worker.close(100)
    assert clock.until(200) == 30 + (70 - 60) + (80 - 75) + (100 - 90)


def test_bytes_under_way_count_as_far_as_they_have_come() -> None:
    """1,000,000 bytes at 8 Mbit/s take a second."""
    cluster = Description.model_validate({"hosts": [{"count": 2}], "link": {"mbit_per_s": 8.0}})
    network = FlowNetwork(cluster, between=MessageCosts(latency=0, eager_limit=10**9))
    seen = []

    def body(comm: Any) -> None:
        if comm.rank == 0:
            comm.start_send(Phantom(10**6, np.dtype(np.uint8)), 1, 0).wait()
        else:
            request = comm.start_recv(Phantom(10**6, np.dtype(np.uint8)), 0, 0)
            for _ in range(4):
                comm.sleep(0.2)
                seen.append(network.ports()[0].passed(comm.now()))
            request.wait()
            seen.append(network.ports()[0].passed(comm.now()))

    World(2, (0, 1), network, phantom=True).run(body)
    assert seen == pytest.approx([0.2e6, 0.4e6, 0.6e6, 0.8e6, 1e6], rel=1e-3)
