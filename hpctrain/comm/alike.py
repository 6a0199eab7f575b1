"""Compares what must be the same on all ranks of a run, before anything is summed or can hang.

Does not import torch: jobs are compared before it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.comm.base import Communicator
from hpctrain.errors import DataError, HpctrainError, JobError, ModelError
from hpctrain.text import shown

if TYPE_CHECKING:
    from torch import Tensor

    from hpctrain.data.splits import Splits
    from hpctrain.replica.layout import Layout

FREE = ("output", "threads")  # only rank 0 creates the run folder; nodes may have different processors
MOST_NAMED = 3
LONGEST, LEAD = 80, 20  # characters of a fact that are shown; of those, how many before the first difference


@dataclass(frozen=True)
class Topic:
    """Facts that must be the same on all ranks, by name: "train.batch_size" -> "8".

    They are reported as "<about><verb><fact> on rank 0 and <fact> on rank 1; <advice>", in an error of class `error`;
    `missing` replaces a fact that a rank does not have.
    """

    verb: str
    advice: str
    error: type[HpctrainError]
    facts: dict[str, str] = field(default_factory=dict)
    missing: str = "not given"


def check_alike(comm: Communicator, topics: Sequence[Topic], everywhere: bool = True) -> None:
    """Raise the first difference between the ranks, on all of them. Collective; costs one gather of a hash.

    `everywhere`: whether `comm` contains all ranks of the run.
    """
    text = repr([list(topic.facts.items()) for topic in topics])
    table = comm.gather_rows(np.frombuffer(hashlib.sha256(text.encode()).digest()[:8], np.int64))
    if (table == table[0]).all():
        return
    for topic in topics:
        sentence = _difference(comm, topic)
        if sentence is not None:
            error = topic.error(sentence)
            error.everywhere = everywhere
            raise error


def _difference(comm: Communicator, topic: Topic) -> str | None:
    """A sentence about the first fact that differs, the same on all ranks; None if there is none. Collective."""
    first: dict[str, str] = comm.broadcast_json(topic.facts)
    own = {about: topic.facts.get(about) for about in [*first, *topic.facts]}
    found: list[dict[str, str | None]] = comm.gather_json({k: v for k, v in own.items() if v != first.get(k)})
    differing = list(dict.fromkeys(about for facts in found for about in facts))
    if not differing:
        return None
    order = list(dict.fromkeys([*first, *differing]))
    lacking = [a for a in differing if a not in first or any(facts.get(a, "") is None for facts in found)]
    about = min(lacking or differing, key=order.index)
    facts = [facts.get(about, first.get(about)) or topic.missing for facts in found]
    more = len(differing) - 1
    rest = f" ({more} more differ{'s' * (more == 1)})" if more else ""
    return f"{about}{topic.verb}{_by_rank(facts, comm.members)}{rest}; {topic.advice}"


def _by_rank(facts: Sequence[str], members: Sequence[int]) -> str:
    """ "8 on ranks 0 and 2 and 16 on rank 1"."""
    ranks: dict[str, list[int]] = {}
    for member, fact in zip(members, facts, strict=True):
        ranks.setdefault(fact, []).append(member)
    same = next((i for i, chars in enumerate(zip(*ranks, strict=False)) if len(set(chars)) > 1), min(map(len, ranks)))
    skip = max(0, same - LEAD) if max(map(len, ranks)) > LONGEST else 0
    parts = [f"{'...' * (skip > 0)}{shown(fact[skip:])} on {_ranks(of)}" for fact, of in ranks.items()]
    if len(parts) > MOST_NAMED:
        parts[MOST_NAMED:] = ["other values on the other ranks"]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _ranks(of: Sequence[int]) -> str:
    if len(of) == 1:
        return f"rank {of[0]}"
    if len(of) > 2 * MOST_NAMED:
        return f"{len(of)} ranks from {of[0]} to {of[-1]}"
    return f"ranks {', '.join(map(str, of[:-1]))} and {of[-1]}"


# -- what is compared --------------------------------------------------------------------------------------------
def job_topic(job: Mapping[str, Any]) -> Topic:
    """The resolved job, as nested plain values. An object without a name is represented by its description."""
    facts = {key: json.dumps(value, default=str) for key, value in _flat(job) if key not in FREE}
    return Topic(" = ", "all ranks must be given the same job", JobError, facts)


def model_topic(layout: Layout, frozen: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Topic:
    """What is trained, in which order and with which options, and the model's other contents (saved buffers)."""
    facts = {}
    for slot in layout.slots:
        facts[f"parameter {slot.name}"] = f"{layout.dtype} of shape {slot.shape}"
    facts["the order of the parameters"] = ", ".join(slot.name for slot in layout.slots)
    for index, group in enumerate(layout.groups):
        options = ", ".join(f"{key} = {_option(value)}" for key, value in group.options.items()) or "no options"
        slots = layout.slots_in(group.low, group.high) if group.high > group.low else []
        members = f"{slots[0].name} and later parameters" if slots else "no parameters"
        facts[f"group {index} of the optimizer"] = f"{members}, with {options}"
    for what, tensors in (("frozen parameter", frozen), ("buffer", buffers)):
        for name, tensor in tensors.items():
            facts[f"{what} {name}"] = f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"
    return Topic(" is ", "all ranks must build the same model", ModelError, facts, missing="missing")


def data_topic(splits: Splits) -> Topic:
    """The lengths of the parts of the data set."""
    facts = {}
    for part in ("train", "validation", "test"):
        dataset = getattr(splits, part)
        if dataset is not None:
            name = "the data set" if part == "train" else f"the {part} part of the data set"
            facts[name] = _length(dataset)
    advice = "every rank must see the same data set: hpctrain deals out the samples itself"
    return Topic(" has ", advice, DataError, facts, missing="no samples")


def stream_topic(length: int | None, read: int) -> Topic:
    """Where a stream of unknown length ended; None: not within the `read` samples read so far."""
    fact = f"ends after {length} samples" if length is not None else f"continues past {read} samples"
    advice = "a stream must yield the same samples on every rank: hpctrain deals them out itself"
    return Topic(" ", advice, DataError, {"the stream": fact})


def _flat(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            yield from _flat({str(index): item for index, item in enumerate(value)}, f"{above}{key}.")
        else:
            yield above + key, value


def _option(value: Any) -> str:
    plain = isinstance(value, (bool, int, float, str, tuple, list, type(None)))
    return repr(value) if plain else f"<{type(value).__name__}>"


def _length(dataset: Any) -> str:
    try:
        count = len(dataset)
    except (TypeError, NotImplementedError):
        return "an unknown number of samples"
    return f"{count} sample{'s' * (count != 1)}"
