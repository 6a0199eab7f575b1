"""What a run is planned to do, from the job in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.clock.samples import run_total
from hpctrain.cluster import Role
from hpctrain.errors import HpctrainError, TraceError
from hpctrain.filenames import JOB
from hpctrain.job import Job
from hpctrain.job.roles import roles_of


@dataclass(frozen=True)
class Plan:
    """What is known of a job. `job`: None if it cannot be read; nothing it names is imported.

    `phases`: their number; `epochs`: train.epochs; `flush_seconds`: how often ranks write; `may_stop_early`: whether
    the run may end before its samples are used up, because of an evaluation or because the last phase has a rule.
    """

    job: Job | None = None
    name: str = ""
    phases: int | None = None
    epochs: float | None = None
    metric: str = "metric"
    higher_is_better: bool = True
    flush_seconds: float = 2.0
    may_stop_early: bool = False

    def roles(self, phase: int, nodes: Sequence[int]) -> dict[int, str]:
        """Role by rank in a phase, for ranks on these nodes; empty if unknown, e.g. for a custom strategy."""
        if self.job is None or not 0 <= phase < len(self.job.schedule):
            return {}
        try:
            roles = roles_of(self.job, nodes)[phase]
        except HpctrainError:
            return {}
        known = dict.fromkeys(roles.servers, Role.SERVER) | dict.fromkeys(roles.workers, Role.WORKER)  # as `Roles.of`
        return {rank: role.value for rank, role in known.items()}

    def total(self, epoch: int, workers: int) -> int | None:
        """Samples of the whole run. `epoch`: samples per epoch; `workers`: of its first phase. None if unknown."""
        if self.job is None or epoch < 1 or workers < 1:
            return None
        train = self.job.train
        return run_total(train, epoch, train.batch_size * train.accumulate * workers)


def read_plan(folder: Path) -> Plan:
    """Read the plan from a run folder. Raises TraceError if its job disables traces."""
    try:
        job = Job.recorded(folder / JOB) if (folder / JOB).is_file() else None
    except HpctrainError:
        job = None
    if job is None:
        return Plan()
    if not job.trace.enabled:
        raise TraceError(
            f"{folder}: this run writes no traces (trace.enabled = false), so there is nothing to watch; "
            "train with trace.enabled = true"
        )
    train, schedule = job.train, job.schedule
    return Plan(
        job=job,
        name=job.name,
        phases=len(schedule),
        epochs=train.epochs,
        metric=job.measured,
        higher_is_better=job.metric.goal == "max",
        flush_seconds=job.trace.flush_seconds,
        may_stop_early=train.target is not None or train.patience is not None or schedule[-1].until is not None,
    )
