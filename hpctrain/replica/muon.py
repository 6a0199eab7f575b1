"""Muon for the matrices of a model, AdamW for all else, under one learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration; Jordan et al. 2024
RMS = 0.2  # of an update's elements, about that of AdamW's; Liu et al. 2025, section 2.2


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), as used inside DiLoCo by MuLoCo (arXiv 2505.23725).

    Parameters of two or more dimensions (kernels as matrices of their outputs) are updated by their momentum made
    orthogonal, times 0.2 * sqrt(the larger side), so that the learning rate and weight decay of AdamW suit both (Liu et
    al. 2025, arXiv 2502.16982). Others are updated by AdamW, as are those of groups with `matrices = False`: embeddings
    and the last layer are often better off so.

    `momentum`, `nesterov`, `steps` (of the iteration): Muon's; `betas`, `eps`: AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        matrices: bool = True,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError("lr and weight_decay must be at least 0, momentum and betas from 0 to below 1")
        if steps < 1:
            raise ValueError(f"steps = {steps}: must be at least 1")
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "steps": steps,
            "betas": tuple(betas), "eps": eps, "matrices": matrices,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                    matrix = group["matrices"] and parameter.dim() >= 2
                    (self._muon if matrix else self._adam)(parameter, parameter.grad, group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity = state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        direction = gradient.lerp(velocity, momentum) if group["nesterov"] else velocity
        matrix = orthogonal(direction.reshape(len(parameter), -1), group["steps"])
        scale = RMS * math.sqrt(max(matrix.shape))
        parameter.add_(matrix.view_as(parameter), alpha=-group["lr"] * scale)

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (first, second) = self.state[parameter], group["betas"]
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        steps = float(state["step"])
        mean = state["exp_avg"].lerp_(gradient, 1.0 - first)
        square = state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1.0 - second)
        size = square.div(1.0 - second**steps).sqrt_().add_(group["eps"])
        parameter.addcdiv_(mean, size, value=-group["lr"] / (1.0 - first**steps))


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """A matrix with the same singular vectors whose singular values are near 1 (between about 0.7 and 1.2).

    Newton-Schulz iteration, in bfloat16 on a GPU, whose cores are made for it, otherwise in the matrix' own dtype.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    found = matrix if wide else matrix.mT
    if matrix.device.type == "cuda":
        found = found.bfloat16()
    found = found / found.norm().clamp_min(1e-7)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found if wide else found.mT).to(matrix.dtype)
