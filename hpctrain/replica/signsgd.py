"""Updates by the sign of the gradient alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class SignSGD(torch.optim.Optimizer):
    """signSGD (Bernstein et al. 2018, algorithm 1): each element moves by `lr`, against the sign of its gradient; 0
    stays. With the codec demo and codec.decay it is DeMo's update (Peng et al. 2024, algorithm 1).

    `weight_decay`: decoupled, as AdamW's: parameters shrink by lr * weight_decay.
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float = 1e-3, weight_decay: float = 0.0
    ) -> None:
        if not lr >= 0.0 or not weight_decay >= 0.0:
            raise ValueError(f"lr and weight_decay must not be negative; given: {lr}, {weight_decay}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step. `closure`: not called; arenas have the gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    parameter.add_(parameter.grad.sign(), alpha=-group["lr"])
