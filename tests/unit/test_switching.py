"""Switching strategies in a run, over virtual ranks: what carries over, when, resuming, and refusals."""

from __future__ import annotations

import gc
import io
import json
import weakref
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from hpctrain.comm.base import Buffer, Communicator
from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.world import World
from hpctrain.errors import CheckpointError, ClusterError, DataError, HpctrainError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.replica.state import State
from hpctrain.run.active import ActiveRun
from hpctrain.run.api import Result, session, train
from hpctrain.run.entrance import Entrance
from hpctrain.run.folder import Narrator
from hpctrain.run.milestones import Milestones
from hpctrain.run.resume import Resume
from hpctrain.strategies.all_reduce import AllReduce
from hpctrain.strategies.base import Strategy
from hpctrain.strategies.parameter_server import ParameterServer, ParameterServerServer
from hpctrain.strategies.parameter_server.corrections import MEAN_SQUARE, DelayCompensation
from hpctrain.strategies.phase import Phase
from hpctrain.trace.events import from_json
from tests import helpers
from tests.helpers import jitter, served
from tests.marks import mostly_slow, slow

AR = {"name": "all_reduce"}
SGD = {"name": "SGD", "lr": 0.05, "momentum": 0.9, "schedule": "linear"}
ADAM = {"name": "Adam", "lr": 0.01, "schedule": "linear"}
CORRECTED = served(momentum_correction=True, delay_compensation="constant", delay_lambda=0.5)
QUEUES = ["shared", "static"]
QUIET = Narrator(enabled=False)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def phases(*parts: tuple[helpers.Tables, int], **enter: Any) -> list[helpers.Tables]:
    """Phases, each until it has consumed the given samples (0: to the end). `enter`: how the second begins."""
    found: list[helpers.Tables] = [{"strategy": strategy} for strategy, _ in parts]
    for phase, (_, samples) in zip(found, parts, strict=True):
        if samples:
            phase["until"] = {"rule": "after", "samples": samples}
    if enter:
        found[1]["enter"] = enter
    return found


# -- what crosses ------------------------------------------------------------------------------------------------
def replayed(folder: Path, size: int, schedule: list[helpers.Tables], **tables: Any) -> helpers.Recording:
    """All ranks end with the result of one process with the same updates in the same order."""
    train_keys = {"epochs": 3, "batch_size": 4, "precision": "float64", **tables.pop("train", {})}
    job = helpers.make_job(folder, phases=schedule, train=train_keys, **tables)
    recording = helpers.record(size, job, compute=jitter(2))
    assert [summary.index for summary in recording.results[0].phases] == list(range(len(schedule)))
    replay = helpers.Replay(recording)
    for result in recording.results:
        assert helpers.difference(helpers.vector(result.model), replay.vector) < 1e-10
    return recording


WAYS = list(product(["auto", "keep", "scale", "reset", "ramp"], ["keep", "scale", "reset", "ramp"]))


@pytest.mark.parametrize(("rate", "momentum"), mostly_slow(WAYS, WAYS[::5] + WAYS[-1:]))
@pytest.mark.parametrize("optimizer", [SGD, slow(ADAM)], ids=["SGD", "Adam"])
def test_state_and_policies_match_one_process(
    tmp_path: Path, optimizer: helpers.Tables, rate: str, momentum: str
):
    enter = {"learning_rate": rate, "momentum": momentum, "ramp": {"samples": 50}, "scale": 0.4}
    replayed(tmp_path, 4, phases((AR, 70), (served(), 120), (AR, 0), **enter), optimizer=optimizer)


@pytest.mark.parametrize(
    "schedule",
    [
        phases((served("sync", servers=2), 70), (served("bounded", servers=1, bound=1), 0)),
        phases((served(servers=3), 70), (AR, 120), (served(servers=1), 0)),
        phases((served(servers=4, colocated=True), 70), (AR, 50), (served(servers=2), 100), (AR, 0)),
        phases((served(servers=1), 70), (served(servers=3, colocated=True), 0)),
        phases((AR, 70), (CORRECTED, 90), (AR, 0)),
    ],
    ids=["sync to bounded", "servers become workers", "beside", "async to async", "corrected"],
)
@pytest.mark.parametrize("optimizer", [slow(SGD), ADAM], ids=["SGD", "Adam"])
def test_different_servers_and_shards(tmp_path: Path, optimizer: helpers.Tables, schedule: list[helpers.Tables]):
    replayed(tmp_path, 5, schedule, optimizer=optimizer)


