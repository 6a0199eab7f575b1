"""Runs from end to end over virtual ranks: sessions, phases, resuming, stopping early, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from hpctrain.clock.decisions import Ask, Conductor
from hpctrain.clock.rules import Rule, TargetOptions
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.splits import Splits
from hpctrain.errors import (
    CheckpointError,
    ClusterError,
    DataError,
    HpctrainError,
    JobError,
    ModelError,
    RunInUseError,
    TraceError,
)
from hpctrain.job import Job
from hpctrain.run.agreement import agreed
from hpctrain.run.api import Result, fit, session, train
from hpctrain.run.folder import Narrator
from hpctrain.run.resume import Resume
from tests import helpers
from tests.marks import mostly_slow, slow
from tests.unit.test_run_lock import leave

PS = {"name": "parameter_server", "mode": "sync", "servers": 1}
QUIET = Narrator(enabled=False)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(size: int, job: Job, **arguments: Any) -> list[Result]:
    return World(size).run(lambda comm: helpers.quiet_train(comm, job, **arguments))


def metrics_of(folder: Path) -> list[tuple[str, str]]:
    with open(folder / "metrics.csv") as file:
        return [(row["step"], row["split"]) for row in csv.DictReader(file)]


# -- the result --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_every_rank_gets_the_saved_model(tmp_path: Path, strategy: helpers.Tables):
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures", strategy=strategy
    )
    results = run(3, job)
    saved = load_file(results[0].folder / "model.safetensors")
    for result in results:
        assert result.folder == results[0].folder
        for name, tensor in result.model.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
    assert set(results[0].metrics) == {"loss", "metric"}
    assert not results[0].interrupted


def test_training_learns_an_easy_task(tmp_path: Path):
    inputs = torch.randn(120, 7, generator=torch.Generator().manual_seed(1))
    easy = TensorDataset(inputs, inputs[:, :3].argmax(1))
    job = helpers.make_job(
        tmp_path, data=(easy, easy), optimizer={"name": "Adam", "lr": 0.02}, train={"epochs": 25, "batch_size": 8}
    )
    assert run(3, job)[0].metrics["metric"] > 0.9


def test_same_resolved_job_gives_the_same_bits(tmp_path: Path):
    job = helpers.make_job(
        tmp_path,
        model="tests.helpers:noisy_net",
        data={"name": "tests.helpers:pictures", "augment": ["shift"]},
        train={"clip_norm": 0.5},
    )
    first = run(3, job)[0].folder
    second = run(3, Job.load(first / "job.toml"))[0].folder
    assert first != second
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert (first / "job.toml").read_text() == (second / "job.toml").read_text()


def test_only_rank_0_prints(tmp_path: Path):
    outs = [io.StringIO() for _ in range(3)]
    job = helpers.make_job(tmp_path)
    World(3).run(lambda comm: train(job, comm, out=Narrator(out=outs[comm.rank])))
    assert "run folder" in outs[0].getvalue()
    assert [out.getvalue() for out in outs[1:]] == ["", ""]


def test_one_narrator_for_all_virtual_ranks_prints_once(tmp_path: Path):
    out = io.StringIO()
    job = helpers.make_job(tmp_path)
    narrator = Narrator(out=out)
    World(3).run(lambda comm: train(job, comm, out=narrator))
    assert out.getvalue().count("3 ranks on 1 node") == 1


# -- a custom loop -----------------------------------------------------------------------------------------
def own_loop(comm: Communicator, job: Job, steps: int = 10**9, resume: Path | None = None) -> tuple[int, Any]:
    """(batches seen, the session); leaves the session after `steps`."""
    count = 0
    with session(job, comm, resume=resume, out=QUIET) as running:
        for batch in running.batches():
            with running.autocast():
                loss = running.loss(running.model(batch.inputs), batch.targets)
            running.step(loss)
            count += 1
            if count == steps:
                break
    return count, running


@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_custom_loop_does_what_train_does(tmp_path: Path, strategy: helpers.Tables):
    job = helpers.make_job(tmp_path, strategy=strategy)
    trained = run(4, job)
    looped = World(4).run(lambda comm: own_loop(comm, job))
    for result, (_, running) in zip(trained, looped, strict=True):
        assert (helpers.vector(result.model) == helpers.vector(running.result.model)).all()


def test_batches_on_a_server_serves_and_yields_nothing(tmp_path: Path):
    counts = [count for count, _ in World(4).run(lambda comm: own_loop(comm, helpers.make_job(tmp_path, strategy=PS)))]
    assert counts == [8, 8, 8, 0]


def test_session_left_early_has_no_result(tmp_path: Path):
    job = helpers.make_job(tmp_path)
    _, running = World(2).run(lambda comm: own_loop(comm, job, steps=3))[0]
    with pytest.raises(HpctrainError, match="was not run to the end"):
        _ = running.result
    assert not (running.folder / "model.safetensors").exists()


def test_session_left_early_resumes_from_its_checkpoint(tmp_path: Path):
    job = helpers.make_job(tmp_path, train={"checkpoint_every": {"steps": 3}})
    whole = run(2, job)[0]
    _, left = World(2).run(lambda comm: own_loop(comm, job, steps=5))[0]
    resumed = run(2, job, resume=left.folder)[0]
    assert (helpers.vector(resumed.model) == helpers.vector(whole.model)).all()


@pytest.mark.parametrize("strategy", [{"name": "all_reduce"}, PS])
def test_step_requires_a_batch(tmp_path: Path, strategy: helpers.Tables):
    def twice(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            for batch in running.batches():
                loss = running.loss(running.model(batch.inputs), batch.targets)
                running.step(loss)
                running.step(loss)

    def never(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            for _ in running.batches():
                pass

    def outside(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            running.step(torch.zeros(()))

    def again(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            fit(running)
            fit(running)

    for body, words in ((twice, "without a batch"), (never, "not called"), (outside, "outside"), (again, "twice")):
        with pytest.raises(HpctrainError, match=words):
            World(2).run(body)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda s: s.model.to(torch.float64), "no longer lies in its arena"),
        (lambda s: s.model.zero_grad(), "gradient of .* no longer lies"),
        (lambda s: setattr(s.model[0].weight, "data", torch.zeros(13, 7)), "0.weight no longer lies"),
    ],
)
def test_broken_views_are_detected(tmp_path: Path, harm: Any, words: str):
    def body(comm: Communicator) -> None:
        with session(helpers.make_job(tmp_path), comm, out=QUIET) as running:
            for batch in running.batches():
                harm(running)
                inputs = batch.inputs.to(running.model.get_parameter("0.weight").dtype)
                running.step(running.loss(running.model(inputs), batch.targets))

    with pytest.raises(ModelError, match=words):
        World(2).run(body)


# -- phases ------------------------------------------------------------------------------------------------------
def phased(folder: Path, *strategies: helpers.Tables, steps: int = 24, **tables: Any) -> Job:
    each = {"rule": "after", "steps": steps // len(strategies)}
    phases = [{"strategy": s, "until": each} for s in strategies]
    del phases[-1]["until"]
    keys = {"steps": steps, "batch_size": 3, "precision": "float64", **tables.pop("train", {})}
    return helpers.make_job(folder, phases=phases, train=keys, **tables)


AR, MESSAGE = {"name": "all_reduce"}, {"name": "all_reduce", "exchange": "message"}
COLOCATED = {"name": "parameter_server", "mode": "sync", "servers": 4, "colocated": True}


@pytest.mark.parametrize("middle", [MESSAGE, COLOCATED])
def test_optimizer_state_carries_over_to_another_strategy(tmp_path: Path, middle: helpers.Tables):
    """With a constant number of workers, several phases equal one phase."""
    optimizer = {"name": "Adam", "lr": 0.01}
    train_keys = {"steps": 24, "batch_size": 3, "precision": "float64"}
    whole = run(4, helpers.make_job(tmp_path, optimizer=optimizer, train=train_keys))
    switched = run(4, phased(tmp_path, AR, middle, AR, optimizer=optimizer))
    assert helpers.difference(helpers.vector(switched[1].model), helpers.vector(whole[1].model)) < 1e-10
    assert [p.steps for p in switched[0].phases] == [8, 8, 8]
    assert [p.strategy.split()[0] for p in switched[0].phases] == ["all_reduce", middle["name"], "all_reduce"]


def test_roles_change_without_losing_samples(tmp_path: Path):
    """Servers become workers again; their totals equal the other ranks'."""
    phases = [
        {"strategy": AR, "until": {"rule": "after", "samples": 20}},
        {"strategy": {**PS, "servers": 2}, "until": {"rule": "after", "samples": 31}},
        {"strategy": AR},
    ]
    World(4).run(lambda comm: helpers.every_sample_once(comm, tmp_path, epochs=4, phases=phases))
    out = io.StringIO()
    job = helpers.make_job(tmp_path, phases=phases, train={"epochs": 2})
    results = World(4).run(lambda comm: train(job, comm, out=Narrator(out=out)))
    assert len({result.samples for result in results}) == 1
    for result in results:
        assert [p.index for p in result.phases] == [0, 1, 2]
        assert [p.samples for p in result.phases] == [p.samples for p in results[0].phases]
        assert (helpers.vector(result.model) == helpers.vector(results[0].model)).all()
    assert "switched at sample 24: after 24 >= 20 samples" in out.getvalue()
    assert "switched at sample 60: after 36 >= 31 samples" in out.getvalue()


