"""How the standard loop and evaluations call a model: samples as mappings, and models that return their loss."""

from __future__ import annotations

import csv
import math
import re
from collections import UserDict
from collections.abc import Callable
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from hpctrain.comm.virtual.world import World
from hpctrain.data.loader import Batch
from hpctrain.errors import DataError, JobError, ModelError
from hpctrain.job import Job
from hpctrain.models.forward import Forward
from hpctrain.models.losses import ModelLoss
from hpctrain.run.api import train
from hpctrain.run.folder import Narrator
from hpctrain.views.compare import main as compare
from hpctrain.views.compare import read_runs
from hpctrain.views.report import write_report
from hpctrain.views.watch.evaluations import read_evaluations
from hpctrain.views.watch.picture import LivePicture
from hpctrain.views.watch.watcher import Watcher
from tests import helpers
from tests.traces import train_traced

WRAPPERS: list[Callable[[dict[str, Any]], Any]] = [dict, UserDict]


class Samples(Dataset[Any]):
    """The samples of `helpers.points` in other forms."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any], count: int = 30) -> None:
        self.inputs, self.targets = helpers.points(count).tensors
        self.form = form

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Any:
        return self.form(self.inputs[index], self.targets[index])


class Halves(nn.Module):
    """Takes its inputs in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(7, 3)

    def forward(self, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
        out: Tensor = self.line(torch.cat([left, right], 1) * scale)
        return out


class Whole(Halves):
    """Takes the mapping."""

    def forward(self, parts: Any) -> Tensor:  # type: ignore[override]
        return super().forward(parts["left"], parts["right"])


class Plain(Halves):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        out: Tensor = self.line(x)
        return out


def halves(x: Tensor) -> dict[str, Tensor]:
    return {"left": x[:3], "right": x[3:]}


def trained(folder: Path, model: Any, form: Any, **keys: Any) -> Any:
    data = Samples(form)
    job = helpers.make_job(folder, model=model, data=(data, data), train={"steps": 4, "batch_size": 4}, **keys)
    return World(2).run(partial(helpers.quiet_train, job=job))[0]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What training on the same samples as pairs of tensors gives."""
    return trained(tmp_path_factory.mktemp("plain"), Plain, lambda x, y: (x, y))


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("model", [Halves, Whole])
def test_mappings_in_a_pair_with_a_target(tmp_path: Path, wanted: Any, wrapper: Any, model: Any) -> None:
    found = trained(tmp_path, model, lambda x, y: (wrapper(halves(x)), y))
    assert found.metrics == wanted.metrics
    assert torch.equal(found.model.line.weight, wanted.model.line.weight)


def test_mappings_alone_are_passed_to_loss_and_metric(tmp_path: Path, wanted: Any) -> None:
    class Labelled(Halves):
        def forward(self, labels: Tensor, **parts: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(parts["left"], parts["right"])

    found = trained(
        tmp_path, Labelled, lambda x, y: {**halves(x), "labels": y},
        loss=lambda outputs, batch: cross_entropy(outputs, batch["labels"]),
        metric=lambda outputs, batch: (outputs.argmax(1) == batch["labels"]).double().mean(),
    )  # fmt: skip
    assert found.metrics == wanted.metrics


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda left: left, r"forward does not take as keyword arguments \(it takes left\); return pairs"),
        (lambda left=None, mask=None: left, r"it takes left, mask"),
        (lambda left, right, *, mask: left, r"it takes left, right, mask"),
    ],
)
def test_mappings_that_the_model_does_not_take_are_refused(forward: Any, words: str) -> None:
    model = nn.Module()
    model.forward = forward
    with pytest.raises(DataError, match=r"mappings with the keys left, right, which Module.*" + words):
        Forward(model, cross_entropy).outputs(Batch({"left": 1, "right": 2}, None, 1))


@pytest.mark.parametrize(
    ("forward", "by_name"),
    [
        (lambda **keys: keys, True),
        (lambda *given, **keys: keys, True),
        (lambda left, right=None, more=0: {"left": left, "right": right}, True),
        (lambda x: x, False),
        (lambda x=None: x, False),
        (lambda *x: x[0], False),
        (lambda x, scale=1.0: x, False),
    ],
)
def test_mapping_is_passed_by_keyword_or_as_one_argument(forward: Any, by_name: bool) -> None:
    seen: list[tuple[int, int]] = []
    model = nn.Module()
    model.forward = forward
    model.register_forward_pre_hook(lambda _, a, k: seen.append((len(a), len(k))), with_kwargs=True)
    given = {"left": 1, "right": 2}
    assert Forward(model, cross_entropy).outputs(Batch(given, None, 1)) == given
    assert seen == [(0, 2) if by_name else (1, 0)]


def test_compiled_model_is_called_like_the_original() -> None:
    given = halves(torch.ones(7))
    for model, batch in [(Halves(), given), (Whole(), given), (Plain(), torch.ones(2, 7))]:
        batch = {key: part.expand(2, -1) for key, part in batch.items()} if isinstance(batch, dict) else batch
        compiled: Any = torch.compile(model, backend="eager")
        outputs = Forward(compiled, cross_entropy).outputs(Batch(batch, torch.zeros(2), 2))
        assert torch.equal(outputs, model.line(torch.ones(2, 7)))


def test_error_inside_forward_is_explained(tmp_path: Path) -> None:
    class Failing(Halves):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(left, right)

    words = r"mappings with the keys left, right, so the model was called with these as keyword arguments.*TypeError"
    with pytest.raises(DataError, match=words):
        trained(tmp_path, Failing, lambda x, y: halves(x))


def test_error_in_a_model_returning_its_loss_is_unchanged() -> None:
    forward = Forward(Halves(), ModelLoss())
    batch = Batch({"left": torch.ones(2, 3), "right": torch.ones(2, 3)}, None, 2)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), forward.explained(batch):
        forward.outputs(batch)


# -- models that return their own loss ---------------------------------------------------------------------------------
class Object:
    """An output object like Hugging Face's."""

    def __init__(self, loss: Any, logits: Tensor) -> None:
        self.loss, self.logits = loss, logits


class Own(nn.Module):
    """Returns its loss in one of the `FORMS`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.line = nn.Linear(7, 3)
        self.form = FORMS[form]

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.line(x)
        return self.form(None if y is None else cross_entropy(logits, y), logits)


FORMS: dict[str, Callable[[Any, Tensor], Any]] = {
    "scalar": lambda loss, logits: loss,
    "pair": lambda loss, logits: (loss * len(logits), len(logits)),
    "weights": lambda loss, logits: [loss * len(logits), torch.tensor(len(logits))],
    "object": Object,
    "pair in an object": lambda loss, logits: Object((loss * len(logits), len(logits)), logits),
    "mapping": lambda loss, logits: {"loss": loss, "logits": logits},
    "losses": lambda loss, logits: {"classifier": 0.25 * loss, "boxes": 0.75 * loss},
    "tuple": lambda loss, logits: (loss, logits),
    "none": lambda loss, logits: Object(None, logits),
    "by sample": lambda loss, logits: logits[:, 0],
}
ALONE = {"loss": "model", "metric": "tests.helpers:no_metric"}


@pytest.mark.parametrize("form", ["scalar", "pair", "weights", "object", "pair in an object", "mapping", "losses"])
@pytest.mark.parametrize("mapping", [False, True])
def test_model_returning_its_loss_trains_as_with_that_loss(
    tmp_path: Path, wanted: Any, form: str, mapping: bool
) -> None:
    samples = (lambda x, y: {"x": x, "y": y}) if mapping else (lambda x, y: (x, y))
    found = trained(tmp_path, {"name": f"{__name__}:Own", "form": form}, samples, **ALONE)
    assert found.metrics["loss"] == pytest.approx(wanted.metrics["loss"], rel=1e-6)
    assert torch.allclose(found.model.line.weight, wanted.model.line.weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("tuple", r"the model returned a tuple of 2 items, which contains no loss; in training it must return a"),
        ("none", r"the model returned a Object, which contains no loss"),
        ("by sample", r"the model returned a tensor of shape \(4,\), which contains no loss"),
    ],
)
def test_model_returning_no_loss_is_refused(tmp_path: Path, form: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        trained(tmp_path, {"name": f"{__name__}:Own", "form": form}, lambda x, y: (x, y), **ALONE)


def test_loss_model_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(JobError, match='loss "model" has no keyword weight; it takes none'):
        trained(tmp_path, Plain, lambda x, y: (x, y), loss={"name": "model", "weight": 1.0})


class Detector(Own):
    """Like torchvision's: losses in training, detections in evaluation mode."""

    def __init__(self) -> None:
        super().__init__("losses")

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return super().forward(x, y) if self.training else [{"labels": row.argmax()[None]} for row in self.line(x)]


def right(outputs: list[dict[str, Tensor]], batch: dict[str, Tensor]) -> tuple[int, int]:
    """A metric that gets the whole mapping, since there are no separate targets."""
    found = torch.cat([each["labels"] for each in outputs])
    return int((found == batch["y"]).sum()), len(found)


def detectors_job(folder: Path, traced: bool) -> Job:
    data = Samples(lambda x, y: {"x": x, "y": y})
    train = {"steps": 4, "batch_size": 4, "evaluate_every": {"steps": 2}}
    return helpers.make_job(
        folder, model=Detector, data=(data, data), loss="model", metric=right, train=train,
        trace={"enabled": traced},
    )  # fmt: skip


def test_evaluation_without_a_loss_reports_none(tmp_path: Path, wanted: Any) -> None:
    lines: list[str] = []

    class Collector(Narrator):
        def say(self, text: str) -> None:
            lines.append(text)

    job = detectors_job(tmp_path, traced=False)
    result = World(2).run(lambda comm: train(job, comm, out=Collector(enabled=comm.rank == 0)))[0]
    assert result.metrics == {"metric": wanted.metrics["metric"]}
    assert torch.allclose(result.model.line.weight, wanted.model.line.weight, rtol=1e-5, atol=1e-7)
    reported = [line for line in lines if line.startswith("epoch")]
    assert reported
    assert all(":right 0." in line and "loss" not in line for line in reported)
    assert not any("nan" in line for line in lines if not line.startswith("phase"))  # whose seconds are virtual: 0


@pytest.mark.slow
def test_readers_accept_evaluations_without_a_loss(tmp_path: Path) -> None:
    run = train_traced(tmp_path, detectors_job(tmp_path, traced=True), 2)
    folder = run.folder
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [row["loss"] for row in rows] == [""] * 2
    metrics = [float(row["metric"]) for row in rows]
    watched = read_evaluations(folder / "metrics.csv")
    assert [(each.loss, each.metric) for each in watched] == [(None, metric) for metric in metrics]
    assert run.metrics()["metric"].tolist() == metrics
    assert not run.notes
    out = StringIO()
    Console(file=out, width=200).print(LivePicture(Watcher(folder).look()))
    assert re.search(r"test +\S*right 0\.\d+ at epoch", out.getvalue())
    path, _ = write_report(folder)
    assert "The last of 2 evaluations." in path.read_text()
    [summary], faults = read_runs([folder])
    assert not faults
    assert math.isnan(summary.test_loss)
    assert summary.test_metric == metrics[-1]
    assert compare([folder], output=tmp_path / "pictures") == 0
