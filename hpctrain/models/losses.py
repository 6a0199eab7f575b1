"""What a loss is averaged over, and its weight among the other micro-batches of its round.

A loss is a scalar, the mean over a batch's samples, or a pair (sum, weight): then the mean of a round is the sum of its
sums over the sum of its weights, on any number of workers. torch's cross entropy and negative log likelihood of class
indices divide by the weight of the targets that count (`ignore_index`, class weights), so they are automatically
weighted accordingly.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.errors import ModelError
from hpctrain.job.spec import bound

if TYPE_CHECKING:
    from hpctrain.job.measuring import Loss

LossFunction = Callable[..., Any]
_WEIGHT = "_hpctrain_weight"  # attribute of a tensor that is a mean over something other than samples
_PAIR = "return a scalar, the mean over the batch's samples, or a pair (sum, weight)"


class Weighed(NamedTuple):
    """A micro-batch's loss: `term`, the scalar to differentiate, is the mean times `share`; `weight` is what the mean
    is taken over: the number of samples, unless the loss specifies otherwise. `total`: what to add up over batches: the
    mean times the weight, or a loss that has no weight."""

    term: Tensor
    share: float
    total: float
    weight: float


def weigh(loss: Any, samples: int) -> Weighed:
    """The loss that a loss function returned for a batch of `samples` samples. With 0 samples (a batch that is
    computed, but does not count) it has no weight. Raises ModelError for an invalid loss."""
    if isinstance(loss, (tuple, list)):
        found = _weigh_pair(loss)
    else:
        _check_scalar(loss, "the loss")
        weight = float(getattr(loss, _WEIGHT, samples))
        found = Weighed(loss, weight, float(loss.detach()) * weight, weight)
    return found if samples else found._replace(share=0.0, total=0.0, weight=0.0)


def _weigh_pair(pair: Any) -> Weighed:
    if len(pair) != 2:
        raise ModelError(f"the loss is a {type(pair).__name__} of {len(pair)} items; {_PAIR}")
    total, weight = pair[0], float(pair[1])
    _check_scalar(total, "the sum of a loss (sum, weight)")
    if not (math.isfinite(weight) and weight >= 0.0):
        raise ModelError(f"the weight of a loss (sum, weight) is {weight}; it must be a finite number, at least 0")
    return Weighed(total, 1.0, float(total.detach()), weight)


def _check_scalar(value: Any, what: str) -> None:
    if not isinstance(value, Tensor):
        raise ModelError(f"{what} is a {type(value).__name__}, not a tensor that can be differentiated; {_PAIR}")
    if value.numel() != 1:
        raise ModelError(
            f'{what} has shape {tuple(value.shape)}; {_PAIR} (torch\'s losses do so with reduction = "mean")'
        )


def check_differentiable(loss: Weighed) -> None:
    """Raises ModelError for a loss that does not depend on any trainable parameter."""
    if not loss.term.requires_grad:
        raise ModelError(
            "the loss depends on no trainable parameter, so there is nothing to differentiate: it was detached "
            "(.item(), .detach(), torch.no_grad()), or every parameter that it depends on is frozen"
        )


class ModelLoss:
    """The loss that the model computes itself (`loss.name = "model"`), found in its outputs:

    - a scalar tensor, shape (), or a pair of scalars (sum, weight);
    - the attribute `loss` of an object, or the entry "loss" of a mapping, each of the same kinds;
    - a mapping that contains only scalar tensors, several losses: their sum.
    """

    def __call__(self, outputs: Any, targets: Any = None) -> Any:
        """A scalar or a pair (sum, weight). Raises ModelError if the model returned no loss."""
        found = self.find(outputs)
        if found is None:
            raise ModelError(
                f'loss.name = "model": the model returned {_shown(outputs)}, which contains no loss; in training it '
                "must return a scalar tensor, the mean over the batch's samples, a pair (sum, weight), an object with "
                "the attribute loss, or a dictionary with the key loss or with only losses, which are summed"
            )
        return found

    def find(self, outputs: Any) -> Any:
        """Like a call, but None if there is no loss, as in the outputs of a detector in evaluation mode."""
        if _is_scalar(outputs) or (_is_plain_pair(outputs) and _is_scalar(outputs[0])):
            return outputs
        if isinstance(outputs, Tensor):
            return None
        if isinstance(outputs, Mapping) and "loss" in outputs:
            return outputs["loss"]
        if isinstance(outputs, Mapping) and outputs and all(_is_scalar(part) for part in outputs.values()):
            return torch.stack(list(outputs.values())).sum()
        return getattr(outputs, "loss", None)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _is_plain_pair(value: Any) -> bool:
    """Whether `value` is a pair (sum, weight)."""
    if type(value) not in (tuple, list) or len(value) != 2:
        return False
    return isinstance(value[1], (int, float)) or (isinstance(value[1], Tensor) and value[1].dim() == 0)


def _shown(outputs: Any) -> str:
    if isinstance(outputs, Tensor):
        return f"a tensor of shape {tuple(outputs.shape)}"
    if isinstance(outputs, Mapping):
        return f"a {type(outputs).__name__} with the keys {', '.join(map(str, outputs)) or 'none'}"
    many = f" of {len(outputs)} items" if isinstance(outputs, (tuple, list)) else ""
    return f"a {type(outputs).__name__}{many}"


def bind(spec: Loss, device: torch.device) -> LossFunction:
    """The function of (outputs, targets) that a job's [loss] specifies.

    A loss class, such as torch.nn.CrossEntropyLoss, is instantiated with the table's other keys. Raises JobError for
    keys that it does not accept, and ModelError for a loss with its own trainable parameters.
    """
    found, options, what = spec.resolve(), spec.options, f'loss "{spec.name}"'
    if inspect.isclass(found):
        found, options = bound(what, found, _tensors(found, options), positional=0)(), {}
    if isinstance(found, nn.Module):
        _check_module(spec.name, found)
        found.to(device)
    function = bound(what, found, options, positional=2) if options else found
    if not callable(function):
        raise ModelError(f"loss.name = {spec.name!r} is a {type(function).__name__}, which cannot be called")
    return _weighted_mean(function) or function


def _tensors(cls: type, options: dict[str, Any]) -> dict[str, Any]:
    """Convert lists, as in job files, to the tensors that torch's own classes expect (`weight`, `pos_weight`)."""
    if not cls.__module__.startswith("torch.nn."):
        return options
    return {key: torch.tensor(value) if isinstance(value, list) else value for key, value in options.items()}


