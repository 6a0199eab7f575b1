"""The job: what is to be run. Its tables, where they are read from, and what is said of their mistakes."""

from hpctrain.job.job import Amount, Job, Options, PhaseTable, check_ranks

__all__ = ["Amount", "Job", "Options", "PhaseTable", "check_ranks"]
