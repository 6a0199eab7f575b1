"""What a simulation of costs alone cannot follow, because it depends on numbers that are not computed."""

from __future__ import annotations

import re

from hpctrain.clock.rules import Rule
from hpctrain.comm.phantom import NO_VALUES
from hpctrain.errors import HpctrainError, JobError
from hpctrain.job import Job
from hpctrain.job.phases import PhaseTable, RuleSpec

META = r"meta tensor|device[^/]{0,12}\bmeta\b|\bmeta\b[^/]{0,12}(device|backend)|register_meta"
SIGNS = re.compile(rf"{META}|\bPhantom\b|Tensor\.__format__|{NO_VALUES}", re.IGNORECASE)
COUNTS = "after"  # the rule that only counts
LEARN = "simulate it with --learn, which computes gradients"


def refuse_values(job: Job) -> None:
    """Raise JobError if values in arenas decide what `job` does next, or what it sends is not known without a forward
    pass: what no run before can tell."""
    if job.train.sync_batchnorm:
        raise JobError(
            "train.sync_batchnorm = true: what layers exchange in a forward pass is not known without one; "
            f"{LEARN}, or leave the key out"
        )
    for index, phase in enumerate(job.schedule):
        every = getattr(phase.strategy.options, "every", None)
        if every == "auto" or getattr(every, "overhead", None) is not None:
            raise JobError(
                f"{job.key(index, 'strategy')}.every: its guard depends on how far parameters move, which a simulation "
                f"of costs does not have; {LEARN}, or give a number of steps"
            )


def refuse_losses(job: Job) -> None:
    """Raise JobError if losses or evaluations decide how long a phase of `job` is."""
    for index, phase in enumerate(job.schedule):
        if (rule := observing(phase)) is not None:
            raise JobError(
                f"{job.key(index, 'until')} = {rule.name!r} depends on losses or evaluations, which a "
                f"simulation of costs does not have; {LEARN}, or with --curve RUN, which takes those of an earlier "
                'run, or say when the phase ends: until = {rule = "after", epochs = 2}'
            )


def observing(phase: PhaseTable) -> RuleSpec | None:
    """The rule that ends the phase by what it observes; None if there is none, or if it only counts."""
    return None if phase.until is None or phase.until.name == COUNTS else phase.until


def judged(job: Job) -> bool:
    """Whether evaluations may end a phase of `job`, or its training."""
    if job.train.target is not None or job.train.patience is not None:
        return True
    rules = [phase.until.resolve() for phase in job.schedule if phase.until is not None]
    return any(getattr(rule, "evaluated", Rule.evaluated) is not Rule.evaluated for rule in rules)


def reads_numbers(error: Exception) -> bool:
    """Whether this is the error of a program that reads values where there are none, or computes with them."""
    cause: BaseException | None = error
    while isinstance(cause, HpctrainError):  # what it was raised from says more
        cause = cause.__cause__
    return cause is not None and SIGNS.search(str(cause)) is not None
