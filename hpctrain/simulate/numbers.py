"""What a simulation of costs alone cannot follow, because it depends on numbers that are not computed."""

from __future__ import annotations

from hpctrain.comm.phantom import NO_VALUES
from hpctrain.errors import JobError
from hpctrain.job import Job

COUNTS = "after"  # the rule that only counts
LEARN = "simulate it with --learn, which computes gradients"


def refuse_numbers(job: Job) -> None:
    """Raise JobError if numbers decide what `job` does next, or what it sends is not known without a forward pass."""
    if job.train.sync_batchnorm:
        raise JobError(
            "train.sync_batchnorm = true: what layers exchange in a forward pass is not known without one; "
            f"{LEARN}, or leave the key out"
        )
    for index, phase in enumerate(job.schedule):
        if phase.until is not None and phase.until.name != COUNTS:
            raise JobError(
                f"{job.key(index, 'until')} = {phase.until.name!r} depends on losses or evaluations, which a "
                f"simulation of costs does not have; {LEARN}, or say when the phase ends: "
                'until = {rule = "after", epochs = 2}'
            )
        every = getattr(phase.strategy.options, "every", None)
        if every == "auto" or getattr(every, "overhead", None) is not None:
            raise JobError(
                f"{job.key(index, 'strategy')}.every: its guard depends on how far parameters move, which a simulation "
                f"of costs does not have; {LEARN}, or give a number of steps"
            )


def reads_numbers(error: Exception) -> bool:
    """Whether this is the error of a program that reads values where there are none."""
    text = str(error)
    return NO_VALUES in text or "meta tensor" in text
