"""The command `hpctrain predict`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.errors import DataError
from hpctrain.ingest.picture import FITS, opened_picture
from hpctrain.output import make_folder, output_file, output_text
from hpctrain.text import escaped, shown_path
from hpctrain.vision.drawing import drawn
from hpctrain.vision.predict import Detection, Predictor


@dataclass(frozen=True)
class PredictRequest:
    """What a user asked for. `json`: a file that also gets the detections; `size`, `fit`: see `Predictor`."""

    run: Path
    pictures: Sequence[Path]
    output: Path
    threshold: float
    json: Path | None = None
    size: int | None = None
    fit: str | None = None

    def check(self) -> None:
        """Raise DataError for what cannot be done."""
        if not 0 <= self.threshold <= 1:
            raise DataError(f"--threshold {self.threshold:g}: expected a score from 0 to 1")
        if self.size is not None and self.size < 1:
            raise DataError(f"--size {self.size}: expected a number of pixels, at least 1")
        if self.fit is not None and self.fit not in FITS:
            raise DataError(f"--fit {self.fit}: expected {' or '.join(FITS)}")
        if self.json is not None and (self.json.is_dir() or not self.json.absolute().parent.is_dir()):
            raise DataError(f"--json {self.json}: expected the name of a file to write, in a folder that exists")
        self._check_names()

    def drawing(self, picture: Path) -> Path:
        """The file for the picture with its boxes."""
        return self.output / f"{picture.stem}.png"

    def _check_names(self) -> None:
        """No file may be written twice, or replace one of the pictures."""
        given = {picture.resolve() for picture in self.pictures}
        taken: dict[Path, Path] = {}
        for picture in self.pictures:
            drawing = self.drawing(picture).resolve()
            if drawing in given:
                raise DataError(f"{shown_path(picture)}: this would replace {drawing}; choose another folder with -o")
            if taken.setdefault(drawing, picture).resolve() != picture.resolve():
                raise DataError(
                    f"{shown_path(taken[drawing])} and {shown_path(picture)} have the same name, so their boxes would "
                    "be in one file; call the command for each of their folders"
                )


def main(request: PredictRequest) -> int:
    """Draw boxes onto all pictures, with a line for each. Returns the exit status.

    Pictures that cannot be read are left out and reported at the end. Raises HpctrainErrors.
    """
    request.check()
    predictor = Predictor(request.run, request.size, request.fit)
    make_folder(request.output)
    rows, problems = list[dict[str, Any]](), list[str]()
    for picture in request.pictures:
        try:
            found = _find(request, predictor, picture)
        except ValueError as error:
            problems.append(f"{shown_path(picture)} {error}")
            rows.append({"picture": str(picture), "problem": str(error)})
            continue
        print(f"{shown_path(picture)}: {_counts(found)}", flush=True)
        rows.append({"picture": str(picture), "detections": [_row(each) for each in found]})
    if request.json is not None:
        with output_text(request.json) as file:
            json.dump({"run": str(request.run), "threshold": request.threshold, "pictures": rows}, file, indent=1)
            file.write("\n")
    if problems:
        raise DataError(f"{len(problems)} of {len(request.pictures)} pictures left out: {'; '.join(problems)}")
    return 0


def _find(request: PredictRequest, predictor: Predictor, path: Path) -> list[Detection]:
    """Detect and draw. Raises ValueError for a picture that cannot be read."""
    picture = opened_picture(path)
    found = predictor.detections(picture, request.threshold)
    with output_file(request.drawing(path)) as file:
        drawn(picture, found).save(file, "PNG")
    return found


def _counts(found: Sequence[Detection]) -> str:
    """For people: "12 RBC, 1 WBC"."""
    if not found:
        return "nothing found"
    counts = Counter(each.label for each in found)
    return ", ".join(f"{count} {escaped(label)}" for label, count in sorted(counts.items()))


def _row(found: Detection) -> dict[str, Any]:
    row = asdict(found)
    return {"class": row["label"], "score": round(found.score, 4), "box": [round(value, 1) for value in found.box]}