def test_former_servers_take_rank_0s_buffers(tmp_path: Path):
    seen: dict[int, torch.Tensor] = {}

    def body(comm: Communicator) -> None:
        job = phased(
            tmp_path, PS, AR, steps=6, model="tests.helpers:noisy_net", data="tests.helpers:pictures"
        )
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                if running.totals.phase == 1 and comm.rank not in seen:
                    seen[comm.rank] = running.model.get_buffer("1.running_mean").clone()
                running.step(running.loss(running.model(batch.inputs), batch.targets))

    World(3).run(body)
    assert torch.equal(seen[2], seen[0])
    assert not torch.equal(seen[1], seen[0])


@pytest.mark.parametrize("index", [0, slow(1), slow(2), 3])
def test_resuming_in_any_phase_and_at_its_end(tmp_path: Path, index: int):
    """Checkpoints every 4 steps; phases end after 8, so that some coincide with the end of a phase."""
    job = phased(
        tmp_path, AR, PS, AR, train={"checkpoint_every": {"samples": 48}, "keep_checkpoints": 99},
        optimizer={"name": "SGD", "lr": 0.05, "momentum": 0.9},
    )  # fmt: skip
    whole = run(4, job)[0]
    helpers.forget_after(whole.folder, index)
    resumed = run(4, job, resume=whole.folder)[0]
    assert [p.steps for p in resumed.phases] == [p.steps for p in whole.phases]
    assert (helpers.vector(resumed.model) == helpers.vector(whole.model)).all()




