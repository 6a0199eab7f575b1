"""Mixed float16: the loss is scaled, gradients are unscaled, steps that overflow are skipped, the scale adapts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from hpctrain.comm.base import Communicator
from hpctrain.conformance.task import Steep, Vector
from hpctrain.errors import NanError
from hpctrain.run import scaling
from hpctrain.run.api import session
from hpctrain.run.folder import Narrator
from hpctrain.run.resume import Resume
from hpctrain.run.scaling import FIRST, GROWS_AFTER, MOST, LossScale
from hpctrain.run.trainer import INSPECTED
from hpctrain.strategies.base import Outcome
from hpctrain.trace.events import LossScaleChanged
from hpctrain.trace.files import event_of
from hpctrain.trace.schema import OUTCOMES
from tests import helpers
from tests.marks import mostly_slow, slow

RANKS = 4
LOCAL: helpers.Tables = {"name": "local_sgd", "every": 3}
LOCKSTEP = {name: helpers.SYNCHRONOUS[name][0] for name in ("shared", "message", "overlap", "servers", "all_serve")}
LOCKSTEP["all_serve"] = {**LOCKSTEP["all_serve"], "servers": RANKS}
OWN_SCALES = {
    "local_sgd": LOCAL,
    "async": helpers.served(colocated=True),
    "bounded": helpers.served("bounded", bound=1),
}
BACKUP: helpers.Tables = {"name": "parameter_server", "mode": "sync", "backup_workers": 1, "colocated": True}
STRATEGIES = {**LOCKSTEP, **OWN_SCALES, "backup": BACKUP}
QUICK = ("shared", "overlap", "servers", "local_sgd", "async")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Ran:
    """What a rank has at the end of a run: parameters, scale, outcomes of its steps, changes of its scale."""

    parameters: Vector
    scale: dict[str, Any]
    outcomes: list[str]
    changes: list[LossScaleChanged]
    loss: float


def run(job: Any, size: int = RANKS, **arguments: Any) -> list[Ran]:
    """Train on virtual ranks; one result per worker. Further arguments are those of `session`."""

    def body(comm: Communicator) -> tuple[Vector, dict[str, Any], float]:
        last = 0.0
        with session(job, comm, out=Narrator(enabled=False), **arguments) as running:
            for batch in running.batches():
                with running.autocast():
                    loss = running.loss(running.model(batch.inputs), batch.targets)
                running.step(loss)
                last = float(loss.detach())
            scale = running.run.loss_scale
        return helpers.vector(running.model), scale.plain() if scale is not None else {}, last

    ends, traces = helpers.traced(size, body)
    found = []
    for (parameters, scale, loss), trace in zip(ends, traces, strict=True):
        outcomes = [OUTCOMES[code - 1] for code in trace["steps"]["outcome"]]
        events = [event_of(row["kind"], row["json"]) for row in trace["events"]]
        changes = [event for event in events if isinstance(event, LossScaleChanged)]
        found.append(Ran(parameters, scale, outcomes, changes, loss))
    return [rank for rank in found if rank.outcomes]


def job_of(folder: Path, strategy: helpers.Tables | None, precision: str = "mixed_float16", **tables: Any) -> Any:
    """`Steep` takes 8 rounds, in the samples' order."""
    train = {"steps": 8, "batch_size": 6, "precision": precision, **tables.pop("train", {})}
    data = {"name": steep(), "shuffle": False, **tables.pop("data", {})}
    given = {"strategy": strategy, "model": Steep, "train": train, "data": data}
    return helpers.make_job(folder, **{**given, **tables})


