"""What a study runs: rows (a strategy with its keys) in settings (a job and a number of workers), each with several
seeds."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from hpctrain.errors import ClusterError
from hpctrain.job import Job
from hpctrain.job.roles import roles_of

MOST_SERVERS = 8
Measure = Literal["points", "loss", "payload"]


@dataclass(frozen=True)
class Variant:
    """A strategy. `keys`: overrides of the setting's job, such as "strategy.codec=topk"."""

    name: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A job on a number of workers. `base`: the row that others are compared with; `rows`: those that run, by name;
    `metric`: what the job's metric is, in words; `measure`: what is compared, the metric ("points") or the loss;
    `seeds`: how many; `keys`: overrides for all rows."""

    name: str
    title: str
    file: Path
    workers: int
    rows: Mapping[str, Variant]
    base: str
    metric: str = "accuracy"
    measure: Measure = "points"
    seeds: int = 3
    keys: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Of the job file: results of another one are of no use."""
        return _digest(tomllib.loads(self.file.read_text()))


@dataclass(frozen=True)
class Case:
    """One run."""

    setting: Setting
    row: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its file, and what patterns are matched with."""
        words = re.sub(r"[^a-z0-9]+", "-", self.row.name.lower().replace("%", "percent")).strip("-")
        return f"{self.setting.name}/{words}.{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that its result depends on, but the program."""
        return _digest([self.setting.digest, self.setting.workers, *self.setting.keys, *self.row.keys])

    def job(self) -> Job:
        """What is trained. Raises JobError."""
        fixed = [f"seed={self.seed}", "threads=1", "trace.enabled=false"]
        return Job.load(self.setting.file, [*self.setting.keys, *self.row.keys, *fixed])

    def ranks(self) -> int:
        """How many ranks it takes: servers besides the workers, if they are not beside them. Raises ClusterError."""
        job = self.job()
        for ranks in range(self.setting.workers, self.setting.workers + MOST_SERVERS + 1):
            if all(len(roles.workers) == self.setting.workers for roles in roles_of(job, range(ranks))):
                return ranks
        raise ClusterError(f"study: {self.row.name} cannot have {self.setting.workers} workers in all of its phases")


def cases(settings: Sequence[Setting]) -> Iterator[Case]:
    """All runs; those of the first seed come first, so that an interrupted study is of use."""
    for seed in range(max(setting.seeds for setting in settings)):
        for setting in settings:
            if seed < setting.seeds:
                yield from (Case(setting, row, seed) for row in setting.rows.values())


def _digest(things: object) -> str:
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=str).encode()).hexdigest()[:12]