# -- stopping ----------------------------------------------------------------------------------------------------
def test_evaluates_once_at_the_end(tmp_path: Path):
    """Validation where the run stops, test once; if there is only one part, once."""
    parts = helpers.pictures()
    for data, wanted in (
        (parts, [("5", "validation"), ("10", "validation"), ("10", "test")]),
        (Splits(parts.train, None, parts.test), [("5", "test"), ("10", "test")]),
        (Splits(parts.train, parts.validation, None), [("5", "validation"), ("10", "validation")]),
    ):
        job = helpers.make_job(
            tmp_path, model="tests.helpers:noisy_net", data=data, train={"epochs": 2, "batch_size": 8}
        )
        result = run(2, job)[0]
        assert metrics_of(result.folder) == wanted
        assert set(result.metrics) == {"loss", "metric"}


@pytest.mark.parametrize("strategy", [AR, PS])
def test_target_ends_the_run(tmp_path: Path, strategy: helpers.Tables):
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures", strategy=strategy,
        train={"epochs": 9, "target": 0.0},
    )  # fmt: skip
    out = io.StringIO()
    results = World(3).run(lambda comm: train(job, comm, out=Narrator(out=out)))
    assert results[0].samples == 75
    assert "stopped at sample 75: target 0 reached" in out.getvalue()
    again = run(3, job, resume=results[0].folder)[0]  # an ended phase stays ended
    assert again.samples == 75


def test_patience_ends_the_run(tmp_path: Path):
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures",
        train={"epochs": 9, "patience": 2, "min_delta": 1.0},
    )  # fmt: skip
    assert run(2, job)[0].samples == 3 * 75


def test_rule_ending_the_last_phase_ends_the_run(tmp_path: Path):
    job = helpers.make_job(
        tmp_path, phases=[{"strategy": AR, "until": {"rule": "after", "steps": 3}}], train={"steps": 9}
    )
    result = run(2, job)[0]
    assert result.phases[0].steps == 3
    assert (result.folder / "model.safetensors").exists()
    assert run(2, job, resume=result.folder)[0].phases[0].steps == 3


class Signals:
    """Replaces StopSignals."""

    def __init__(self, messages: list[str]) -> None:
        self.asked, self.say = 0, messages.append

    def stepped(self) -> None:
        pass

    def saving(self) -> None:
        pass


