"""Clipping by global norm."""

from __future__ import annotations


def clip_factor(squares: float, limit: float) -> float:
    """The factor that scales a vector with the sum of squares `squares` to a norm of at most `limit`.

    Pascanu et al. 2013, as in torch.nn.utils.clip_grad_norm_.
    """
    return min(1.0, limit / (squares**0.5 + 1e-6))
