"""Workers and islands that train by themselves between agreements: how long, who, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.network import LinkNetwork
from hpctrain.comm.virtual.world import World
from hpctrain.conformance import Subject
from hpctrain.data.order import Order, round_bounds
from hpctrain.errors import JobError, LeftError, NanError
from hpctrain.run.api import train
from hpctrain.run.resume import Resume
from hpctrain.strategies.interval import OverheadInterval, RoundCost
from hpctrain.strategies.streaming_diloco import StreamingDiLoCo
from hpctrain.trace.events import IntervalChanged
from hpctrain.trace.files import event_of
from tests import helpers
from tests.unit.test_leaving import left_by

ADAM = {"name": "Adam", "lr": 0.01}
SGD = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
BATCH, EVERY_NODE = 6, [0, 0, 1, 1]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def trained(folder: Path, size: int, strategy: helpers.Tables, world: Any = None, **tables: Any) -> Any:
    """The final parameters, equal on all ranks."""
    train = {"steps": 12, "precision": "float64", **tables.pop("train", {})}
    job = helpers.make_job(folder, strategy=strategy, train=train, **tables)
    found = World(size, **(world or {})).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
    assert all((each == found[0]).all() for each in found)
    return found[0]


# -- every --------------------------------------------------------------------------------------------------------
def test_interval_in_epochs_is_that_many_steps(tmp_path: Path):
    """103 samples are 6 steps of 3 workers with 6 samples each."""
    epochs = trained(tmp_path, 3, {"name": "local_sgd", "every": {"epochs": 2}}, optimizer=ADAM)
    np.testing.assert_array_equal(epochs, trained(tmp_path, 3, {"name": "local_sgd", "every": 12}, optimizer=ADAM))


def test_interval_longer_than_the_run_is_refused(tmp_path: Path):
    with pytest.raises(JobError, match=r"^strategy.every = 13, but the run has only 12 steps"):
        trained(tmp_path, 3, {"name": "local_sgd", "every": 13})


def test_interval_of_a_later_phase_is_refused_before_the_first(tmp_path: Path):
    """With the phase's key; no run folder is made."""
    first = {"strategy": {"name": "all_reduce"}, "until": {"rule": "after", "steps": 2}}
    job = helpers.make_job(tmp_path, phases=[first, {"strategy": {"name": "diloco", "every": 13}}])
    with pytest.raises(JobError, match=r"^phases.1.strategy.every = 13, but the run has only 8 steps"):
        World(3).run(lambda comm: helpers.quiet_train(comm, job))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("every", "words"),
    [
        (0, "strategy.every = 0: must be at least 1"),
        ({"epochs": 0}, "strategy.every.epochs = 0: must be a number, above 0"),
        ({"epochs": 1, "most": 3}, "has most or guard beside epochs"),
        ({}, "must be a number of steps, {epochs = 1} or {overhead = 0.1}"),
        ("often", 'must be a number of steps, {epochs = 1} or {overhead = 0.1}, or "auto"'),
    ],
)
def test_intervals_that_mean_nothing_are_refused(tmp_path: Path, every: object, words: str):
    with pytest.raises(JobError) as caught:
        helpers.make_job(tmp_path, strategy={"name": "diloco", "every": every})
    assert words in str(caught.value)


def costs(exchanging: float, change: float = 0.0, computing: float = 1.0) -> list[RoundCost]:
    return [RoundCost(computing / 2, exchanging, 0.0), RoundCost(computing, exchanging, change)]


def test_interval_follows_the_overhead():
    """At most doubled at once; the slowest worker's computation counts; one late message changes little."""
    interval = OverheadInterval(target=0.1, most=30)
    assert interval.steps == 8
    assert interval.observe(costs(0.2), 8) == (
        "exchanges take 20.0% of the slowest worker's computation, and 10% is wanted"
    )
    assert interval.steps == 16
    for _ in range(9):
        assert interval.observe(costs(0.2, computing=2.0), 16) == ""
    assert interval.observe(costs(0.6, computing=2.0), 16) == ""
    for _ in range(30):
        interval.observe(costs(0.05, computing=interval.steps / 8), interval.steps)
    assert 4 <= interval.steps <= 6
    for _ in range(30):
        interval.observe(costs(10.0, computing=interval.steps / 8), interval.steps)
    assert interval.steps == 30


