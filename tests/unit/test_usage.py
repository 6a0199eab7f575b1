"""CPU, memory, network and GPUs of hand-built runs with known results."""

from __future__ import annotations

import pytest

from hpctrain.analysis import Analysis
from hpctrain.analysis.usage import node_usage
from hpctrain.trace import Run
from tests.traces import HandMade

MIB = 2**20


def two_nodes(folder):
    """Ranks 0 and 1 on node 0, rank 2 on node 1; samples at 0, 1 and 2 s; node 0 receives 5 MB/s, then 7."""
    with HandMade(folder, 3, nodes=[0, 0, 1]) as run:
        for rank in range(3):
            run[rank].span("forward", 0.0, 1.0)
            for second, received in enumerate([100, 5_000_100, 12_000_100]):
                run[rank].resource(1000.0 * second, 50.0 + 10 * rank, (rank + 1) * MIB, received, 2 * received)
    return Analysis(Run(folder)).usage


def test_network_rate_comes_from_one_rank_per_node(tmp_path):
    usage = two_nodes(tmp_path)
    assert usage.loc[usage["rank"] == 0, "net_in_bytes_per_s"].tolist()[1:] == pytest.approx([5e6, 7e6])
    assert usage.loc[usage["rank"] == 2, "net_out_bytes_per_s"].tolist()[1:] == pytest.approx([10e6, 14e6])
    assert usage.loc[usage["rank"] == 1, "net_in_bytes_per_s"].isna().all()
    assert usage.groupby("rank")["node"].first().tolist() == [0, 0, 1]


def test_cpu_and_memory_are_summed_over_the_ranks_of_a_node(tmp_path):
    nodes = node_usage(two_nodes(tmp_path), moments=3)
    last = nodes.groupby("node").last()
    assert last["cpu_percent"].tolist() == pytest.approx([50.0 + 60.0, 70.0])
    assert last["resident_bytes"].tolist() == [3 * MIB, 3 * MIB]
    assert nodes.loc[nodes["node"] == 0, "t_s"].tolist() == pytest.approx([0.0, 1.0, 2.0])


def test_ranks_that_sample_at_different_times_add_up(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("forward", 0.0, 1.0)
            for second in range(5):
                run[rank].resource(1000.0 * second + 300.0 * rank, 100.0, MIB)
    nodes = node_usage(Analysis(Run(tmp_path)).usage)
    assert set(nodes["resident_bytes"]) == {2 * MIB}


def test_ended_rank_adds_nothing(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("forward", 0.0, 1.0)
            for second in range(3 if rank else 11):
                run[rank].resource(1000.0 * second, 100.0, MIB)
    nodes = node_usage(Analysis(Run(tmp_path)).usage, moments=11)
    assert nodes["resident_bytes"].tolist()[:3] == [2 * MIB] * 3
    assert nodes["resident_bytes"].tolist()[4:] == [MIB] * 7


def test_unknown_values_and_the_first_percentage_are_nan(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].span("forward", 0.0, 1.0)
        run[0].resource(0.0, 2000.0, MIB)
        run[0].resource(1000.0, 50.0, MIB, -1, -1, 80.0, 3 * MIB)
    usage = Analysis(Run(tmp_path)).usage
    assert usage[["net_in_bytes_per_s", "net_out_bytes_per_s"]].isna().all().all()
    assert usage["cpu_percent"].isna().tolist() == [True, False]
    assert usage["gpu_percent"].isna().tolist() == [True, False]
    assert (usage["gpu_percent"][1], usage["gpu_memory_bytes"][1]) == (80.0, 3 * MIB)


def test_sample_right_after_another_is_left_out(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].span("forward", 0.0, 1.0)
        for at in (0.0, 1000.0, 1005.0):
            run[0].resource(at, 50.0, MIB, 0, 0)
    assert Analysis(Run(tmp_path)).usage["t_s"].tolist() == pytest.approx([0.0, 1.0])


def test_counter_reset_gives_no_rate(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].span("forward", 0.0, 1.0)
        for second, received in enumerate([1000, 2000, 500]):
            run[0].resource(1000.0 * second, 50.0, MIB, received, received)
    rates = Analysis(Run(tmp_path)).usage["net_in_bytes_per_s"]
    assert rates.isna().tolist() == [True, False, True]


def test_run_without_samples_has_no_usage(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].span("forward", 0.0, 1.0)
    usage = Analysis(Run(tmp_path)).usage
    assert len(usage) == len(node_usage(usage)) == 0
