"""How a metric is computed over a data set that several ranks share: start, update, merge, value.

A job names a metric in one of two forms: a function of a batch's (outputs, targets), which `Tally` sums up, or a class
with the methods `METHODS`, which `UserMeasure` calls. `Several` holds several metrics. Evaluations use only `Measure`.
An evaluation of the job's own has the same two forms; its arguments are (model, batch).
"""

from __future__ import annotations

import os
import re
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hpctrain.errors import HpctrainError, ModelError
from hpctrain.models.examples import Example

State = Mapping[str, Any]
Value = float | dict[str, float]
METHODS = "start", "update", "state", "merge", "value"
_RETURNS = "it must return a number (the mean over the batch), a pair (sum, weight), or a dictionary of these"


class Measure(ABC):
    """A metric, used for one evaluation after another. `name`, `kind`: for messages.

    On each rank: `start`, `update` once per batch (a rank may have none), `state`. Then on rank 0: `merge`, `value`.
    All raise ModelError for an invalid metric.
    """

    def __init__(self, name: str, kind: str = "metric") -> None:
        self.name, self.title = name, f'{kind} "{name}"'

    def check_data(self, dataset: Any) -> None:  # noqa: B027 (most metrics suit any data)
        """Raise an HpctrainError if the metric does not suit that part of the data, or None. Before training."""

    @abstractmethod
    def start(self) -> None:
        """Reset: an evaluation begins."""

    @abstractmethod
    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        """Add a batch of `samples` samples: the model's outputs, and the targets to compare with."""

    @abstractmethod
    def state(self) -> State:
        """The accumulated state of this rank: numbers, tensors, arrays, or lists of tensors or arrays, by name."""

    @abstractmethod
    def merge(self, states: Sequence[State]) -> None:
        """Replace the accumulated state by the states of all ranks, in rank order."""

    @abstractmethod
    def value(self) -> Value:
        """The value over all batches; in a dictionary of several values, the first is the metric."""

    def examples(self) -> Sequence[Example]:
        """Samples of this rank to show, with what the model makes of them; after the last `update`, before `merge`."""
        return ()


# -- functions ---------------------------------------------------------------------------------------------------
class Tally(Measure):
    """Sums up the values that a function of (outputs, targets) returns for batches: a mean over the batch's samples, a
    pair (sum, weight), or a dictionary of these."""

    def __init__(self, name: str, function: Callable[..., Any], kind: str = "metric") -> None:
        super().__init__(name, kind)
        self.function = function
        self._sums: dict[str, list[float]] = {}  # [sum, weight] by key; the key "" is for a value without one

    def start(self) -> None:
        self._sums = {}

    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        measured = self.function(outputs, targets)
        given = measured if isinstance(measured, dict) else {"": measured}
        shares = {key: self._share(value, key, samples) for key, value in given.items()}
        if not shares:
            raise ModelError(f"{self.title} returned an empty dictionary; it must have at least one key")
        if self._sums and list(shares) != list(self._sums):
            raise ModelError(
                f"{self.title} returned a dictionary with the keys {list(shares)}, but earlier with "
                f"{list(self._sums)}; it must have the same keys for every batch"
            )
        for key, share in shares.items():
            before = self._sums.get(key, [0.0, 0.0])
            self._sums[key] = [before[0] + share[0], before[1] + share[1]]

    def state(self) -> State:
        return {f"{part} {key}": sums[i] for key, sums in self._sums.items() for i, part in enumerate(_PARTS)}

    def merge(self, states: Sequence[State]) -> None:
        known = [state for state in states if state]
        if any(list(state) != list(known[0]) for state in known):
            raise ModelError(f"{self.title} returned dictionaries with different keys on different ranks")
        total = {name: sum(state[name] for state in known) for name in known[0]} if known else {}
        keys = [name.removeprefix("sum ") for name in total if name.startswith("sum ")]
        self._sums = {key: [total[f"{part} {key}"] for part in _PARTS] for key in keys}

    def value(self) -> Value:
        means = {key: mean(*sums) for key, sums in self._sums.items()}
        return means.get("", mean(0.0, 0.0)) if list(means) in ([], [""]) else means

    def _share(self, value: Any, key: Any, samples: int) -> list[float]:
        if not isinstance(key, str):
            raise ModelError(f"{self.title} returned a dictionary with the key {key!r}; keys must be strings")
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return [self._number(value[0], key), self._number(value[1], key)]
        return [samples * self._number(value, key), samples]

    def _number(self, value: Any, key: str) -> float:
        where = f" under {key}" if key else ""
        return _number(value, f"{self.title} returned a {{}}{where}; {_RETURNS}")


_PARTS = "sum", "weight"


def mean(total: float, weight: float) -> float:
    """The mean; NaN if the weight is 0."""
    return float(total / weight) if weight else float("nan")


