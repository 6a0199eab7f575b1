"""A small decoder-only transformer (Vaswani et al. 2017; with normalisation first, as GPT-2, Radford et al. 2019)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.errors import ModelError
from hpctrain.models.arguments import share, whole

SPREAD = 0.02  # standard deviation of initial weights (GPT-2)


class CausalBlock(nn.Module):
    """Attention to earlier places, then a layer four times as wide, each added to its input: (n, length, width) -> the
    same. `depth`: how many blocks the model has."""

    def __init__(self, width: int, heads: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.before_attention, self.before_layer = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.mixed = _linear(width, 3 * width), _linear(width, width, depth)
        self.wide, self.narrow = _linear(width, 4 * width), _linear(4 * width, width, depth)

    def forward(self, values: Tensor) -> Tensor:
        """The block's output; see the class for shapes."""
        values = values + self._dropped(self.mixed(self._attended(self.before_attention(values))))
        return values + self._dropped(self.narrow(functional.gelu(self.wide(self.before_layer(values)))))

    def _attended(self, values: Tensor) -> Tensor:
        n, length, width = values.shape
        parts = self.queries_keys_values(values).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        queries, keys, known = parts.unbind()
        found = functional.scaled_dot_product_attention(queries, keys, known, is_causal=True)
        return found.transpose(1, 2).reshape(n, length, width)

    def _dropped(self, values: Tensor) -> Tensor:
        return functional.dropout(values, self.dropout, self.training) if self.dropout else values


class Transformer(nn.Module):
    """Scores of the next token at each place: (n, length) int64 below `tokens` -> (n, tokens, length), with the classes
    in dimension 1, as torch's cross entropy expects; length is at most `context`."""

    def __init__(self, tokens: int, context: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.context = context
        self.token, self.place = nn.Embedding(tokens, width), nn.Embedding(context, width)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=SPREAD)
        self.blocks = nn.Sequential(*(CausalBlock(width, heads, depth, dropout) for _ in range(depth)))
        self.norm, self.scores = nn.LayerNorm(width), _linear(width, tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """The scores; see the class for shapes. Raises ModelError if the input is longer than the context."""
        length = tokens.shape[1]
        if length > self.context:
            raise ModelError(
                f"the input has {length} tokens, but model.context = {self.context}: give both the same length "
                "(data.context)"
            )
        values = self.token(tokens) + self.place(torch.arange(length, device=tokens.device))
        scores: Tensor = self.scores(self.norm(self.blocks(values)))
        return scores.transpose(1, 2)


def transformer(
    tokens: int = 65, context: int = 64, width: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.0
) -> nn.Module:
    """(n, length) int64 -> (n, tokens, length), length up to `context`; 112,577 parameters with the defaults.

    `tokens`: how many there are, 65 characters in tinyshakespeare; `width`: values per place, a multiple of `heads`.
    """
    width, heads = whole("width", width), whole("heads", heads)
    if width % heads:
        raise ModelError(f"model.width = {width} is not a multiple of model.heads = {heads}, which share it equally")
    sizes = whole("tokens", tokens), whole("context", context), width, whole("depth", depth), heads
    return Transformer(*sizes, share("dropout", dropout))


def _linear(inputs: int, outputs: int, depth: int = 0) -> nn.Linear:
    """`depth`: of the model, if the layer's output is added to what came before: 2 `depth` such layers add up."""
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=SPREAD / math.sqrt(2 * depth) if depth else SPREAD)
    nn.init.zeros_(layer.bias)
    return layer