def test_interval_shrinks_while_workers_drift_apart():
    interval = OverheadInterval(guard=0.05)
    assert interval.observe(costs(0.5, change=0.06), 8) == "an exchange changes the parameters by 0.06, above 0.05"
    assert interval.steps == 4
    for _ in range(5):
        interval.observe(costs(0.5, change=0.06), interval.steps)
    assert interval.steps == 1


def test_automatic_interval_depends_on_measured_times():
    """Such a run cannot be repeated bit by bit. Resumed with a smaller limit, it keeps to that."""
    assert not Subject("local_sgd", {"every": "auto"}).strategy().deterministic
    assert Subject("local_sgd", {"every": 3}).strategy().deterministic
    interval = OverheadInterval(most=5)
    interval.load({**OverheadInterval().numbers(), "steps": 100})
    assert interval.steps == 5


def test_automatic_interval_is_traced_and_kept_in_checkpoints(tmp_path: Path):
    """On a slow network rounds become longer; a resumed run has the same lengths, and so ends with the same bits."""
    job = helpers.make_job(
        tmp_path,
        strategy={"name": "local_sgd", "every": {"overhead": 0.1, "guard": 10.0}},
        train={"steps": 90, "checkpoint_every": {"steps": 30}, "keep_checkpoints": 9},
        optimizer=ADAM,
    )

    def body(comm: Communicator) -> Any:
        result = helpers.quiet_train(comm, job)
        if comm.rank == 0:
            helpers.forget_after(result.folder, 1)
        comm.barrier()
        again = helpers.quiet_train(comm, job, resume=result.folder)
        return helpers.vector(result.model), helpers.vector(again.model)

    world = {"nodes": [0, 1], "network": LinkNetwork(latency=10_000_000), "compute": helpers.jitter(sigma=0.0)}
    found, traces = helpers.traced(2, body, **world)
    for whole, resumed in found:
        assert (whole == resumed).all()
    events = [event_of(row["kind"], row["json"]) for row in traces[1]["events"]]
    changes = [event for event in events if isinstance(event, IntervalChanged)]
    assert [(event.old, event.new) for event in changes][:2] == [(8, 16), (16, 21)]
    assert "of the slowest worker's computation" in changes[0].why


# -- islands ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shared", [True, False])
def test_islands_that_agree_in_every_step_are_all_reduce(tmp_path: Path, shared: bool):
    tables = {"optimizer": {"name": "SGD", "lr": 0.1}, "communicator": {"shared": shared}}
    nodes = {"nodes": [0, 0, 0, 1]}
    found = trained(tmp_path, 4, {"name": "local_sgd", "every": 1, "island": "node"}, nodes, **tables)
    assert helpers.difference(found, trained(tmp_path, 4, {"name": "all_reduce"}, nodes, **tables)) < 1e-14


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["local_sgd", "diloco", "streaming_diloco"])
def test_an_island_is_one_worker_with_the_batches_of_its_ranks(tmp_path: Path, name: str, shared: bool):
    """With clipping, which applies to the island's gradient."""
    strategy = {"name": name, "every": 4}
    tables: dict[str, Any] = {"optimizer": ADAM, "communicator": {"shared": shared}}
    found = trained(
        tmp_path, 4, {**strategy, "island": "node"}, {"nodes": EVERY_NODE}, train={"clip_norm": 0.3}, **tables
    )
    alone = trained(tmp_path, 2, strategy, train={"batch_size": 2 * BATCH, "clip_norm": 0.3}, **tables)
    assert helpers.difference(found, alone) < 1e-12


