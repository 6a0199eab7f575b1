"""Going on with a run: what is to be resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpctrain.errors import JobError
from hpctrain.sentences import value_text


@dataclass(frozen=True)
class Resume:
    """The run to go on with. A path alone, as in `train(job, resume="runs/digits-..."), is short for `Resume(path)`.

    `optimizer`: "keep" goes on with its state (momentum, Adam's moments); "reset" lets that begin anew.
    """

    folder: Path | str
    optimizer: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        """Raises JobError."""
        if self.optimizer not in ("keep", "reset"):
            raise JobError(f'Resume: optimizer = {value_text(self.optimizer)}: must be "keep" or "reset"')

    @classmethod
    def of(cls, value: Resume | Path | str | None) -> Resume | None:
        """What a caller may give for it."""
        return value if value is None or isinstance(value, Resume) else cls(value)
