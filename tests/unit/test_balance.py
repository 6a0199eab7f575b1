"""balance = "throughput": shares follow measured speeds, and the result of a synchronous round does not change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hpctrain.analysis import Analysis
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.conformance import Subject
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import round_bounds
from hpctrain.errors import JobError, ModelError
from hpctrain.job import Job
from hpctrain.run.api import Result, session
from hpctrain.run.folder import Narrator
from hpctrain.strategies.balance import Balance, BatchBalance, StepBalance, apportioned
from hpctrain.trace.events import SharesChanged
from hpctrain.views.figures import timeline
from hpctrain.views.report.marks import collect_marks
from tests import helpers
from tests.marks import slow
from tests.traces import train_traced

BATCH = 32


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# -- the controller --------------------------------------------------------------------------------------------------
@dataclass
class Machines:
    """Workers that need `fixed` seconds for a batch and `each` for a sample, with that relative noise."""

    each: list[float]
    fixed: float = 0.0
    noise: float = 0.0
    random: Random = field(default_factory=lambda: Random(1))

    def seconds(self, samples: Sequence[int]) -> list[float]:
        """What each worker measures."""
        return [
            (self.fixed + each * count) * (1 + self.random.gauss(0, self.noise)) * (count > 0)
            for each, count in zip(self.each, samples, strict=True)
        ]


def play(balance: BatchBalance, machines: Machines, rounds: int) -> list[SharesChanged]:
    """Whole rounds with the shares that are dealt. Returns the decisions."""
    found = []
    for _ in range(rounds):
        shares, later = balance.deal(0, 1)
        event = balance.observe(shares, machines.seconds(shares))
        assert balance.deal(0, 1)[0] == later, "a batch was announced that does not come"
        found += [event] if event is not None else []
    return found


def test_shares_follow_speeds_and_the_global_batch_stays():
    balance, machines = BatchBalance([3, 4, 5, 6], BATCH), Machines([0.001, 0.003, 0.001, 0.001])
    [decision] = play(balance, machines, 200)
    shares, _ = balance.deal(0, 1)
    assert shares == (39, 13, 38, 38) and sum(shares) == 4 * BATCH
    assert (decision.before, decision.after) == ("32 32 32 32", "39 13 38 38")
    assert (decision.slowest, decision.excess) == (4, 2.0) and decision.gain == pytest.approx(96 / 39, abs=0.001)
    assert str(decision) == (
        "samples per step 32 32 32 32 -> 39 13 38 38: rank 4 computed for 2.00 times the mean; "
        "2.46 times as fast is expected"
    )


def test_fixed_costs_of_a_batch_are_learnt_from_what_new_shares_take():
    machines = Machines([0.001, 0.003, 0.001, 0.001], fixed=0.02)
    balance = BatchBalance(range(4), BATCH)
    assert len(play(balance, machines, 300)) > 1
    times = machines.seconds(balance.deal(0, 1)[0])
    assert max(times) / min(times) < 1.1


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_equally_fast_workers_keep_equal_shares(noise: float):
    balance = BatchBalance(range(8), BATCH)
    assert play(balance, Machines([0.001] * 8, noise=noise), 400) == []


def test_single_delays_move_nothing_and_lasting_changes_do():
    balance = BatchBalance(range(4), BATCH)
    for _ in range(20):
        play(balance, Machines([0.001, 0.05, 0.001, 0.001]), 1)
        assert play(balance, Machines([0.001] * 4), 6) == []
    assert play(balance, Machines([0.001, 0.002, 0.001, 0.001]), 80)
    assert balance.deal(0, 1)[0][1] < 20
    assert play(balance, Machines([0.001] * 4), 80)
    assert balance.deal(0, 1)[0] == (32, 32, 32, 32)


def test_limits_keep_memory_bounded_and_every_worker_at_work():
    balance = BatchBalance(range(4), BATCH)
    play(balance, Machines([0.001, 1.0, 1.0, 1.0]), 40)
    assert balance.deal(0, 1)[0] == (64, 22, 21, 21)
    play(balance, Machines([0.001, 0.001, 0.001, 1.0]), 90)
    assert min(balance.deal(0, 1)[0]) == 2


def test_workers_without_measurements_delay_decisions():
    balance = BatchBalance(range(2), BATCH)
    for _ in range(30):
        assert balance.observe([32, 0], [1.0, 0.0]) is None
        assert balance.observe([32, 32], [0.0, 1.0]) is None


def test_slower_workers_take_fewer_steps():
    balance = StepBalance(range(4), BATCH)
    found = [balance.observe([s * 8 for s in (32, 32, 32, 32)], [8.0, 24.0, 8.2, 8.0], 8) for _ in range(2)]
    assert found[0] is None and found[1] is not None and found[1].after == "8 2 8 8"
    assert balance.loads(8) == [8, 2, 8, 8] and balance.loads(16) == [16, 4, 16, 16]
    assert [balance.deal(index, 8)[0][1] for index in range(8)] == [32, 32, 0, 0, 0, 0, 0, 0]
    for index in range(7):
        assert balance.deal(index, 8)[1] == balance.deal(index + 1, 8)[0]
    assert balance.deal(7, 8)[1] == (32,) * 4
    for _ in range(50):
        balance.observe([256, 64, 256, 256], [8.0, 2.0, 8.0, 8.0], 8)
    assert balance.loads(8) == [8] * 4


@pytest.mark.parametrize("kind", [BatchBalance, StepBalance])
@pytest.mark.parametrize("at", [3, 5, 9])
def test_state_continues_a_run(kind: type[Balance], at: int):
    machines = Machines([0.001, 0.003, 0.001, 0.002], noise=0.2, random=Random(3))
    rows = [machines.seconds([32] * 4) for _ in range(30)]
    whole, first, again = (kind(range(4), BATCH) for _ in range(3))
    decisions = [whole.observe([32] * 4, row, 2) for row in rows]
    assert any(decisions)
    for row in rows[:at]:
        first.observe([32] * 4, row, 2)
    again.load(json.loads(json.dumps(first.state())))
    assert [again.observe([32] * 4, row, 2) for row in rows[at:]] == decisions[at:]
    assert again.deal(0, 2) == whole.deal(0, 2)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.integers(1, 300))
def test_parts_are_proportional_within_limits(weights: list[float], batch: int):
    least, most, total = min(batch, 2), 2 * batch, batch * len(weights)
    parts = apportioned(total, weights, least, most)
    assert sum(parts) == total and all(least <= part <= most for part in parts)
    for a, part in zip(weights, parts, strict=True):
        for b, other in zip(weights, parts, strict=True):
            if a >= b:
                assert part >= other - 1
            if least < part < most and least < other < most:
                assert abs(part / a - other / b) <= 1 / a + 1 / b


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any),
    st.integers(0, 500),
    st.integers(1, 200),
)
def test_a_round_is_cut_in_proportion_to_shares(shares: list[int], cursor: int, length: int):
    size, workers = sum(shares), len(shares)
    bounds = round_bounds(cursor, length, size, workers, shares)
    assert bounds[0] == cursor and bounds[-1] == min(cursor + size, (cursor // length + 1) * length)
    found = np.diff(bounds)
    assert (found >= 0).all() and (found <= np.array(shares)).all()
    if bounds[-1] == cursor + size:
        assert found.tolist() == shares


# -- runs over virtual ranks -----------------------------------------------------------------------------------------
COST = 0.001  # seconds of virtual time for a sample
SLOW = {1: 3.0}
THROUGHPUT = {"balance": "throughput"}
LOCKSTEP: dict[str, tuple[dict[str, Any], int]] = {
    "shared": ({"name": "all_reduce"}, 4),
    "message": ({"name": "all_reduce", "exchange": "message", "overlap": True, "bucket_mb": 0.0005}, 4),
    "server": ({"name": "parameter_server", "mode": "sync"}, 5),
    "beside": ({"name": "parameter_server", "mode": "sync", "servers": 2, "colocated": True}, 4),
}
LOCAL: dict[str, tuple[dict[str, Any], int]] = {
    "local_sgd": ({"name": "local_sgd", "every": 8}, 4),
    "diloco": ({"name": "diloco", "every": 6}, 4),
}


def timed(
    comm: Communicator, job: Job, resume: Path | None = None, seen: Any = None, cost: Sequence[float] = (COST,) * 5
) -> tuple[Result, float]:
    """Train, where a sample takes a rank `cost` seconds of virtual time before the forward pass. Returns the result and
    the seconds of training; `seen` gets (step, samples) of each micro-batch."""
    begun = comm.now()
    with session(job, comm, resume, Narrator(enabled=False)) as running:
        for batch in running.batches():
            if seen is not None:
                seen.append((running.totals.step, batch.size))
            comm.sleep(cost[comm.rank] * batch.size)
            running.step(running.loss(running.model(batch.inputs), batch.targets))
    return running.result, (comm.now() - begun) / 1e9


def slowed_job(folder: Path, strategy: dict[str, Any], **tables: Any) -> Job:
    given = tables.pop("train", {})
    train = {**({} if "epochs" in given else {"steps": 60}), "batch_size": BATCH, "precision": "float64", **given}
    data = {"name": "tests.helpers:points", "samples": 1003}
    keys = {"data": data, "train": train, "debug": {"slow": SLOW}, **tables}
    return helpers.make_job(folder, strategy=strategy, **keys)


Timed = list[tuple[Result, float]]  # of each rank


def compared(size: int, folder: Path, strategy: dict[str, Any], **tables: Any) -> tuple[Timed, Timed]:
    """Without and with balance."""
    jobs = [slowed_job(folder, {**strategy, **keys}, **tables) for keys in ({}, THROUGHPUT)]
    even, fair = (World(size).run(partial(timed, job=job)) for job in jobs)
    return even, fair


def losses(results: Timed) -> float:
    return results[0][0].phases[-1].loss


@pytest.mark.parametrize("name", ["shared", "server", slow("message"), slow("beside")])
def test_synchronous_training_with_a_slow_worker_is_faster_and_ends_the_same(tmp_path: Path, name: str):
    strategy, size = LOCKSTEP[name]
    even, fair = compared(size, tmp_path, strategy)
    assert even[0][1] > 1.8 * fair[0][1]
    off = helpers.difference(helpers.vector(fair[0][0].model), helpers.vector(even[0][0].model))
    assert off < 1e-10 and losses(fair) == pytest.approx(losses(even), rel=1e-10)


@pytest.mark.parametrize("name", list(LOCAL))
def test_local_training_with_a_slow_worker_is_faster_per_sample(tmp_path: Path, name: str):
    strategy, size = LOCAL[name]
    even, fair = compared(size, tmp_path, strategy, train={"epochs": 8})
    assert even[0][0].samples == fair[0][0].samples == 8 * 1003
    assert even[0][1] > 1.7 * fair[0][1]
    assert losses(fair) == pytest.approx(losses(even), rel=0.05)


RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "momentum": ({"name": "SGD", "lr": 0.05, "momentum": 0.9}, {}),
    "accumulate and clip": ({"name": "AdamW", "lr": 0.01}, {"accumulate": 3, "batch_size": 10, "clip_norm": 0.1}),
}


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("name", ["shared", "server", slow("message"), slow("beside")])
def test_unequal_shares_equal_one_process(tmp_path: Path, name: str, recipe: str):
    strategy, size = LOCKSTEP[name]
    optimizer, keys = RECIPES[recipe]
    job = slowed_job(tmp_path, {**strategy, **THROUGHPUT}, optimizer=optimizer, train={"steps": 40, **keys})
    counts: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(size)}
    results = World(size).run(lambda comm: timed(comm, job, seen=counts[comm.rank]))
    expected = helpers.plain(job, 4, data=helpers.points(1003))
    assert helpers.difference(helpers.vector(results[0][0].model), expected) < 1e-10
    accumulate = keys.get("accumulate", 1)
    late = {rank: [n for step, n in found if step == 20] for rank, found in counts.items()}
    shares = [sum(late[rank]) for rank in range(4)]
    assert shares[1] < min(shares[0], shares[2], shares[3]) / 2.5
    assert all(len(late[rank]) == accumulate for rank in range(4)), "micro-batches grow, they do not become more"


@pytest.mark.parametrize("count", [397, slow(401), slow(416)])
def test_short_rounds_use_every_sample_once(tmp_path: Path, count: int):
    """An epoch ends with a round that is smaller than all others."""
    body = partial(helpers.every_sample_once, folder=tmp_path, epochs=6, samples=count, train={"batch_size": 4})
    for strategy, size in (LOCKSTEP["shared"], LOCKSTEP["server"], LOCAL["local_sgd"]):
        World(size, compute=_costs).run(partial(body, strategy={**strategy, **THROUGHPUT}))


def _costs(rank: int, kind: str, nbytes: int, flops: float) -> int:
    return 1000 * (1 + 2 * (rank == 1)) if kind == "forward" else 0


@pytest.mark.parametrize("name", ["shared", "server", "local_sgd", slow("diloco"), slow("beside")])
@pytest.mark.parametrize("kept", [0, 1, slow(2)])
def test_resumes_with_the_same_shares(tmp_path: Path, name: str, kept: int):
    """In virtual time, where a resumed run measures the same: bit for bit, before a decision, between a decision and
    its effect, and after it."""
    strategy, size = {**LOCKSTEP, **LOCAL}[name]
    keys = {"steps": 40, "checkpoint_every": {"steps": 5}, "keep_checkpoints": 99}
    job = slowed_job(tmp_path, {**strategy, **THROUGHPUT}, train=keys, optimizer=RECIPES["momentum"][0])
    seen: dict[int, list[tuple[int, int]]] = {rank: [] for rank in range(2 * size)}
    whole = World(size).run(lambda comm: timed(comm, job, seen=seen[comm.rank]))[0][0]
    helpers.forget_after(whole.folder, kept)
    again = World(size).run(lambda comm: timed(comm, job, whole.folder, seen[size + comm.rank]))[0][0]
    assert helpers.vector(again.model).tobytes() == helpers.vector(whole.model).tobytes()
    for rank in range(size):
        assert seen[size + rank] == seen[rank][len(seen[rank]) - len(seen[size + rank]) :]
    assert len({n for _, n in seen[1]}) > 1 or name in LOCAL


@pytest.mark.parametrize("name", ["shared", "server", "local_sgd"])
def test_batches_fetched_in_advance_are_those_that_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    strategy, size = {**LOCKSTEP, **LOCAL}[name]
    asked: set[tuple[int, tuple[int, int]]] = set()
    taken: list[tuple[int, tuple[int, int]]] = []
    take = Loader.take

    def noted(self: Loader, start: int, stop: int) -> Batch:
        taken.append((id(self), (start, stop)))
        return take(self, start, stop)

    monkeypatch.setattr(Loader, "request", lambda self, *piece: asked.add((id(self), piece)))
    monkeypatch.setattr(Loader, "take", noted)
    job = slowed_job(tmp_path, {**strategy, **THROUGHPUT}, train={"evaluate_every": {"epochs": 99}})
    World(size).run(lambda comm: timed(comm, job))
    loaders = {loader for loader, _ in asked}
    unforeseen = [entry for entry in taken if entry[0] in loaders and entry not in asked]
    assert len(unforeseen) == 4, "only each worker's first batch was not requested in time"


def observed(job: Job, size: int, **arguments: Any) -> tuple[list[Any], list[list[Any]]]:
    """The results, and each rank's events."""
    from hpctrain.trace.files import event_of

    results, traces = helpers.traced(size, lambda comm: timed(comm, job), **arguments)
    return results, [[event_of(row["kind"], row["json"]) for row in trace["events"]] for trace in traces]