def test_non_elementwise_optimizer_crosses_a_switch(tmp_path: Path):
    schedule = phases((AR, 70), (served(servers=2), 100), (served("sync", servers=3, colocated=True), 0))
    replayed(tmp_path, 5, schedule, optimizer={"name": "Adafactor", "lr": 0.01})


def test_more_servers_than_the_model_has_cache_lines(tmp_path: Path):
    schedule = phases((AR, 70), (served(servers=6, colocated=True), 100), (AR, 0))
    replayed(tmp_path, 6, schedule, optimizer=ADAM, model="tests.unit.test_parameter_server:line")


ORDERS = [
    phases((AR, 20), (served(servers=2), 31), (AR, 0)),
    phases((served(servers=2), 20), (served("bounded", bound=1), 31), (served("sync", servers=2), 9), (AR, 0)),
    phases((served(servers=4, colocated=True), 33), (served(servers=1), 0)),
]


@pytest.mark.parametrize("queue", mostly_slow(QUEUES, QUEUES[:1]))
@pytest.mark.parametrize("schedule", ORDERS)
def test_every_sample_once_across_switches_in_mid_epoch(tmp_path: Path, schedule: list[helpers.Tables], queue: str):
    World(4, compute=jitter()).run(
        lambda comm: helpers.every_sample_once(comm, tmp_path, epochs=4, phases=schedule, data_keys={"queue": queue})
    )


@pytest.mark.parametrize("schedule", ORDERS)
def test_all_workers_begin_every_phase_with_equal_parameters(tmp_path: Path, schedule: list[helpers.Tables]):
    job = helpers.make_job(tmp_path, phases=schedule, train={"epochs": 2, "batch_size": 3})
    begun = World(4, compute=jitter()).run(lambda comm: helpers.beginnings(comm, job))
    for phase in map(str, range(len(schedule))):
        vectors = [own[phase] for own in begun if phase in own]
        assert len(vectors) > 1
        assert all(vector == vectors[0] for vector in vectors)


@pytest.mark.parametrize(("nodes", "wanted"), [([0] * 4, [0, 2, 4]), ([0, 0, 1, 1], [0, 1, 2, 3, 4])])
def test_model_is_broadcast_only_if_ranks_may_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: list[int], wanted: list[int]
):
    """If all ranks were workers in the previous phase, on one node, they hold equal parameters: no broadcast."""
    phase, broadcast = [-1], VirtualCommunicator.broadcast
    enter, rounds = Entrance.enter, []

    def counted(comm: VirtualCommunicator, buffer: Buffer, root: int = 0) -> None:
        if buffer.dtype == np.float32 and comm.rank == 0:
            rounds.append(phase[0])
        broadcast(comm, buffer, root)

    def entered(self: Entrance) -> Phase:
        phase[0] = self._run.totals.phase
        return enter(self)

    monkeypatch.setattr(VirtualCommunicator, "broadcast", counted)
    monkeypatch.setattr(Entrance, "enter", entered)
    message = {**AR, "exchange": "message"}
    schedule = phases((message, 24), (served(), 24), (message, 24), (served(), 24), (message, 0))
    job = helpers.make_job(tmp_path, phases=schedule, train={"steps": 30})
    World(4, nodes=nodes).run(lambda comm: train(job, comm, out=QUIET))
    assert rounds == wanted


