"""Captions as numbers: how a text is split into words, and which number each word has."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpctrain.errors import DataError

PAD, START, END, UNKNOWN = range(4)
SPECIAL = 4  # how many tokens are no words
NEVER = (PAD, START, UNKNOWN)  # what no caption contains that a model makes
_APOSTROPHES = str.maketrans("", "", "'\u2019")


def tokenize(text: str) -> list[str]:
    """The words of a caption, of letters, digits and marks (Unicode's categories L, N and M), composed (NFC), in lower
    case and without apostrophes; everything else separates words, so languages without spaces have none of their own.
    """
    plain = unicodedata.normalize("NFC", text).lower().translate(_APOSTROPHES)
    words = "".join(each if unicodedata.category(each)[0] in "LNM" else " " for each in plain).split()
    return [word for word in words if any(map(str.isalnum, word))]


@dataclass(frozen=True)
class Vocabulary:
    """The words that a model knows, and what else a caption for another picture needs.

    Token SPECIAL + i is `words[i]`; the tokens before that are PAD, START, END and UNKNOWN. `length`: words in the
    longest caption. `pictures`: plain values that say how pictures become features.
    """

    words: tuple[str, ...]
    length: int
    pictures: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, captions: Iterable[str], min_count: int = 1, length: int | None = None, pictures: Mapping[str, Any] = {}
    ) -> Vocabulary:
        """The words that occur at least `min_count` times, the most frequent first, equally frequent ones sorted.

        `length`: None: that of the longest caption. Raises DataError if no word is left.
        """
        texts = [tokenize(text) for text in captions]
        counts = Counter(word for text in texts for word in text)
        words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        if not words:
            raise DataError(f"no word occurs {min_count} times in the training captions; choose a lower data.min_count")
        return cls(tuple(words), length or max(map(len, texts)), dict(pictures))

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return SPECIAL + len(self.words)

    def encode(self, captions: Sequence[str]) -> Tensor:
        """START, the words, END and padding of each caption: (n, length + 2) int64. What is longer is cut."""
        numbers = {word: SPECIAL + place for place, word in enumerate(self.words)}
        rows = torch.full((len(captions), self.length + 2), PAD, dtype=torch.int64)
        for row, text in zip(rows, captions, strict=True):
            known = [numbers.get(word, UNKNOWN) for word in tokenize(text)[: self.length]]
            row[: len(known) + 2] = torch.tensor([START, *known, END])
        return rows

    def decode(self, tokens: Sequence[int]) -> str:
        """The words up to END, with spaces between them."""
        texts = []
        for token in tokens:
            if token == END:
                break
            if token >= SPECIAL:
                texts.append(self.words[token - SPECIAL])
        return " ".join(texts)

    def packed(self) -> Tensor:
        """All of it as (bytes,) uint8: JSON."""
        text = json.dumps({"words": self.words, "length": self.length, "pictures": self.pictures}, sort_keys=True)
        return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).copy())

    @classmethod
    def unpacked(cls, packed: Tensor) -> Vocabulary:
        """The inverse of `packed`. Raises DataError for anything else."""
        try:
            values = json.loads(bytes(packed.cpu().numpy()))
            words, length, pictures = values["words"], values["length"], values["pictures"]
            if not all(isinstance(word, str) for word in words) or not words or not isinstance(pictures, dict):
                raise TypeError
            return cls(tuple(words), int(length), pictures)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError("the vocabulary in the model cannot be read; hpctrain did not write it") from None
