"""The network model of virtual time. All times are integers, in nanoseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

LATER = 2**63  # a time that is not known yet


class Network(Protocol):
    """How long messages take. A message of at most `eager_limit` bytes does not wait for its receiver."""

    eager_limit: int

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        """Reserve the path for `nbytes` from node `source` to node `dest`, from time `start` on.

        Returns (when the sender may continue, when the last byte has arrived).
        """


@dataclass
class FreeNetwork:
    """Costs nothing. By default even the shortest message waits for its receiver, to reveal deadlocks."""

    eager_limit: int = -1

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        return start, start


@dataclass
class LinkNetwork:
    """Each node has one link, of `bandwidth` bytes per second in each direction, to a non-blocking switch.

    A message occupies the sender's link, then the receiver's, one message at a time (the postal model with contention
    at the ends); within a node it takes `node_latency` and is sent at `node_bandwidth`, without contention.
    """

    latency: int = 20_000
    bandwidth: float = 1.25e9
    node_latency: int = 500
    node_bandwidth: float = 8e9
    eager_limit: int = 8192
    out: dict[int, int] = field(default_factory=dict)  # by node: when its link is free
    into: dict[int, int] = field(default_factory=dict)

    def transfer(self, source: int, dest: int, nbytes: int, start: int) -> tuple[int, int]:
        if source == dest:
            end = start + self.node_latency + int(nbytes * 1e9 / self.node_bandwidth)
            return end, end
        wire = int(nbytes * 1e9 / self.bandwidth)
        leave, arrive = self.out.get(source, 0), self.into.get(dest, 0)
        if leave < start:
            leave = start
        if arrive < leave + self.latency:
            arrive = leave + self.latency
        self.out[source] = sent = leave + wire
        self.into[dest] = arrived = arrive + wire
        return sent, arrived
