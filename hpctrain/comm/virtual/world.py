"""Runs a function on many virtual ranks. Deterministic.

`World(size).run(function)` calls `function(communicator)` once per rank. A rank runs until it must wait; then the next
runnable rank runs, in the order in which they became runnable. Time passes only in messages (according to `network`),
in spans of the caller (according to `compute`) and in `sleep`. If no rank can continue and no event is pending,
`DeadlockError` lists what each rank waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from hpctrain.comm.virtual.communicator import VirtualCommunicator
from hpctrain.comm.virtual.flows import FlowNetwork
from hpctrain.comm.virtual.network import Network
from hpctrain.comm.virtual.platform import Collectives, Compute, Platform
from hpctrain.comm.virtual.shared import VirtualGroup
from hpctrain.trace.recorder import NullRecorder, Recorder


class World(Platform):
    """`size` virtual ranks on `nodes` (rank -> node index; default: all on one).

    `collectives`: "loop" is faster, and takes the same virtual time within the limits that `loops` states; a collective
    leaves one span per rank.
    `phantom`: arenas hold no memory (`comm.phantom`): for costs without numbers. `simulates`: the description of the
    cluster that the ranks stand for; their runs then write traces.
    `isolate_torch`: save and restore torch's grad mode, autocast and CPU random state at every switch between ranks.
    Attributes after a run: `time` (virtual nanoseconds), `resumptions` (the number of switches between ranks).
    """

    def __init__(
        self,
        size: int,
        nodes: Sequence[int] | None = None,
        network: Network | FlowNetwork | None = None,
        compute: Compute | None = None,
        recorders: Sequence[Recorder] | None = None,
        isolate_torch: bool = True,
        collectives: Collectives = "messages",
        phantom: bool = False,
        simulates: str = "",
    ) -> None:
        places = nodes if nodes is not None else (0,) * size
        super().__init__(places, network, compute, isolate_torch, collectives, phantom, simulates)
        self.size = size
        self.recorders = recorders

    def run(self, function: Callable[[VirtualCommunicator], Any]) -> list[Any]:
        """Run all ranks until they end; returns their results in rank order.

        Raises the first exception of a rank, or DeadlockError.
        """
        group = VirtualGroup(self.nodes, tuple(range(self.size)), 1)
        recorders = self.recorders or [NullRecorder()] * self.size
        comms = [VirtualCommunicator(self, group, rank, recorders[rank]) for rank in range(self.size)]
        return self.run_all([(f"rank {comm.rank}", partial(function, comm)) for comm in comms])
