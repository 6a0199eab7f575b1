"""Going on with a run: what is to be resumed, and what a job may change about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpctrain.errors import JobError
from hpctrain.job.messages import value_text

LATEST = "latest"
MOST_SHOWN = 6  # changes that one sentence lists

# What has no effect on the numbers of a run: free to differ between a run and its continuation, and no part of what
# tells two runs apart. A key stands for all below it.
FREE = {
    "output": "where new run folders are made",
    "ranks": "the checkpoint itself knows on how many ranks the run was",
    "data.prefetch": "how far ahead samples are fetched",
    "data.threads": "how many threads fetch them",
    "train.checkpoint_every": "how often a checkpoint is saved",
    "train.keep_checkpoints": "how many are kept",
    "trace": "what is written down about the run",
    "communicator.wait": "how ranks wait",
    "communicator.cuda_aware": "which way buffers take",
    "debug": "for tests and studies",
}
# What a run keeps from its beginning to its end, and why. (Its strategies, and the parameters' shapes and precision,
# are in the checkpoint, which is compared too.)
FIXED = {
    "seed": "the order of its samples is drawn from it",
    "data.name": "its place is counted in that data set's samples",
    "data.validation": "the samples that were held back would be others",
    "data.last": "its epochs are that long",
    "data.shuffle": "the order of its samples depends on it",
    "metric": "metrics.csv and the best value so far are of that metric",
}


@dataclass(frozen=True)
class Resume:
    """The run to go on with. A path alone, as in `train(job, resume="runs/digits-..."), is short for `Resume(path)`.

    `folder`: its run folder; or "latest": the newest unfinished run of the same identity under the job's output, or
    a new run if there is none (a folder of that name is "./latest").
    `changes`: what is done about keys in which the job differs from the run's. "refuse" names them in an error;
    "take" goes on with the job's values and writes them into the run folder.
    `optimizer`: "keep" goes on with its state (momentum, Adam's moments); "reset" lets that begin anew.
    """

    folder: Path | str
    changes: Literal["refuse", "take"] = "refuse"
    optimizer: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        """Raises JobError."""
        if self.changes not in ("refuse", "take"):
            raise JobError(f'Resume: changes = {value_text(self.changes)}: must be "refuse" or "take"')
        if self.optimizer not in ("keep", "reset"):
            raise JobError(f'Resume: optimizer = {value_text(self.optimizer)}: must be "keep" or "reset"')
        if self.latest and (self.changes, self.optimizer) != ("refuse", "keep"):
            raise JobError(
                'resuming "latest" goes on with a run as it is, each time anew; name the run folder to change its '
                "keys or reset its optimizer"
            )

    @property
    def latest(self) -> bool:
        """Whether the run is still to be found."""
        return self.folder == LATEST

    @classmethod
    def of(cls, value: Resume | Path | str | None) -> Resume | None:
        """What a caller may give for it."""
        return value if value is None or isinstance(value, Resume) else cls(value)


class Change(NamedTuple):
    """A key that differs; None: left out."""

    key: str
    old: Any
    new: Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Where two jobs' tables (`Job.plain`) differ, key by key, in their order; the keys of FREE are among them."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = [Change(key, before.get(key), after.get(key)) for key in keys]
    return [change for change in pairs if _comparable(change.old) != _comparable(change.new)]


def binding(changes: list[Change]) -> list[Change]:
    """Those that change the run."""
    return [change for change in changes if _above(FREE, change.key) is None]


def why_fixed(change: Change) -> str | None:
    """Why a run cannot take that change; None: it can."""
    key = _above(FIXED, change.key)
    return FIXED[key] if key is not None else None


def listed(changes: list[Change], form: str) -> str:
    """`form` for each of them ({key}, {old}, {new}), in one line; the first few and how many more there are. Where a
    table has another name, its other keys need no words."""
    renamed = [c.key.removesuffix("name") for c in changes if c.key.endswith(".name")]
    changes = [c for c in changes if c.key.endswith(".name") or not c.key.startswith(tuple(renamed))]
    texts = [form.format(key=c.key, old=text_of(c.old), new=text_of(c.new)) for c in changes[:MOST_SHOWN]]
    more = f" and {len(changes) - MOST_SHOWN} more" if len(changes) > MOST_SHOWN else ""
    return ", ".join(texts) + more


def text_of(value: Any) -> str:
    """A value as a job file has it, for a sentence."""
    if value is None:
        return "left out"
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    return value_text(value)


def _leaves(tables: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of what is no table; tables in a list by their index."""
    if isinstance(tables, list):
        tables = dict(enumerate(tables))
    for name, value in tables.items():
        key = f"{above}{name}"
        listing = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        if (isinstance(value, dict) and value) or listing:
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _comparable(value: Any) -> Any:
    """Where an object of a program is recorded, the line of its file counts for nothing: an edit elsewhere moves it."""
    if isinstance(value, str) and value.startswith("<"):
        return re.sub(r":\d+>$", ">", value)
    return (type(value) is bool, value)  # in TOML true is not 1


def _above(table: Mapping[str, str], key: str) -> str | None:
    return next((entry for entry in table if key == entry or key.startswith(entry + ".")), None)
