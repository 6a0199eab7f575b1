"""What users bring along: functions that make batches, evaluations, several metrics, values to log."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from hpctrain import Box, Example
from hpctrain.analysis import Analysis
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.loader import Batch, Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import Splits
from hpctrain.errors import HpctrainError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.models.examples import plain
from hpctrain.run import files
from hpctrain.run.api import fit_batch, session
from hpctrain.run.command import evaluate_run
from hpctrain.run.folder import Narrator
from hpctrain.run.result import Result
from hpctrain.run.resume import Resume
from hpctrain.run.session import Session
from hpctrain.trace import open_run
from hpctrain.views import compare
from hpctrain.views.report import write_report
from tests import helpers
from tests.traces import HandMade, train_traced


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def run(ranks: int, job: Job, resume: Path | None = None) -> Result:
    """Train on virtual ranks; rank 0's result."""
    return World(ranks).run(lambda comm: helpers.quiet_train(comm, job, resume=resume))[0]


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


# -- batches of samples of different lengths ---------------------------------------------------------------------
class Sentences(Dataset[dict[str, Tensor]]):
    """Sequences of 1 to 5 numbers, and their sum."""

    def __init__(self, count: int = 30) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = torch.arange(1.0, 2.0 + index % 5) / 5
        return {"numbers": numbers, "total": numbers.sum()}


def padded(samples: list[dict[str, Tensor]], width: int = 5) -> tuple[Tensor, Tensor]:
    numbers = torch.zeros(len(samples), width)
    for row, sample in zip(numbers, samples, strict=True):
        row[: len(sample["numbers"])] = sample["numbers"]
    return numbers, torch.stack([sample["total"] for sample in samples])[:, None]


def linear() -> nn.Module:
    return nn.Linear(5, 1)


def sentences() -> Splits:
    return Splits(Sentences(), Sentences(12), Sentences(7))


@pytest.mark.parametrize("collate", [padded, {"name": f"{__name__}:padded", "width": 5}, lambda items: padded(items)])
@pytest.mark.parametrize("threads", [0, 2])
def test_samples_of_different_lengths_are_collated_by_the_users_function(
    tmp_path: Path, collate: Any, threads: int
) -> None:
    """In training and in evaluations, as one process would do."""
    job = helpers.make_job(
        tmp_path, model=linear, data={"name": sentences, "collate": collate, "threads": threads}, loss="mse",
        metric={"name": "torch.nn.functional:mse_loss", "goal": "min"}, train={"steps": 6, "batch_size": 5},
    )  # fmt: skip
    one = job.override(["train.batch_size=10"])
    found, wanted = run(2, job), run(1, one)
    assert found.metrics == pytest.approx(wanted.metrics)
    for key, value in load_file(found.folder / "model.safetensors").items():
        assert torch.allclose(value, load_file(wanted.folder / "model.safetensors")[key], atol=1e-6)


def test_collating_draws_the_same_whoever_fetches() -> None:
    """A function that draws from a global generator, for data in memory, while the training loop draws as well."""
    whole = Loader(helpers.pictures().train, Order(75, seed=4), threads=0, seed=4, collate=noisy)
    wanted = [whole.take(start, start + 5).inputs for start in range(0, 75, 5)]
    for threads in (0, 2):
        with Loader(helpers.pictures().train, Order(75, seed=4), threads=threads, seed=4, collate=noisy) as loader:
            for place, start in enumerate(range(0, 75, 5)):
                batch = loader.take(start, start + 5)
                loader.request(start + 5, min(75, start + 10))
                torch.rand(3)
                assert torch.equal(batch.inputs, wanted[place])


