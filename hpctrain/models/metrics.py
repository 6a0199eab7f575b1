"""Metrics: accuracy, balanced accuracy, bits, and the metric that a job's [metric] specifies."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.errors import HpctrainError, JobError, ModelError
from hpctrain.job.spec import bound
from hpctrain.models.losses import ClassLoss, LossFunction
from hpctrain.models.measures import METHODS, Measure, Several, Tally, UserMeasure

if TYPE_CHECKING:
    from hpctrain.job.measuring import AlsoMetric, Evaluate, Metric
    from hpctrain.job.spec import Named

_OWN = 'name a metric of your own: metric.name = "module:function", a function of (outputs, targets)'
_LOGITS = (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits)
_PROBABILITIES = (nn.BCELoss, functional.binary_cross_entropy)
_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, functional.cross_entropy, functional.nll_loss)


def accuracy(
    outputs: Tensor,
    targets: Tensor,
    dim: int | None = None,
    ignore_index: int = -100,
    threshold: float | None = None,
    unclear: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(number of correct outputs, number of `targets` that count), both scalars.

    Accepts outputs (n, classes) with class indices (n,); outputs (n, classes, ...) with (n, ...), as in torch's cross
    entropy; outputs (n, ..., classes) with (n, ...); or targets of the outputs' shape with class probabilities. The
    largest output is compared; targets equal to `ignore_index` do not count. `dim`: the dimension of the classes; None:
    derived from the shapes, or `unclear` if two dimensions are possible. `threshold`, for outputs and targets of the
    same shape, or of (n, 1) and (n,): each output means yes above it, each target above 0.5. Raises ModelError for
    other shapes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not outputs.dim():
        raise ModelError(
            f"accuracy compares tensors of several outputs and targets, but was given a {type(outputs).__name__} and a "
            f"{type(targets).__name__}; {_OWN}"
        )
    if threshold is not None:
        return _yes_or_no(outputs, targets, threshold)
    if outputs.shape == targets.shape and targets.is_floating_point() and outputs.dim() > 1 and outputs.shape[1] > 1:
        place = 1 if dim is None else dim
        targets = targets.argmax(place)
    elif outputs.numel() == targets.numel():
        raise ModelError(
            f"{_shapes(outputs, targets)}: there is one output for each target, so it is unclear which outputs are "
            "correct; set metric.threshold (an output above it means yes: 0 for logits, 0.5 for probabilities); or "
            'name another metric, such as {name = "torch.nn.functional:mse_loss", goal = "min"}'
        )
    else:
        place = _place_of_classes(outputs, targets, unclear) if dim is None else dim
    found = outputs.argmax(place) if -outputs.dim() <= place < outputs.dim() else outputs
    if found.shape != targets.shape:
        raise ModelError(f"{_shapes(outputs, targets)} do not fit with metric.dim = {place}; leave it out, or {_OWN}")
    counted = targets != ignore_index
    return ((found == targets) & counted).sum(), counted.sum()


class BalancedAccuracy:
    """The mean over classes of the share of a class' samples that are classified correctly; classes without samples do
    not count. Rare classes weigh as much as frequent ones.

    Outputs are (n, classes), targets class indices (n,). Raises ModelError for other shapes.
    """

    def start(self) -> None:
        """Reset."""
        self._correct = self._samples = torch.zeros(0, dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        if outputs.dim() != 2 or targets.shape != outputs.shape[:1] or targets.is_floating_point():
            shapes = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
            raise ModelError(f"balanced_accuracy: {shapes} do not fit: it takes (n, classes) and class indices (n,)")
        found, classes = outputs.argmax(1), outputs.shape[1]
        self._correct = _sum([self._correct, targets[found == targets].bincount(minlength=classes).cpu()])
        self._samples = _sum([self._samples, targets.bincount(minlength=classes).cpu()])

    def state(self) -> dict[str, Tensor]:
        """By class: how many samples there were, and how many were classified correctly; empty without a batch."""
        return {"correct": self._correct, "samples": self._samples}

    def merge(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Replace this rank's counts by those of all ranks."""
        self._correct, self._samples = (_sum([state[name] for state in states]) for name in ("correct", "samples"))

    def value(self) -> float:
        """The mean; NaN without samples."""
        there = self._samples > 0
        return float((self._correct[there].double() / self._samples[there]).mean())


def _sum(counts: Sequence[Tensor]) -> Tensor:
    """Of counts by class; one that is shorter lacks the last classes."""
    total = torch.zeros(max(len(each) for each in counts), dtype=torch.int64)
    for each in counts:
        total[: len(each)] += each
    return total