@pytest.mark.parametrize("strategy", [AR, PS, slow(COLOCATED)])
def test_interrupted_run_resumes_to_the_same_bits(tmp_path: Path, strategy: helpers.Tables):
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures", strategy=strategy,
        optimizer={"name": "Adam", "lr": 0.01}, train={"steps": 9, "batch_size": 4},
    )  # fmt: skip
    whole = run(4, job)[0]
    messages: list[str] = []

    def body(comm: Communicator) -> Result:
        count = 0
        with session(job, comm, out=QUIET) as running:
            for batch in running.batches():
                running.step(running.loss(running.model(batch.inputs), batch.targets))
                count += 1
                signals = Signals(messages)
                signals.asked = 2 * (comm.rank == 1 and count == 4)  # the signal arrives on one rank only
                running.run.signals = signals  # type: ignore[assignment]
        return running.result

    left = World(4).run(body)[0]
    assert left.interrupted
    assert left.metrics == {}
    assert left.phases[0].steps == 6  # noticed after the fifth, agreed on with the sixth
    assert len(messages) == 1
    assert "resume=" in messages[0]
    assert str(left.folder) in messages[0]
    resumed = run(4, job, resume="latest")[0]
    assert resumed.folder == left.folder
    assert (helpers.vector(resumed.model) == helpers.vector(whole.model)).all()
    assert run(4, job, resume="latest")[0].folder != left.folder


class SecondEvaluation(Rule):
    """Ends a phase at its second evaluation."""

    Options = TargetOptions
    seen = 0

    def observe(self, cursor: int, loss: float) -> str | None:
        return None

    def evaluated(self, cursor: int, metric: float, higher_is_better: bool) -> str | None:
        self.seen += 1
        return "the second" if self.seen == 2 else None

    def state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


EVALUATED: helpers.Tables = {"steps": 9, "batch_size": 4, "evaluate_every": {"steps": 3}}
SECOND = {"rule": SecondEvaluation, "metric": 1.0}
AT_EVALUATIONS: dict[str, helpers.Tables] = {
    "rounds": {"strategy": AR},
    "a server": {"strategy": PS, "train": {"checkpoint_every": {"steps": 3}}},
    "patience": {"strategy": AR, "train": {"patience": 2, "min_delta": 9.0}},
    "a target": {"strategy": {**PS, "colocated": True}, "train": {"target": 0.0}},
    "a rule": {"phases": [{"strategy": AR, "until": SECOND}, {"strategy": PS}]},
    "a rule of the last phase": {"phases": [{"strategy": AR, "until": SECOND}]},
    "a phase's end": {"phases": [{"strategy": PS, "until": {"rule": "after", "steps": 3}}, {"strategy": AR}]},
    "no lockstep": {
        "strategy": helpers.served(colocated=True),
        "train": {"evaluate_every": {"samples": 24}, "patience": 2, "min_delta": 9.0},
    },
}


def _metrics_without_seconds(folder: Path) -> list[list[str]]:
    if not (folder / "metrics.csv").exists():
        return []
    with open(folder / "metrics.csv") as file:
        return [[value for key, value in row.items() if key != "seconds"] for row in csv.DictReader(file)]


def _interrupted_at(job: Job, cursor: int) -> Path:
    """The folder of a run that is interrupted by the step that ends at `cursor`."""
    decide = Conductor.decide

    def interrupting(self: Conductor, before: int, after: int, loss: float, wish: Ask) -> Ask:
        return decide(self, before, after, loss, wish | (Ask.INTERRUPT if before < cursor <= after else 0))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Conductor, "decide", interrupting)
        result = run(3, job)[0]
    assert result.interrupted
    assert result.samples == cursor
    assert max((int(row[1]) for row in _metrics_without_seconds(result.folder)), default=0) < cursor
    return result.folder


@pytest.mark.parametrize("what", mostly_slow(AT_EVALUATIONS, list(AT_EVALUATIONS)[:1]))
def test_evaluation_due_at_an_interruption_is_made_by_the_resumed_run(tmp_path: Path, what: str):
    """In each case rows, ends of phases and of the run, and the model equal those of the uninterrupted run."""
    tables = AT_EVALUATIONS[what]
    tables = {**tables, "train": {**EVALUATED, **tables.get("train", {})}}
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures", **tables
    )
    whole = run(3, job)[0]
    rows = _metrics_without_seconds(whole.folder)
    places = sorted({int(row[1]) for row in rows if row[3] == "validation"})
    assert places
    for cursor in places:
        folder = _interrupted_at(job, cursor)
        resumed = run(3, job, resume=folder)[0]
        found = _metrics_without_seconds(folder)
        assert [(p.index, p.steps, p.samples) for p in resumed.phases] == [
            (p.index, p.steps, p.samples) for p in whole.phases
        ]
        if "lockstep" in what:  # samples per worker depend on the timing of queue requests
            assert [row[1:4] for row in found] == [row[1:4] for row in rows]
            continue
        assert found == rows
        model = "model.safetensors"
        assert (folder / model).read_bytes() == (whole.folder / model).read_bytes()


