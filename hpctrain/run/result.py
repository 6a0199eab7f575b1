"""The result of a run, for users."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hpctrain.errors import INTERRUPTED
from hpctrain.run.folder import PhaseSummary


@dataclass
class Result:
    """The result of a run. `model`: the trained model, as in model.safetensors, on every rank, in its own memory (after
    an interruption: on ranks that were workers).

    `metrics`: {"loss": ..., "metric": ...} on the test samples (or validation, if there are none), and "metric.NAME"
    for each entry of a metric that returns a dictionary; empty without either part, and after an interruption.
    `folder`: the run folder. `phases`: a summary of each phase.
    """

    model: nn.Module
    folder: Path
    metrics: dict[str, float]
    phases: list[PhaseSummary]
    samples: int
    interrupted: bool

    @property
    def status(self) -> int:
        """The exit status for a program that ends with this run, `sys.exit(result.status)` on all ranks: 130 after an
        interruption, which makes slurm/train.sbatch requeue its job; else 0."""
        return INTERRUPTED if self.interrupted else 0