@pytest.mark.parametrize("name", ["shared", "server", "local_sgd"])
def test_decisions_are_events(tmp_path: Path, name: str):
    strategy, size = {**LOCKSTEP, **LOCAL}[name]
    _, events = observed(slowed_job(tmp_path, {**strategy, **THROUGHPUT}), size)
    found = [[event for event in own if isinstance(event, SharesChanged)] for own in events]
    deciding = found if name != "server" else found[4:]
    assert all(own == deciding[0] for own in deciding) and len(deciding[0]) >= 1
    first = deciding[0][0]
    assert first.slowest == 1 and first.excess == pytest.approx(2.0, rel=0.05) and first.gain > 1.8
    assert first.before == ("8 8 8 8" if name == "local_sgd" else "32 32 32 32")


def test_decisions_are_marks_on_timelines(tmp_path: Path):
    job = slowed_job(tmp_path, {"name": "all_reduce", **THROUGHPUT}, debug={"slow": {}})
    run = train_traced(tmp_path / "run", job, 4, compute=_costs)
    legend = timeline.draw(Analysis(run)).legends[0]
    assert "rebalance (event)" in [text.get_text() for text in legend.get_texts()]
    [mark, *_] = [mark for mark in collect_marks(run)["events"] if mark["kind"] == "rebalance"]
    assert mark["ranks"] == [0, 1, 2, 3] and mark["text"].startswith("samples per step 32 32 32 32 -> ")


