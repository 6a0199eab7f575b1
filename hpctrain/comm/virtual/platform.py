"""The platform of virtual ranks: nodes, the network between them, and a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hpctrain.comm.virtual.network import FreeNetwork, Network
from hpctrain.comm.virtual.scheduler import Scheduler

Compute = Callable[[int, str, int, float], int]
"""(rank, span kind, bytes, flops) -> nanoseconds that the span costs in virtual time."""


class Platform(Scheduler):
    """`nodes`: rank -> node index; `network`: how long messages take; `compute`: the cost of spans (None: free);
    `phantom`: arenas hold no memory, because only what operations cost is of interest."""

    def __init__(
        self, nodes: Sequence[int], network: Network | None, compute: Compute | None, isolate_torch: bool, phantom: bool
    ) -> None:
        super().__init__(isolate_torch)
        self.nodes = tuple(nodes)
        self.network: Network = network or FreeNetwork()
        self.compute = compute
        self.phantom = phantom
