"""What tells a run from others, recorded in its folder when it is made."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from hpctrain.errors import JobError
from hpctrain.filenames import JOB, RUN
from hpctrain.job import Job
from hpctrain.job import file as jobfile
from hpctrain.launcher.facts import SLURM, SLURM_FEDERATED


def slurm_job(environment: Mapping[str, str]) -> str:
    """The Slurm job, and within an array the task, that this process is part of: "123", "123_7", "123_7@cluster"; ""
    outside of Slurm. The same after a requeue, and unlike every other's on the same file system."""
    job = environment.get(SLURM.array_job) or environment.get(SLURM.job, "")
    if not job:
        return ""
    task = environment.get(SLURM.array_task, "")
    cluster = environment.get(SLURM.cluster, "")
    federated = job.isdecimal() and int(job) >= SLURM_FEDERATED
    return job + (f"_{task}" if task else "") + (f"@{cluster}" if cluster and not federated else "")


@dataclass(frozen=True)
class Identity:
    """Who made a run. Together with its resolved job this tells it from others: a Slurm job (or task of an array) has
    runs of its own, and so has everybody outside of Slurm; among those, jobs that differ are different runs. `file` and
    `overrides`: the job's, as the command named them; a Slurm job that comes back says the same again."""

    slurm_job: str = ""
    file: str = ""
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job, environment: Mapping[str, str]) -> Self:
        """Of a run of `job` that is started here and now."""
        return cls(slurm_job(environment), job.file, job.overrides)

    def write(self, folder: Path) -> None:
        """Into the run folder. Raises OSError."""
        tables = {"slurm_job": self.slurm_job, "file": self.file, "overrides": list(self.overrides)}
        (folder / RUN).write_text(jobfile.write({key: value for key, value in tables.items() if value}))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the run in that folder; one that lacks the file was made outside of Slurm, without overrides."""
        try:
            found = tomllib.loads((folder / RUN).read_text())
            given = tuple(map(str, found.get("overrides", ())))
            return cls(str(found.get("slurm_job", "")), str(found.get("file", "")), given)
        except (OSError, ValueError, TypeError):
            return cls()


def recorded(folder: Path) -> dict[str, Any]:
    """The tables of a run's resolved job, with what is default today written out. Raises JobError if there are none."""
    tables = jobfile.read(folder / JOB)
    try:
        return Job(**tables).plain()
    except JobError:  # it names an object of a program, or what is not there any more
        return tables