def test_waiting_inside_models_is_not_computation(tmp_path: Path):
    """Batch norm over all workers waits for the slowest in every forward pass: the others are not slow."""
    fair = {"name": "all_reduce", **THROUGHPUT}
    keys: dict[str, Any] = {"model": "tests.unit.test_balance:normed", "debug": {"slow": {}}}
    job = slowed_job(tmp_path, fair, train={"sync_batchnorm": True}, **keys)
    counts: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    cost = (COST, 3 * COST, COST, COST)
    results = World(4).run(lambda comm: timed(comm, job, seen=counts[comm.rank], cost=cost))
    last = [sum(n for step, n in own if step == 50) for own in counts]
    assert sum(last) == 4 * BATCH and last[1] < 20 and min(last[0], last[2], last[3]) > 30
    alone = slowed_job(tmp_path, {"name": "all_reduce"}, **keys)
    [(found, _)] = World(1).run(lambda comm: timed(comm, alone.override([f"train.batch_size={4 * BATCH}"])))
    assert helpers.difference(helpers.vector(results[0][0].model), helpers.vector(found.model)) < 1e-8


def test_shares_of_fewer_micro_batches_join_in_batch_norm(tmp_path: Path):
    """A worker whose share is too small for as many micro-batches as the others have borrows samples for the rest."""
    job = slowed_job(
        tmp_path,
        {"name": "all_reduce", **THROUGHPUT},
        model="tests.unit.test_balance:normed",
        debug={"slow": {1: 50.0}},
        train={"sync_batchnorm": True, "batch_size": 2, "accumulate": 4, "steps": 30},
    )
    counts: list[list[tuple[int, int]]] = [[] for _ in range(4)]
    World(4).run(lambda comm: timed(comm, job, seen=counts[comm.rank]))
    assert [n for step, n in counts[1] if step == 25] == [2, 0, 0, 0]
    assert sum(n for own in counts for step, n in own if step == 25) == 32


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 13), nn.BatchNorm1d(13), nn.Tanh(), nn.Linear(13, 3))