class Wide(Steep):
    """With more parameters than a check of unscaled gradients looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, INSPECTED // 4)
        self.last = nn.Linear(INSPECTED // 4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(inputs)))
        return out + 1000.0 * (inputs[:, :1] == 9.0) * (out - out.detach())


def steep(sample: int = -1, value: float = 9.0) -> TensorDataset:
    """`points`, 300 of them; the features of that sample, if any, are `value`."""
    return helpers.points(300, sample, value)


def second(workers: int = RANKS, steps: int = 1) -> int:
    """A sample of the second worker in the second round, or after that many steps."""
    return steps * 6 * workers + 7


ONE_SCALE = [LossScaleChanged(FIRST, FIRST / 2, "overflow")]


# -- the scale by itself ---------------------------------------------------------------------------------------
def outcome(result: Any = "applied", overflow: bool = False) -> Outcome:
    return Outcome(result, 0, 1.0, 1, overflow=overflow)


def test_scale_follows_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """After overflows at any time it is what GradScaler's would be."""
    monkeypatch.setattr(scaling, "GROWS_AFTER", 20)
    own, theirs = LossScale(), torch.amp.GradScaler("cpu", growth_interval=20)
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for step in range(120):
        overflow = step in (0, 1, 2, 22, 60)
        theirs.scale(weight.sum())  # only prepares the scaler; the gradient is given
        weight.grad = torch.full((1,), torch.inf if overflow else 1.0)
        theirs.step(optimizer)
        theirs.update()
        own.follow(outcome("skipped" if overflow else "applied", overflow))
        assert (own.factor, own.good) == (theirs.get_scale(), theirs._get_growth_tracker())
    assert own.factor == FIRST / 4


def test_scale_has_limits() -> None:
    low, high = LossScale(2.0), LossScale(MOST, GROWS_AFTER - 1)
    assert low.follow(outcome("skipped", True)) == LossScaleChanged(2.0, 1.0, "overflow")
    assert low.follow(outcome("skipped", True)) is None
    assert (low.factor, low.to_blame) == (1.0, False)
    assert high.follow(outcome()) is None
    assert (high.factor, high.good, high.to_blame) == (MOST, 0, True)


def test_a_step_skipped_for_another_reason_does_not_count() -> None:
    scale = LossScale(FIRST, 5)
    scale.follow(outcome("skipped"))
    assert scale == LossScale(FIRST, 5)


# -- training ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", mostly_slow(STRATEGIES, QUICK))
def test_trains_as_float32_does(tmp_path: Path, name: str) -> None:
    """Also with accumulation, clipping and uneven last rounds."""
    train = {"steps": 9, "accumulate": 2, "batch_size": 4, "clip_norm": 0.5}
    jobs = [
        helpers.make_job(tmp_path, strategy=STRATEGIES[name], train={**train, "precision": precision})
        for precision in ("float32", "mixed_float16")
    ]
    exact, mixed = (run(job) for job in jobs)
    assert all(not rank.changes for rank in mixed)
    assert helpers.difference(mixed[0].parameters, exact[0].parameters) < 1e-3
    for rank, own in zip(mixed, exact, strict=True):
        assert rank.outcomes == own.outcomes
        assert rank.loss == pytest.approx(own.loss, abs=2e-3)
        assert np.array_equal(rank.parameters, mixed[0].parameters)


def faint(outputs: Tensor, targets: Tensor) -> Tensor:
    """So faint that its gradients vanish in float16."""
    return functional.cross_entropy(outputs, targets) * 1e-8


