"""Errors that users can cause. Each has a one-sentence message: rank 0 prints it once, status 2, no traceback."""

from typing import Any

INTERRUPTED = 130  # the exit status of a run that a signal has stopped, and that can be resumed


class HpctrainError(Exception):
    """A mistake that the user can fix: the message says what, where, what was expected and what to do.

    `everywhere`: all ranks of the run raise it, so that none waits for another. `status`: the exit status of a job
    that ends with this error.
    """

    everywhere = False
    status = 2


class JobError(HpctrainError):
    """The job description is wrong: a key, a value, or keys that contradict each other."""


class DataError(HpctrainError):
    """A data set is missing, corrupt or of the wrong shape."""


class ClusterError(HpctrainError):
    """The ranks, nodes or MPI library are not what the job needs."""


class CheckpointError(HpctrainError):
    """A checkpoint is missing, truncated, foreign, or belongs to another model or job."""


class UnwrittenError(CheckpointError):
    """A run has ended, but some of its files could not be written. `result`: its result, including the model."""

    status = 1
    result: Any = None


class RunInUseError(HpctrainError):
    """Another process uses the run folder; the message names it."""


class TraceError(HpctrainError):
    """A run folder or trace file cannot be read."""


class ModelError(HpctrainError):
    """The model or optimizer cannot be trained as asked."""


class LeftError(HpctrainError):
    """A rank left the training loop, or ended its program, while others continue."""

    status = 1


class NanError(HpctrainError):
    """A loss or gradient is not finite; the message names the rank and the step."""