def test_owed_evaluation_is_not_reported_twice(tmp_path: Path):
    """Resumed twice from a checkpoint that owes one, which the first resumed run made."""
    job = helpers.make_job(tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures", train=EVALUATED)
    folder = _interrupted_at(job, 36)
    run(3, job, resume=folder)
    rows = _metrics_without_seconds(folder)
    helpers.forget_after(folder, 0)
    run(3, job, resume=folder)
    assert _metrics_without_seconds(folder) == rows


def test_measurements_after_the_checkpoint_are_discarded(tmp_path: Path):
    job = helpers.make_job(
        tmp_path, model="tests.helpers:noisy_net", data="tests.helpers:pictures",
        train={"epochs": 3, "checkpoint_every": {"epochs": 1}},
    )  # fmt: skip
    folder = run(2, job)[0].folder
    whole = metrics_of(folder)
    helpers.forget_after(folder, 0)
    run(2, job, resume=folder)
    assert metrics_of(folder) == whole


# -- evaluation --------------------------------------------------------------------------------------------------
def test_fewer_test_samples_than_ranks(tmp_path: Path):
    few = TensorDataset(*(tensor[:2] for tensor in helpers.points().tensors))
    job = helpers.make_job(tmp_path, data=(helpers.points(), few))
    alone = run(1, job.override(["train.batch_size=30", "train.precision=float64"]))[0].metrics
    five = run(5, job.override(["train.precision=float64"]))[0].metrics
    assert five == pytest.approx(alone, rel=1e-9)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(helpers.points(11))


def test_testing_on_a_stream(tmp_path: Path):
    listed = helpers.make_job(tmp_path, data=(helpers.points(), helpers.points(11)))
    streamed = helpers.make_job(tmp_path, data=(helpers.points(), Stream()))
    assert run(3, streamed)[0].metrics == pytest.approx(run(3, listed)[0].metrics, rel=1e-6)


def test_training_on_a_stream(tmp_path: Path):
    job = helpers.make_job(tmp_path, data=Stream(), train={"steps": 7, "batch_size": 2})
    result = run(3, job)[0]
    assert result.samples == 44  # 7 full rounds' worth: at the ends of epochs, not known at first, rounds are smaller


# -- what is refused: once, before anything is written -----------------------------------------------------------
REFUSED: dict[str, tuple[type[HpctrainError], str, dict[str, Any]]] = {
    "too few ranks": (ClusterError, "needs 4 ranks was started with 3", {"ranks": 4}),
    "slow rank": (JobError, "debug.slow.7: this run has 3 ranks", {"debug": {"slow": {7: 2}}}),
    "servers": (ClusterError, "strategy.servers = 3: of 3 ranks", {"strategy": {**PS, "servers": 3}}),
    "servers of a later phase": (
        ClusterError,
        "phases.1.strategy.servers = 9: of 3 ranks",
        {"phases": [{"strategy": AR, "until": {"rule": "after", "steps": 1}}, {"strategy": {**PS, "servers": 9}}]},
    ),
    "nothing trainable": (ModelError, "no trainable parameters", {"model": lambda: nn.ReLU()}),
    "no model": (ModelError, "expected a torch.nn.Module", {"model": lambda: 5}),
    "lazy": (ModelError, "lazy parameters", {"model": lambda: nn.LazyLinear(3)}),
    "optimizer": (ModelError, "SGD has no such argument", {"optimizer": {"name": "SGD", "momemtum": 1}}),
    "missing data": (DataError, "nowhere", {"data": {"name": "mnist", "path": "nowhere"}}),
    "empty data": (DataError, "is empty", {"data": TensorDataset(torch.zeros(0, 7))}),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_refused_on_every_rank_without_writing_anything(tmp_path: Path, what: str):
    kind, words, tables = REFUSED[what]
    job = helpers.make_job(tmp_path / "runs", **tables)
    messages = []

    def body(comm: Communicator) -> None:
        with pytest.raises(kind, match=words) as caught:
            helpers.quiet_train(comm, job)
        assert caught.value.everywhere
        messages.append(str(caught.value))

    World(3).run(body)
    assert len(messages) == 3
    assert len(set(messages)) == 1
    assert "\n" not in messages[0]
    assert not (tmp_path / "runs").exists()


def test_output_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(JobError, match="output = "):
        run(2, helpers.make_job(tmp_path / "file"))


def test_run_folder_is_removed_if_traces_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_room(self: Any, *_: Any) -> None:
        if self._comm.rank == 1:
            raise TraceError("no room")

    monkeypatch.setattr("hpctrain.run.tracing.Tracing.open", no_room)
    with pytest.raises(TraceError, match="no room"):
        run(3, helpers.make_job(tmp_path / "runs"))
    assert not list((tmp_path / "runs").iterdir())


def _finished(folder: Path, **tables: Any) -> tuple[Job, Path]:
    job = helpers.make_job(folder, train={"checkpoint_every": {"steps": 3}}, **tables)
    result = run(2, job)[0]
    helpers.forget_after(result.folder, 0)
    return job, result.folder


def _files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("harm", "size", "overrides", "words"),
    [
        (lambda f: f.write_bytes(f.read_bytes()[:-50]), 2, [], "truncated"),
        (lambda f: f.write_bytes(b""), 2, [], "truncated"),
        (lambda f: f.unlink(), 2, [], "no checkpoint to resume from"),
        (lambda f: None, 2, ["model.name=tests.unit.test_run:other"], "another model"),
        (lambda f: None, 3, [], "used 2 ranks and is resumed on 3"),
        (lambda f: None, 2, ["strategy=parameter_server"], "for other phases"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused(
    tmp_path: Path, harm: Any, size: int, overrides: list[str], words: str
):
    job, folder = _finished(tmp_path)
    harm(next((folder / "checkpoints").iterdir()))
    before = _files(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        run(size, job.override(overrides), resume=Resume(folder, changes="take"))
    assert _files(tmp_path) == before


def other() -> nn.Module:
    return nn.Linear(7, 3)


# -- whose run folder it is ----------------------------------------------------------------------------------------
def test_differing_job_is_refused_by_name_or_its_changes_are_taken(tmp_path: Path):
    """On every rank alike; accepted changes are reported at the start and kept by the run."""
    job, folder = _finished(tmp_path)
    other, before, out = job.override(["optimizer.lr=0.3", "train.steps=10"]), _files(tmp_path), io.StringIO()
    messages: list[str] = []
    words = "optimizer.lr is 0.1 there and 0.3 in this job, train.steps is 8 there and 10 in this job; start"

    def refused(comm: Communicator) -> None:
        with pytest.raises(CheckpointError, match=words) as caught:
            helpers.quiet_train(comm, other, resume=folder)
        messages.append(str(caught.value))
        assert caught.value.everywhere

    World(2).run(refused)
    assert len(set(messages)) == 1
    assert _files(tmp_path) == before
    narrator = Narrator(out=out)
    World(2).run(lambda comm: train(other, comm, Resume(folder, changes="take"), narrator))
    assert "resumed at sample 72 (step 6)\nchanged from here on: optimizer.lr = 0.3 (was 0.1), train.steps = 10" in (
        out.getvalue()
    )
    assert Job.load(folder / "job.toml") == other
    assert [json.loads(line)["sample"] for line in (folder / "history.jsonl").read_text().splitlines()] == [72, 72]
    helpers.forget_after(folder, 0)
    assert run(2, other, resume=folder)[0].phases[0].steps == 10
    with pytest.raises(CheckpointError, match="seed = 5: the run in .* has seed = 0 and keeps it"):
        run(2, job.override(["seed=5"]), resume=Resume(folder, changes="take"))


def test_keys_that_do_not_affect_numbers_may_differ(tmp_path: Path):
    job, folder = _finished(tmp_path)
    whole = run(2, job)[0].folder
    free = job.override(["output=elsewhere", "trace.flush_seconds=9", "train.keep_checkpoints=5", "data.threads=0"])
    text = (folder / "job.toml").read_text()
    run(2, free, resume=folder)
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (folder / "job.toml").read_text() == text


def test_run_folder_is_used_by_one_run_at_a_time(tmp_path: Path):
    """Neither resuming nor `latest` can use it; it is free after an interruption, an error or the end."""
    job, folder = _finished(tmp_path)

    def refused(resume: Path | str) -> None:
        with pytest.raises(RunInUseError, match=f"{folder} is in use by process {os.getpid()} on "):
            run(1, job, resume=resume)

    def body(comm: Communicator, fails: bool) -> None:
        with session(job, comm, resume=folder, out=QUIET) as running:
            for batch in running.batches():
                for resume in ("latest", folder) if comm.rank == 0 else ():
                    refused(resume)
                running.step(running.loss(running.model(batch.inputs), batch.targets))
                if fails:
                    raise ZeroDivisionError
                assert [t.name for t in threading.enumerate()].count("run-lock") == 1

    with pytest.raises(ZeroDivisionError):
        World(2).run(lambda comm: body(comm, True))
    assert not list(folder.glob("*lock*"))
    World(2).run(lambda comm: body(comm, False))
    assert not list(folder.glob("*lock*"))
    assert "run-lock" not in [t.name for t in threading.enumerate()]


@pytest.mark.parametrize(("when", "kept"), [(2, 0), (7, 1)])  # before a checkpoint; before the end
def test_run_whose_folder_was_taken_over_stops_writing(tmp_path: Path, when: int, kept: int):
    """It stalled for so long that another process took over its folder."""
    job = helpers.make_job(tmp_path, train={"checkpoint_every": {"steps": 4}})

    def body(comm: Communicator) -> None:
        with session(job, comm, out=QUIET) as running:
            for count, batch in enumerate(running.batches()):
                if count == when and comm.rank == 0:
                    leave(running.folder, pid=4711)
                running.step(running.loss(running.model(batch.inputs), batch.targets))

    with pytest.raises(RunInUseError, match="has been taken over by process 4711"):
        World(2).run(body)
    [folder] = tmp_path.iterdir()
    assert len(list(folder.glob("checkpoints/*"))) == kept
    assert not (folder / "model.safetensors").exists()


def test_overrides_are_in_the_first_line(tmp_path: Path):
    job = helpers.make_job(tmp_path).override(["optimizer.lr=0.3", "seed=4"])
    out = io.StringIO()
    narrator = Narrator(out=out)
    folder = World(2).run(lambda comm: train(job, comm, out=narrator))[0].folder
    assert out.getvalue().startswith("train with optimizer.lr=0.3, seed=4: 2 ranks on 1 node, ")
    assert (folder / "job.toml").read_text().startswith("# train with optimizer.lr=0.3, seed=4\n")


# -- resuming with another optimizer -----------------------------------------------------------------------------
ADAM = {"name": "Adam", "lr": 0.01}
OWN_SGD = {"name": "tests.unit.test_run:Momentum", "lr": 0.1}  # not known to be elementwise: moments by parameter


def _without_record(folder: Path) -> None:
    """A checkpoint without a record of its optimizer, as in older versions."""
    [path] = (folder / "checkpoints").iterdir()
    with safe_open(path, framework="pt") as file:
        head = json.loads(file.metadata()["hpctrain"])
    del head["progress"]["optimizer"]
    save_file(load_file(path), path, {"hpctrain": json.dumps(head)})


MOMENTUM = {"name": "SGD", "lr": 0.1, "momentum": 0.9}
WHOLE = {**ADAM, "elementwise": False}
OPTIMIZERS: dict[str, tuple[helpers.Tables, helpers.Tables, str | None, str | None]] = {
    # started with, resumed with, the messages for a checkpoint with and without a record of its optimizer
    "another class": (ADAM, MOMENTUM, "the state of Adam, but the job names SGD", "keeps exp_avg, exp_avg_sq, step,"),
    "a variant": (ADAM, {**ADAM, "name": "AdamW"}, "the state of Adam, but the job names AdamW", None),
    "more moments": (ADAM, {**ADAM, "amsgrad": True}, "no max_exp_avg_sq, which optimizer Adam with", "max_e"),
    "fewer moments": ({**ADAM, "amsgrad": True}, ADAM, None, "that keeps exp_avg, exp_avg_sq, max_exp_avg_sq, step,"),
    "a first moment": ({"name": "SGD"}, MOMENTUM, "no momentum_buffer, which", "no momentum_buffer, which"),
    "other numbers": (ADAM, {**ADAM, "lr": 0.3, "betas": [0.5, 0.9], "weight_decay": 0.1}, None, None),
    "other cuts": (WHOLE, ADAM, "optimizer.elementwise = false, but the job has true", "elementwise = false"),
    "by parameter": ({**OWN_SGD, "momentum": 0.9}, ADAM, "of Momentum, but the job names Adam", "momentum_buffer"),
}


@pytest.mark.parametrize("recorded", [True, slow(False)])
@pytest.mark.parametrize("what", list(OPTIMIZERS))
def test_other_optimizer_is_refused_by_name_or_reset(tmp_path: Path, what: str, recorded: bool):
    before, after, words, guessed = OPTIMIZERS[what]
    folder = _finished(tmp_path, optimizer=before)[1]
    if not recorded:
        _without_record(folder)
        words = guessed
    other = helpers.make_job(tmp_path, optimizer=after, train={"checkpoint_every": {"steps": 3}})
    if words is not None:
        kept = _files(tmp_path)
        with pytest.raises(CheckpointError, match=words) as caught:
            run(2, other, resume=Resume(folder, "take"))
        assert "--reset-optimizer" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert _files(tmp_path) == kept
    else:
        run(2, other, resume=Resume(folder, "take"))
        helpers.forget_after(folder, 0)
    run(2, other, resume=Resume(folder, "take", "reset"))


@pytest.mark.parametrize("strategy", [AR, MESSAGE, PS])
@pytest.mark.parametrize("elementwise", [True, False])
def test_reset_optimizer_starts_like_a_new_one(tmp_path: Path, strategy: helpers.Tables, elementwise: bool):
    """From the checkpoint's parameters and position on, it equals plain torch with a new optimizer."""
    keys = {"steps": 8, "precision": "float64", "checkpoint_every": {"steps": 3}, "keep_checkpoints": 9}
    optimizer = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "elementwise": elementwise}
    job = helpers.make_job(tmp_path, strategy=strategy, optimizer=optimizer, train=keys)
    size = 2 if strategy is not PS else 3
    folder = run(size, job)[0].folder
    helpers.forget_after(folder, 0)
    [path] = (folder / "checkpoints").iterdir()
    begun = {name.removeprefix("parameter/"): t for name, t in load_file(path).items() if name.startswith("parameter/")}
    found = run(size, job, resume=Resume(folder, optimizer="reset"))[0].model
    model = helpers.net().double()
    model.load_state_dict(begun)
    wanted = helpers.plain(job, 2, lambda: model, cursor=int(path.stem), steps=5)
    assert helpers.difference(helpers.vector(found), wanted) < 1e-10


def test_data_differing_from_the_runs_is_refused(tmp_path: Path):
    folder = _finished(tmp_path, data=helpers.points())[1]
    with pytest.raises(CheckpointError, match="had 103 training samples, but the data set now has 90"):
        run(2, helpers.make_job(tmp_path, data=helpers.points(90)), resume=folder)  # an object of the same description


def test_resuming_a_folder_that_is_not_a_run(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        run(2, helpers.make_job(tmp_path / "runs"), resume=tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_rank_0_decides_which_folder_to_resume(tmp_path: Path):
    """A file system may show another rank fewer files than rank 0; rank 0's view counts."""
    job, folder = _finished(tmp_path)
    World(2).run(lambda comm: helpers.quiet_train(comm, job, resume=folder if comm.rank == 0 else None))


# -- objects of a program's own ----------------------------------------------------------------------------------
def test_lambda_is_recorded_by_name_and_refused_on_loading(tmp_path: Path):
    job = helpers.make_job(tmp_path, model=lambda: other(), loss=lambda outputs, targets: outputs.square().mean())
    folder = run(2, job)[0].folder
    text = (folder / "job.toml").read_text()
    assert "<lambda in test_run.py:" in text
    with pytest.raises(JobError, match="was an object of the program that made this run") as caught:
        Job.load(folder / "job.toml")
    assert "model" in str(caught.value)


class Momentum(torch.optim.SGD):
    """A class of the user's own."""


def test_custom_module_data_set_loss_and_optimizer(tmp_path: Path):
    def body(comm: Communicator) -> np.ndarray:
        torch.manual_seed(3)
        job = helpers.make_job(
            tmp_path,
            model=nn.Linear(7, 3),
            data=helpers.points(),
            loss=lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, label_smoothing=0.1),
            optimizer={"name": Momentum, "lr": 0.1, "momentum": 0.9, "elementwise": True},
            metric=lambda outputs, targets: 0.0,
        )
        return helpers.vector(helpers.quiet_train(comm, job).model)

    found = World(3).run(body)
    assert all((vector == found[0]).all() for vector in found)


# -- agreement ---------------------------------------------------------------------------------------------------
def test_agreed_raises_the_first_ranks_error_on_all_ranks():
    messages = []

    def body(comm: Communicator) -> None:
        def what() -> int:
            if comm.rank > 0:
                raise DataError(f"of rank {comm.rank}")
            return 7

        with pytest.raises(DataError, match="of rank 1") as caught:
            agreed(comm, what)
        messages.append(caught.value.everywhere)

    World(4).run(body)
    assert messages == [True] * 4


def test_agreed_returns_each_ranks_own_value():
    assert World(3).run(lambda comm: agreed(comm, lambda: comm.rank * 2)) == [0, 2, 4]
