"""Captions without a trained model: what a model's BLEU is to be compared with."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.vocabulary import tokenize
from hpctrain.vision.captions import CaptionSet, PictureSet


def frequent_words(train: CaptionSet, others: PictureSet) -> list[str]:
    """For every picture the most frequent words of the training captions, as many as a caption has on average."""
    texts = [tokenize(text) for text in training_captions(train)]
    counts = Counter(word for text in texts for word in text)
    words = sorted(counts, key=lambda word: (-counts[word], word))
    return [" ".join(words[: round(sum(map(len, texts)) / len(texts))])] * len(others)


def nearest_neighbour(train: CaptionSet, others: PictureSet) -> list[str]:
    """For each picture the first caption of the training picture whose features have the smallest angle to its own."""
    known, pictures = train.known, np.unique(train.pictures)
    own, theirs = (_unit(known.features[numbers]) for numbers in (others.numbers, pictures))
    return [known.captions[pictures[place]][0] for place in (own @ theirs.T).argmax(1)]


def training_captions(train: CaptionSet) -> list[str]:
    """All captions to train on."""
    return [text for picture in np.unique(train.pictures) for text in train.known.captions[picture]]


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of length 1 each."""
    found: NDArray[np.float32] = features / np.linalg.norm(features, axis=1, keepdims=True)
    return found