# -- mistakes --------------------------------------------------------------------------------------------------------
def refused(**strategy: Any) -> str:
    with pytest.raises(JobError) as caught:
        helpers.make_job("unused", strategy=strategy)
    return str(caught.value)


def test_mistakes_are_refused():
    for name in ("all_reduce", "parameter_server", "local_sgd", "diloco"):
        assert 'strategy.balance = "fast"' in refused(name=name, balance="fast")
    text = refused(name="parameter_server", mode="async", **THROUGHPUT)
    assert "shared queue, slow ones fewer" in text and 'set mode = "sync"' in text
    text = refused(name="parameter_server", mode="sync", backup_workers=1, **THROUGHPUT)
    assert "backup_workers = 1" in text and "leave one of them out" in text


def test_batch_norm_on_a_single_sample_is_refused_beforehand(tmp_path: Path):
    job = slowed_job(tmp_path, {"name": "all_reduce", **THROUGHPUT}, model="tests.unit.test_balance:normed")
    with pytest.raises(ModelError, match=r"may leave a worker a batch of one.*sync_batchnorm"):
        World(4).run(lambda comm: helpers.quiet_train(comm, job))
    whole = job.override(['data.last="drop"'])
    World(4).run(lambda comm: timed(comm, whole))


def test_it_is_not_promised_to_be_reproducible():
    for name in ("all_reduce", "local_sgd", "diloco"):
        assert not Subject(name, THROUGHPUT).strategy().deterministic
        assert Subject(name, {}).strategy().deterministic
    assert Subject("all_reduce", THROUGHPUT).strategy().exact


def test_loads_are_those_that_were_decided() -> None:
    """15 / 22 * 22 is slightly less than 15 in floating point."""
    for length in range(1, 60):
        for load in range(1, length + 1):
            balance = StepBalance([0, 1], 8)
            balance._adopt([load, length], length)
            assert balance.loads(length) == [load, length]


def test_noise_makes_decisions_rarer() -> None:
    """After a large gain only where the shares were right before: otherwise measurements contradict each other."""
    balance, decided = BatchBalance([0, 1], 32), list[int]()
    for round in range(120):
        slow = len(decided) % 2  # after every decision another worker seems to be the slow one
        seconds = [count * (3.0 if rank == slow else 1.0) for rank, count in enumerate(balance.loads(1))]
        if balance.observe(balance.loads(1), seconds) is not None:
            decided.append(round)
    waits = [later - earlier for earlier, later in pairwise(decided)]
    assert waits == sorted(waits)
    assert waits[-1] > 2 * waits[0]
