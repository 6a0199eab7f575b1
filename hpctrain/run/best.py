"""The best evaluation of a run so far, by `train.keep_best`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import ModelError
from hpctrain.run.evaluate import Evaluation
from hpctrain.text import did_you_mean


@dataclass
class Best:
    """`name`: which value counts. `value`: the best so far, of the evaluation at the cursor `samples`; None: none."""

    name: str
    higher_is_better: bool
    value: float | None = None
    samples: int | None = None

    def improves(self, found: Evaluation, samples: int) -> bool:
        """Whether the evaluation at the cursor `samples` is the best so far, which it is from then on. Raises
        ModelError, on all workers, if it has no value of that name."""
        value = found.named(self.name)
        if value is None:
            error = ModelError(
                f"train.keep_best = {self.name!r}{did_you_mean(self.name, found.names)}: the evaluation gives "
                f"{', '.join(found.names)}"
            )
            error.everywhere = True
            raise error
        sign = 1.0 if self.higher_is_better else -1.0
        if math.isnan(value) or (self.value is not None and sign * (value - self.value) <= 0.0):
            return False
        self.value, self.samples = value, samples
        return True

    def plain(self) -> dict[str, Any]:
        """For checkpoints."""
        return dict(vars(self))

    def take(self, plain: dict[str, Any] | None) -> None:
        """Continue from an earlier `plain`, unless that is about another value."""
        if plain is not None and (plain["name"], plain["higher_is_better"]) == (self.name, self.higher_is_better):
            self.value, self.samples = plain["value"], plain["samples"]

    def forget(self) -> None:
        """There is no model of the best evaluation any more: the next one is the best."""
        self.value = self.samples = None