def test_between_islands_nothing_is_sent_within_a_round(tmp_path: Path):
    """A node that is late delays the others only at the end of a round."""
    strategy = {"name": "local_sgd", "every": 6, "island": "node"}
    job = helpers.make_job(tmp_path, strategy=strategy, train={"steps": 12})
    network = LinkNetwork()
    sent: list[int] = []
    transfer = network.transfer

    def noted(source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        if source != dest:
            sent.append(start)
        return transfer(source, dest, nbytes, start)

    network.transfer = noted  # type: ignore[method-assign]
    World(4, EVERY_NODE, network, helpers.jitter(sigma=0.0)).run(lambda comm: helpers.quiet_train(comm, job))
    steps = sorted({start // (10 * helpers.MILLISECOND) for start in sent})
    assert {step for step in steps if 0 < step < 12} <= {6}


def test_worker_that_leaves_its_island_is_named(tmp_path: Path):
    strategy = {"name": "local_sgd", "every": 4, "island": "node"}
    job = helpers.make_job(tmp_path, strategy=strategy)
    with pytest.raises(LeftError, match=r"^rank 1 left .* at step 2 while"):
        left_by(4, job, lambda rank, steps: rank == 1 and steps == 2, nodes=EVERY_NODE)


def test_all_may_leave_in_the_middle_of_a_round(tmp_path: Path):
    strategy = {"name": "diloco", "every": 4, "island": "node"}
    for steps, _ in left_by(4, helpers.make_job(tmp_path, strategy=strategy), lambda _, s: s == 2, nodes=EVERY_NODE):
        assert steps == 2


# -- streaming ----------------------------------------------------------------------------------------------------
def test_without_delay_and_mixing_one_fragment_is_diloco(tmp_path: Path):
    streaming = {"name": "streaming_diloco", "every": 4, "fragments": 1, "delay": 0, "mix": 0.0}
    found = trained(tmp_path, 3, streaming, optimizer=ADAM)
    np.testing.assert_array_equal(found, trained(tmp_path, 3, {"name": "diloco", "every": 4}, optimizer=ADAM))


@pytest.mark.parametrize(("fragments", "delay", "mix"), [(2, 1, 0.5), (2, 2, 0.25), (4, 0, 0.5)])
def test_streaming_equals_a_loop_by_hand(tmp_path: Path, fragments: int, delay: int, mix: float):
    """Algorithm 2 of the paper, over vectors."""
    options = {"every": 4, "fragments": fragments, "delay": delay, "mix": mix}
    found = trained(tmp_path, 3, {"name": "streaming_diloco", **options}, optimizer={"name": "SGD", "lr": 0.1})
    cuts = cut_as_arena(fragments)
    wanted = by_hand(3, 12, 4 // fragments, delay, mix, [slice(*pair) for pair in zip(cuts, cuts[1:], strict=False)])
    assert helpers.difference(found, wanted) < 1e-12


def cut_as_arena(fragments: int) -> list[int]:
    """Where fragments begin in the vector of all parameters, which has no padding."""
    from hpctrain.replica.layout import lay_out, slice_bounds

    layout, _ = lay_out(dict(helpers.net().double().named_parameters()))
    kept = np.concatenate([np.arange(slot.offset, slot.offset + slot.size) for slot in layout.slots])
    return [int(np.searchsorted(kept, cut)) for cut in slice_bounds(layout, fragments, elementwise=True)]


def by_hand(workers: int, steps: int, length: int, delay: int, mix: float, fragments: list[slice]) -> Any:
    """Streaming DiLoCo with SGD of rate 0.1 inside and Nesterov's 0.7, 0.9 outside. `length`: steps per round."""
    torch.manual_seed(0)
    model, order, data = helpers.net().double(), Order(len(helpers.points()), 0), helpers.points()
    anchor = helpers.vector(model)
    values, velocity = [anchor.copy() for _ in range(workers)], np.zeros_like(anchor)
    weights = np.zeros((len(fragments), workers))
    on_its_way: tuple[slice, Any] | None = None
    cursor, turn = 0, 0

    def receive() -> None:
        nonlocal on_its_way
        if on_its_way is None:
            return
        here, mean = on_its_way
        velocity[here] = 0.9 * velocity[here] + mean
        anchor[here] -= 0.7 * (mean + 0.9 * velocity[here])
        for own in values:
            own[here] = mix * own[here] + (1 - mix) * anchor[here]
        on_its_way = None

    def send(fragment: int) -> None:
        nonlocal on_its_way
        here, shares = fragments[fragment], weights[fragment] / weights[fragment].sum()
        on_its_way = here, sum(share * (anchor[here] - own[here]) for share, own in zip(shares, values, strict=True))
        weights[fragment] = 0

    for step in range(steps):
        bounds = round_bounds(cursor, order.length, workers * BATCH, workers)
        cursor = bounds[-1]
        for worker in range(workers):
            indices = order.indices(bounds[worker], bounds[worker + 1])
            if len(indices):
                values[worker] -= 0.1 * gradient(model, values[worker], *data[torch.from_numpy(indices)])
            weights[:, worker] += len(indices)
        if step % length + 1 >= delay and delay:
            receive()
        if step % length == length - 1:
            receive()
            send(turn % len(fragments))
            turn += 1
            if not delay:
                receive()
    receive()
    for fragment in range(len(fragments)):
        if weights[fragment].sum():
            send(fragment)
            receive()
    return anchor


def gradient(model: nn.Module, values: Any, inputs: Tensor, targets: Tensor) -> Any:
    nn.utils.vector_to_parameters(torch.from_numpy(values), model.parameters())
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs.double()), targets).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]).numpy()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every": 10, "fragments": 4}, "has every = 10, which is not a multiple of fragments = 4"),
        ({"every": 8, "fragments": 4, "delay": 3}, "has delay = 3, but the next fragment is exchanged after 2 steps"),
    ],
)
def test_fragments_that_do_not_fit_are_refused(tmp_path: Path, options: helpers.Tables, words: str):
    with pytest.raises(JobError) as caught:
        helpers.make_job(tmp_path, strategy={"name": "streaming_diloco", **options})
    assert words in str(caught.value)


