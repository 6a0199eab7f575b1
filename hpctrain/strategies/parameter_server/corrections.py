"""Corrections for late gradients in a parameter server's asynchronous modes."""

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
    """DC-ASGD: g + lambda * g * g * (w_now - w_then), where g * g approximates the diagonal of the Hessian (Zheng et
    al. 2017, section 4; adaptive, section 6: lambda / sqrt(moving mean of g * g))."""

    def __init__(self, strength: float, mean_square: torch.Tensor | None) -> None:
        self._strength, self._mean_square = strength, mean_square

    def view(self) -> dict[str, Buffer]:
        """The state to save in a checkpoint, on the CPU, not copied if possible: moments of the shard's elements."""
        from hpctrain.replica.tensors import as_array, on_host

        return {} if self._mean_square is None else {MEAN_SQUARE: as_array(on_host(self._mean_square))}

    def load(self, moments: dict[str, Buffer]) -> None:
        """Continue from the result of `view`."""
        from hpctrain.replica.tensors import as_tensor

        if self._mean_square is not None and MEAN_SQUARE in moments:
            self._mean_square.copy_(as_tensor(moments[MEAN_SQUARE]))

    @classmethod
    def of(cls, options: ParameterServerOptions, values: torch.Tensor) -> DelayCompensation | None:
        """The compensation that the options select, for a shard with these parameters; None if they select none."""
        if options.delay_compensation == "none":
            return None
        if options.delay_compensation == "constant":
            return cls(options.delay_lambda or 0.04, None)
        return cls(options.delay_lambda or 2.0, values.new_zeros(values.shape))

    def correct(self, gradient: torch.Tensor, now: torch.Tensor, then: torch.Tensor, first: int) -> None:
        """Correct `gradient`, the shard's stretch that begins at `first`, in place. All tensors are flat and of equal
        length."""
        change = gradient.square()
        if self._mean_square is not None:
            mean_square = self._mean_square[first : first + gradient.numel()]
            mean_square.mul_(0.95).add_(change, alpha=0.05)
            change.div_((mean_square + 1e-7).sqrt_())
        gradient.add_(change.mul_(now - then), alpha=self._strength)


class RunningClip:
    """Scales down vectors longer than `longest` times the mean length of about the last ten.

    A long gradient that arrives late, after the parameters have moved on, cannot be trusted.
    """

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self._mean, self._seen = 0.0, 0

    def counters(self) -> list[float]:
        """The counters that a checkpoint saves."""
        return [self._mean, self._seen]

    def load(self, counters: Sequence[float]) -> None:
        """Continue from the result of `counters`."""
        self._mean, self._seen = counters[0], int(counters[1])

    def factor(self, length: float) -> float:
        """The scaling factor for the next gradient, of this length; lengths that are not finite are ignored."""
        if not math.isfinite(length):
            return 1.0
        self._seen += 1
        kept = length if self._seen == 1 else min(length, self._longest * self._mean)
        self._mean += max(0.1, 1.0 / self._seen) * (kept - self._mean)
        return kept / length if length > 0.0 else 1.0
