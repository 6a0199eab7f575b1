"""The command `hpctrain caption`: describes pictures with a run's model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hpctrain.errors import DataError, JobError
from hpctrain.ingest.picture import fitted, upright_picture
from hpctrain.models.captioner import Captioner
from hpctrain.text import escaped, shown, shown_path
from hpctrain.vision.features import Seeing, seeing
from hpctrain.vision.saved import saved_model


def main(run: Path, pictures: Sequence[Path], beam: int, weights: Path | None = None) -> int:
    """Print a caption for each picture, and the pictures that cannot be read on stderr. Returns the exit status, 2 if
    there were any. Raises HpctrainErrors."""
    if beam < 1:
        raise DataError(f"--beam {beam}: expected a whole number of at least 1")
    describer = Describer(trained(run), weights)
    problems = 0
    for path in pictures:
        try:
            print(f"{shown_path(path)}: {describer.caption(path, beam)}")
        except ValueError as error:
            problems += 1
            print(escaped(f"hpctrain: {shown_path(path)} {error}; left out"), file=sys.stderr)
    return 2 if problems else 0


def trained(run: Path) -> Captioner:
    """The model that a run has trained: the best that it kept, or the last. Raises JobError for a run of another kind,
    and errors of `saved_model`."""
    parts = saved_model(run)
    if not isinstance(parts.model, Captioner):
        raise JobError(
            f"{shown_path(run)} is a run of model.name = {shown(parts.job.model.name)!r}, which describes no pictures; "
            "expected a run of captioner"
        )
    return parts.model.cpu().float()


class Describer:
    """A trained model and the net that makes features as they were made for its training."""

    def __init__(self, model: Captioner, weights: Path | None = None) -> None:
        """`weights`: of the net, for one whose weights come with no package. Raises HpctrainErrors if they are missing
        or are not those that the model was trained with."""
        self.model, recipe = model, model.known().pictures
        try:
            name, digest = str(recipe["backbone"]), str(recipe["weights"])
            self._size, self._fit = int(recipe["size"]), str(recipe["fit"])
        except (KeyError, ValueError, TypeError):
            raise DataError("the model does not say how its features were made; train it again") from None
        self.seeing: Seeing = seeing(name, weights)
        if self.seeing.digest != digest:
            raise DataError(
                f"{shown_path(self.seeing.weights)}: the model was trained with features of {name} with other weights; "
                "name their file with --weights"
            )

    def caption(self, path: Path, beam: int) -> str:
        """Of the picture in that file. Raises ValueError, saying what is wrong, if it cannot be read."""
        picture = fitted(upright_picture(path), self._size, self._fit)
        pixels = np.frombuffer(picture.pixels, np.uint8).copy()
        features = self.seeing.of(pixels.reshape(1, self._size, self._size, 3))
        with torch.inference_mode():
            return self.model.describe(torch.from_numpy(features), beam)[0]