def test_phase_frees_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the next phase allocates its memory, the previous one's is free, without the garbage collector."""
    joined: dict[int, list[weakref.ref[Any]]] = {rank: [] for rank in range(4)}
    states: dict[int, list[weakref.ref[State]]] = {rank: [] for rank in range(4)}
    checked = []

    def watch(kind: type[Any]) -> None:
        join = kind.join

        def joining(self: Any, phase: Phase, state: State | None = None) -> None:
            joined[phase.comm.rank].append(weakref.ref(self))
            if state is not None:
                states[phase.comm.rank].append(weakref.ref(state))
            join(self, phase, state)

        monkeypatch.setattr(kind, "join", joining)

    def attached(self: ParameterServerServer, phase: Phase, *rest: Any, **named: Any) -> None:
        joined[phase.comm.rank].append(weakref.ref(self))
        attach(self, phase, *rest, **named)

    attach = ParameterServerServer.attach
    monkeypatch.setattr(ParameterServerServer, "attach", attached)
    for kind in (AllReduce, ParameterServer):
        watch(kind)
    enter, train_on = Entrance.enter, Milestones.__init__

    def entered(self: Entrance) -> Phase:
        checked.append([ref() for ref in joined[self._run.comm.rank]])
        return enter(self)

    def training(self: Milestones, run: ActiveRun, phase: Phase, strategy: Strategy) -> None:
        checked.append([ref() for ref in states[run.comm.rank]])
        train_on(self, run, phase, strategy)

    monkeypatch.setattr(Entrance, "enter", entered)
    monkeypatch.setattr(Milestones, "__init__", training)
    schedule = phases((AR, 24), (served(), 24), (AR, 24), (served(servers=2, colocated=True), 24), (AR, 0))
    job = helpers.make_job(tmp_path, phases=schedule, train={"steps": 30}, optimizer=ADAM)
    gc.disable()
    try:
        World(4).run(lambda comm: train(job, comm, out=QUIET))
    finally:
        gc.enable()
    assert [len(seen) for seen in joined.values()] == [5, 5, 6, 6]  # in the fourth phase two are servers
    assert len(states[0]) == len(schedule) - 1
    assert [alive for row in checked for alive in row if alive is not None] == []


# -- rules -------------------------------------------------------------------------------------------------------
def event_of(row: Any) -> tuple[str, str]:
    """(kind, message) of an event in the trace."""
    kind = row["kind"].decode()
    return kind, str(from_json(kind, row["json"].decode()))


def observed(size: int, job: Job, **world: Any) -> tuple[str, list[Result], list[list[tuple[str, str]]]]:
    """(the run's output, its results, every rank's events as (kind, message))."""
    out = io.StringIO()
    results, traces = helpers.traced(size, lambda comm: train(job, comm, out=Narrator(out=out)), **world)
    events = [[event_of(row) for row in trace["events"]] for trace in traces]
    return out.getvalue(), results, events


def ruled(folder: Path, until: helpers.Tables, strategy: helpers.Tables | None = None, **tables: Any) -> Job:
    """An asynchronous phase that a rule ends, then all-reduce."""
    schedule = [{"strategy": strategy or served(), "until": until}, {"strategy": AR}]
    return helpers.make_job(folder, phases=schedule, **{"train": {"epochs": 3, "batch_size": 4}, **tables})


@pytest.mark.parametrize("queue", mostly_slow(QUEUES, QUEUES[:1]))
@pytest.mark.parametrize(
    ("until", "samples"),
    [
        ({"samples": 36}, 36),
        ({"steps": 3}, 36),  # rounds of 3 workers with 4 samples
        ({"epochs": 1}, 103),
        ({"fraction": 1 / 3}, 103),
    ],
)
def test_after_ends_the_phase_at_the_amount(tmp_path: Path, until: helpers.Tables, samples: int, queue: str):
    """With a shared queue at the end of a stretch, with static ones at the end of a round."""
    job = ruled(tmp_path, {"rule": "after", **until}, data={"name": "tests.helpers:points", "queue": queue})
    text, results, _ = observed(4, job, compute=jitter())
    assert f"switched at sample {samples}: after {samples} >= {samples} samples\n" in text
    assert [summary.samples for summary in results[0].phases] == [samples, 309 - samples]


def easy() -> TensorDataset:
    """Quickly learned."""
    inputs = torch.randn(240, 7, generator=torch.Generator().manual_seed(1))
    return TensorDataset(inputs, inputs[:, :3].argmax(1))


STABLE = {"rule": "loss_stable", "window": 3, "rounds": 4, "threshold": 0.05, "armed": 0.8}


