"""Beam search against brute force, and what competes with what."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hpctrain.models.decoding import beam_search


def table(seed: int, tokens: int, depth: int) -> Any:
    """Log probabilities that depend on all tokens so far: a step for `beam_search`, and the same as a function."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, tokens**depth, tokens, generator=generator, dtype=torch.float64).log_softmax(-1)

    def step(last: Tensor, state: Any) -> Any:
        batch, path = state
        path = (path * tokens + last) % tokens**depth
        return scores[batch, path], (batch, path)

    def follow(batch: int, sequence: Sequence[int], start: int) -> float:
        path, total, last = 0, 0.0, start
        for token in sequence:
            path = (path * tokens + last) % tokens**depth
            total += float(scores[batch, path, token])
            last = token
        return total

    return step, follow


def all_sequences(tokens: int, length: int, end: int) -> list[tuple[int, ...]]:
    """Those that end, and those that are full."""
    others = [token for token in range(tokens) if token != end]
    found = [(*words, end) for size in range(length) for words in itertools.product(others, repeat=size)]
    return found + list(itertools.product(others, repeat=length))


@pytest.mark.parametrize("normalise", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_as_wide_as_everything_finds_the_best_of_all(seed: int, normalise: float) -> None:
    tokens, length, start, end = 3, 4, 0, 2
    step, follow = table(seed, tokens, 5)
    state = (torch.tensor([0, 1]), torch.zeros(2, dtype=torch.int64))
    found = beam_search(step, state, start, end, length, width=tokens**length, normalise=normalise)
    for batch in range(2):
        def score(each: Sequence[int], batch: int = batch) -> float:
            return follow(batch, each, start) / len(each) ** normalise

        best = max(all_sequences(tokens, length, end), key=score)
        assert found[batch].tolist() == [*best, *[end] * (length - len(best))]


def test_width_one_is_greedy_and_wider_is_no_worse() -> None:
    tokens, length, start, end = 6, 5, 0, 5
    step, follow = table(1, tokens, 5)
    state = (torch.tensor([0, 1, 1]), torch.zeros(3, dtype=torch.int64))
    greedy = beam_search(step, state, start, end, length)
    last, now, wanted = torch.zeros(3, dtype=torch.int64), state, torch.full((3, length), end)
    going = torch.ones(3, dtype=torch.bool)
    for place in range(length):
        scores, now = step(last, now)
        last = scores.argmax(1)
        wanted[going, place] = last[going]
        going &= last != end
    assert torch.equal(greedy, wanted)
    assert torch.equal(greedy[1], greedy[2])

    def best(rows: Tensor) -> float:
        row = rows[0].tolist()
        return follow(0, row[: row.index(end) + 1] if end in row else row, start)

    wide = beam_search(step, state, start, end, length, width=200, normalise=0.0)
    assert best(wide) > best(greedy)


def test_unfinished_captions_compete_by_their_means() -> None:
    """The one that has ended would win by its sum in the second step; the best of all is found only without it."""
    end, a, b, c = range(4)
    chances = {(): {end: -1.0, a: -1.2}, (a,): {b: -0.6, c: -0.7}, (a, b): {end: -3.0}, (a, c): {end: -0.1}}

    def step(tokens: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """The state is the tokens so far, -1 before the first."""
        so_far = torch.cat([state[0], tokens[:, None]], 1)
        scores = torch.full((len(tokens), 4), -torch.inf)
        for row, words in zip(scores, so_far[:, 2:].tolist(), strict=True):
            for token, chance in chances.get(tuple(words), {}).items():
                row[token] = chance
        return scores, (so_far,)

    begin = torch.full((1, 1), -1)
    assert beam_search(step, (begin,), -1, end, 4, width=2)[0].tolist()[:3] == [a, c, end]
    assert beam_search(step, (begin,), -1, end, 4, width=2, normalise=0.0)[0].tolist()[:1] == [end]
