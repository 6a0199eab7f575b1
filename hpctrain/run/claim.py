"""Claims a run folder: creates one for a new run or finds one to resume, compares it with the job, and locks it.

Used on rank 0 only.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.errors import CheckpointError, JobError
from hpctrain.filenames import HISTORY, JOB, LOCK, MODEL, RUN
from hpctrain.job import Job
from hpctrain.run import folder as runfolder
from hpctrain.run.checkpoint import list_checkpoints
from hpctrain.run.identity import Identity, recorded
from hpctrain.run.lock import Lock
from hpctrain.run.resume import Change, Resume, binding, differences, listed, text_of, why_fixed


@dataclass
class Claim:
    """A run folder that this process uses until `release`.

    `overrides`: those that the run began with. `changes`: the keys that it takes from another job from now on.
    """

    folder: Path
    lock: Lock
    overrides: tuple[str, ...]
    changes: list[Change] = field(default_factory=list)

    def release(self) -> None:
        """Let other processes use the folder. Does nothing if already released."""
        self.lock.release()

    def record(self, job: Job, resume: Resume, sample: int) -> list[str]:
        """Record in the folder that the run follows `job` from `sample` on; returns sentences about what is new.

        Raises CheckpointError if it cannot be written.
        """
        rows = [{"key": c.key, "old": c.old, "new": c.new} for c in self.changes]
        if resume.optimizer == "reset":
            rows.append({"key": "optimizer", "reset": True})
        stamp = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "sample": sample}
        try:
            if rows:
                with open(self.folder / HISTORY, "a") as file:
                    file.writelines(json.dumps({**stamp, **row}, default=str) + "\n" for row in rows)
            if self.changes:
                runfolder.write_job(self.folder, job, self.overrides)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: the changes cannot be recorded there ({error.strerror})") from None
        texts = [f"changed from here on: {listed(self.changes, '{key} = {new} (was {old})')}"] if self.changes else []
        return texts + (["the optimizer starts afresh"] if resume.optimizer == "reset" else [])


def new_run(job: Job, environment: Mapping[str, str] = os.environ) -> Claim:
    """Create a run folder for a new run of `job`. JobError if it cannot be created."""
    folder = runfolder.create(job)
    try:
        lock = Lock(folder, environment)
        try:
            Identity.of(job, environment).write(folder)
            runfolder.write_job(folder, job, job.overrides)  # last: a folder without it cannot be resumed
            return Claim(folder, lock, job.overrides)
        except BaseException:
            lock.release()
            raise
    except (OSError, CheckpointError) as error:
        runfolder.discard(folder)
        why = error.strerror if isinstance(error, OSError) else error
        raise JobError(
            f"output = {job.output!r}: the run folder {folder} cannot be created ({why}); "
            "choose a folder that you can write to"
        ) from None


def run_to_resume(job: Job, resume: Resume, environment: Mapping[str, str] = os.environ) -> Claim | str:
    """The run to resume; or, for "latest", a note about the new run that begins instead.

    Raises CheckpointError if there is no checkpoint or the job differs from the run's; RunInUseError if another process
    uses the folder; JobError if the run's job cannot be read.
    """
    if resume.latest:
        return _latest(job, environment)
    folder = Path(resume.folder)
    runfolder.newest_checkpoint(folder)
    lock = Lock(folder, environment)
    try:
        return Claim(folder, lock, Identity.read(folder).overrides, _taken(folder, job, resume))
    except BaseException:
        lock.release()
        raise


def _taken(folder: Path, job: Job, resume: Resume) -> list[Change]:
    """The changes that the run takes from `job`. Raises CheckpointError for changes that it cannot take."""
    every = differences(recorded(folder), job.plain())
    if resume.changes == "refuse":
        if changes := binding(every):
            raise CheckpointError(_other_job(folder, changes))
        return []
    for change in every:
        if (why := why_fixed(change)) is not None:
            raise CheckpointError(
                f"{change.key} = {text_of(change.new)}: the run in {folder} has {change.key} = {text_of(change.old)} "
                f"and keeps it, because {why}; start a new run to change it"
            )
    return every


def _latest(job: Job, environment: Mapping[str, str]) -> Claim | str:
    """The newest unfinished run of an equal job in this Slurm job (or, outside of Slurm, made outside of Slurm)."""
    me, elsewhere = Identity.of(job, environment), None
    edited: list[tuple[Path, list[Change]]] = []
    for folder in _unfinished(Path(job.output)):
        identity = Identity.read(folder)
        try:
            changes = binding(differences(recorded(folder), job.plain()))
        except JobError:
            continue
        if identity.slurm_job == me.slurm_job and not changes:
            lock = Lock(folder, environment)
            if list_checkpoints(folder) and not (folder / MODEL).exists():
                return Claim(folder, lock, identity.overrides)
            lock.release()  # it died before its first checkpoint, or has just finished
        elif not changes and not (folder / LOCK).exists():
            elsewhere = elsewhere or folder
        elif identity == me and me.slurm_job and list_checkpoints(folder):
            edited.append((folder, changes))
    if edited:  # same command in the same, requeued Slurm job: the job file was edited in the meantime
        raise CheckpointError(_other_job(*edited[0]))
    if elsewhere is None:
        return ""
    slurm = Identity.read(elsewhere).slurm_job
    made = f"in Slurm job {slurm}" if slurm else "outside of Slurm"
    return (
        f"this is a new run; {elsewhere}, an unfinished run of an equal job, was started {made}: "
        f"continue it with hpctrain train --resume {elsewhere}"
    )


def _unfinished(output: Path) -> list[Path]:
    """Run folders that have a checkpoint or are in use, but no model yet; newest first."""
    found = []
    with suppress(OSError):
        for folder in output.iterdir():
            begun = list_checkpoints(folder) or (folder / LOCK).exists()
            if begun and (folder / JOB).exists() and not (folder / MODEL).exists():
                found.append((_made(folder), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def _made(folder: Path) -> float:
    """When the run began, by the clock of the file system that all its nodes share."""
    file = folder / RUN
    with suppress(OSError):
        return (file if file.exists() else folder / JOB).stat().st_mtime
    return 0.0


def _other_job(folder: Path, changes: list[Change]) -> str:
    differ = listed(changes, "{key} is {old} there and {new} in this job")
    return (
        f"{folder} is a run of another job: {differ}; start a new run without --resume, or change that run: "
        f'hpctrain train --resume {folder} key=value ... (in Python resume=hpctrain.Resume(folder, changes="take"))'
    )