def stable(folder: Path, **tables: Any) -> Job:
    return ruled(
        folder, STABLE, data=easy(), optimizer={"name": "Adam", "lr": 0.02}, train={"epochs": 20, "batch_size": 8},
        **tables,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["async", slow("bounded")])
def test_loss_stable_ends_an_asynchronous_phase(tmp_path: Path, mode: str):
    """The coordinator decides and traces its news, and rank 0 prints the reason."""
    text, results, events = observed(4, stable(tmp_path, strategy=served(mode)), compute=jitter())
    [line] = [line for line in text.splitlines() if line.startswith("switched at sample")]
    samples = results[0].phases[0].samples
    assert line.startswith(f"switched at sample {samples:,}: loss_stable 0.0")
    assert line.endswith(" <= 0.05")
    assert 240 < samples < 20 * 240
    news = [text for kind, text in events[3] if kind == "rule"]
    assert len(news) > 2
    assert line.endswith(news[-1])
    assert all(("switch", line.partition(": ")[2]) in own for own in events)


def second(losses: list[float], words: str) -> str | None:
    """A rule: after two intervals."""
    return words if len(losses) == 2 else None


def test_function_of_the_losses_ends_the_phase(tmp_path: Path):
    text, results, _ = observed(4, ruled(tmp_path, {"rule": "tests.unit.test_switching:second", "words": "enough"}))
    samples = results[0].phases[0].samples  # at 20 rounds of 12, of which two at the ends of epochs are smaller; or so
    assert 206 <= samples < 309
    assert f"switched at sample {samples}: enough\n" in text


def test_target_ends_the_phase_at_an_evaluation(tmp_path: Path):
    job = ruled(tmp_path, {"rule": "target", "metric": 0.0}, data=(helpers.points(), helpers.points(20)))
    text, results, events = observed(4, job, compute=jitter())
    assert "switched at sample 103: target: metric 0." in text
    assert [summary.samples for summary in results[0].phases] == [103, 206]
    assert [kind for kind, _ in events[0]].count("rule") == 1


def test_rule_ending_the_last_phase_ends_the_run(tmp_path: Path):
    schedule = [{"strategy": AR, "until": {"rule": "after", "samples": 24}},
                {"strategy": served(), "until": {"rule": "after", "samples": 31}}]  # fmt: skip
    text, results, _ = observed(4, helpers.make_job(tmp_path, phases=schedule, train={"epochs": 3, "batch_size": 4}))
    assert results[0].samples == 32 + 32  # rounds of 16; stretches of 4
    assert text.count("switched at") == 1
    assert (results[0].folder / "model.safetensors").exists()


def test_switch_strategy_by_name(tmp_path: Path):
    """All-reduce until the loss is stable, then an asynchronous parameter server."""
    job = helpers.make_job(
        tmp_path, strategy={"name": "switch", "until": STABLE, "then": served(servers=2)}, data=easy(),
        optimizer={"name": "Adam", "lr": 0.02}, train={"epochs": 20, "batch_size": 8},
    )  # fmt: skip
    text, results, events = observed(5, job, compute=jitter())
    samples = results[0].phases[0].samples
    assert f"switched at sample {samples:,}: loss_stable 0.0" in text
    assert [summary.strategy for summary in results[0].phases] == ["all_reduce", "parameter_server (async)"]
    assert [text for kind, text in events[4] if kind == "role"] == [
        "phase 0: worker of all_reduce", "phase 1: server of parameter_server (async)"
    ]  # fmt: skip
    vectors = [helpers.vector(result.model) for result in results]
    assert all((vector == vectors[0]).all() for vector in vectors)


def test_run_too_short_for_its_rule_trains_to_the_end_with_a_note(tmp_path: Path):
    job = helpers.make_job(tmp_path, strategy={"name": "switch"})
    text, results, _ = observed(4, job)
    note = "note: strategy.until cannot end phase 0 in this run, so all_reduce trains until the run ends: one win"
    assert note in text
    assert "takes 70 rounds, but no more than 8 remain when the phase starts" in text
    assert [summary.steps for summary in results[0].phases] == [8]
    assert "note:" not in observed(4, helpers.make_job(tmp_path, strategy={"name": "switch", "until": STABLE},
                                                   train={"epochs": 4}))[0]  # fmt: skip


