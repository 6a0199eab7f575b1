"""Losses and evaluations on four clocks, staleness and rules, of hand-built runs with known results."""

from __future__ import annotations

import pytest

from hpctrain.analysis import Analysis
from hpctrain.trace import Run
from tests.traces import HandMade

METRICS = "step,samples,epoch,seconds,split,loss,metric\n"


def work(rank, start, end, step):
    rank.span("forward", start, end, step)


def synchronous(folder):
    """Two workers, three rounds that end at 10, 30 and 60 ms. Between the second and the third an evaluation takes 10
    ms on rank 0 and 12 on rank 1, from 32 on."""
    with HandMade(folder, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            work(run[rank], 2.0, 5.0, 0)
            run[rank].span("send", 5.0, 6.0, 0, bytes=100, peer=1 - rank, id=7)
            run[rank].span("reduce", 6.0, 7.0, 0, bytes=10, id=8)
            run[rank].done(10.0 - rank, 0, loss=4.0 - 2 * rank, samples=32, cursor=64)
            run[rank].span("wait", 10.0, 11.0, 1, id=9)
            run[rank].span("reduce", 11.0, 12.0, 1, bytes=1)
            run[rank].done(30.0, 1, loss=3.0, samples=32, cursor=128)
            run[rank].span("evaluate", 32.0, 42.0 + 2 * rank)
            run[rank].span("send", 45.0, 46.0, 2, bytes=1000, peer=1 - rank, id=10)
            # The last round of an epoch is short: rank 0 has 10 samples, rank 1 has 30.
            run[rank].done(60.0, 2, loss=1.0 + rank, samples=10 + 20 * rank, cursor=168)
    return run


def losses(folder):
    return Analysis(Run(folder)).convergence


def test_round_is_one_update_with_the_loss_averaged_by_samples(tmp_path):
    synchronous(tmp_path)
    found = losses(tmp_path)
    assert found["step"].tolist() == [1, 2, 3]
    assert found["samples"].tolist() == [64, 128, 168]
    assert found["loss"].tolist() == pytest.approx([3.0, 3.0, (10 * 1.0 + 30 * 2.0) / 40])
    assert found["phase"].tolist() == [0, 0, 0]


def test_time_starts_at_the_first_span_and_training_time_excludes_evaluations(tmp_path):
    synchronous(tmp_path)
    found = losses(tmp_path)
    assert found["t_s"].tolist() == pytest.approx([0.008, 0.028, 0.058])  # the first span begins at 2 ms
    assert found["seconds"].tolist() == pytest.approx([0.008, 0.028, 0.058 - 0.012])


def test_bytes_sum_messages_collectives_and_shared_sums_of_all_ranks(tmp_path):
    synchronous(tmp_path)
    assert losses(tmp_path)["bytes"].tolist() == [220, 222, 2222]


def test_server_sums_are_not_counted_twice(tmp_path):
    with HandMade(tmp_path, 3) as run:
        for rank, role in enumerate(["worker", "worker", "server"]):
            run[rank].phase(0.0, 0, role, "parameter_server (sync)")
        for rank in (0, 1):
            work(run[rank], 1.0, 2.0, 0)
            run[rank].span("send", 2.0, 3.0, 0, bytes=100, peer=2, id=rank)
        run[0].span("reduce", 3.0, 4.0, 0, bytes=5000, lane=1)  # a colocated server
        run[2].span("reduce", 4.0, 5.0, 0, bytes=5000)
        for rank in (0, 1):
            run[rank].done(6.0, 0, cursor=64)
    assert losses(tmp_path)["bytes"].tolist() == [200]


def test_bytes_sent_before_training_are_not_counted(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].span("send", 0.0, 1.0, bytes=10**6, peer=1 - rank, id=1)
            run[rank].phase(2.0, 0, "worker", "all_reduce")
            work(run[rank], 3.0, 4.0, 0)
            run[rank].span("send", 5.0, 6.0, 0, bytes=100, peer=1 - rank, id=2)
            run[rank].done(7.0, 0, cursor=64)
    assert losses(tmp_path)["bytes"].tolist() == [200]


def asynchronous(folder):
    """Two workers and a server. Rank 1 is slow: it takes one step while rank 0 takes three."""
    with HandMade(folder, 3) as run:
        for rank, role in enumerate(["worker", "worker", "server"]):
            run[rank].phase(0.0, 0, role, "parameter_server (async)")
        for rank in (0, 1):
            work(run[rank], 0.0, 1.0, 0)
        for step, (at, cursor) in enumerate([(10.0, 32), (20.0, 64), (40.0, 128)]):
            run[0].done(at, step, loss=3.0 - step, cursor=cursor, staleness_min=0, staleness_max=int(step == 2))
        run[1].done(30.0, 0, loss=9.0, cursor=96, staleness_min=1, staleness_max=2)
    return run


def test_asynchronous_updates_are_ordered_each_with_its_own_loss(tmp_path):
    asynchronous(tmp_path)
    found = losses(tmp_path)
    assert found["samples"].tolist() == [32, 64, 96, 128]
    assert found["loss"].tolist() == [3.0, 2.0, 9.0, 1.0]
    assert found["step"].tolist() == [1, 2, 3, 4]


def test_time_is_monotonic_when_workers_learn_of_updates_out_of_order(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "parameter_server (async)")
            work(run[rank], 0.0, 1.0, 0)
        run[0].done(20.0, 0, cursor=32)
        run[1].done(10.0, 0, cursor=64)
    found = losses(tmp_path)
    assert found["samples"].tolist() == [32, 64]
    assert found["t_s"].tolist() == pytest.approx([0.02, 0.02])


def test_without_cursors_samples_are_counted_in_time_order(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "my_strategy")
            work(run[rank], 0.0, 1.0, 0)
            run[rank].done(10.0 + rank, 0, samples=8)
    assert losses(tmp_path)["samples"].tolist() == [8, 16]


def test_non_finite_loss_is_left_out_of_the_mean(tmp_path):
    with HandMade(tmp_path, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            work(run[rank], 0.0, 1.0, 0)
        run[0].done(10.0, 0, loss=float("nan"), cursor=64)
        run[1].done(10.0, 0, loss=2.0, cursor=64)
        run[0].done(20.0, 1, loss=float("inf"), cursor=128)
    found = losses(tmp_path)
    assert found["loss"][0] == 2.0
    assert found["loss"].isna().tolist() == [False, True]


def test_steps_repeated_after_resuming_count_once(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        work(run[0], 0.0, 1.0, 0)
        run[0].done(10.0, 0, loss=5.0, cursor=32)
        run[0].event(11.0, "rule", "loss_stable 0.5 > 0.01")
        run[0].done(20.0, 1, loss=4.0, cursor=64)
    with HandMade(tmp_path, 1, attempt=2) as run:
        run[0].phase(100.0, 0, "worker", "all_reduce")
        work(run[0], 100.0, 101.0, 1)
        run[0].event(105.0, "rule", "loss_stable 0.5 > 0.01")
        run[0].done(107.0, 1, loss=3.0, cursor=64)
    analysis = Analysis(Run(tmp_path))
    assert analysis.convergence["loss"].tolist() == [5.0, 3.0]
    assert analysis.convergence["seconds"].tolist() == pytest.approx([0.010, 0.017])
    assert analysis.rules["samples"].tolist() == [64]


def test_evaluations_have_the_clocks_of_the_preceding_update(tmp_path):
    synchronous(tmp_path)
    (tmp_path / "metrics.csv").write_text(METRICS + "2,128,1.0,0.02,validation,2.5,0.75\n3,168,1.3,0.04,test,2.0,0.9\n")
    found = Analysis(Run(tmp_path)).metrics
    assert found[["step", "samples", "bytes"]].to_numpy().tolist() == [[2, 128, 222], [3, 168, 2222]]
    assert found["seconds"].tolist() == pytest.approx([0.028, 0.046])
    assert found["split"].tolist() == ["validation", "test"]
    assert found["metric"].tolist() == [0.75, 0.9]


def test_run_without_evaluations_has_none(tmp_path):
    synchronous(tmp_path)
    found = Analysis(Run(tmp_path)).metrics
    assert len(found) == 0
    assert {"samples", "seconds", "bytes", "loss", "metric"} <= set(found.columns)


def test_run_without_steps_has_no_losses(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
    analysis = Analysis(Run(tmp_path))
    assert len(analysis.convergence) == len(analysis.metrics) == len(analysis.staleness) == len(analysis.rules) == 0


def test_staleness_of_every_asynchronous_gradient(tmp_path):
    asynchronous(tmp_path)
    found = Analysis(Run(tmp_path)).staleness
    assert found[["rank", "step", "staleness_min", "staleness_max"]].to_numpy().tolist() == [
        [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 2], [0, 2, 0, 1],
    ]  # fmt: skip
    assert found["t_s"].tolist() == pytest.approx([0.01, 0.02, 0.03, 0.04])


def test_synchronous_phases_have_no_staleness(tmp_path):
    with HandMade(tmp_path, 1) as run:
        run[0].done(10.0, 0, cursor=32, staleness_min=0, staleness_max=0, phase=0)
        run[0].done(20.0, 1, cursor=64, staleness_min=1, staleness_max=3, phase=1)
    assert Analysis(Run(tmp_path)).staleness["phase"].tolist() == [1]


def rules_of(folder, *events):
    """The rules of a run of two workers that both record events (ms, kind, text); steps end at 10, 20 ... ms."""
    with HandMade(folder, 2) as run:
        for rank in (0, 1):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            work(run[rank], 0.0, 1.0, 0)
            for at, kind, text in events:
                run[rank].event(at + rank, kind, text)
            for step in range(4):
                run[rank].done(10.0 * (step + 1), step, cursor=64 * (step + 1))
    return Analysis(Run(folder)).rules


def test_equal_events_of_all_ranks_are_merged_per_occurrence(tmp_path):
    rules = rules_of(tmp_path, (9.0, "rule", "loss_stable 0.5 > 0.01"), (19.0, "rule", "loss_stable 0.5 > 0.01"))
    assert rules["t_s"].tolist() == pytest.approx([0.009, 0.019])
    assert rules["samples"].tolist() == [64, 128]
    assert rules["rule"].tolist() == ["loss_stable"] * 2


def test_moment_a_rule_fired_is_reported_once(tmp_path):
    rules = rules_of(
        tmp_path,
        (9.0, "rule", "loss_stable 0.0500 > 0.01, not armed: loss 2.05 of first 2.31"),
        (19.0, "rule", "loss_stable 0.0050 <= 0.01, not armed: loss 1.2 of first 2.31"),
        (29.0, "rule", "loss_stable 0.0098 <= 0.01"),
        (31.0, "switch", "loss_stable 0.0098 <= 0.01"),
    )
    assert rules["statistic"].tolist() == [0.05, 0.005, 0.0098]
    assert rules["threshold"].tolist() == [0.01] * 3
    assert rules["fired"].tolist() == [False, False, True]
    assert rules["samples"].tolist()[-1] == 192


@pytest.mark.parametrize(
    ("text", "statistic", "threshold", "fired"),
    [
        ("target: metric 0.9700 >= 0.97", 0.97, 0.97, True),
        ("target: metric 0.5000 < 0.97", 0.5, 0.97, False),
        ("target: metric nan against 0.97", None, 0.97, False),
        ("loss_stable_published 1.2e-05 <= 0.0001", 1.2e-5, 1e-4, True),
        ("loss_stable -0.1 > 0.01, never armed: the first loss, -3, is negative", -0.1, 0.01, False),
        ("my rule says: the moon is full", None, None, False),
        ("", None, None, False),
    ],
)
def test_rule_messages_are_parsed(tmp_path, text, statistic, threshold, fired):
    (row,) = rules_of(tmp_path, (9.0, "rule", text)).to_dict("records")
    assert row["text"] == text
    assert row["fired"] is fired
    for name, expected in (("statistic", statistic), ("threshold", threshold)):
        assert row[name] == pytest.approx(float("nan") if expected is None else expected, nan_ok=True)


def test_phase_that_ends_without_a_statistic_has_a_row(tmp_path):
    (row,) = rules_of(tmp_path, (21.0, "switch", "after 128 >= 128 samples")).to_dict("records")
    assert (row["text"], row["fired"]) == ("after 128 >= 128 samples", True)
    assert row["statistic"] != row["statistic"]


def test_run_without_phase_events_has_losses_and_no_rules(tmp_path):
    with HandMade(tmp_path, 1) as run:
        for step in range(3):
            run[0].done(10.0 * (step + 1), step, loss=1.0, cursor=32 * (step + 1))
    analysis = Analysis(Run(tmp_path))
    assert analysis.convergence["samples"].tolist() == [32, 64, 96]
    assert analysis.convergence["seconds"].tolist() == pytest.approx([0.0, 0.01, 0.02], abs=1e-6)
    assert len(analysis.rules) == 0
