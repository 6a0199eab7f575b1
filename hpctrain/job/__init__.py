"""The job, which describes a run: its tables, how they are read, and messages about mistakes in them."""

from hpctrain.job.job import Amount, Job, Options, PhaseTable, check_ranks

__all__ = ["Amount", "Job", "Options", "PhaseTable", "check_ranks"]
