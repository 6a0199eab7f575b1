"""What distinguishes a run from others, recorded in its folder when it is created."""

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
    """The Slurm job of this process, with the array task if any: "123", "123_7", "123_7@cluster"; "" outside of Slurm.
    Stays the same after a requeue, and is unique on a shared file system."""
    job = environment.get(SLURM.array_job) or environment.get(SLURM.job, "")
    if not job:
        return ""
    task = environment.get(SLURM.array_task, "")
    cluster = environment.get(SLURM.cluster, "")
    federated = job.isdecimal() and int(job) >= SLURM_FEDERATED
    return job + (f"_{task}" if task else "") + (f"@{cluster}" if cluster and not federated else "")


@dataclass(frozen=True)
class Identity:
    """Who made a run. Together with the resolved job this distinguishes it from others: each Slurm job (or array task)
    has its own runs, and runs made outside of Slurm form one more group; within a group, different jobs mean different
    runs. `file` and `overrides`: the job's, as given on the command line; a requeued Slurm job gives the same ones."""

    slurm_job: str = ""
    file: str = ""
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Job, environment: Mapping[str, str]) -> Self:
        """The identity of a run of `job` started now, in this environment."""
        return cls(slurm_job(environment), job.file, job.overrides)

    def write(self, folder: Path) -> None:
        """Write the identity into the run folder. Raises OSError."""
        tables = {"slurm_job": self.slurm_job, "file": self.file, "overrides": list(self.overrides)}
        (folder / RUN).write_text(jobfile.write({key: value for key, value in tables.items() if value}))

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The identity of the run in that folder; without the file, it was made outside of Slurm, without overrides."""
        try:
            found = tomllib.loads((folder / RUN).read_text())
            given = tuple(map(str, found.get("overrides", ())))
            return cls(str(found.get("slurm_job", "")), str(found.get("file", "")), given)
        except (OSError, ValueError, TypeError):
            return cls()


def recorded(folder: Path) -> dict[str, Any]:
    """The tables of a run's resolved job, including today's defaults. Raises JobError if there are none."""
    tables = jobfile.read(folder / JOB)
    try:
        return Job(**tables).plain()
    except JobError:  # it names a program object, or something that no longer exists
        return tables
