"""The results of a study: one small JSON file per run, so that it can be interrupted, divided and compared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from hpctrain.errors import DataError
from hpctrain.study.case import Case

Figures = dict[str, Any]


class Kept:
    """Results in `folder`: FOLDER/SETTING/ROW.SEED.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, case: Case) -> Figures | None:
        """Of that run; None if there is none, or if the job or its keys were others. Raises DataError."""
        path = self._path(case)
        if not path.exists():
            return None
        try:
            found: Figures = json.loads(path.read_text())
            return found if found["digest"] == case.digest else None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is no result of a study ({error}); remove it, and start the study again") from None

    def keep(self, case: Case, figures: Figures) -> None:
        """Write a result, whole or not at all."""
        about = {"setting": case.setting.name, "row": case.row.name, "seed": case.seed, "digest": case.digest}
        self.note(case.name, {**about, **figures})

    def note(self, name: str, figures: Figures) -> None:
        """Write FOLDER/NAME.json, whole or not at all."""
        path = self.folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(figures, indent=1) + "\n")
        fresh.replace(path)

    def frame(self, cases: Iterable[Case]) -> pd.DataFrame:
        """The results that there are, a row per run."""
        return pd.DataFrame([found for case in cases if (found := self.find(case)) is not None])

    def _path(self, case: Case) -> Path:
        return self.folder / f"{case.name}.json"
