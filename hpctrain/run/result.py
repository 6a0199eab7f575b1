"""What users get of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hpctrain.run.folder import PhaseSummary


@dataclass
class Result:
    """What a run gave. `model`: trained, as in model.safetensors, on every rank, in memory of its own (after an
    interruption: on ranks that were workers).

    `metrics`: {"loss": ..., "metric": ...} of the test part (or validation, without one), and "metric.NAME" of each
    entry of a metric that returns a dictionary; empty where there is neither part, and after an interruption. `folder`:
    the run folder. `phases`: what became of each.
    """

    model: nn.Module
    folder: Path
    metrics: dict[str, float]
    phases: list[PhaseSummary]
    samples: int
    interrupted: bool
