"""How the standard loop and evaluations call a model and its loss on a batch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from inspect import Parameter, Signature
from typing import Any

from torch import nn

from hpctrain.data.loader import Batch
from hpctrain.errors import DataError, HpctrainError
from hpctrain.models.losses import LossFunction, ModelLoss


class _Call(Enum):
    """The arguments that a model is called with."""

    INPUTS = "inputs"
    PAIR = "inputs and targets"
    KEYWORDS = "keyword arguments"


class Forward:
    """A model and its loss. The first batch decides how the model is called, by the signature of its forward:

    - Inputs that are a mapping: with its keys as keyword arguments, if forward accepts all of them. Otherwise with the
      mapping itself, if forward takes one positional argument whose name is not among the keys.
    - Other inputs: with the inputs alone; with the targets as well if the model returns its own loss (`ModelLoss`) and
      forward takes a second positional argument.
    """

    def __init__(self, model: nn.Module, loss: LossFunction) -> None:
        self._model, self._loss = model, loss
        self._call: _Call | None = None

    def outputs(self, batch: Batch) -> Any:
        """The model's outputs. Raises DataError for a mapping that the model cannot be called with."""
        if self._call is None:
            self._call = self._choice(batch)
        if self._call is _Call.KEYWORDS:
            return self._model(**batch.inputs)
        if self._call is _Call.PAIR:
            return self._model(batch.inputs, batch.targets)
        return self._model(batch.inputs)

    def loss(self, outputs: Any, batch: Batch) -> Any:
        """A scalar or a pair (sum, weight), as accepted by `losses.weigh`."""
        return self._loss(outputs, batch.reference)

    def found_loss(self, outputs: Any, batch: Batch) -> Any:
        """Like `loss`; None if the model should compute the loss but returned none (for example in evaluation mode)."""
        if isinstance(self._loss, ModelLoss):
            return self._loss.find(outputs)
        return self.loss(outputs, batch)

    @contextmanager
    def explained(self, batch: Batch) -> Iterator[None]:
        """Turn errors inside model or loss on samples that are not pairs into a DataError that says how to fix it.

        Not if a model that returns its own loss accepts all keys of a mapping: the error is then the model's own.
        """
        try:
            yield
        except HpctrainError:
            raise
        except Exception as error:
            own = self._call is _Call.KEYWORDS and isinstance(self._loss, ModelLoss)
            if batch.targets is not None or not batch.size or own:
                raise
            raised = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            if isinstance(batch.inputs, Mapping):
                how = "as keyword arguments" if self._call is _Call.KEYWORDS else "as one mapping"
                raise DataError(
                    f"the data set's samples are mappings with the keys {_listed(batch.inputs)}, so the model was "
                    f"called with these {how}, and the loss with the mapping as targets, which raised {raised}; return "
                    'pairs (mapping, target), or set loss.name = "model" if the model returns its loss'
                ) from error
            kind = f"{len(batch.inputs)} items each" if isinstance(batch.inputs, (list, tuple)) else "one item each"
            raise DataError(
                f"the data set's samples are of {kind}, not pairs (input, target), so the model was called with all of "
                f"a sample and the loss with targets None, which raised {raised}; return ((x, mask), y) for two "
                "inputs, or, to train, write a loop of your own (hpctrain.session)"
            ) from error

    def _choice(self, batch: Batch) -> _Call:
        signature = _signature(self._model)
        if not isinstance(batch.inputs, Mapping):
            both = isinstance(self._loss, ModelLoss) and batch.targets is not None
            return _Call.PAIR if both and _takes(signature, None, None) else _Call.INPUTS
        if all(isinstance(key, str) for key in batch.inputs) and _takes(signature, **batch.inputs):
            return _Call.KEYWORDS
        if (name := _sole(signature)) is None or name in batch.inputs:
            known = ", ".join(signature.parameters) or "none"
            raise DataError(
                f"the data set's samples are mappings with the keys {_listed(batch.inputs)}, which "
                f"{type(self._model).__name__}.forward does not take as keyword arguments (it takes {known}); return "
                "pairs (mapping, target), where the mapping has just these keys"
            )
        return _Call.INPUTS


def _signature(model: nn.Module) -> Signature:
    """The signature of forward; one that accepts anything if there is none (TorchScript)."""
    inner = getattr(model, "_orig_mod", model)  # torch.compile
    try:
        return inspect.signature(inner.forward)
    except (TypeError, ValueError):
        return inspect.signature(lambda *arguments, **keywords: None)


def _takes(signature: Signature, /, *arguments: Any, **keywords: Any) -> bool:
    try:
        signature.bind(*arguments, **keywords)
    except TypeError:
        return False
    return True


def _sole(signature: Signature) -> str | None:
    """The name of the only argument that the model is meant to be called with; None if there is no such argument."""
    positional = [p for p in signature.parameters.values() if p.kind in _POSITIONAL]
    needed = [p for p in positional if p.default is Parameter.empty and p.kind is not Parameter.VAR_POSITIONAL]
    names = [p.name for p in needed or positional]
    return names[0] if len(names) == 1 and _takes(signature, None) else None


_POSITIONAL = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL


def _listed(mapping: Mapping[Any, Any]) -> str:
    return ", ".join(map(str, mapping)) or "none"
