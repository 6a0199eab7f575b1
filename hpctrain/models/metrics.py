"""Metrics: accuracy, and how what a metric returns of each batch becomes a mean over a data set."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm.base import Communicator
from hpctrain.errors import ModelError
from hpctrain.models.losses import ClassLoss, LossFunction

if TYPE_CHECKING:
    from hpctrain.job.tables import Metric

MetricFunction = Callable[..., Any]
Share = tuple[float, float]  # a sum, and the weight that it is divided by
_RETURNS = "it must return a number (the mean over the batch), a pair (sum, weight), or a dictionary of these"
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
    """(how many `targets` the outputs are right about, how many count), both scalars.

    Outputs (n, classes) with class indices (n,); outputs (n, classes, ...) with (n, ...), as torch's cross entropy
    takes them; outputs (n, ..., classes) with (n, ...); or targets of the outputs' shape, probabilities of the
    classes. The largest output is compared; targets that are `ignore_index` do not count. `dim`: where the classes
    are; None: by the shapes, or `unclear` where two places are possible. `threshold`, for outputs and targets of one
    shape, or of (n, 1) and (n,): each output by itself says yes above it, each target above 0.5. Raises ModelError
    for other shapes.
    """
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not outputs.dim():
        raise ModelError(
            f"accuracy compares tensors of several outputs and targets, and was given a {type(outputs).__name__} and a "
            f"{type(targets).__name__}; {_OWN}"
        )
    if threshold is not None:
        return _yes_or_no(outputs, targets, threshold)
    if outputs.shape == targets.shape and targets.is_floating_point() and outputs.dim() > 1 and outputs.shape[1] > 1:
        place = 1 if dim is None else dim
        targets = targets.argmax(place)
    elif outputs.numel() == targets.numel():
        raise ModelError(
            f"{_shapes(outputs, targets)}: there is one output for each target, so it is unclear what is right; set "
            "metric.threshold (an output above it means yes: 0 for logits, 0.5 for probabilities); or name another "
            'metric, such as {name = "torch.nn.functional:mse_loss", goal = "min"}'
        )
    else:
        place = _place_of_classes(outputs, targets, unclear) if dim is None else dim
    found = outputs.argmax(place) if -outputs.dim() <= place < outputs.dim() else outputs
    if found.shape != targets.shape:
        raise ModelError(f"{_shapes(outputs, targets)} do not fit with metric.dim = {place}; leave it out, or {_OWN}")
    counted = targets != ignore_index
    return ((found == targets) & counted).sum(), counted.sum()


def _yes_or_no(outputs: Tensor, targets: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    if outputs.numel() != targets.numel() or len(outputs) != len(targets):
        raise ModelError(f"{_shapes(outputs, targets)} do not fit: with a threshold there is one output per target")
    right = (outputs.flatten() > threshold) == (targets.flatten() > 0.5)
    return right.sum(), torch.tensor(right.numel())


def _place_of_classes(outputs: Tensor, targets: Tensor, unclear: int | None) -> int:
    """The dimension that outputs have and targets do not."""
    second = outputs.shape[:1] + outputs.shape[2:] == targets.shape
    last = outputs.shape[:-1] == targets.shape
    if outputs.dim() > 2 and second and last:
        if unclear is None:
            raise ModelError(
                f"{_shapes(outputs, targets)}: classes may be in dimension 1 or in the last; say which by metric.dim"
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


def bind(spec: Metric, loss: LossFunction) -> MetricFunction:
    """The function of (outputs, targets) that a job's [metric] stands for. Raises JobError.

    Accuracy learns from the job's `loss` which targets do not count, where the classes are and what means yes.
    """
    function = spec.bind(positional=2)
    if spec.resolve() is not accuracy:
        return function
    return partial(accuracy, **{**_implied(loss), **spec.options})


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


class Tally:
    """Adds up what a metric returned of batches: a mean over the batch's samples, a pair (sum, weight), or a dictionary
    of such. `first`: the sum and the weight of that, or of the dictionary's first entry. `name`: for messages."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shares: dict[str, Share] = {}
        self.named = False  # whether there are entries with names

    @property
    def first(self) -> Share:
        return next(iter(self._shares.values()), (0.0, 0.0))

    def add(self, measured: Any, samples: int) -> None:
        """Of a batch of so many samples. Raises ModelError for what is no metric."""
        given = measured if isinstance(measured, dict) else {"": measured}
        shares = {key: self._share(value, key, samples) for key, value in given.items()}
        if not shares or (self._shares and list(shares) != list(self._shares)):
            raise ModelError(
                f'metric "{self._name}" returned a dictionary with the keys {list(shares)}, and before with '
                f"{list(self._shares)}; it must have the same keys, and one at least, for every batch"
            )
        self.named = isinstance(measured, dict)
        for key, (total, weight) in shares.items():
            before = self._shares.get(key, (0.0, 0.0))
            self._shares[key] = before[0] + total, before[1] + weight

    def entries(self, comm: Communicator) -> dict[str, float]:
        """The means of a dictionary's entries, over all ranks' batches. Collective; some may have had no batch."""
        tables = [table for table in comm.gather_json(self._shares) if table]
        if any(list(table) != list(tables[0]) for table in tables):
            raise ModelError(f'metric "{self._name}" returned dictionaries with different keys on different ranks')
        sums = {key: [sum(table[key][part] for table in tables) for part in (0, 1)] for key in tables[0]}
        return {key: mean(total, weight) for key, (total, weight) in sums.items()}

    def _share(self, value: Any, key: str, samples: int) -> Share:
        if not isinstance(key, str):
            raise ModelError(f'metric "{self._name}" returned a dictionary with the key {key!r}; keys must be texts')
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return self._number(value[0], key), self._number(value[1], key)
        return samples * self._number(value, key), samples

    def _number(self, value: Any, key: str) -> float:
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            where = f" under {key}" if key else ""
            raise ModelError(
                f'metric "{self._name}" returned a {type(value).__name__}{shape}{where}; {_RETURNS}'
            ) from None


def mean(total: float, weight: float) -> float:
    """NaN where nothing was weighed."""
    return float(total / weight) if weight else float("nan")