class Growing(nn.Module):
    """The first of three layers of equal size overflows as soon as it learns; the others stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(7, 3) for _ in range(3)])

    def forward(self, inputs: Tensor) -> Tensor:
        first, *others = [layer(inputs) for layer in self.layers]
        return 100.0 * first + 0.0 * sum(others)


def late(progress: float) -> float:
    """No learning until the last of six steps, which is too large."""
    return 3e38 * (progress > 0.8)


@pytest.mark.parametrize("island", ["worker", "node"])
def test_fragment_that_overflows_at_the_end_is_an_error(tmp_path: Path, island: str):
    """Also if those exchanged after it do not."""
    strategy = {"name": "streaming_diloco", "every": 6, "fragments": 3, "island": island}
    schedule = {"name": f"{__name__}:late"}
    with pytest.raises(NanError, match=r"parameter layers.0.weight.* is not finite"):
        trained(
            tmp_path, 2, strategy, {"nodes": [0, 1]}, model=f"{__name__}:Growing",
            optimizer={"name": "SGD", "lr": 1.0, "schedule": schedule}, train={"steps": 6, "precision": "float32"},
        )  # fmt: skip


# -- resumed ------------------------------------------------------------------------------------------------------
STREAMING = {"name": "streaming_diloco", "every": 4, "fragments": 2}
LOCAL, NODE = {"name": "local_sgd", "every": 4}, {"island": "node"}


@pytest.mark.parametrize(
    ("strategy", "then", "nodes", "optimizer", "words"),
    [
        (STREAMING, {"delay": 0, "every": 8}, EVERY_NODE, "keep", ""),
        (STREAMING, {"fragments": 4}, EVERY_NODE, "keep", "what workers have learned"),
        (STREAMING, NODE, EVERY_NODE, "keep", "each worker's own optimizer state is lost"),
        (STREAMING | NODE, {}, [0, 0, 0, 1], "keep", "what workers have learned"),
        (STREAMING, {}, EVERY_NODE, "reset", "what workers have learned"),
        (LOCAL, {"every": 3}, EVERY_NODE, "keep", ""),
        (LOCAL, NODE, EVERY_NODE, "keep", "each worker's own optimizer state is lost"),
        (LOCAL | NODE, {"island": "worker"}, EVERY_NODE, "keep", "each worker's own optimizer state is lost"),
        (LOCAL | NODE, {}, [0, 0, 0, 0], "keep", "each worker's own optimizer state is lost"),
        (LOCAL, {}, EVERY_NODE, "reset", ""),
    ],
)
def test_what_does_not_fit_a_resumed_run_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: Any, capsys: Any, strategy: Any, then: Any, nodes: Any, optimizer: Any, words: str
):
    """The workers' shares of what is exchanged always add up to 1."""
    shares: dict[Any, list[float]] = {}
    send = StreamingDiLoCo._send

    def noted(self: StreamingDiLoCo, fragment: int, position: int) -> None:
        if self.exchange.comm.local_rank == 0 or self.options.island == "worker":
            shares.setdefault((fragment, position), []).append(self._mine[fragment] / self._all[fragment])
        send(self, fragment, position)

    keys = {"train": {"steps": 12, "checkpoint_every": {"steps": 4}, "keep_checkpoints": 9}, "optimizer": ADAM}
    job = helpers.make_job(tmp_path, strategy=strategy, **keys)
    folder = World(4, EVERY_NODE).run(lambda comm: helpers.quiet_train(comm, job))[0].folder
    helpers.forget_after(folder, 1)
    monkeypatch.setattr(StreamingDiLoCo, "_send", noted)
    job, how = helpers.make_job(tmp_path, strategy=strategy | then, **keys), Resume(folder, "take", optimizer)
    capsys.readouterr()
    found = World(4, nodes).run(lambda comm: helpers.vector(train(job, comm=comm, resume=how).model))
    assert all((each == found[0]).all() for each in found)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == bool(words)
    assert words in "".join(warnings)
    assert bool(shares) == (strategy["name"] == "streaming_diloco")
    for parts in shares.values():
        assert sum(parts) == pytest.approx(1.0)


