"""The factor of the loss that keeps gradients in float16 from vanishing (train.precision = "mixed_float16")."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpctrain.replica.blocks import add_up
from hpctrain.strategies.base import Outcome
from hpctrain.trace.events import LossScaleChanged

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 2.0**16
MOST = 2.0**126  # its inverse is a normal float32 number
GROWS_AFTER = 2000  # steps


@dataclass
class LossScale:
    """Doubles after many steps without an overflow and halves after an overflow, like torch.amp.GradScaler's.

    Its factors are powers of 2, so that scaling and unscaling does not round gradients in float32. Workers that step
    together see the same outcomes, so they hold the same scale; elsewhere each worker has its own.
    """

    factor: float = FIRST
    good: int = 0  # steps since the factor last changed or a gradient last overflowed

    @property
    def to_blame(self) -> bool:
        """Whether an overflow may be due to the scale; at 1 it is an error."""
        return self.factor > 1.0

    def unscale(self, gradient: Tensor) -> bool:
        """Divide a stretch of the gradient by the factor, in one pass. Returns whether all elements are finite."""
        return add_up([gradient], gradient, self.factor)

    def follow(self, outcome: Outcome) -> LossScaleChanged | None:
        """Adapt the factor to a step's outcome. Returns the event if it changes."""
        if outcome.overflow:
            return self._change(max(1.0, self.factor / 2), "overflow")
        if outcome.result != "skipped":  # skipped: nothing is known, since the loss was not finite or had no samples
            self.good += 1
        if self.good >= GROWS_AFTER:
            return self._change(min(MOST, self.factor * 2), f"{GROWS_AFTER} steps without overflow")
        return None

    def _change(self, factor: float, why: str) -> LossScaleChanged | None:
        old, self.factor, self.good = self.factor, factor, 0
        return LossScaleChanged(old, factor, why) if factor != old else None

    def plain(self) -> dict[str, Any]:
        """The scale as plain values, for checkpoints and for the next phase."""
        return {"factor": self.factor, "good": self.good}

    def take(self, plain: dict[str, Any]) -> None:
        """Continue from these values."""
        self.factor, self.good = float(plain["factor"]), int(plain["good"])
