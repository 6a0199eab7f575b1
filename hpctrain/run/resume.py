"""Resuming a run: which run to resume, and which keys a job may change."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpctrain.errors import JobError
from hpctrain.filenames import LATEST
from hpctrain.job.messages import value_text

MOST_SHOWN = 6  # maximum number of changes listed in one sentence

# Keys that do not affect a run's numbers. They may differ between a run and its continuation, and do not distinguish
# two runs. A key stands for all keys below it.
FREE = {
    "output": "where new run folders are created",
    "ranks": "the checkpoint records how many ranks the run used",
    "data.prefetch": "how far ahead samples are fetched",
    "data.threads": "how many threads fetch them",
    "train.checkpoint_every": "how often a checkpoint is saved",
    "train.keep_checkpoints": "how many are kept",
    "train.keep_best": "which evaluation's model is kept as well",
    "trace": "what is recorded about the run",
    "communicator.wait": "how ranks wait",
    "communicator.cuda_aware": "how buffers reach MPI",
    "debug": "for tests and studies",
}
# Keys that a run keeps from beginning to end, and why. (Its strategies, and the parameters' shapes and precision, are
# in the checkpoint, which is also compared.)
FIXED = {
    "seed": "it determines the order of the samples",
    "data.name": "the run's position is counted in that data set's samples",
    "data.validation": "other samples would be held out",
    "data.last": "it determines how long an epoch is",
    "data.shuffle": "the order of the samples depends on it",
    "data.partition": "the order of the samples depends on it",
    "evaluate": "metrics.csv and the best value so far are for that evaluation",
    "metric": "metrics.csv and the best value so far are for that metric",
}
MEASURED = (".bucket_mb",)  # where a job says "auto", a continuation takes what the run has measured


@dataclass(frozen=True)
class Resume:
    """The run to resume. A path alone, as in `train(job, resume="runs/digits-...")`, is short for `Resume(path)`.

    `folder`: the run folder, or "latest": the newest unfinished run with the same identity under the job's output, or a
    new run if there is none (for a folder of that name, write "./latest"). `changes`: what to do about keys in which
    the job differs from the run's: "refuse" raises an error that names them; "take" uses the job's values and writes
    them into the run folder. `optimizer`: "keep" keeps its state (momentum, Adam's moments); "reset" starts with a
    fresh one.
    """

    folder: Path | str
    changes: Literal["refuse", "take"] = "refuse"
    optimizer: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        """Check the values. Raises JobError."""
        if self.changes not in ("refuse", "take"):
            raise JobError(f'Resume: changes = {value_text(self.changes)}: must be "refuse" or "take"')
        if self.optimizer not in ("keep", "reset"):
            raise JobError(f'Resume: optimizer = {value_text(self.optimizer)}: must be "keep" or "reset"')
        if self.latest and (self.changes, self.optimizer) != ("refuse", "keep"):
            raise JobError(
                'resuming "latest" continues a run unchanged, every time; name the run folder to change its keys '
                "or reset its optimizer"
            )

    @property
    def latest(self) -> bool:
        """Whether the run has yet to be found."""
        return self.folder == LATEST

    @classmethod
    def of(cls, value: Resume | Path | str | None) -> Resume | None:
        """Convert any value that a caller may pass."""
        return value if value is None or isinstance(value, Resume) else cls(value)


class Change(NamedTuple):
    """A key that differs; a value of None means it is left out."""

    key: str
    old: Any
    new: Any


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The keys in which a run's tables (`Job.plain`) and a new job's differ, in their order; includes the keys of FREE,
    but not a key of MEASURED that is "auto" in the new job."""
    before, after = dict(leaves(old)), dict(leaves(new))
    keys = [*before, *(key for key in after if key not in before)]
    pairs = [Change(key, before.get(key), after.get(key)) for key in keys]
    changes = [change for change in pairs if _comparable(change.old) != _comparable(change.new)]
    return [change for change in changes if not (change.new == "auto" and change.key.endswith(MEASURED))]


def binding(changes: list[Change]) -> list[Change]:
    """The changes that affect the run."""
    return [change for change in changes if _above(FREE, change.key) is None]


def why_fixed(change: Change) -> str | None:
    """Why a run cannot take that change; None: it can."""
    key = _above(FIXED, change.key)
    return FIXED[key] if key is not None else None


def listed(changes: list[Change], form: str) -> str:
    """`form` filled in for each change ({key}, {old}, {new}), in one line: the first few, and how many more there are.
    If a table's name changes, its other keys are omitted."""
    renamed = [c.key.removesuffix("name") for c in changes if c.key.endswith(".name")]
    changes = [c for c in changes if c.key.endswith(".name") or not c.key.startswith(tuple(renamed))]
    texts = [form.format(key=c.key, old=text_of(c.old), new=text_of(c.new)) for c in changes[:MOST_SHOWN]]
    more = f" and {len(changes) - MOST_SHOWN} more" if len(changes) > MOST_SHOWN else ""
    return ", ".join(texts) + more


def text_of(value: Any) -> str:
    """A value as written in a job file, for a sentence."""
    if value is None:
        return "left out"
    if isinstance(value, list):
        return f"[{', '.join(map(text_of, value))}]"
    return value_text(value)


def leaves(tables: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is not a table; tables in a list by their index."""
    if isinstance(tables, list):
        tables = dict(enumerate(tables))
    for name, value in tables.items():
        key = f"{above}{name}"
        listing = isinstance(value, list) and any(isinstance(item, dict) for item in value)
        if (isinstance(value, dict) and value) or listing:
            yield from leaves(value, f"{key}.")
        else:
            yield key, value


def _comparable(value: Any) -> Any:
    """A value for comparing. For recorded program objects the line number is ignored: an edit elsewhere moves it."""
    if isinstance(value, str) and value.startswith("<"):
        return re.sub(r":\d+>$", ">", value)
    return (type(value) is bool, value)  # in TOML, true is not 1


def _above(table: Mapping[str, str], key: str) -> str | None:
    return next((entry for entry in table if key == entry or key.startswith(entry + ".")), None)
