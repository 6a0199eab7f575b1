"""Beam search: the sequence of tokens that a model finds most likely, as far as a limited search can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Any], tuple[Tensor, Any]]  # tokens (m,) int64, state -> log probabilities (m, tokens), state


def beam_search(
    step: Step, state: tuple[Tensor, ...], start: int, end: int, length: int, width: int = 1, normalise: float = 1.0
) -> Tensor:
    """The best sequence of each of n batches of hypotheses: (n, length) int64, with `end` and then more of them where
    it is shorter.

    `state`: what `step` continues from, tensors (n, ...). `step` gives the log probabilities of the next token; -inf
    for what must not come. In each step the `width` best hypotheses of a batch are kept. A sequence that has ended
    stays one of them while no other is better. Hypotheses are compared by the sum of log probabilities, divided by
    (tokens, the end included) ** `normalise`: 0 prefers short sequences, 1 compares means (after Wu et al. 2016,
    section 7). `width` 1 is greedy search. Equal ones keep their order, so the result is deterministic.
    """
    n, device = len(state[0]), state[0].device
    state = tuple(part.repeat_interleave(width, 0) for part in state)
    last = torch.full((n * width,), start, dtype=torch.int64, device=device)
    found = torch.full((n * width, length), end, dtype=torch.int64, device=device)
    sums = torch.full((n, width), -torch.inf, dtype=torch.float64, device=device)
    sums[:, 0] = 0.0  # the others are copies of the first
    sizes, ended = torch.zeros_like(sums), torch.zeros(n, width, dtype=torch.bool, device=device)
    first = torch.arange(n, device=device)[:, None] * width
    for place in range(length):
        scores, state = step(last, state)
        tokens = scores.shape[1]
        scores = scores.double().view(n, width, tokens).masked_fill(ended[:, :, None], -torch.inf)
        scores[:, :, end] = torch.where(ended, 0.0, scores[:, :, end])
        totals = (sums[:, :, None] + scores).view(n, -1)
        lengths = (sizes + ~ended)[:, :, None].expand(n, width, tokens).reshape(n, -1)
        order = (totals / lengths**normalise).sort(dim=1, descending=True, stable=True).indices[:, :width]
        parent, last = order // tokens, (order % tokens).view(-1)
        sums, sizes, rows = totals.gather(1, order), lengths.gather(1, order), (first + parent).view(-1)
        state = tuple(part.index_select(0, rows) for part in state)
        found = found.index_select(0, rows)
        found[:, place] = last
        ended = (last == end).view(n, width)
        if bool(ended.all()):
            break
    best = (sums / sizes**normalise).sort(dim=1, descending=True, stable=True).indices[:, :1]
    return found[(first + best).view(-1)]
