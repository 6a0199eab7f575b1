"""A model that describes pictures in words, from features of the pictures (Tanti et al. 2018, the "merge" model)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.data.vocabulary import END, NEVER, PAD, SPECIAL, START, Vocabulary
from hpctrain.errors import ModelError
from hpctrain.models.arguments import share, whole
from hpctrain.models.decoding import beam_search

Continued = tuple[Tensor, Tensor, Tensor]  # what the picture shows; the LSTM's hidden state and cell, (n, width) each


class Captioner(nn.Module):
    """Scores of the next word at each place of a caption, from the picture's features and the words before it.

    The picture: features -> dropout -> a layer of `width` units. The text: embedding -> dropout -> LSTM, both `width`
    wide. Their sum -> a layer -> a score per word. `words`: tokens at most; those that the vocabulary does not have are
    not used, and get no gradient.

    The buffer `vocabulary` (`Vocabulary.packed`) comes with the first batch and is saved with the model, which refuses
    batches with another one.
    """

    vocabulary: Tensor
    used: Tensor  # tokens of the vocabulary

    def __init__(self, features: int, words: int, width: int, dropout: float) -> None:
        super().__init__()
        self.words = words
        self.dropout = dropout
        self.picture, self.token = nn.Linear(features, width), nn.Embedding(words, width, padding_idx=PAD)
        self.text = nn.LSTM(width, width, batch_first=True)
        self.both, self.scores = nn.Linear(width, width), nn.Linear(width, words)
        nn.init.uniform_(self.token.weight, -0.05, 0.05)  # as in Keras; torch's are twenty times as large
        self.register_buffer("vocabulary", torch.zeros(0, dtype=torch.uint8))
        self.register_buffer("used", torch.zeros((), dtype=torch.int64))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """The loss of all next words: the sum of their cross entropies, and how many they are.

        `batch`: `features` (n, features), `tokens` (n, length) or (n, captions, length) int64 (`Vocabulary.encode`; a
        row of PAD is no caption), `vocabulary` (bytes,) uint8. Raises ModelError if these do not fit the model.
        """
        self._check(batch)
        features, tokens = batch["features"], batch["tokens"]
        if tokens.dim() == 3:
            features, tokens = features.repeat_interleave(tokens.shape[1], 0), tokens.flatten(0, 1)
        tokens = tokens[:, : max(2, int((tokens != PAD).sum(1).max()))]  # the longest caption of the batch
        text, _ = self._encoded_text(tokens[:, :-1])
        counted = tokens[:, 1:] != PAD
        scores = self._scores(text[counted], self._encoded_picture(features)[counted.nonzero()[:, 0]])
        total = functional.cross_entropy(scores, tokens[:, 1:][counted], reduction="sum")
        return {"loss": (total, counted.sum())}

    def describe(self, features: Tensor, width: int = 1, normalise: float = 1.0) -> list[str]:
        """A caption for each picture of features (n, features), by beam search (see there) of that width.

        Raises ModelError if the features do not fit, or the model has not been trained.
        """
        known = self.known()
        self._check_features(features)
        picture = self._encoded_picture(features)
        hidden = picture.new_zeros(len(picture), self.text.hidden_size)
        found = beam_search(self._next, (picture, hidden, hidden), START, END, known.length + 1, width, normalise)
        return [known.decode(row) for row in found.tolist()]

    def known(self) -> Vocabulary:
        """The vocabulary that the model was trained with. Raises ModelError if there is none, DataError if it is not
        readable."""
        if not self.vocabulary.numel():
            raise ModelError("the model has no vocabulary, so it was not trained; train it first")
        return Vocabulary.unpacked(self.vocabulary)

    def _next(self, tokens: Tensor, state: Continued) -> tuple[Tensor, Continued]:
        """A step of beam search."""
        picture, hidden, cell = state
        text, (hidden, cell) = self._encoded_text(tokens[:, None], (hidden[None], cell[None]))
        scores = self._scores(text[:, 0], picture).float()
        scores[:, list(NEVER)] = -torch.inf
        return scores.log_softmax(1), (picture, hidden[0], cell[0])

    def _encoded_picture(self, features: Tensor) -> Tensor:
        return functional.relu(self.picture(functional.dropout(features, self.dropout, self.training)))

    def _encoded_text(
        self, tokens: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the text says so far, at each place: (n, length, width); and the LSTM's state after it."""
        text, state = self.text(functional.dropout(self.token(tokens), self.dropout, self.training), state)
        return text, state

    def _scores(self, text: Tensor, picture: Tensor) -> Tensor:
        """Of the vocabulary's tokens: (m, tokens), from (m, width) each."""
        weight, bias = (part[: int(self.used)] for part in (self.scores.weight, self.scores.bias))
        return functional.linear(functional.relu(self.both(text + picture)), weight, bias)

    def _check(self, batch: Mapping[str, Tensor]) -> None:
        given = batch["vocabulary"]
        if not self.vocabulary.numel():
            self._take(given)
        elif not torch.equal(self.vocabulary, given):
            own, other = self.known().tokens, Vocabulary.unpacked(given).tokens
            raise ModelError(
                f"the data's vocabulary ({other} tokens) is that of another run than this model's ({own} tokens), or "
                "its features were made in another way; give the run its own data: data.file and the data's other keys "
                "as they were"
            )
        self._check_features(batch["features"])

    def _take(self, packed: Tensor) -> None:
        tokens = Vocabulary.unpacked(packed).tokens
        if tokens > self.words:
            raise ModelError(
                f"the training captions have {tokens} tokens, but model.words = {self.words}; set model.words = "
                f"{tokens}, or a higher data.min_count, so that rare words are left out"
            )
        self.vocabulary = packed.clone()
        self.used.fill_(tokens)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """As torch does, but the vocabulary may have any length."""
        if isinstance(given := state.get(f"{prefix}vocabulary"), Tensor):
            self.vocabulary = self.vocabulary.new_zeros(given.shape)
        super()._load_from_state_dict(state, prefix, *rest)

    def _check_features(self, features: Tensor) -> None:
        if features.shape[1] != self.picture.in_features:
            raise ModelError(
                f"the pictures have {features.shape[1]} features each, but model.features = "
                f"{self.picture.in_features}; set model.features = {features.shape[1]}"
            )


def captioner(features: int = 1280, words: int = 1000, width: int = 256, dropout: float = 0.5) -> nn.Module:
    """A model of data sets named "captions": (n, `features`) and captions of at most `words` different tokens.

    The thesis's sizes are the defaults, but for `features` (4096 of VGG16) and `words` (all that its captions have).
    """
    sizes = whole("features", features), whole("words", words, SPECIAL + 1), whole("width", width)
    return Captioner(*sizes, share("dropout", dropout))
