"""Times, efficiencies, waits, critical path and traffic of runs built by hand, with known results."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpctrain.analysis import Analysis
from hpctrain.analysis.course import read_course
from hpctrain.analysis.efficiency import computation_scaling
from hpctrain.trace import open_run
from tests.traces import HandMade

BARRIER, MESSAGE = 1 << 43 | 5, 3 << 36 | 1


def synchronous(folder: Path, offsets: list[float] | None = None) -> Analysis:
    """Two workers, two steps of 10 ms: rank 0 computes 4 ms of each, rank 1 eight; then a second of exchange."""
    with HandMade(folder, 2, offsets=offsets) as run:
        for rank, computes in ((0, 4.0), (1, 8.0)):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            for step in range(2):
                at = 1.0 + 10.0 * step
                run[rank].span("forward", at, at + 1.0, step)
                run[rank].span("backward", at + 1.0, at + computes, step)
                run[rank].span("wait", at + computes, at + 8.5, step, id=BARRIER + step)
                run[rank].span("reduce", at + 8.5, at + 9.0, step, bytes=400, flops=200.0)
                run[rank].span("update", at + 9.0, at + 10.0, step)
                run[rank].done(at + 10.0, step, loss=1.0, samples=32, cursor=64 * (step + 1))
    return Analysis(open_run(folder))


def test_phase_times_are_those_of_its_steps(tmp_path: Path) -> None:
    times = synchronous(tmp_path).times.set_index("rank")
    assert times["total_s"].tolist() == pytest.approx([0.02, 0.02])
    assert times["useful_s"].tolist() == pytest.approx([0.011, 0.019])  # sums from shared memory are computation
    assert times["communication_s"].tolist() == pytest.approx([0.009, 0.001])
    assert times["backward"].tolist() == pytest.approx([0.006, 0.014])
    assert times["strategy"].tolist() == ["all_reduce"] * 2


def test_pop_model_efficiencies(tmp_path: Path) -> None:
    row = synchronous(tmp_path).efficiency.iloc[0]
    assert (row["phase"], row["strategy"], row["workers"]) == (0, "all_reduce", 2)
    assert row["seconds"] == pytest.approx(0.02)
    assert row["load_balance"] == pytest.approx(15 / 19)
    assert row["communication_efficiency"] == pytest.approx(19 / 20)
    assert row["parallel_efficiency"] == pytest.approx(15 / 20)
    assert computation_scaling(2.0, 2.5) == pytest.approx(0.8)


def test_barrier_wait_lasts_until_the_last_rank_arrives(tmp_path: Path) -> None:
    waits = synchronous(tmp_path).waits
    assert waits[["rank", "peer", "root"]].drop_duplicates().to_numpy().tolist() == [[0, 1, 1]]
    assert waits["seconds"].sum() == pytest.approx(0.008)  # what follows, from 9 ms on, is exchange
    assert set(waits["doing"]) == {"backward"}


@pytest.mark.parametrize("offset", [-7.0, 3_600_000.0])
def test_clock_offsets_change_nothing(tmp_path: Path, offset: float) -> None:
    (tmp_path / "same").mkdir()
    (tmp_path / "other").mkdir()
    same, other = synchronous(tmp_path / "same"), synchronous(tmp_path / "other", [0.0, offset])
    assert other.waiting_matrix().to_numpy() == pytest.approx(same.waiting_matrix().to_numpy())
    assert other.efficiency["parallel_efficiency"][0] == pytest.approx(same.efficiency["parallel_efficiency"][0])


def test_critical_path_of_synchronous_steps(tmp_path: Path) -> None:
    path = synchronous(tmp_path).critical_path.set_index("rank")
    assert path["share"].tolist() == [0.0, 1.0]
    assert path.loc[1, "compute_s"] == pytest.approx(0.008)
    assert path.loc[1, "exchange_s"] == pytest.approx(0.002)


def test_waiting_is_traced_to_the_end_of_the_chain(tmp_path: Path) -> None:
    """Worker 0 waits for the server, which waits for worker 1, which computes, does nothing traced, then sends."""
    with HandMade(tmp_path, 3, roles=["worker", "worker", "server"]) as run:
        for rank in range(3):
            run[rank].phase(0.0, 0, "server" if rank == 2 else "worker", "parameter_server (sync)")
        run[0].span("forward", 1.0, 2.0, 0)
        run[0].span("recv", 2.0, 9.0, 0, bytes=400, peer=2, id=MESSAGE)
        run[0].done(10.0, 0)
        run[1].span("forward", 1.0, 5.0, 0)
        run[1].span("send", 6.0, 6.1, 0, bytes=400, peer=2, id=MESSAGE + 1)
        run[1].done(10.0, 0)
        run[2].span("wait", 1.0, 6.5, 0, peer=1, id=MESSAGE + 1)
        run[2].span("recv", 6.5, 6.5, 0, bytes=400, peer=1, id=MESSAGE + 1)
        run[2].span("update", 6.5, 8.0, 0)
        run[2].span("send", 8.0, 8.2, 0, bytes=400, peer=0, id=MESSAGE)
    analysis = Analysis(open_run(tmp_path))
    own = analysis.waits[analysis.waits["rank"] == 0].groupby(["root", "doing"], observed=True)["seconds"].sum()
    assert {key: round(1e3 * value, 3) for key, value in own.items()} == {
        (1, "forward"): 3.0,  # 2 to 5 ms
        (1, "nothing traced"): 1.0,  # to 6 ms, when rank 1 sends
        (2, "wait"): 0.5,  # its message is in transit
        (2, "update"): 1.5,
    }
    assert analysis.waits[analysis.waits["rank"] == 0]["peer"].unique().tolist() == [2]
    assert analysis.waiting_matrix().to_numpy()[0].tolist() == pytest.approx([0.0, 0.004, 0.002])


def test_wait_for_a_colocated_server_uses_the_servers_lane(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "parameter_server (async)")
        run[0].span("forward", 1.0, 9.0, 0)
        run[0].span("update", 1.0, 4.0, 0, lane=1)
        run[0].span("send", 4.0, 4.1, 0, bytes=8, peer=1, id=MESSAGE, lane=1)
        run[0].done(10.0, 0)
        run[1].span("forward", 1.0, 2.0, 0)
        run[1].span("recv", 2.0, 5.0, 0, bytes=8, peer=0, id=MESSAGE)
        run[1].done(10.0, 0)
    waits = Analysis(open_run(tmp_path)).waits
    assert waits[["rank", "root", "doing"]].to_numpy().tolist() == [[1, 0, "update"]]
    assert waits["seconds"].sum() == pytest.approx(0.002)


def test_broadcast_wait_lasts_until_the_root_sends(tmp_path: Path) -> None:
    with HandMade(tmp_path, 3) as run:
        for rank in range(3):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 2.0, 0)
        run[0].span("update", 2.0, 4.0, 0)
        run[0].span("send", 4.0, 5.0, 0, bytes=8, id=9)
        run[1].span("recv", 2.0, 5.0, 0, bytes=8, id=9)
        run[2].span("update", 2.0, 4.5, 0)
        run[2].span("recv", 4.5, 5.0, 0, bytes=8, id=9)
        for rank in range(3):
            run[rank].done(6.0, 0)
    waits = Analysis(open_run(tmp_path)).waits
    assert waits[["rank", "root", "doing"]].to_numpy().tolist() == [[1, 0, "update"]]
    assert waits["seconds"].sum() == pytest.approx(0.002)


def test_unexplained_waits_are_attributed_to_no_rank(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2, missing=(1,)) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("forward", 1.0, 2.0, 0)
        run[0].span("wait", 2.0, 3.0, 0)
        run[0].span("recv", 3.0, 5.0, 0, bytes=8, peer=1, id=MESSAGE)
        run[0].done(5.0, 0)
    analysis = Analysis(open_run(tmp_path))
    found = analysis.waits[["root", "doing", "seconds"]].to_numpy().tolist()
    assert found == [[-1, "", 0.001], [1, "nothing traced", 0.002]]
    assert any("rank 1 of 2" in note for note in analysis.run.notes)


def test_evaluations_checkpoints_and_switches_are_not_training_time(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 3.0, 0)
            run[rank].recorder.open("evaluate", run[rank]._at(3.0))
            run[rank].span("wait", 4.0 + rank, 6.0, 0, id=BARRIER)
            run[rank].recorder.close(run[rank]._at(7.0))
            run[rank].done(8.0, 0)
            run[rank].span("evaluate", 8.0, 20.0)  # the final one is after the phase
    analysis = Analysis(open_run(tmp_path))
    assert analysis.times["total_s"].tolist() == pytest.approx([0.003, 0.003])
    assert analysis.times["paused_s"].tolist() == pytest.approx([0.004, 0.004])
    assert analysis.waits.empty
    assert analysis.times["communication_s"].sum() == 0.0


def test_each_phase_has_its_own_times(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 3.0, 0)
            run[rank].done(4.0, 0, phase=0)
            run[rank].phase(5.0, 1, "server" if rank else "worker", "parameter_server (async)")
            run[rank].span("switch", 5.0, 6.0, 0)
        run[0].span("forward", 7.0, 8.0, 1)
        run[1].span("update", 8.0, 8.5, 1)
        run[0].done(9.0, 1, phase=1)
    times = Analysis(open_run(tmp_path)).times
    assert times[["phase", "rank", "role"]].to_numpy().tolist() == [
        [0, 0, "worker"], [0, 1, "worker"], [1, 0, "worker"], [1, 1, "server"],
    ]  # fmt: skip
    assert times["total_s"].tolist() == pytest.approx([0.003, 0.003, 0.002, 0.002])
    assert times["useful_s"].tolist() == pytest.approx([0.002, 0.002, 0.001, 0.0005])


def test_traffic_counts_messages_once_and_times_only_awaited_ones(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 2.0, 0)
        run[0].span("send", 3.0, 3.1, 0, bytes=4000, peer=1, id=MESSAGE)
        run[0].span("send", 3.1, 5.0, 0, bytes=0, peer=1, id=MESSAGE)
        run[0].span("send", 6.0, 6.1, 0, bytes=1000, peer=1, id=MESSAGE + 1)
        run[0].span("reduce", 8.0, 9.0, 0, bytes=100)
        run[1].span("recv", 2.0, 5.0, 0, bytes=4000, peer=0, id=MESSAGE)
        run[1].span("recv", 7.0, 7.0, 0, bytes=1000, peer=0, id=MESSAGE + 1)
        for rank in range(2):
            run[rank].done(10.0, 0)
    analysis = Analysis(open_run(tmp_path))
    table = analysis.traffic.set_index(["source", "destination"])
    assert table[["messages", "bytes"]].to_numpy()[1].tolist() == [2, 5000]
    assert table.loc[(0, 1), "seconds"] == pytest.approx(0.002)
    assert table.loc[(0, 1), "bytes_per_s"] == pytest.approx(4000 / 0.002)
    assert table[["messages", "bytes"]].to_numpy()[0].tolist() == [1, 100]  # the sum from shared memory
    row = analysis.overlap.iloc[0]
    assert row["in_flight_s"] == pytest.approx(0.002)
    assert row["blocked_s"] == pytest.approx(0.002)


def test_bytes_of_server_sums_and_broadcasts_are_counted_once(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2, roles=["worker", "server"]) as run:
        run[0].phase(0.0, 0, "worker", "parameter_server (sync)")
        run[1].phase(0.0, 0, "server", "parameter_server (sync)")
        run[0].span("forward", 1.0, 2.0, 0)
        run[0].span("send", 2.0, 2.5, 0, bytes=400, peer=1, id=MESSAGE)
        run[0].span("recv", 4.0, 5.0, 0, id=9)
        run[0].done(6.0, 0)
        run[1].span("recv", 2.5, 2.5, 0, bytes=400, peer=0, id=MESSAGE)
        run[1].span("reduce", 3.0, 4.0, 0, bytes=400)
        run[1].span("send", 4.0, 5.0, 0, bytes=30, id=9)
    table = Analysis(open_run(tmp_path)).traffic
    assert table[["source", "destination", "bytes"]].to_numpy().tolist() == [[0, 1, 400], [1, -1, 30]]


def test_overlap_is_communication_that_was_not_waited_for(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("reduce", 1.0, 1.0, 0, bytes=400, id=5)
        run[0].span("backward", 1.0, 9.0, 0)
        run[0].span("reduce", 9.0, 11.0, 0, id=5)
        run[0].done(12.0, 0)
    assert Analysis(open_run(tmp_path)).overlap["hidden"].tolist() == pytest.approx([0.8])


def test_links_are_those_measured_at_the_start(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        run[0].event(0.0, "network", '{"peer": 1, "same_node": true, "latency_s": 1e-6, "bytes_per_s": 2e9}')
        run[1].event(0.0, "network", "spoilt")
    assert Analysis(open_run(tmp_path)).links.to_numpy().tolist() == [[0, 1, True, 1e-6, 2e9]]


def test_very_long_runs_are_sampled_with_a_note(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            for step in range(1000):
                run[rank].span("forward", step, step + 0.25 + rank / 4, step)
                run[rank].span("wait", step + 0.25 + rank / 4, step + 0.75, step, id=BARRIER + step)
            run[rank].done(1000.0, 0)
    analysis = Analysis(open_run(tmp_path))
    whole, sample = analysis.course, read_course(analysis.run, analysis.phases, most=800)
    assert whole.share == 1.0 and sample.share == pytest.approx(0.2)
    assert 600 < len(sample.spans) < 1000
    analysis.__dict__["course"] = sample
    assert analysis.waiting_matrix().loc[0, 1] == pytest.approx(0.25, rel=0.1)
    assert any("20%" in note for note in analysis.run.notes)


def test_run_without_steps_has_empty_frames(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        run[0].span("wait", 0.0, 1.0)
    analysis = Analysis(open_run(tmp_path))
    frames = [analysis.phases, analysis.times, analysis.efficiency, analysis.waits, analysis.critical_path,
              analysis.traffic, analysis.links, analysis.overlap]  # fmt: skip
    assert all(frame.empty for frame in frames)
    assert analysis.headline == "No step was traced."


def test_resumed_run_counts_both_attempts(tmp_path: Path) -> None:
    for attempt in (1, 2):
        with HandMade(tmp_path, 1, attempt=attempt) as run:
            run[0].phase(0.0, 0, "worker", "all_reduce")
            run[0].span("forward", 1.0, 3.0, attempt)
            run[0].done(5.0, attempt)
    times = Analysis(open_run(tmp_path)).times
    assert times[["total_s", "useful_s"]].to_numpy().tolist() == [pytest.approx([0.008, 0.004])]


def paused_run(folder: Path, steps: int) -> Analysis:
    """Two workers; every eighth step is followed by an evaluation of 2 ms; each step waits a quarter of its 1 ms."""
    with HandMade(folder, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            at = 1.0
            for step in range(steps):
                run[rank].span("forward", at, at + 0.5 + rank / 4, step)
                run[rank].span("wait", at + 0.5 + rank / 4, at + 0.75, step, id=BARRIER + step)
                run[rank].span("update", at + 0.75, at + 1.0, step)
                at += 1.0
                if step % 8 == 7:
                    run[rank].span("evaluate", at, at + 2.0, step)
                    at += 2.0
            run[rank].done(at, steps - 1)
    return Analysis(open_run(folder))


def test_pauses_are_complete_when_spans_are_sampled(tmp_path: Path) -> None:
    analysis = paused_run(tmp_path, 800)
    whole = analysis.efficiency
    sampled = Analysis(analysis.run)
    sampled.__dict__["course"] = read_course(analysis.run, analysis.phases, most=1500)
    assert sampled.course.share < 0.4
    assert sampled.times["paused_s"].tolist() == pytest.approx([0.2, 0.2])
    assert sampled.times["total_s"].tolist() == pytest.approx(analysis.times["total_s"].tolist())
    assert sampled.efficiency["parallel_efficiency"][0] == pytest.approx(whole["parallel_efficiency"][0], rel=0.1)


def test_waits_for_a_checkpoint_are_labelled_checkpoint(tmp_path: Path) -> None:
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 2.0, 0)
        run[0].span("checkpoint", 2.0, 8.0, 0)
        run[0].span("wait", 8.0, 8.0, 0, id=BARRIER)
        run[1].span("wait", 2.0, 8.0, 0, id=BARRIER)
        for rank in range(2):
            run[rank].done(9.0, 0)
    analysis = Analysis(open_run(tmp_path))
    assert analysis.waits[["rank", "root", "doing"]].to_numpy().tolist() == [[1, 0, "checkpoint"]]
    assert analysis.headline.endswith("is waiting for rank 0, which meanwhile is mostly writing a checkpoint.")


def test_blocking_collective_cut_by_its_messages_has_no_overlap(tmp_path: Path) -> None:
    with HandMade(tmp_path, 1) as run:
        run[0].phase(0.0, 0, "worker", "all_reduce")
        run[0].span("forward", 1.0, 2.0, 0)
        recorder = run[0].recorder
        recorder.open("reduce", run[0]._at(2.0), 400, -1, 5)
        run[0].span("send", 4.0, 9.0, 0, bytes=400, peer=0, id=MESSAGE)
        recorder.close(run[0]._at(10.0))
        run[0].done(11.0, 0)
    assert Analysis(open_run(tmp_path)).overlap.empty