@pytest.mark.parametrize("name", ["shared", slow("overlap")])
def test_the_scale_keeps_faint_gradients(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(precision: str) -> Vector:
        job = job_of(tmp_path, STRATEGIES[name], precision, loss=faint, optimizer={"name": "SGD", "lr": 1e7})
        return run(job)[0].parameters

    exact = trained("float32")
    assert helpers.difference(trained("mixed_float16"), exact) < 0.01
    monkeypatch.setattr("hpctrain.run.begin.LossScale", lambda: LossScale(1.0))
    assert helpers.difference(trained("mixed_float16"), exact) > 0.05


def test_one_worker_does_what_torchs_scaler_does(tmp_path: Path) -> None:
    """The same bits, after a step that overflows."""
    job = job_of(tmp_path, LOCKSTEP["message"], model=Wide, data={"name": steep(7)})
    [found] = run(job, 1)
    torch.manual_seed(job.seed)
    model = Wide()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    inputs, targets = steep(7).tensors
    for at in range(0, 48, 6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = functional.cross_entropy(model(inputs[at : at + 6]), targets[at : at + 6])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert found.scale["factor"] == scaler.get_scale() == FIRST / 2
    assert np.array_equal(found.parameters, helpers.vector(model))


# -- overflows ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", LOCKSTEP)
def test_all_workers_skip_the_step_that_overflows_on_one(tmp_path: Path, name: str) -> None:
    """With nan = "stop", and the skipped round leaves no trace in the parameters."""
    data = steep(second(helpers.workers_of(name, RANKS)))
    ranks = run(job_of(tmp_path, LOCKSTEP[name], data={"name": data}))
    for rank in ranks:
        assert rank.outcomes == ["applied", "skipped", *["applied"] * 6]
        assert rank.changes == ONE_SCALE
        assert rank.scale == {"factor": FIRST / 2, "good": 6}
        assert np.array_equal(rank.parameters, ranks[0].parameters)
    assert np.isfinite(ranks[0].parameters).all()


@pytest.mark.parametrize("name", OWN_SCALES)
def test_a_worker_that_steps_by_itself_skips_by_itself(tmp_path: Path, name: str) -> None:
    ranks = run(job_of(tmp_path, OWN_SCALES[name], data={"name": steep(second()), "queue": "static"}))
    hit = [rank for rank in ranks if rank.changes]
    assert len(hit) == 1
    assert hit[0].changes == ONE_SCALE
    assert hit[0].outcomes.count("skipped") == 1
    assert hit[0].scale["factor"] == FIRST / 2
    for rank in ranks:
        assert np.isfinite(rank.parameters).all()
        assert np.array_equal(rank.parameters, ranks[0].parameters)
        assert rank is hit[0] or (rank.scale["factor"] == FIRST and "skipped" not in rank.outcomes)


def test_an_overflow_in_the_last_step_of_a_long_round_counts(tmp_path: Path) -> None:
    """The outcome is that of the round, which the others' steps make; the worker's scale halves all the same."""
    ranks = run(job_of(tmp_path, LOCAL, data={"name": steep(second(steps=2))}))
    assert [rank.changes for rank in ranks] == [[], ONE_SCALE, [], []]
    assert all("skipped" not in rank.outcomes for rank in ranks)


def test_late_workers_keep_the_others_scale(tmp_path: Path) -> None:
    """With backup workers, the late one's gradient is dropped; it learns of an overflow that it had no part in."""
    ranks = run(job_of(tmp_path, BACKUP, data={"name": steep(second())}, debug={"slow": {3: 3.0}}))
    assert "dropped" in [result for rank in ranks for result in rank.outcomes]
    assert [rank.changes for rank in ranks] == [ONE_SCALE] * RANKS


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # virtual ranks add infinities of both signs
@pytest.mark.parametrize("name", ["shared", "overlap", "local_sgd", "async"])
def test_an_overflow_at_scale_1_is_an_error(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.run.begin.LossScale", lambda: LossScale(1.0))
    job = job_of(tmp_path, STRATEGIES[name], loss=abrupt)
    with pytest.raises(NanError, match=r"the gradient of parameter last.weight is not finite on rank"):
        run(job)


def abrupt(outputs: Tensor, targets: Tensor) -> Tensor:
    """Its gradient is too large for float16, though the loss is finite."""
    return functional.cross_entropy(outputs, targets) * 1e6


@pytest.mark.parametrize("name", ["shared", "overlap", "servers", "local_sgd", "async"])
@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_a_loss_that_is_not_finite_is_no_overflow(tmp_path: Path, name: str, nan: str) -> None:
    """It ends the run with nan = "stop"; with "skip" it leaves the scale as it is."""
    job = job_of(tmp_path, STRATEGIES[name], data={"name": steep(second(), np.nan)}, train={"nan": nan})
    if nan == "stop":
        with pytest.raises(NanError, match="loss is nan on rank"):
            run(job)
        return
    ranks = run(job)
    assert any("skipped" in rank.outcomes for rank in ranks)
    assert all(rank.scale["factor"] == FIRST and not rank.changes for rank in ranks)


@pytest.mark.parametrize("name", ["shared", "local_sgd", "servers"])
def test_the_scale_grows(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "GROWS_AFTER", 3)
    monkeypatch.setattr("hpctrain.run.begin.LossScale", lambda: LossScale(64.0))
    for rank in run(job_of(tmp_path, STRATEGIES[name])):
        assert [(each.old, each.new) for each in rank.changes] == [(64, 128), (128, 256)]
        assert {each.why for each in rank.changes} == {"3 steps without overflow"}
        assert rank.scale == {"factor": 256.0, "good": 2}


def test_batch_norm_over_all_workers(tmp_path: Path) -> None:
    """Its sums in backward are of scaled gradients, which needs the same scale on all workers."""
    train = {"steps": 4, "batch_size": 4, "sync_batchnorm": True}
    tables: helpers.Tables = {"model": noiseless, "data": "tests.helpers:pictures", "strategy": LOCKSTEP["shared"]}
    exact, mixed = (
        run(helpers.make_job(tmp_path, **tables, train={**train, "precision": precision}))
        for precision in ("float32", "mixed_float16")
    )
    assert helpers.difference(mixed[0].parameters, exact[0].parameters) < 0.01


def noiseless() -> nn.Module:
    """With batch norm."""
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 3))


# -- checkpoints and phases --------------------------------------------------------------------------------------
SWITCHED: helpers.Tables = {
    "phases": [
        {"strategy": LOCAL, "until": {"rule": "after", "steps": 4}},
        {"strategy": LOCKSTEP["shared"]},
    ]
}


@pytest.mark.parametrize("name", [slow("shared"), slow("overlap"), slow("local_sgd"), "servers", "switch"])
def test_resumes_bit_for_bit(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every checkpoint: between an overflow and the growth that follows it, and where a phase ends."""
    monkeypatch.setattr(scaling, "GROWS_AFTER", 5)
    tables = SWITCHED if name == "switch" else {"strategy": STRATEGIES[name]}
    train = {"checkpoint_every": {"steps": 2}, "keep_checkpoints": 9}
    tables = {**tables, "data": {"name": steep(second())}, "optimizer": {"name": "Adam", "lr": 0.01}}
    job = job_of(tmp_path, tables.pop("strategy", None), train=train, **tables)
    whole = run(job)
    assert {rank.scale["factor"] for rank in whole} <= {FIRST, FIRST * 2}
    [folder] = tmp_path.iterdir()
    saved = (folder / "model.safetensors").read_bytes()
    for at in (1, 0):
        helpers.forget_after(folder, at)
        again = run(job, resume=folder)
        assert (folder / "model.safetensors").read_bytes() == saved
        assert [rank.scale for rank in again] == [rank.scale for rank in whole]
        assert all(np.array_equal(rank.parameters, whole[0].parameters) for rank in again)


def test_each_worker_resumes_its_own_scale(tmp_path: Path) -> None:
    train = {"steps": 12, "checkpoint_every": {"steps": 6}, "keep_checkpoints": 9}
    job = job_of(tmp_path, OWN_SCALES["async"], data={"name": steep(second()), "queue": "static"}, train=train)
    whole = run(job)
    assert sorted(rank.scale["factor"] for rank in whole) == [FIRST / 2, FIRST, FIRST, FIRST]
    [folder] = tmp_path.iterdir()
    helpers.forget_after(folder, 0)
    again = run(job, resume=folder)
    assert [rank.scale for rank in again] == [rank.scale for rank in whole]
    assert not any(rank.changes for rank in again)


def test_phases_begin_with_one_scale(tmp_path: Path) -> None:
    """Rank 0's, whatever the scales that the workers had; here worker 1 had half of it."""
    ranks = run(job_of(tmp_path, None, data={"name": steep(second())}, **SWITCHED))
    assert [rank.changes for rank in ranks] == [[], ONE_SCALE, [], []]
    assert [rank.scale["factor"] for rank in ranks] == [FIRST] * RANKS


def test_a_run_may_take_up_or_give_up_the_scale(tmp_path: Path) -> None:
    """Checkpoints without a scale, as of older versions, and those with one in a run that uses none."""
    train = {"checkpoint_every": {"steps": 2}, "keep_checkpoints": 9}
    for first, second in (("float32", "mixed_float16"), ("mixed_float16", "float32")):
        path = tmp_path / first
        run(job_of(path, LOCAL, first, train=train))
        [folder] = path.iterdir()
        helpers.forget_after(folder, 0)
        ranks = run(job_of(path, LOCAL, second, train=train), resume=Resume(folder, changes="take"))
        assert all(bool(rank.scale) == (second == "mixed_float16") for rank in ranks)
