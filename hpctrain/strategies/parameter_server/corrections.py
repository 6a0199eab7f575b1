"""What a parameter server's asynchronous modes do about gradients that come late."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from hpctrain.comm.base import Buffer
    from hpctrain.strategies.parameter_server.options import ParameterServerOptions

MEAN_SQUARE = "mean square of the gradient"


class DelayCompensation:
    """DC-ASGD: g + lambda * g * g * (w_now - w_then), g * g standing for the diagonal of the Hessian
    (Zheng et al. 2017, section 4; adaptive, section 6: lambda / sqrt(moving mean of g * g))."""

    def __init__(self, strength: float, mean_square: torch.Tensor | None) -> None:
        self._strength, self._mean_square = strength, mean_square

    def view(self) -> dict[str, Buffer]:
        """What a checkpoint must keep, as it is, on the CPU: moments of the shard's elements."""
        from hpctrain.replica.tensors import as_array

        return {} if self._mean_square is None else {MEAN_SQUARE: as_array(self._mean_square.cpu())}

    def load(self, moments: dict[str, Buffer]) -> None:
        """Go on from what `view` gave."""
        from hpctrain.replica.tensors import as_tensor

        if self._mean_square is not None and MEAN_SQUARE in moments:
            self._mean_square.copy_(as_tensor(moments[MEAN_SQUARE]))

    @classmethod
    def of(cls, options: ParameterServerOptions, values: torch.Tensor) -> DelayCompensation | None:
        """As the options have it, for a shard of these parameters; None: none is wanted."""
        if options.delay_compensation == "none":
            return None
        if options.delay_compensation == "constant":
            return cls(options.delay_lambda or 0.04, None)
        return cls(options.delay_lambda or 2.0, values.new_zeros(values.shape))

    def correct(self, gradient: torch.Tensor, now: torch.Tensor, then: torch.Tensor) -> None:
        """In place; all flat, of one length."""
        change = gradient.square()
        if self._mean_square is not None:
            self._mean_square.mul_(0.95).add_(change, alpha=0.05)
            change.div_((self._mean_square + 1e-7).sqrt_())
        gradient.add_(change.mul_(now - then), alpha=self._strength)


class RunningClip:
    """Scales down what is longer than `longest` times the mean length of about the last ten.

    A long gradient that comes late, where the parameters have moved on, is not to be trusted.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._mean, self._seen = 0.0, 0

    def counters(self) -> list[float]:
        """What a checkpoint must keep."""
        return [self._mean, self._seen]

    def load(self, counters: Sequence[float]) -> None:
        """Go on from what `counters` gave."""
        self._mean, self._seen = counters[0], int(counters[1])

    def factor(self, length: float) -> float:
        """For the next gradient, of this length; one that is not finite counts for nothing."""
        if not math.isfinite(length):
            return 1.0
        self._seen += 1
        kept = length if self._seen == 1 else min(length, self._longest * self._mean)
        self._mean += max(0.1, 1.0 / self._seen) * (kept - self._mean)
        return kept / length if length > 0.0 else 1.0
