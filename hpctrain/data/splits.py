"""A job's data: a training part, and optionally validation and test parts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset, Subset

from hpctrain.data.memory import known_targets
from hpctrain.data.order import Order, permutation
from hpctrain.errors import DataError
from hpctrain.text import did_you_mean

if TYPE_CHECKING:
    from hpctrain.job import Job


@dataclass
class Splits:
    """torch data sets (or anything with `__getitem__` and `__len__`, or an IterableDataset)."""

    train: Any
    validation: Any = None
    test: Any = None


def load_data(job: Job) -> Splits:
    """The data that `job.data` names, with the share `data.validation` of the training part held back.

    The name may refer to `Splits`, a pair (train, test), or one data set, or to a function or class that returns one of
    these. Raises DataError; exceptions from a user's function are passed on.
    """
    source, name = job.data.resolve(), f"data.name = {job.data.name!r}"
    options: dict[str, Any] = dict(job.data.options)
    if callable(source) and not _is_data(source):
        source = _call(source, options, name)
    elif options:
        raise DataError(f"data.{next(iter(options))}: the data set was given as an object, which takes no options")
    splits = _as_splits(source, name)
    for part in ("train", "validation", "test"):
        _check(getattr(splits, part), part, name)
    return _hold_back(splits, job.data.validation, job.seed)


def make_order(dataset: Any, seed: int = 0, shuffle: bool = True) -> Order:
    """The order of a data set's samples; a stream keeps its own order, and its length may not be known yet."""
    if not isinstance(dataset, IterableDataset):
        return Order(len(dataset), seed, shuffle)
    return Order(_stream_length(dataset), seed, shuffle=False)


def stratified(targets: NDArray[Any], count: int, seed: int) -> NDArray[np.bool_]:
    """A mask over `targets` with exactly `count` true, drawn by `seed`, in proportion to the classes."""
    classes, members, sizes = np.unique(targets, return_inverse=True, return_counts=True)
    take, remainders = np.divmod(sizes * count, len(targets))
    take[np.argsort(-remainders, kind="stable")[: count - int(take.sum())]] += 1
    drawn = permutation(len(targets), seed)
    mask = np.zeros(len(targets), np.bool_)
    for number in range(len(classes)):
        mask[drawn[members[drawn] == number][: take[number]]] = True
    return mask


def _is_data(value: Any) -> bool:
    return isinstance(value, (Dataset, Splits, tuple))


def _call(function: Callable[..., Any], options: dict[str, Any], name: str) -> Any:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in classes have no signature
        return function(**options)
    parameters = signature.parameters.values()
    takes = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    unknown = [key for key in options if key not in takes]
    if unknown and not any(one.kind == one.VAR_KEYWORD for one in parameters):
        guess = did_you_mean(unknown[0], takes)
        raise DataError(f"data.{unknown[0]}: {name} has no such option{guess}; it takes {', '.join(takes) or 'none'}")
    try:
        signature.bind(**options)
    except TypeError as error:
        raise DataError(f"{name}: {error}; it takes {', '.join(takes)}") from None
    return function(**options)


def _as_splits(value: Any, name: str) -> Splits:
    if isinstance(value, Splits):
        return Splits(value.train, value.validation, value.test)
    if isinstance(value, tuple) and len(value) == 2:
        return Splits(value[0], None, value[1])
    if isinstance(value, tuple) or not _is_dataset(value):
        what = f"a tuple of {len(value)}" if isinstance(value, tuple) else f"of type {type(value).__name__}"
        raise DataError(
            f"{name} returned a value that is {what}; expected a torch Dataset or IterableDataset, a pair "
            "(train, test), or hpctrain.data.splits.Splits"
        )
    return Splits(value)


def _is_dataset(value: Any) -> bool:
    indexed = hasattr(value, "__getitem__") and not isinstance(value, (str, bytes, dict, type))
    return isinstance(value, IterableDataset) or indexed


def _check(dataset: Any, part: str, name: str) -> None:
    if dataset is None and part != "train":
        return
    if not _is_dataset(dataset):
        raise DataError(f"{name}: its {part} part is of type {type(dataset).__name__}, which is not a torch data set")
    if isinstance(dataset, IterableDataset):
        empty = _stream_length(dataset) == 0
    else:
        try:
            empty = len(dataset) == 0
        except (TypeError, NotImplementedError):
            raise DataError(
                f"{name}: its {part} part, a {type(dataset).__name__}, has no length; give it __len__, or "
                "make it an IterableDataset"
            ) from None
    if empty:
        raise DataError(f"{name}: its {part} part is empty; at least one sample is needed")


def _stream_length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def _hold_back(splits: Splits, share: float, seed: int) -> Splits:
    if share == 0:
        return splits
    key = f"data.validation = {share}"
    if splits.validation is not None:
        raise DataError(f"{key}: the data set has a validation part of its own; set data.validation = 0")
    if isinstance(splits.train, IterableDataset):
        raise DataError(
            f"{key}: a stream cannot be split at random; set data.validation = 0, or let the data function "
            "return Splits with a validation part"
        )
    length = len(splits.train)
    count = round(share * length)
    if not 0 < count < length:
        raise DataError(f"{key}: of {length} training samples, that leaves {count} to validate and {length - count}")
    targets = known_targets(splits.train)
    held = stratified(np.zeros(length) if targets is None else targets, count, seed)
    train = Subset(splits.train, np.flatnonzero(~held).tolist())
    return Splits(train, Subset(splits.train, np.flatnonzero(held).tolist()), splits.test)
