"""The platform of virtual ranks: nodes, the network between them, and a clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from hpctrain.comm.virtual.flows import FlowNetwork
from hpctrain.comm.virtual.network import FreeNetwork, Network
from hpctrain.comm.virtual.scheduler import Scheduler

Compute = Callable[[int, str, int, float], int]
"""(rank, span kind, bytes, flops) -> nanoseconds that the span costs in virtual time."""

Collectives = Literal["messages", "loop"]

Manner = Literal["naps", "idles", "polls", "beside"]
"""How a rank waits: it looks now and then; the same where no long message moves; all the time, as MPI does within a
collective; or not by itself, because another part of the rank does."""


class Attention(Protocol):
    """What messages take of the ranks' processors. `naps`: waiting ranks look only now and then."""

    naps: bool

    def handled(self, rank: int, nbytes: int, messages: int = 1) -> None:
        """The rank has sent or received messages; that takes it time, from now on."""

    def waited(self, rank: int, since: int, manner: Manner) -> None:
        """The rank has waited since then. Returns when it has noticed the end."""


class Platform(Scheduler):
    """`nodes`: rank -> node index; `network`: how long messages take; `compute`: the cost of spans (None: free);
    `collectives`: by messages, or each as one loop where `loops` can; `phantom`: arenas hold no memory, because only
    what operations cost is of interest; `simulates`: the cluster that it stands for, described."""

    def __init__(
        self,
        nodes: Sequence[int],
        network: Network | FlowNetwork | None,
        compute: Compute | None,
        isolate_torch: bool,
        collectives: Collectives = "messages",
        phantom: bool = False,
        simulates: str = "",
    ) -> None:
        super().__init__(isolate_torch)
        self.nodes = tuple(nodes)
        self.network: Network = FreeNetwork()  # unused where there are `flows`
        self.flows: FlowNetwork | None = None
        if isinstance(network, FlowNetwork):
            network.begin(self, self.nodes)
            self.flows, self.eager_limits = network, (network.between.eager_limit, network.within.eager_limit)
        else:
            self.network = network or self.network
            self.eager_limits = (self.network.eager_limit, self.network.eager_limit)  # between nodes, within one
        self.compute = compute
        self.phantom, self.simulates = phantom, simulates
        self.collectives = collectives
        self.attention: Attention | None = None

    def handled(self, rank: int, nbytes: int) -> None:
        """The rank has sent or received a message."""
        if self.attention is not None:
            self.attention.handled(rank, nbytes)

    def notice(self, rank: int, since: int, manner: Manner) -> None:
        """The rank has waited since then. Returns when it has noticed the end."""
        if self.attention is not None:
            self.attention.waited(rank, since, manner)

    def sleep_until(self, end: int) -> None:
        """Let the current task sleep."""
        task = self.current
        assert task is not None
        if end > self.time:
            self.wake_at(end, task)
        while self.time < end:
            self.block("the end of a sleep")