def bits(outputs: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """(the bits that it takes to say the `targets`, knowing `outputs`; the number of targets that count), both scalars:
    the cross entropy to base 2. Of characters, their ratio is the bits per character.

    `outputs`: scores (n, classes, ...), `targets`: class indices (n, ...), as for torch's cross entropy. Raises
    ModelError for other shapes.
    """
    if outputs.shape[:1] + outputs.shape[2:] != targets.shape:
        shapes = f"outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"
        raise ModelError(f"bits: {shapes} do not fit: it takes outputs (n, classes, ...) and class indices (n, ...)")
    nats = functional.cross_entropy(outputs.float(), targets, reduction="sum", ignore_index=ignore_index)
    return nats / math.log(2), (targets != ignore_index).sum()


def _yes_or_no(outputs: Tensor, targets: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    if outputs.numel() != targets.numel() or len(outputs) != len(targets):
        raise ModelError(f"{_shapes(outputs, targets)} do not fit: with a threshold there is one output per target")
    right = (outputs.flatten() > threshold) == (targets.flatten() > 0.5)
    return right.sum(), torch.tensor(right.numel())


def _place_of_classes(outputs: Tensor, targets: Tensor, unclear: int | None) -> int:
    """The dimension that outputs have in addition to those of the targets."""
    second = outputs.shape[:1] + outputs.shape[2:] == targets.shape
    last = outputs.shape[:-1] == targets.shape
    if outputs.dim() > 2 and second and last:
        if unclear is None:
            raise ModelError(
                f"{_shapes(outputs, targets)}: classes may be in dimension 1 or in the last; say which with metric.dim"
            )
        return unclear
    if outputs.dim() > 1 and (second or last):
        return 1 if second else -1
    raise ModelError(
        f"{_shapes(outputs, targets)} do not fit: it takes outputs (n, classes, ...) or (n, ..., classes) and class "
        f"indices (n, ...); {_OWN}"
    )


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    return f"accuracy: outputs of shape {tuple(outputs.shape)} and targets of shape {tuple(targets.shape)}"


def bind(spec: Metric, loss: LossFunction) -> Measure:
    """The metric that a job's [metric] specifies, together with those in `metric.also`. Raises JobError.

    For accuracy, the job's `loss` determines which targets do not count, where the classes are and what means yes.
    """
    first = _bound(spec, loss)
    return Several([first, *(_bound(each, loss) for each in spec.also)]) if spec.also else first


def bind_evaluation(spec: Evaluate) -> Measure:
    """The evaluation that a job's `evaluate` specifies: a class with the methods `METHODS`, or a function of (model,
    batch). Raises JobError."""
    found = spec.resolve()
    return _made(spec, found) if inspect.isclass(found) else Tally(spec.name, spec.bind(positional=2), spec.KIND)


def _bound(spec: Metric | AlsoMetric, loss: LossFunction) -> Measure:
    """One metric: a class with the methods `METHODS`, or a function of (outputs, targets)."""
    found = spec.resolve()
    if inspect.isclass(found):
        return _made(spec, found)
    function = spec.bind(positional=2)
    if found is accuracy:
        function = partial(accuracy, **{**_implied(loss), **spec.options})
    return Tally(spec.name, function)


def _made(spec: Named, cls: type) -> Measure:
    what = f'{spec.KIND} "{spec.name}"'
    missing = [name for name in METHODS if not callable(getattr(cls, name, None))]
    if missing:
        raise JobError(
            f"{what} is a class without {' and '.join(f'{name}()' for name in missing)}; such a class has "
            f"{', '.join(METHODS)}"
        )
    make = bound(what, cls, spec.options, positional=0)
    try:
        return UserMeasure(spec.name, make(), spec.KIND)
    except HpctrainError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else "no message"
        raise JobError(f"{what} cannot be made: {type(error).__name__}: {text}") from error


def _implied(loss: LossFunction) -> dict[str, Any]:
    inner, keywords = getattr(loss, "func", loss), getattr(loss, "keywords", {})
    if isinstance(inner, ClassLoss):
        return {"ignore_index": inner.ignored, "unclear": 1}
    if _is_one_of(inner, _CLASSES):
        ignored = keywords.get("ignore_index", getattr(inner, "ignore_index", -100))
        return {"ignore_index": ignored, "unclear": 1}
    if _is_one_of(inner, _LOGITS):
        return {"threshold": 0.0}
    return {"threshold": 0.5} if _is_one_of(inner, _PROBABILITIES) else {}


def _is_one_of(thing: Any, known: tuple[Any, ...]) -> bool:
    return any(thing is one or (isinstance(one, type) and isinstance(thing, one)) for one in known)
