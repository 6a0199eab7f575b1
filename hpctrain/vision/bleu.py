"""BLEU (Papineni et al. 2002) of a model's captions: `evaluate = "captions"` in a job."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpctrain.data.loader import Batch
from hpctrain.data.vocabulary import tokenize
from hpctrain.errors import JobError, ModelError
from hpctrain.filenames import MOST_EXAMPLES
from hpctrain.models.examples import Example
from hpctrain.vision.captions import texts_of

ORDERS = (4, 1, 2, 3)  # BLEU-4 first: it is what a target and patience look at
TINY = 1e-12  # nltk's score is less, but not 0, if there is no common sequence of that many words


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """BLEU-4, -1, -2, -3 and sacreBLEU of a caption per picture, against all captions that people gave it; from 0 to 1.

    BLEU-n: nltk's corpus_bleu with equal weights for 1 to n words, without smoothing, of the words of `tokenize`.
    sacreBLEU: sacrebleu's corpus_bleu of the texts as they are, in lower case, with its tokenisation 13a. NaN without
    captions. Raises JobError if the packages are not installed.
    """
    corpus_bleu, sacrebleu = _packages()
    if not captions:
        return {name: float("nan") for name in (*(f"BLEU-{order}" for order in ORDERS), "sacreBLEU")}
    words, truth = [tokenize(text) for text in captions], [[tokenize(text) for text in each] for each in references]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no common sequence of four words
        found = corpus_bleu(truth, words, [(1 / order,) * order for order in ORDERS])
    most = max(map(len, references))
    streams = [[each[place] if place < len(each) else None for each in references] for place in range(most)]
    other = sacrebleu.corpus_bleu(captions, streams, lowercase=True, tokenize="13a").score / 100
    scores = (float(value) if value > TINY else 0.0 for value in found)
    return dict(zip((f"BLEU-{order}" for order in ORDERS), scores, strict=True)) | {"sacreBLEU": other}


def _packages() -> Any:
    try:
        import sacrebleu
        from nltk.translate.bleu_score import corpus_bleu
    except ImportError as error:
        raise JobError(f"BLEU needs nltk and sacrebleu ({error}): pip install 'hpctrain[captions]'") from None
    return corpus_bleu, sacrebleu


class CaptionScores:
    """An evaluation of models that describe pictures, on batches of `PictureSet`: BLEU of the captions that a search of
    width `beam` finds (1: greedy), and `loss`, the mean cross entropy of a word in people's captions."""

    def __init__(self, beam: int = 1) -> None:
        """Raises JobError."""
        if isinstance(beam, bool) or not isinstance(beam, int) or beam < 1:
            raise JobError(f"evaluate.beam = {beam!r}: expected a whole number of at least 1")
        _packages()
        self.beam = beam

    def start(self) -> None:
        """Reset."""
        self._found: list[tuple[str, list[str]]] = []  # the caption, and people's
        self._examples: list[Example] = []
        self._sum, self._weight = 0.0, 0.0

    def update(self, model: nn.Module, batch: Batch) -> None:
        """Add a batch. Raises ModelError for a model or batch of another kind."""
        inputs, describe = batch.inputs, getattr(model, "describe", None)
        if describe is None or not isinstance(inputs, Mapping) or "captions" not in inputs:
            raise ModelError(
                'captions are scored of models such as "captioner", on the validation and test samples of data sets '
                'named "captions"; name another evaluation'
            )
        total, weight = model(inputs)["loss"]
        self._sum, self._weight = self._sum + float(total), self._weight + float(weight)
        texts = describe(inputs["features"], self.beam)
        found = list(zip(texts, map(texts_of, inputs["captions"]), strict=True))
        self._show(found, inputs)
        self._found += found

    def _show(self, found: Sequence[tuple[str, list[str]]], inputs: Mapping[str, Tensor]) -> None:
        pictures = inputs["pictures"].cpu().numpy()
        for place, (text, truth) in enumerate(found[: MOST_EXAMPLES - len(self._examples)]):
            name = "".join(texts_of(inputs["name"][place]))
            picture = pictures[place] if place < len(pictures) else None
            self._examples.append(Example(name, picture, text=text, truth=truth))

    def examples(self) -> list[Example]:
        """The first pictures with the model's caption and people's."""
        return self._examples

    def state(self) -> dict[str, Any]:
        """The captions so far as JSON, and the sum and the weight of the loss."""
        text = np.frombuffer(json.dumps(self._found).encode(), np.uint8)
        return {"captions": torch.from_numpy(text.copy()), "sum": self._sum, "weight": self._weight}

    def merge(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replace this rank's captions by those of all ranks."""
        parts = (json.loads(bytes(state["captions"].numpy())) for state in states)
        self._found = [(text, truth) for part in parts for text, truth in part]
        self._sum, self._weight = (sum(state[name] for state in states) for name in ("sum", "weight"))

    def value(self) -> dict[str, float]:
        """BLEU-4, -1, -2, -3, sacreBLEU (see `bleu`) and loss."""
        loss = self._sum / self._weight if self._weight else float("nan")
        return bleu([text for text, _ in self._found], [truth for _, truth in self._found]) | {"loss": loss}
