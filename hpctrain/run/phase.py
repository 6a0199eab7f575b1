"""Builds the parts of a `Phase`, for runs and for benches and tests that train without one."""

from __future__ import annotations

from typing import Any

import torch

from hpctrain.cluster import Roles
from hpctrain.comm.base import Communicator
from hpctrain.replica.layout import Layout
from hpctrain.replica.optimizer import OptimizerChoice
from hpctrain.replica.update import Update, make_update
from hpctrain.strategies.phase import Updating


def updating(optimizer: OptimizerChoice, layout: Layout, **keys: Any) -> Updating:
    """The updates of the job's optimizer; `keys`: further fields of `Updating`."""

    def make(values: torch.Tensor, low: int, high: int) -> Update:
        return make_update(optimizer, layout, values, low, high)

    return Updating(make, optimizer.elementwise, optimizer.adaptive, **keys)


def split_by_role(comm: Communicator, roles: Roles) -> tuple[Communicator, Communicator | None]:
    """A phase's own communicators: all ranks, and the workers (None on a dedicated server). Collective."""
    everyone = comm.split(0, comm.rank)
    assert everyone is not None
    return everyone, everyone.split(0 if comm.rank in roles.workers else None, comm.rank)