# -- resuming ----------------------------------------------------------------------------------------------------
def resumable(folder: Path, schedule: list[helpers.Tables], **tables: Any) -> Job:
    keys = {"epochs": 3, "batch_size": 3, "checkpoint_every": {"samples": 40}, "keep_checkpoints": 99}
    return helpers.make_job(
        folder, phases=schedule, train={**keys, "precision": "float64", **tables.pop("train", {})},
        **{"optimizer": SGD, **tables},
    )  # fmt: skip


def heads(folder: Path) -> list[tuple[int, int, Any, Any]]:
    """(cursor, phase, version, gradients dropped) of every checkpoint."""
    found = []
    for head in map(head_of, sorted((folder / "checkpoints").iterdir())):
        progress, counters = head["progress"], head["state"]["counters"]
        phase = progress["account"]["books"]["phase"]
        found.append((progress["cursor"], phase, counters.get("version"), counters.get("dropped")))
    return found


def head_of(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint."""
    with safe_open(path, "pt") as file:
        head: dict[str, Any] = json.loads(file.metadata()["hpctrain"])
    return head


def moments(folder: Path) -> list[torch.Tensor]:
    """The newest checkpoint's mean squares of gradients (delay compensation)."""
    path = sorted((folder / "checkpoints").iterdir())[-1]
    with safe_open(path, "pt") as file:
        return [file.get_tensor(name) for name in file.keys() if quote(MEAN_SQUARE) in name]  # noqa: SIM118


RESET = {"learning_rate": "reset", "momentum": "reset"}
RESUMED = {
    "async": phases((served(servers=3), 0)),
    "bounded": phases((served("bounded", servers=3), 0)),
    "there and back": phases((AR, 100), (served(servers=3), 100), (AR, 0), **RESET),
    "other servers": phases((served(servers=3), 100), (served("sync", servers=2, colocated=True), 0), **RESET),
}


@pytest.mark.parametrize("queue", ["shared", slow("static")])
@pytest.mark.parametrize("what", mostly_slow(RESUMED, list(RESUMED)[:1]))
def test_resumed_run_has_the_same_bits(tmp_path: Path, what: str, queue: str):
    """With a single asynchronous worker there is only one order. `enter` applies once, at the switch."""
    job = resumable(tmp_path, RESUMED[what], data={"name": "tests.helpers:points", "queue": queue})
    whole = World(4).run(lambda comm: helpers.quiet_train(comm, job))[0]
    before = heads(whole.folder)
    for index in (0, 2, 3, 5):
        helpers.forget_after(whole.folder, index)
        again = World(4).run(lambda comm: helpers.quiet_train(comm, job, resume=whole.folder))[0]
        assert heads(whole.folder) == before
        assert [summary.samples for summary in again.phases] == [summary.samples for summary in whole.phases]
        assert [summary.steps for summary in again.phases] == [summary.steps for summary in whole.phases]
        assert (helpers.vector(again.model) == helpers.vector(whole.model)).all()


def test_state_of_corrections_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A worker's running mean of gradient lengths, and the servers' of squared gradients (adaptive DC-ASGD); the next
    phase starts without them."""
    kept = served(servers=2, clip_pushes=1.5, delay_compensation="adaptive")
    job = resumable(tmp_path, phases((kept, 200), (AR, 0)))
    whole = World(5).run(lambda comm: helpers.quiet_train(comm, job))[0]
    assert [phase for _, phase, *_ in heads(whole.folder)][2:6] == [0, 0, 0, 1]
    assert moments(whole.folder) == []
    helpers.forget_after(whole.folder, 2)
    (squares,) = moments(whole.folder)
    numbers = head_of(sorted((whole.folder / "checkpoints").iterdir())[-1])["own"]["numbers"]
    begun, loaded = {}, []
    train_on, load = Milestones.__init__, DelayCompensation.load

    def training(self: Milestones, run: ActiveRun, phase: Phase, strategy: Strategy) -> None:
        if isinstance(strategy, ParameterServer):
            assert strategy._running is not None
            begun[run.comm.rank] = strategy._running.counters()
        train_on(self, run, phase, strategy)

    def loading(self: DelayCompensation, moments: dict[str, Buffer]) -> None:
        load(self, moments)
        loaded.append(self.view()[MEAN_SQUARE].copy())

    monkeypatch.setattr(Milestones, "__init__", training)
    monkeypatch.setattr(DelayCompensation, "load", loading)
    World(5).run(lambda comm: helpers.quiet_train(comm, job, resume=whole.folder))
    assert begun == {rank: numbers[rank]["clip"] for rank in range(3)}
    assert len({mean for mean, _ in begun.values()}) == 3
    assert all(seen > 2 for _, seen in begun.values())
    assert (np.concatenate(loaded) == squares.numpy()).all()
    assert (squares > 0).any()


@pytest.mark.slow
@pytest.mark.parametrize("queue", ["shared", "static"])
def test_samples_and_versions_of_several_workers_are_consistent(tmp_path: Path, queue: str):
    schedule = phases((AR, 100), (served(servers=2), 100), (served("bounded", bound=1), 0))
    job = resumable(tmp_path, schedule, data={"name": "tests.helpers:points", "queue": queue})
    whole = World(5, compute=jitter(1)).run(lambda comm: helpers.quiet_train(comm, job))[0]
    before = heads(whole.folder)
    for index in range(len(before)):
        helpers.forget_after(whole.folder, index)
        again = World(5, compute=jitter(index)).run(lambda comm: helpers.quiet_train(comm, job, resume=whole.folder))
        assert heads(whole.folder) == before
        assert [summary.steps for summary in again[0].phases] == [summary.steps for summary in whole.phases]


@pytest.mark.slow
def test_rule_resumes_where_it_was(tmp_path: Path):
    """With one worker, whose losses repeat."""
    job = stable(tmp_path).override(["train.checkpoint_every.samples=100", "train.keep_checkpoints=99"])
    _, results, events = observed(2, job)
    folder = results[0].folder
    news = [text for kind, text in events[1] if kind == "rule"]
    for index in (5, 1):
        helpers.forget_after(folder, index)
        _, again = helpers.traced(2, lambda comm: helpers.quiet_train(comm, job, resume=folder))
        repeated = [text for kind, text in map(event_of, again[1]["events"]) if kind == "rule"]
        assert 0 < len(repeated) < len(news)
        assert repeated == news[-len(repeated) :]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (served(), served("bounded")),
        (served("bounded"), served("sync")),
        (served(), AR),
        ({"name": "switch", "then": served()}, {"name": "switch", "then": served("bounded")}),
    ],
)
def test_resuming_with_different_phases_is_refused(tmp_path: Path, before: helpers.Tables, after: helpers.Tables):
    keys = {"epochs": 2, "batch_size": 3, "checkpoint_every": {"samples": 40}}
    made = [helpers.make_job(tmp_path, strategy=strategy, train=keys) for strategy in (before, after)]
    folder = World(3).run(lambda comm: helpers.quiet_train(comm, made[0]))[0].folder
    helpers.forget_after(folder, 0)
    with pytest.raises(CheckpointError, match="for other phases") as caught:
        World(3).run(lambda comm: helpers.quiet_train(comm, made[1], resume=Resume(folder, changes="take")))
    assert "\n" not in str(caught.value)


class Signals:
    """Replaces StopSignals: a signal arrives on one rank."""

    def __init__(self, asked: bool) -> None:
        self.asked = 2 * asked
        self.messages: list[str] = []

    def stepped(self) -> None:
        pass

    def saving(self) -> None:
        pass

    def say(self, text: str) -> None:
        self.messages.append(text)


@pytest.mark.parametrize("queue", mostly_slow(QUEUES, QUEUES[:1]))
@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_interruption_loses_no_sample(tmp_path: Path, mode: str, queue: str):
    """Received in mid-epoch by a fast worker while another is far behind; the rest follows after resuming."""
    samples = 60
    job = helpers.make_job(
        tmp_path, model=lambda: nn.Linear(1, 1), loss="mse", metric="tests.helpers:no_metric",
        data={"name": helpers.Counted(samples), "queue": queue}, strategy=served(mode, servers=2),
        train={"epochs": 2, "batch_size": 2},
    )  # fmt: skip
    seen: list[int] = []

    def body(comm: Communicator, resume: str | None) -> Result:
        count = 0
        with session(job, comm, resume, QUIET) as running:
            for batch in running.batches():
                seen.extend(int(value) for value in batch.inputs[:, 0])
                count += 1
                running.run.signals = Signals(comm.rank == 0 and count == 4 and resume is None)  # type: ignore[assignment]
                running.step(running.loss(running.model(batch.inputs / samples), batch.targets))
        return running.result

    left = World(5, compute=jitter(1, 0.1, {1: 5.0})).run(lambda comm: body(comm, None))[0]
    assert left.interrupted
    assert left.samples == len(seen) < samples
    resumed = World(5, compute=jitter(2)).run(lambda comm: body(comm, "latest"))[0]
    assert resumed.folder == left.folder
    assert sorted(seen) == sorted(2 * list(range(samples)))


# -- refused with one message, before anything is written ------------------------------------------------
class Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(helpers.points(11))


def switching(until: helpers.Tables, **strategy: Any) -> list[helpers.Tables]:
    return [{"strategy": served(**strategy), "until": until}, {"strategy": AR}]


REFUSED: dict[str, tuple[type[HpctrainError], str, helpers.Tables]] = {
    "negative bound": (JobError, "strategy.bound", {"strategy": served("bounded", bound=-1)}),
    "absurd bound": (JobError, "strategy.bound", {"strategy": served("bounded", bound=10**9)}),
    "bound without effect": (JobError, "bound", {"strategy": served("async", bound=5)}),
    "backup workers without effect": (JobError, "backup_workers", {"strategy": served("async", backup_workers=1)}),
    "correction without effect": (
        JobError,
        "lr_per_update",
        {"strategy": {"name": "parameter_server", "mode": "sync", "lr_per_update": "none"}},
    ),
    "strength without compensation": (JobError, "delay_lambda", {"strategy": served(delay_lambda=1.0)}),
    "an unknown mode": (JobError, "strategy.mode", {"strategy": {"name": "parameter_server", "mode": "asynch"}}),
    "target without evaluations": (
        JobError,
        "phases.0.until: it needs evaluations",
        {"phases": switching({"rule": "target", "metric": 0.5})},
    ),
    "too few ranks": (ClusterError, "phases.0.strategy.servers = 4", {"phases": switching(STABLE, servers=4)}),
    "too few ranks for the second": (
        ClusterError,
        "strategy.then.servers = 9: of 4 ranks",
        {"strategy": {"name": "switch", "until": STABLE, "then": served(servers=9)}, "train": {"epochs": 20}},
    ),
    "a stream": (DataError, "stream of unknown length", {"data": Endless(), "strategy": served()}),
    "a later stream": (
        DataError,
        "stream of unknown length",
        {"data": Endless(), "phases": phases((AR, 20), (served(), 0))},
    ),
    "a queue without effect": (
        JobError,
        'data.queue = "shared"',
        {"data": {"name": "tests.helpers:points", "queue": "shared"}, "strategy": served("sync")},
    ),
    "batch norm in lockstep": (
        ModelError,
        "train.sync_batchnorm",
        {
            "model": "tests.helpers:noisy_net",
            "data": "tests.helpers:pictures",
            "strategy": served(),
            "train": {"sync_batchnorm": True},
        },
    ),
    "a switch in a switch": (
        JobError,
        "switch",
        {"strategy": {"name": "switch", "then": {"name": "switch"}}},
    ),
    "a switch as a phase": (JobError, "switch", {"phases": phases((AR, 20), ({"name": "switch"}, 0))}),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_with_one_message_and_nothing_is_written(tmp_path: Path, what: str):
    kind, words, tables = REFUSED[what]
    with pytest.raises(kind) as caught:
        job = helpers.make_job(tmp_path / "runs", **tables)
        World(4).run(lambda comm: helpers.quiet_train(comm, job))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    assert not (tmp_path / "runs").exists()
