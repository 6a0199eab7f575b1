"""What the methods of a strategy that agrees in rounds are called with: a step, or a round."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.strategies.contribution import Used

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Step:
    """One mini-batch of this worker, or of its island, in a round of several steps."""

    number: int  # in the run, from 0
    index: int  # in the round, from 0
    samples: int
    rate: float  # factor of the learning rate
    momentum: float  # factor of the momentum
    skip: bool  # nothing to apply: no samples, or not finite with train.nan = "skip" or under the loss scale
    gradient: torch.Tensor  # the mean gradient of the samples: the elements [exchange.low, exchange.high)
    used: Used = None  # the parameters with a gradient; None: all


@dataclass(frozen=True)
class Round:
    """One agreement among all workers."""

    number: int  # in the phase, from 0
    start: int  # the run's clock at the start of the round, in samples
    steps: int  # steps per worker
    samples: int  # of all workers
    share: float  # this worker's (its island's) weight in averages: by samples, unless the loss says otherwise
    divisor: float  # divides the sum of the gradient arenas to give the mean gradient (rounds of one step)
    rate: float  # factor of the learning rate
    momentum: float  # factor of the momentum
    last: bool  # the phase is known to end with this round
    skip: bool  # nothing may be applied: no samples, or not finite with train.nan = "skip" or under the loss scale
    used: Used = None  # the parameters with a gradient on any worker; None: all
