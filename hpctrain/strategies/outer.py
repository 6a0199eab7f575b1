"""The outer optimizer of DiLoCo (Douillard et al. 2023, algorithm 1): SGD with Nesterov's momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from hpctrain.options import Options
from hpctrain.replica.state import Section

if TYPE_CHECKING:
    import torch


class OuterOptions(Options):
    """The outer optimizer's options."""

    outer_lr: float = Field(0.7, gt=0, le=10, description="the outer learning rate; 1 and no momentum: local_sgd")
    outer_momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description='outer momentum (Nesterov\'s); 0 with codec = "topk", whose memory takes its place (SparseLoCo)',
    )


class OuterOptimizer:
    """Steps the parameters on which all agree, `anchor`, which begin as a copy of `values`. Its gradient is the mean of
    what the workers' steps have taken away from the anchor."""

    def __init__(self, options: OuterOptions, values: torch.Tensor) -> None:
        import torch

        from hpctrain.replica.tensors import as_array

        self._rate, self._momentum = options.outer_lr, options.outer_momentum
        self.anchor = values.clone()
        self._velocity = torch.zeros_like(values)
        self.section = Section(flat={"velocity": as_array(self._velocity)})

    def step(self, mean: torch.Tensor, low: int, high: int) -> torch.Tensor:
        """Step the elements [low, high) of the anchor, of which `mean` is the gradient. Returns them."""
        anchor, velocity = self.anchor[low:high], self._velocity[low:high]
        velocity.mul_(self._momentum).add_(mean)
        return anchor.sub_(mean, alpha=self._rate).sub_(velocity, alpha=self._rate * self._momentum)
