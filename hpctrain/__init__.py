"""Train PyTorch models on MPI and Slurm clusters with the synchronisation strategy that is fastest there.

Importing this package does not initialise MPI or CUDA, and does not load torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain.errors import HpctrainError
    from hpctrain.job import Job
    from hpctrain.models.examples import Box, Example
    from hpctrain.run.api import Result, Session, session, train
    from hpctrain.run.resume import Resume

__version__ = "0.1.0"
__all__ = ["Box", "Example", "HpctrainError", "Job", "Result", "Resume", "Session", "session", "train"]

_WHERE = {
    "Box": "hpctrain.models.examples",
    "Example": "hpctrain.models.examples",
    "HpctrainError": "hpctrain.errors",
    "Job": "hpctrain.job",
    "Result": "hpctrain.run.api",
    "Resume": "hpctrain.run.resume",
    "Session": "hpctrain.run.api",
    "session": "hpctrain.run.api",
    "train": "hpctrain.run.api",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hpctrain' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name]), name)
