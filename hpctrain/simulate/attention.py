"""What waiting and messages take of the ranks' processors."""

from __future__ import annotations

from collections.abc import Sequence

from hpctrain.comm.virtual.platform import Manner, Platform
from hpctrain.comm.waiting import nap
from hpctrain.simulate.calibration import HandlingCosts
from hpctrain.simulate.passes import Processor


class WaitingRanks:
    """See `Attention`. A waiting rank handles messages meanwhile; what is left of that delays it. Where it naps, it
    notices the end half a nap late, on average."""

    def __init__(self, world: Platform, processors: Sequence[Processor], costs: HandlingCosts, naps: bool) -> None:
        self._world, self._processors, self._costs, self.naps = world, processors, costs, naps

    def handled(self, rank: int, nbytes: int, messages: int = 1) -> None:
        self._processors[rank].owe(self._costs.message_s * messages + self._costs.byte_s * nbytes)

    def waited(self, rank: int, since: int, manner: Manner) -> None:
        world = self._world
        if self.naps and manner != "polls" and world.time > since:
            late = nap((world.time - since) / 1e9, idle=manner == "idles") / 2
            world.sleep_until(world.time + round(late * 1e9))
        if manner != "beside":
            napping = self.naps and manner != "polls"
            self._processors[rank].waited(since, self._costs.napping if napping else 1.0)
