"""How ranks make up for what their messages leave out: by error feedback, momentum correction, or differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from hpctrain.codecs.base import Addend

if TYPE_CHECKING:
    from hpctrain.codecs.wire import WireCodec

VELOCITY, SUM = "velocity", "sum"


class Feedback:
    """Error feedback (Seide et al. 2014; Karimireddy et al. 2019): what a message leaves out, `Addend.rest`, is added
    to the next values.

    `decay`: what it is multiplied with before. With less than 1 the rest is a momentum from which what has been sent is
    subtracted, as in DeMo (Peng et al. 2024) and SparseLoCo (Sarfi et al. 2025). `keeps`: the arrays that each rank
    keeps besides, one value for each element, at least float32 (`Addend.kept`).
    """

    keeps: ClassVar[tuple[str, ...]] = ()

    def __init__(self, decay: float = 1.0) -> None:
        self.decay = decay

    def mix(self, addend: Addend) -> None:
        """Make of this rank's values what is to be written."""
        assert addend.rest is not None
        addend.values.add_(addend.rest, alpha=addend.carry * self.decay)

    def written(self, addend: Addend, codec: WireCodec, message: torch.Tensor) -> None:
        """The message has been written, and the rest is what it leaves out."""

    def arrived(self, addend: Addend) -> None:
        """Make of the sum of all messages, which is in the values, the sum of what ranks mean."""


class MomentumCorrection(Feedback):
    """Deep Gradient Compression (Lin et al. 2018, algorithm 1 and section 3.2): each rank accumulates the velocities of
    momentum SGD, not gradients, and sends the largest sums. The velocity of what has been sent becomes 0 (momentum
    factor masking), so that late gradients do not push twice. The job's optimizer is plain SGD.
    """

    keeps = (VELOCITY,)

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum

    def mix(self, addend: Addend) -> None:
        assert addend.rest is not None
        velocity = addend.kept[VELOCITY]
        velocity.mul_(self._momentum * addend.carry).add_(addend.values)
        addend.values.copy_(velocity).add_(addend.rest, alpha=addend.carry)

    def written(self, addend: Addend, codec: WireCodec, message: torch.Tensor) -> None:
        velocity = addend.kept[VELOCITY]
        sent = torch.empty_like(velocity)
        codec.decode(message, sent)
        velocity.masked_fill_(sent != 0, 0.0)


class Differences(Feedback):
    """EF21-SGDM (Fatkhullin, Tyurin and Richtarik 2023, algorithm 1; without momentum EF21: Richtarik, Sokolov and
    Fatkhullin 2021): each rank has a mean of its gradients, v = momentum v + (1 - momentum) gradient, which begins with
    the first gradient, and an estimate of v that all could know. A message has the difference between the two, as far
    as it goes, and moves the estimate. What arrives is the sum of all estimates; each rank keeps it, with the same
    bits.

    The estimate itself is not stored: it is v less the rest.
    """

    keeps = (VELOCITY, SUM)

    def __init__(self, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum

    def mix(self, addend: Addend) -> None:
        assert addend.rest is not None
        mean, values, momentum = addend.kept[VELOCITY], addend.values, self._momentum if addend.begun else 0.0
        mean.mul_(addend.carry)
        values.sub_(mean).mul_(1.0 - momentum)
        mean.add_(values)
        values.add_(addend.rest, alpha=addend.carry)

    def arrived(self, addend: Addend) -> None:
        total = addend.kept[SUM]
        total.mul_(addend.carry).add_(addend.values)
        addend.values.copy_(total)