def _check_module(name: str, loss: nn.Module) -> None:
    trained = [key for key, parameter in loss.named_parameters() if parameter.requires_grad]
    if trained:
        raise ModelError(
            f"loss.name = {name!r} has trainable parameters of its own ({', '.join(trained)}), which would not be "
            "trained; make them part of the model, or freeze them with requires_grad_(False)"
        )


def _weighted_mean(function: LossFunction) -> LossFunction | None:
    """The same loss with its weight attached, if it is one of torch's losses that divide by their targets' weight."""
    if type(function) in (nn.CrossEntropyLoss, nn.NLLLoss):
        of = functional.cross_entropy if isinstance(function, nn.CrossEntropyLoss) else functional.nll_loss
        keys = ("weight", "ignore_index", "reduction", "label_smoothing")
        options = {key: getattr(function, key) for key in keys if hasattr(function, key)}
    elif (of := getattr(function, "func", function)) in (functional.cross_entropy, functional.nll_loss):
        options = dict(function.keywords) if isinstance(function, partial) else {}
    else:
        return None
    if options.get("reduction", "mean") != "mean" or options.get("reduce") is not None:
        return None
    return ClassLoss(of, options)


class ClassLoss:
    """Cross entropy or negative log likelihood (`function`), averaged over the targets that count.

    Called with outputs (n, classes, ...) and targets (n, ...): class indices, where `ignore_index` does not count, or,
    for cross entropy, probabilities of the outputs' shape. If no target counts, the loss is 0 and has no weight.
    """

    def __init__(self, function: LossFunction, options: dict[str, Any]) -> None:
        self._function = function
        self._options = options
        weight = options.get("weight")
        self._weight = torch.as_tensor(weight, dtype=torch.get_default_dtype()) if weight is not None else None
        self.ignored = int(options.get("ignore_index", -100))

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        options = self._options
        if self._weight is not None:
            options = {**options, "weight": self._weight.to(outputs)}
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return self._tensor(self._function(outputs, targets, **options))
        weight = self.weight_of(targets)
        if weight == 0.0:  # the mean would be 0 / 0
            return _weighing(self._function(outputs, targets, **{**options, "reduction": "sum"}), 0.0)
        return _weighing(self._tensor(self._function(outputs, targets, **options)), weight)

    def weight_of(self, targets: Tensor) -> float:
        """The divisor of the mean over these class indices."""
        counted = targets != self.ignored
        if self._weight is None:
            return float(counted.sum())
        return float(self._weight.to(targets.device)[targets[counted]].sum())

    @staticmethod
    def _tensor(value: Any) -> Tensor:
        assert isinstance(value, Tensor)
        return value


def _weighing(loss: Tensor, weight: float) -> Tensor:
    setattr(loss, _WEIGHT, weight)
    return loss
