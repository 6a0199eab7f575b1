"""A model trained on random data, phase by phase and without a session: shared by benches of strategies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpctrain.clock.decisions import Conductor
from hpctrain.cluster import assign_roles
from hpctrain.comm.base import Communicator
from hpctrain.models.mlp import mlp
from hpctrain.models.resnet18 import resnet18
from hpctrain.replica.arenas import Placement
from hpctrain.replica.optimizer import OptimizerChoice
from hpctrain.replica.replica import Replica
from hpctrain.run.phase import split_by_role, updating
from hpctrain.strategies.base import Strategy
from hpctrain.strategies.phase import Dealing, Members, Phase

MLP, RESNET = "mlp, 10.0 M, batch 32", "resnet18 at 32x32, 11.2 M, batch 16"
HIDDEN = [2048, 2048, 2048]
ENDLESS = 2**62


@dataclass(frozen=True)
class Load:
    """A model, trained on `batch` random inputs of shape `inputs` in ten classes, for `blocks` times `steps` steps;
    `unmeasured`: steps at the start of each block that touch fresh memory."""

    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    batch: int
    steps: int
    blocks: int
    unmeasured: int = 2


LARGE = Load(lambda: mlp(784, 10, HIDDEN), (784,), 32, steps=8, blocks=8)
LOADS = {MLP: LARGE, RESNET: Load(lambda: resnet18(), (3, 32, 32), 16, steps=2, blocks=6, unmeasured=1)}


class Workload:
    """One model on every rank of `comm`, trained by SGD. `autocast`: computes in that type, as mixed precision does."""

    def __init__(
        self,
        comm: Communicator,
        load: Load,
        momentum: float,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.comm, self.load, self.device, self._autocast = comm, load, torch.device(device), autocast
        self.replica = Replica(load.build().to(self.device))
        self.choice = OptimizerChoice.of(torch.optim.SGD, {"lr": 1e-4, "momentum": momentum}, True, self.device)
        self.inputs = torch.randn(load.batch, *load.inputs, device=self.device)
        self.targets = torch.randint(0, 10, (load.batch,), device=self.device)

    def begin(self, strategy: Strategy, total: int = ENDLESS) -> Phase:
        """A phase of `total` samples for `strategy`, which has yet to join it; places the arenas. Collective."""
        replica = self.replica
        roles = assign_roles(self.comm.nodes, *type(strategy).roles(strategy.options))
        comm, workers = split_by_role(self.comm, roles)
        # Otherwise the strategy would exchange messages although it was asked to share memory.
        placement: Placement = strategy.needs.placement(comm.nodes) if self.device.type == "cpu" else "rank"
        if placement != "rank" and comm.can_share(2 * replica.layout.length * 4) is not None:
            placement = "rank"
        replica.place(comm, placement)
        return Phase(
            0,
            Members(comm, workers, roles, placement),
            replica,
            updating(self.choice, replica.layout),
            Dealing(self.load.batch, queue="shared", epoch=total),
            Conductor(total, 0, 0, None),
        )

    def end(self, phase: Phase) -> None:
        """End the phase after all ranks have left it. Collective."""
        self.replica.release()
        if phase.workers is not None:
            phase.workers.free()
        phase.comm.free()

    def compute(self) -> float:
        """Run forward and backward; return the loss."""
        self.replica.gradient.zero_()
        loss = self.loss()
        loss.backward()
        return float(loss.detach())

    def loss(self) -> torch.Tensor:
        """Run forward."""
        with torch.autocast(self.device.type, self._autocast, enabled=self._autocast is not None):
            return nn.functional.cross_entropy(self.replica.model(self.inputs), self.targets)


class Alone(Strategy):
    """No exchange: every process trains independently."""

    def join(self, phase: Phase, state: Any = None) -> None:
        self.replica = phase.replica
        self.update = phase.updating.make(phase.replica.values, 0, phase.replica.layout.length)

    def step(self, samples: int, loss: float) -> Any:
        self.update.apply(self.replica.gradient, 1.0)
