"""What a user can do wrong, each a sentence: printed once by rank 0, exit status 2, never a traceback."""

from typing import Any


class HpctrainError(Exception):
    """A mistake that the user can mend: the message says what, where, what was expected and what to do.

    `everywhere`: all ranks of the run raise it, so that none of them waits for another. `status`: the exit status of
    a job that ends with it.
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
    """A checkpoint is missing, truncated, foreign, or of another model or job."""


class UnwrittenError(CheckpointError):
    """A run has ended, but some of its files could not be written. `result`: what it gave, the model included."""

    status = 1
    result: Any = None


class RunInUseError(HpctrainError):
    """Another process uses the run folder; names it."""


class TraceError(HpctrainError):
    """A run folder or trace file cannot be read."""


class ModelError(HpctrainError):
    """The model or optimizer cannot be trained as asked."""


class LeftError(HpctrainError):
    """A rank left the training loop, or ended its program, while others go on."""

    status = 1


class NanError(HpctrainError):
    """A loss or gradient is not finite; names the rank and the step."""