def _number(value: Any, text: str) -> float:
    """Convert to float. `text` is the error message for an invalid value, with {} for its type."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
        raise ModelError(text.format(f"{type(value).__name__}{shape}")) from None


# -- classes -----------------------------------------------------------------------------------------------------
class UserMeasure(Measure):
    """Calls an object of the user's class, which has the methods `METHODS`. Exceptions that they raise, and invalid
    return values, become ModelErrors."""

    def __init__(self, name: str, metric: Any, kind: str = "metric") -> None:
        super().__init__(name, kind)
        self._metric = metric

    def check_data(self, dataset: Any) -> None:
        if callable(getattr(self._metric, "check_data", None)):
            self._call("check_data", dataset)

    def start(self) -> None:
        self._call("start")

    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        self._call("update", outputs, targets)

    def state(self) -> State:
        found = self._call("state")
        if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
            raise ModelError(
                f"{self.title}: state() returned a {type(found).__name__}; it must return a dictionary of "
                "numbers, tensors, arrays, or lists of tensors or arrays, by name"
            )
        return found

    def merge(self, states: Sequence[State]) -> None:
        first = _kinds(states[0])
        for rank, state in enumerate(states):
            if (own := _kinds(state)) != first:
                raise ModelError(
                    f"{self.title}: state() returned {_listed(first)} on rank 0, but {_listed(own)} on rank "
                    f"{rank}; it must return the same names and types on every rank, including one that had no batch"
                )
        self._call("merge", states)

    def value(self) -> Value:
        found, what = self._call("value"), f"{self.title}: value() returned a {{}}"
        if not isinstance(found, Mapping):
            return _number(found, f"{what}; it must return a number, or a dictionary of numbers by name")
        if not found or not all(isinstance(key, str) and key for key in found):
            raise ModelError(
                f"{what.format('dictionary')} with the keys {list(found)}; it must have at least one, and keys must be "
                "strings"
            )
        return {key: _number(value, f"{what} under {key}; it must be a number") for key, value in found.items()}

    def examples(self) -> Sequence[Example]:
        if not callable(getattr(self._metric, "examples", None)):
            return ()
        found = self._call("examples")
        if not isinstance(found, Sequence) or not all(isinstance(each, Example) for each in found):
            raise ModelError(f"{self.title}: examples() must return a list of hpctrain.Example")
        return found

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return getattr(self._metric, method)(*arguments)
        except HpctrainError:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f": {str(error).splitlines()[0]}" if str(error) else ""
            raise ModelError(
                f"{self.title}: {method}() failed in {os.path.basename(where.filename)}, line {where.lineno}: "
                f"{type(error).__name__}{text}"
            ) from error


def _kinds(state: State) -> dict[str, str]:
    return {
        name: "number" if isinstance(value, (bool, int, float)) else type(value).__name__
        for name, value in sorted(state.items())
    }


def _listed(kinds: dict[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "nothing"


# -- several -----------------------------------------------------------------------------------------------------
class Several(Measure):
    """Several metrics of the same outputs. A metric that gives a number appears under its name, without its module;
    one that gives a dictionary, under the dictionary's keys."""

    def __init__(self, metrics: Sequence[Measure]) -> None:
        super().__init__(metrics[0].name)
        self._metrics = metrics

    def check_data(self, dataset: Any) -> None:
        for metric in self._metrics:
            metric.check_data(dataset)

    def start(self) -> None:
        for metric in self._metrics:
            metric.start()

    def update(self, outputs: Any, targets: Any, samples: int) -> None:
        for metric in self._metrics:
            metric.update(outputs, targets, samples)

    def state(self) -> State:
        states = [metric.state() for metric in self._metrics]
        return {f"{place} {name}": value for place, state in enumerate(states) for name, value in state.items()}

    def merge(self, states: Sequence[State]) -> None:
        for place, metric in enumerate(self._metrics):
            start = f"{place} "
            own = [{n.removeprefix(start): v for n, v in state.items() if n.startswith(start)} for state in states]
            metric.merge(own)

    def value(self) -> Value:
        found: dict[str, float] = {}
        for metric in self._metrics:
            value = metric.value()
            named = value if isinstance(value, dict) else {short_name(metric.name): value}
            if both := sorted(found.keys() & named.keys()):
                raise ModelError(f"{metric.title} gives {both[0]}, and so does an earlier one; leave one out")
            found |= named
        return found

    def examples(self) -> Sequence[Example]:
        return [example for metric in self._metrics for example in metric.examples()]


def short_name(name: str) -> str:
    """The name of a metric without its module: "my_metrics:recall", or the record of an object, "<recall in a.py:3>" ->
    "recall"."""
    record = re.fullmatch(r"<(\S+)( object)?( in .*)?>", name)
    return record[1] if record is not None else name.rpartition(":")[2]