def noisy(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs = torch.stack([pair[0] for pair in samples])
    return inputs + 0.1 * torch.randn(inputs.shape), torch.stack([pair[1] for pair in samples])


def test_data_in_memory_can_be_collated_too(tmp_path: Path) -> None:
    job = helpers.make_job(tmp_path, data={"name": "tests.helpers:points", "collate": doubled})
    plain = helpers.make_job(tmp_path, data={"name": doubled_points})
    assert (run(2, job).folder / "model.safetensors").read_bytes() == (
        run(2, plain).folder / "model.safetensors"
    ).read_bytes()


def doubled(samples: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return 2 * torch.stack([pair[0] for pair in samples]), torch.stack([pair[1] for pair in samples])


def doubled_points() -> Any:
    inputs, targets = helpers.points().tensors
    return torch.utils.data.TensorDataset(2 * inputs, targets)


def test_collate_that_cannot_be_called_is_refused_before_training(tmp_path: Path) -> None:
    collate = {"name": f"{__name__}:padded", "x": 1}
    job = helpers.make_job(tmp_path, data={"name": "tests.helpers:points", "collate": collate})
    with pytest.raises(JobError, match=r'collate ".*:padded" has no keyword x; it takes width'):
        run(1, job)


# -- an evaluation of one's own ----------------------------------------------------------------------------------
def errors(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """A mean over samples, and a mean with a weight of its own."""
    assert not model.training
    wrong = (model(batch.inputs).argmax(1) != batch.targets).float()
    first = batch.targets == 0
    return {"loss": wrong.mean() + 1.0, "error": wrong.mean(), "error of 0": (wrong[first].sum(), int(first.sum()))}


class Errors:
    """The same by counting, with examples."""

    def __init__(self, shown: int = 3) -> None:
        self.shown = shown

    def start(self) -> None:
        self.wrong, self.count, self.seen = 0, 0, list[Example]()

    def update(self, model: nn.Module, batch: Batch) -> None:
        found = model(batch.inputs).argmax(1)
        self.wrong += int((found != batch.targets).sum())
        self.count += batch.size
        self.seen += [self._example(*each) for each in zip(found.tolist(), batch.targets.tolist(), strict=True)]

    def _example(self, found: int, wanted: int) -> Example:
        picture = np.full((40, 60, 3), 40 * wanted, np.uint8)
        boxes = [Box(5, 5, 20, 30, "cell", 0.75), Box(6, 6, 21, 31, "<b>cell</b>")]
        return Example("p", picture, boxes, f"class {found}", [f"class {wanted} & <script>"])

    def state(self) -> dict[str, Any]:
        return {"wrong": self.wrong, "count": self.count}

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        self.wrong, self.count = (sum(state[name] for state in states) for name in ("wrong", "count"))

    def value(self) -> dict[str, float]:
        return {"error": self.wrong / self.count}

    def examples(self) -> list[Example]:
        return self.seen[: self.shown]


def job_with(folder: Path, **tables: Any) -> Job:
    """30 samples to train on, 12 to validate on and 7 to test on."""
    base: dict[str, Any] = {
        "data": {"name": f"{__name__}:parts"}, "train": {"epochs": 4, "batch_size": 5}, "metric": {"goal": "min"},
    }  # fmt: skip
    return helpers.make_job(folder, **{**base, **tables, "train": {**base["train"], **tables.get("train", {})}})


def parts() -> Splits:
    inputs, targets = helpers.points(49).tensors
    sets = [torch.utils.data.TensorDataset(inputs[a:b], targets[a:b]) for a, b in ((0, 30), (30, 42), (42, 49))]
    return Splits(*sets)


@pytest.mark.parametrize("ranks", [1, 3])
def test_own_evaluation_replaces_loss_and_metric(tmp_path: Path, ranks: int) -> None:
    job = job_with(tmp_path, evaluate=f"{__name__}:errors")
    found = run(ranks, job)
    counted = run(ranks, job_with(tmp_path, evaluate=Errors))
    names = ["loss", "metric", "metric.error", "metric.error of 0"]
    assert list(rows(found.folder)[0])[5:] == names
    assert found.metrics["metric"] == found.metrics["metric.error"] == pytest.approx(counted.metrics["metric"])
    assert found.metrics["loss"] == pytest.approx(found.metrics["metric"] + 1.0)
    assert counted.metrics.keys() == {"metric", "metric.error"}
    assert evaluate_run(found.folder)[1] == f"test error {found.metrics['metric']:.4f}"


def test_evaluation_that_returns_no_dictionary_is_reported_by_all_ranks(tmp_path: Path) -> None:
    job = job_with(tmp_path, evaluate=lambda model, batch: 1.0)
    with pytest.raises(ModelError, match="must give a dictionary of numbers by name"):
        run(3, job)


def test_evaluation_that_lacks_methods_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r'evaluation ".*" is a class without start\(\) and update\(\)'):
        run(1, job_with(tmp_path, evaluate=Sentences))


class Changing(Errors):
    """Another name in every evaluation, or first a number."""

    calls = 0

    def value(self) -> dict[str, float]:
        Changing.calls += 1
        return {f"error {Changing.calls}": 0.0}


def changing(outputs: Tensor, targets: Tensor) -> Any:
    Changing.calls += 1
    return 0.0 if Changing.calls <= 3 else {"now": 0.0}


@pytest.mark.parametrize("tables", [{"evaluate": Changing}, {"metric": {"name": changing, "goal": "min"}}])
def test_values_may_not_change_their_names_between_evaluations(tmp_path: Path, tables: Any) -> None:
    Changing.calls = 0
    with pytest.raises(ModelError, match="it must give the same every time"):
        run(1, job_with(tmp_path, **tables))
    lines = (next(tmp_path.iterdir()) / "metrics.csv").read_text().splitlines()
    assert len({line.count(",") for line in lines}) == 1


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_values_may_not_have_the_names_that_every_evaluation_has(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=f'gives a value of the name "{name}"'):
        run(2, job_with(tmp_path, metric={"name": lambda outputs, targets: {name: 1.0}, "goal": "min"}))


# -- several metrics, and which of them counts -------------------------------------------------------------------
def test_further_metrics_have_columns_and_one_is_monitored(tmp_path: Path) -> None:
    also = ["balanced_accuracy", {"name": f"{__name__}:share", "of": 1}]
    job = job_with(tmp_path, metric={"name": "accuracy", "also": also, "monitor": "balanced_accuracy"})
    alone = run(3, job_with(tmp_path, metric="balanced_accuracy"))
    found = run(3, job)
    last = rows(found.folder)[-1]
    assert list(last)[5:] == ["loss", "metric", "metric.accuracy", "metric.balanced_accuracy", "metric.share"]
    assert last["metric"] == last["metric.balanced_accuracy"] == rows(alone.folder)[-1]["metric"]
    targets = helpers.points(49).tensors[1][42:]
    assert float(last["metric.share"]) == pytest.approx(float((targets == 1).float().mean()), abs=1e-6)


def test_metrics_given_as_objects_have_their_own_names(tmp_path: Path) -> None:
    """Also those of a main program, which jobs record as "<share in FILE:LINE>"."""

    def inner(outputs: Tensor, targets: Tensor) -> float:
        return 0.25

    job = job_with(tmp_path, metric={"name": "accuracy", "also": [inner, share], "monitor": "inner"})
    last = rows(run(2, job).folder)[-1]
    assert list(last)[5:] == ["loss", "metric", "metric.accuracy", "metric.inner", "metric.share"]
    assert float(last["metric"]) == 0.25


def test_monitored_loss_needs_its_direction() -> None:
    with pytest.raises(JobError, match=r'metric\.monitor = "loss": smaller losses are better: set metric\.goal'):
        Job(metric={"monitor": "loss"})


def share(outputs: Tensor, targets: Tensor, of: int = 0) -> Tensor:
    return (targets == of).float().mean()


def test_patience_follows_the_monitored_value(tmp_path: Path) -> None:
    """`share` never changes; the loss falls."""
    metric = {"name": f"{__name__}:share", "also": ["accuracy"], "goal": "min"}
    stopped = run(2, job_with(tmp_path, metric=metric, train={"patience": 2}))
    whole = run(2, job_with(tmp_path, metric={**metric, "monitor": "loss"}, train={"patience": 2}))
    assert (stopped.samples, whole.samples) == (90, 120)
    assert all(row["metric"] == row["loss"] for row in rows(whole.folder))


@pytest.mark.parametrize(
    ("tables", "text"),
    [
        ({"metric": {"monitor": "acuracy", "also": ["balanced_accuracy"]}}, "metric.monitor = 'acuracy' (did you mean"),
        ({"train": {"keep_best": "f1"}}, "train.keep_best = 'f1': the evaluation gives metric, loss"),
        ({"metric": {"also": ["accuracy"]}}, 'metric "accuracy" gives accuracy, and so does an earlier one'),
    ],
)
@pytest.mark.parametrize("strategy", ["all_reduce", {"name": "parameter_server", "mode": "async"}])
def test_wrong_names_are_one_message(tmp_path: Path, tables: Any, text: str, strategy: Any) -> None:
    with pytest.raises(ModelError) as raised:
        run(3, job_with(tmp_path, **tables, strategy=strategy))
    assert text in str(raised.value)


# -- the best model ----------------------------------------------------------------------------------------------
def best_row(folder: Path, column: str, largest: bool = True) -> dict[str, str]:
    """The first best validation."""
    found = [row for row in rows(folder) if row["split"] == "validation"]
    return (max if largest else min)(found, key=lambda row: float(row[column]))


def job_that_keeps(folder: Path, lr: float) -> Job:
    """The model with the lowest loss, and a checkpoint of every epoch."""
    train = {"keep_best": "loss", "checkpoint_every": {"epochs": 1}, "keep_checkpoints": 9}
    return job_with(folder, train=train, optimizer={"name": "SGD", "lr": lr})


@pytest.mark.parametrize("keep", ["metric", "loss", "balanced_accuracy"])
def test_best_model_is_that_of_the_best_validation(tmp_path: Path, keep: str) -> None:
    metric = {"also": ["balanced_accuracy"], "goal": "max"}
    job = job_with(tmp_path, metric=metric, train={"keep_best": keep}, optimizer={"name": "SGD", "lr": 1.0})
    folder = run(2, job).folder
    column = {"metric": "metric", "loss": "loss"}.get(keep, f"metric.{keep}")
    row = best_row(folder, column, largest=keep != "loss")
    model = helpers.net()
    model.load_state_dict(load_file(folder / "best.safetensors"))
    inputs, targets = helpers.points(49).tensors
    with torch.no_grad():
        outputs = model(inputs[30:42])
    assert float(nn.functional.cross_entropy(outputs, targets[30:42])) == pytest.approx(float(row["loss"]), rel=1e-4)
    about = (folder / "best.toml").read_text()
    assert f"samples = {row['samples']}\n" in about
    assert f'name = "{keep}"' in about


def test_best_model_of_a_resumed_run_is_that_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Resumed from before the best evaluation, from after it, and after a later one had replaced the file."""
    job = job_that_keeps(tmp_path, lr=0.5)
    folder = run(2, job).folder
    whole, about = (folder / "best.safetensors").read_bytes(), (folder / "best.toml").read_text()
    for checkpoint in sorted((folder / "checkpoints").iterdir(), reverse=True)[1:]:
        for later in (folder / "checkpoints").iterdir():
            if later.name > checkpoint.name:
                later.unlink()
        (folder / "model.safetensors").unlink()
        run(2, job, resume=folder)
        assert (folder / "best.safetensors").read_bytes() == whole
        assert (folder / "best.toml").read_text() == about


def test_best_model_of_a_run_resumed_with_changes_is_one_of_its_own(tmp_path: Path) -> None:
    """Not that of an evaluation after the checkpoint, which no longer belongs to the run."""
    job = job_that_keeps(tmp_path, lr=0.2)
    folder = run(2, job).folder
    for later in sorted((folder / "checkpoints").iterdir())[1:]:
        later.unlink()
    (folder / "model.safetensors").unlink()
    worse = job.override(["optimizer.lr=20.0"])
    World(2).run(lambda comm: helpers.quiet_train(comm, worse, resume=Resume(folder, changes="take")))
    kept = tomllib.loads((folder / "best.toml").read_text())
    assert [kept["value"]] == [
        pytest.approx(float(row["loss"]), rel=1e-5)
        for row in rows(folder)
        if row["split"] == "validation" and int(row["samples"]) == kept["samples"]
    ]


def test_crash_between_the_best_model_and_its_description_is_seen(tmp_path: Path, monkeypatch: Any) -> None:
    """The resumed run does not take the new model for the old one."""
    job = job_that_keeps(tmp_path, lr=0.2)
    written = files.write_whole

    def crashes(path: Path, text: str) -> None:
        if path.name == "best.toml" and "samples = 60" in text:
            raise KeyboardInterrupt
        written(path, text)

    monkeypatch.setattr(files, "write_whole", crashes)
    with pytest.raises(KeyboardInterrupt):
        run(1, job.override(["train.batch_size=10"]))
    monkeypatch.undo()
    folder = next(tmp_path.iterdir())
    assert not (folder / "best.toml").exists()
    worse = job.override(["train.batch_size=10", "optimizer.lr=20.0"])
    World(1).run(lambda comm: helpers.quiet_train(comm, worse, resume=Resume(folder, changes="take")))
    model, about = helpers.net(), tomllib.loads((folder / "best.toml").read_text())
    model.load_state_dict(load_file(folder / "best.safetensors"))
    inputs, targets = helpers.points(49).tensors
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(inputs[30:42]), targets[30:42]))
    assert loss == pytest.approx(about["value"], rel=1e-5)


def test_samples_to_test_on_do_not_choose_the_best_model(tmp_path: Path) -> None:
    targets = helpers.points(49).tensors[1]
    more = next(k for k in range(3) if (targets[42:] == k).float().mean() > (targets[30:42] == k).float().mean())
    metric = {"name": f"{__name__}:share", "of": more, "goal": "max"}
    folder = run(2, job_with(tmp_path, metric=metric, train={"keep_best": "metric"})).folder
    assert tomllib.loads((folder / "best.toml").read_text())["split"] == "validation"


def test_evaluation_that_fails_at_the_end_does_not_lose_the_model(tmp_path: Path) -> None:
    """The mistake mended, the run goes on with that evaluation."""
    job = job_with(tmp_path, evaluate=f"{__name__}:Fails", train={"evaluate_every": {"fraction": 1}})
    Fails.fails = True
    with pytest.raises(ModelError, match=r'evaluation ".*:Fails": update\(\) failed in .*: ZeroDivisionError'):
        run(1, job)
    folder = next(tmp_path.iterdir())
    assert not (folder / "model.safetensors").exists()
    Fails.fails = False
    found = run(1, job, resume=folder)
    assert [row["split"] for row in rows(folder)] == ["validation", "test"]
    whole = run(1, job_with(tmp_path, evaluate=f"{__name__}:Fails", train={"evaluate_every": {"fraction": 1}}))
    assert (found.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()


class Fails(Errors):
    fails = False

    def update(self, model: nn.Module, batch: Batch) -> None:
        if self.fails:
            model.register_forward_hook(lambda *_: 1 / 0)
        super().update(model, batch)


# -- what is logged and shown ------------------------------------------------------------------------------------
def logging_loop(session: Session) -> None:
    for batch in session.batches():
        fit_batch(session, batch)
        session.log({"part/of loss": torch.tensor(float(session.comm.rank))}, steps=session.totals.step)


def test_logged_values_are_in_the_traces(tmp_path: Path) -> None:
    job = job_with(tmp_path / "runs", trace={"enabled": True}, train={"epochs": 1})
    logged = Analysis(train_traced(tmp_path, job, 2, logging_loop)).logged
    assert logged["name"].tolist().count("steps") == 6
    assert logged[logged["name"] == "part/of loss"].groupby("rank")["value"].first().tolist() == [0.0, 1.0]
    steps = logged[logged["name"] == "steps"]
    assert steps["value"].tolist() == steps["step"].tolist()
    assert sorted(set(steps["samples"])) == [10, 20, 30]


def test_values_logged_again_after_a_resume_replace_the_earlier_ones(tmp_path: Path) -> None:
    for attempt, cursors in {1: (10, 20, 30), 2: (20, 30, 40)}.items():
        with HandMade(tmp_path, 1, attempt=attempt) as run:
            for place, cursor in enumerate(cursors):
                run[0].span("forward", 10.0 * place + 100 * attempt, 10.0 * place + 5.0 + 100 * attempt, place)
                run[0].done(10.0 * place + 5.5 + 100 * attempt, attempt - 1 + place, cursor=cursor)
                run[0].log(10.0 * place + 6.0 + 100 * attempt, "x", attempt, attempt + place, cursor)
    logged = Analysis(open_run(tmp_path)).logged
    assert list(zip(logged["samples"], logged["value"], strict=True)) == [(10, 1.0), (20, 2.0), (30, 2.0), (40, 2.0)]


def test_progress_has_what_was_logged_and_the_end_names_its_value(tmp_path: Path) -> None:
    out = io.StringIO()

    def body(comm: Communicator) -> None:
        shown = Narrator(every=0.0, out=out) if comm.rank == 0 else Narrator(enabled=False)
        with session(job_with(tmp_path, evaluate=f"{__name__}:errors"), comm, out=shown) as s:
            for batch in s.batches():
                s.log(boxes=comm.rank + 0.25)
                fit_batch(s, batch)

    World(2).run(body)
    assert re.search(r"step 2  loss \d\.\d+  boxes 0\.25  ", out.getvalue())
    assert re.search(r"^test error 0\.\d+$", out.getvalue(), re.MULTILINE)


@pytest.mark.parametrize("value", ["3", None, torch.zeros(2), 10**400])
def test_logging_anything_but_numbers_is_refused(tmp_path: Path, value: Any) -> None:
    job = job_with(tmp_path)

    def body(comm: Communicator) -> None:
        with session(job, comm, out=Narrator(enabled=False)) as s:
            for _ in s.batches():
                s.log(x=value)

    with pytest.raises(HpctrainError, match=r"log\(x=\.\.\.\) got an? \w+; it takes numbers"):
        World(1).run(body)


def test_report_shows_examples_and_their_texts_cannot_become_markup(tmp_path: Path) -> None:
    job = job_with(tmp_path / "runs", evaluate={"name": Errors, "shown": 2}, trace={"enabled": True})
    folder = train_traced(tmp_path, job, 2).folder
    page = write_report(folder)[0].read_text()
    shown = page[page.index('<section id="examples">') :].partition("</section>")[0]
    assert shown.count('<div class="example">') == shown.count("data:image/jpeg;base64,") == 2
    assert shown.count('class="found"') == shown.count('class="true"') == 2
    assert "<title>cell 0.75</title>" in shown
    assert "(test, epoch 4.00)" in shown
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert "<b>" not in shown


def test_examples_of_all_kinds_are_plain() -> None:
    nan, grey = float("nan"), torch.full((3, 4, 6), 60, dtype=torch.uint8)
    good: Any = (np.float32(1), torch.tensor(2.0), 3, 4, "a", np.float64(0.5))
    boxes = [Box(*good), Box(nan, 0, 1, 1), Box(0, 0, 1, 1, "", nan)]
    found = plain(Example("n", grey, boxes, "text", "a dog"))
    assert found["boxes"] == [{"sides": [1.0, 2.0, 3.0, 4.0], "label": "a", "score": 0.5}]
    assert found["truth"] == ["a dog"]
    assert (found["width"], found["height"]) == (6, 4)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(found["jpeg"]))))
    assert abs(picture.astype(int) - 60).max() <= 2
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "wrong", [{"boxes": [1]}, {"boxes": None}, {"picture": np.zeros((0, 4, 3), np.uint8)}, {"picture": 3}]
)
def test_examples_that_are_none_are_an_error_of_all_ranks(tmp_path: Path, wrong: Any) -> None:
    class Wrong(Errors):
        def examples(self) -> list[Example]:
            return [Example("that one", **wrong)]

    with pytest.raises(ModelError, match="example 'that one': its (boxes|picture)"):
        run(2, job_with(tmp_path, evaluate=Wrong))


class Once(Errors):
    """Shows examples in its first evaluation only."""

    calls = 0

    def examples(self) -> list[Example]:
        Once.calls += 1
        return super().examples() if Once.calls == 1 else []


def test_examples_are_those_of_the_latest_evaluation(tmp_path: Path) -> None:
    """None if it shows none; and a resumed run forgets those of an evaluation after its checkpoint."""
    Once.calls = 0
    train = {"epochs": 2, "checkpoint_every": {"epochs": 1}, "keep_checkpoints": 9}
    assert not (run(1, job_with(tmp_path, evaluate=Once, train=train)).folder / "examples.json").exists()
    job = job_with(tmp_path, evaluate=f"{__name__}:Fails", train=train)
    Fails.fails = False
    folder = run(1, job).folder
    for later in sorted((folder / "checkpoints").iterdir())[1:]:
        later.unlink()
    (folder / "model.safetensors").unlink()
    Fails.fails = True
    with pytest.raises(ModelError):
        run(1, job, resume=folder)
    assert not (folder / "examples.json").exists()


def test_damaged_examples_are_left_out_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.views.figures.FIGURES", ())
    job = job_with(tmp_path / "runs", evaluate=Errors, trace={"enabled": True})
    folder = train_traced(tmp_path, job, 1).folder
    path = folder / "examples.json"
    whole = json.loads(path.read_text())
    for key, value in {"jpeg": '"><script>', "width": "1e999", "boxes": [{"sides": [1, 2]}], "truth": "ab"}.items():
        path.write_text(json.dumps({**whole, "examples": [{**whole["examples"][0], key: value}]}))
        page = write_report(folder)[0].read_text()
        assert "examples: examples.json cannot be read: it is damaged" in page
        assert '<section id="examples">' not in page


def test_comparison_lists_values_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_with(tmp_path / "runs", evaluate=f"{__name__}:errors", trace={"enabled": True}, train={"epochs": 1})
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        train_traced(folder, job.override([f"seed={seed}"]), 2)
    compare.main(folders, csv=tmp_path / "c.csv")
    with open(tmp_path / "c.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["metric_name"] for row in table] == ["metric", "metric"]
    found = [float(row["test_error of 0"]) for row in table]
    assert found == pytest.approx([float(rows(folder)[-1]["metric.error of 0"]) for folder in folders])
    assert re.search(r"strategy +error +error of 0\n", capsys.readouterr().out)