# -- fixed shards, scaled rates -----------------------------------------------------------------------------------
def test_local_epochs_over_fixed_shards(tmp_path: Path):
    """The ancestor's regime: each worker passes over its own shard twice, then all average."""
    strategy = {"name": "local_sgd", "every": {"epochs": 2}}
    job = helpers.make_job(tmp_path, strategy=strategy, data={"partition": "fixed"}, train={"epochs": 4})
    recording = helpers.record(3, job)
    taken = []
    for rank in range(3):
        own = [recording.samples(rank, step)[0] for step in range(24)]
        taken.append({row.tobytes() for row in torch.cat(own).numpy()})
    assert sum(map(len, taken)) == len(set().union(*taken)) == len(helpers.points())
    assert sorted(map(len, taken)) == [34, 34, 35]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"strategy": {"name": "all_reduce", "balance": "throughput"}}, "with balance workers take more or fewer"),
        ({"strategy": helpers.served("async")}, "under strategy parameter_server samples come from one queue"),
        (
            {
                "phases": [
                    {"strategy": {"name": "all_reduce"}, "until": {"rule": "after", "steps": 2}},
                    {"strategy": helpers.served("sync")},
                ]
            },
            "the phases have 2 and 3 workers",
        ),
    ],
)
def test_shards_that_cannot_be_fixed_are_refused(tmp_path: Path, keys: Any, words: str):
    job = helpers.make_job(tmp_path, data={"partition": "fixed"}, **keys)
    with pytest.raises(JobError, match='^data.partition = "fixed": ' + words):
        World(3).run(lambda comm: helpers.quiet_train(comm, job))


def test_balance_within_an_island_is_refused(tmp_path: Path):
    with pytest.raises(JobError, match='has island = "node" with balance, but the workers of a node'):
        helpers.make_job(tmp_path, strategy={"name": "diloco", "island": "node", "balance": "throughput"})


@pytest.mark.parametrize(("scaling", "factor"), [("linear", 3.0), ("sqrt", 3.0**0.5)])
def test_learning_rate_grows_with_the_workers(tmp_path: Path, scaling: str, factor: float):
    found = trained(tmp_path, 3, {"name": "all_reduce"}, optimizer={"name": "SGD", "lr": 0.1, "scaling": scaling})
    wanted = trained(tmp_path, 3, {"name": "all_reduce"}, optimizer={"name": "SGD", "lr": 0.1 * factor})
    assert helpers.difference(found, wanted) < 1e-12


@pytest.mark.parametrize("name", ["local_sgd", "diloco", "streaming_diloco"])
def test_random_delays_average_out_over_a_round(tmp_path: Path, name: str):
    """Eight workers wait for the slowest of each step; of rounds of 16 steps only for the slowest sum."""

    def seconds(strategy: helpers.Tables) -> float:
        job = helpers.make_job(tmp_path, strategy=strategy, train={"steps": 32})
        world = World(8, compute=helpers.jitter(sigma=0.5))
        world.run(lambda comm: helpers.quiet_train(comm, job))
        return world.time / 1e9

    keys = {"every": 32, "fragments": 2} if name == "streaming_diloco" else {"every": 16}
    assert seconds({"name": name, **keys}) < 0.75 * seconds({"name": "all_reduce"})
