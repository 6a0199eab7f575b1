"""When many messages end that are sent in steps, vectorised: by the rules of each network, to the nanosecond.

Only for messages that never compete with each other or with anything else. Where they do, `Crowded` is raised, and
nothing has changed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from hpctrain.comm.virtual.flows import FlowNetwork, Port
from hpctrain.comm.virtual.network import LATER, FreeNetwork, LinkNetwork, Network
from hpctrain.comm.virtual.schedules import Numbers

EXACT = 256  # ranks of a group up to which short messages that meet are taken one by one, which is slow


class Crowded(Exception):
    """Messages compete, so their times depend on the order of events."""


class StepTimes(ABC):
    """The times of the messages of a group's collectives, of which each begins with `begin` and ends with `keep`, which
    makes the network remember it. (Without `keep` it has not happened.) `step` and `keep` may raise Crowded."""

    def begin(self) -> None:
        """Before the first step."""
        return

    @abstractmethod
    def step(self, source: Numbers, dest: Numbers, nbytes: Numbers, send: Numbers, recv: Numbers) -> Any:
        """For messages from ranks `source` of the group to ranks `dest`, whose sends and receives start at the times
        `send` and `recv`: (when each sender may continue, when each receiver may)."""

    def keep(self) -> None:
        """After the last step."""
        return


class FreeTimes(StepTimes):
    """Of a `FreeNetwork`."""

    def __init__(self, network: FreeNetwork) -> None:
        self._limit = network.eager_limit

    def step(self, source: Numbers, dest: Numbers, nbytes: Numbers, send: Numbers, recv: Numbers) -> Any:
        both = np.maximum(send, recv)
        return np.where(nbytes <= self._limit, send, both), both


class LinkTimes(StepTimes):
    """Of a `LinkNetwork`, which serves messages in the order in which they are sent."""

    def __init__(self, network: LinkNetwork, hosts: Numbers) -> None:
        self._network = network
        names, self._node = np.unique(hosts, return_inverse=True)
        self._names: list[int] = names.tolist()

    def begin(self) -> None:
        self._out = np.array([self._network.out.get(node, 0) for node in self._names])
        self._in = np.array([self._network.into.get(node, 0) for node in self._names])
        # Out and in: when the latest message of this collective was sent, and by which rank.
        self._latest = np.full((4, len(self._names)), -1)

    def step(self, source: Numbers, dest: Numbers, nbytes: Numbers, send: Numbers, recv: Numbers) -> Any:
        network, here, there = self._network, self._node[source], self._node[dest]
        both = np.maximum(send, recv)
        start = np.where(nbytes <= network.eager_limit, send, both)
        sent = start + network.node_latency + (nbytes * 1e9 / network.node_bandwidth).astype(np.int64)
        arrived = sent.copy()
        far = np.flatnonzero(here != there)
        if far.size:
            wire = (nbytes[far] * 1e9 / network.bandwidth).astype(np.int64)
            out, into, now = here[far], there[far], start[far]
            self._check(self._latest[:2], out, source[far], now)
            self._check(self._latest[2:], into, source[far], now)
            leave = np.maximum(self._out[out], now)
            arrive = np.maximum(self._in[into], leave + network.latency)
            self._out[out] = sent[far] = leave + wire
            self._in[into] = arrived[far] = arrive + wire
        return sent, np.maximum(arrived, both)

    def _check(self, latest: Numbers, nodes: Numbers, senders: Numbers, now: Numbers) -> None:
        when, sender = latest
        if np.bincount(nodes).max() > 1 or np.any((now <= when[nodes]) & (sender[nodes] != senders)):
            raise Crowded
        when[nodes], sender[nodes] = now, senders

    def keep(self) -> None:
        self._network.out.update(zip(self._names, self._out.tolist(), strict=True))
        self._network.into.update(zip(self._names, self._in.tolist(), strict=True))


class FlowPairs:
    """What is known of messages from some ranks to others, whenever they are sent.

    By pair: `latency`, `back`, `alone`, `limit` (see `FlowPath`), the overheads `sending` and `receiving`, `free`: when
    its last message has left, and `bytes` and `busy`, sums over its messages. `ports`: one row per position on the
    path, the number of the port there, 0 for none; `long` and `short`: the same for the ports that messages above the
    eager limit, and up to it, compete for.
    """

    def __init__(self, network: FlowNetwork, hosts: tuple[Numbers, Numbers], numbers: dict[Port, int]) -> None:
        paths = [network.path(here, there) for here, there in zip(*(h.tolist() for h in hosts), strict=True)]
        self.latency = np.array([path.latency for path in paths])
        self.back = np.array([path.back for path in paths])
        self.alone = np.array([path.alone for path in paths])
        self.limit = np.array([path.costs.eager_limit for path in paths])
        self.sending = np.array([path.costs.send_overhead for path in paths])
        self.receiving = np.array([path.costs.recv_overhead for path in paths])
        self.received = bool(self.receiving.any())
        width = max(len(path.passed) for path in paths)
        self.ports = _table([path.passed for path in paths], numbers, width)
        self._tables = [
            _table([getattr(path, name) for path in paths], numbers, width) for name in ("short", "ports")
        ]
        self.short, self.long = map(SharedPorts, self._tables)
        self.kept = np.zeros(len(paths), np.int64)
        self.begin()

    def begin(self) -> None:
        """Before a collective."""
        self.free, self.bytes, self.busy = self.kept, np.zeros_like(self.kept), np.zeros_like(self.kept)

    def shared(self, eager: Any) -> list[Numbers]:
        """The ports that messages compete for, of which some are `eager`. Raises Crowded if two need the same one."""
        if eager.all():
            found = self.short
        elif eager.any():
            found = SharedPorts([np.where(eager, short, long) for short, long in zip(*self._tables, strict=True)])
        else:
            found = self.long
        if found.crowded:
            raise Crowded
        return found.rows


class SharedPorts:
    """`rows` of ports that messages compete for, as in `FlowPairs`; `crowded`: two messages for the same one."""

    def __init__(self, rows: list[Numbers]) -> None:
        self.rows = [row for row in rows if row.any()]
        self.crowded = any(np.bincount(row[row > 0]).max() > 1 for row in self.rows)


def _table(passed: Sequence[tuple[Port, ...]], numbers: dict[Port, int], width: int) -> list[Numbers]:
    return list(np.array([[numbers[port] for port in ports] + [0] * (width - len(ports)) for ports in passed]).T)


class FlowTimes(StepTimes):
    """Of a `FlowNetwork`. One port is used at a time by one pair of ranks only, or `Crowded`."""

    def __init__(self, network: FlowNetwork, hosts: Numbers, members: Sequence[int]) -> None:
        self._network, self._hosts, self._members = network, hosts, members
        self._exact = len(members) <= EXACT
        self._ports = network.ports()
        self._numbers = {port: number for number, port in enumerate(self._ports, start=1)}
        # When each port becomes free from the messages of earlier collectives, and of this one. Number 0 is no port.
        self._kept = np.zeros(len(self._ports) + 1, np.int64)
        self._pairs: dict[bytes, FlowPairs] = {}

    def begin(self) -> None:
        self._sends = np.array([self._network.sends.get(member, 0) for member in self._members])
        self._receives = np.array([self._network.receives.get(member, 0) for member in self._members])
        self._last = np.zeros(len(self._members), np.int64)  # arrival at each rank
        self._free = np.zeros_like(self._kept)
        self._used: list[tuple[Numbers, Numbers, Numbers]] = []  # ports (then ranks), from when, until when
        self._unordered = False
        self._from, self._until = LATER, 0
        for pairs in self._pairs.values():
            pairs.begin()

    def step(self, source: Numbers, dest: Numbers, nbytes: Numbers, send: Numbers, recv: Numbers) -> Any:
        pairs = self._known(source, dest)
        self._sends[source] = ready = np.maximum(send, self._sends[source]) + pairs.sending
        eager = nbytes <= pairs.limit
        shared, start = pairs.shared(eager), ready
        if not eager.all():
            asked = np.maximum(ready + pairs.latency, np.maximum(send, recv)) + pairs.back
            start = np.where(eager, ready, asked)
        for row in shared:  # long messages of other collectives let short ones pass
            start = np.where(eager, start, np.maximum(start, self._kept[row]))
        start = np.maximum(start, pairs.free)
        self._from = min(self._from, int(start.min()))
        took = np.ceil(nbytes / pairs.alone).astype(np.int64)
        pairs.free = left = start + took
        self._until = max(self._until, int(left.max()))
        pairs.bytes, pairs.busy = pairs.bytes + nbytes, pairs.busy + took
        for row in shared:
            self._unordered |= bool(np.any(start < self._free[row]))
            self._free[row] = np.maximum(self._free[row], left)
            self._free[0] = 0
            if self._exact:
                self._used.append((row, start, left))
            else:
                self._used.append((row[~eager], start[~eager], left[~eager]))
        done = left + pairs.latency
        if pairs.received:
            last, free, early = self._last[dest], self._receives[dest], done < self._last[dest]
            self._unordered |= bool(early.any())
            self._last[dest] = np.maximum(last, done)
            begun = np.where(early | (pairs.receiving == 0), done, np.maximum(done, free))
            done = begun + pairs.receiving
            self._receives[dest] = np.where(pairs.receiving == 0, free, np.maximum(free, done))
            if self._exact:
                self._used.append((len(self._kept) + dest, begun, done))
        return np.where(eager, ready, left), np.maximum(done, recv)

    def _check(self) -> None:
        """Messages that did not use a port, or arrive at a rank, in the order of steps must not have met there."""
        ports, starts, ends = (np.concatenate(columns) for columns in zip(*self._used, strict=True))
        order = np.lexsort((starts, ports))[np.count_nonzero(ports == 0) :]
        ports, starts, ends = ports[order], starts[order], ends[order]
        if np.any((ports[1:] == ports[:-1]) & (starts[1:] < ends[:-1])):
            raise Crowded

    def _known(self, source: Numbers, dest: Numbers) -> FlowPairs:
        key = source.tobytes() + dest.tobytes()
        pairs = self._pairs.get(key)
        if pairs is None:
            hosts = self._hosts[source], self._hosts[dest]
            pairs = self._pairs[key] = FlowPairs(self._network, hosts, self._numbers)
        return pairs

    def keep(self) -> None:
        if self._unordered and self._used:
            self._check()
        self._network.sends.update(zip(self._members, self._sends.tolist(), strict=True))
        self._network.receives.update(zip(self._members, self._receives.tolist(), strict=True))
        self._kept = np.maximum(self._kept, self._free)
        nbytes, busy = (np.zeros(len(self._kept), np.int64) for _ in range(2))
        for pairs in self._pairs.values():
            pairs.kept = pairs.free
            for row in pairs.ports:
                np.add.at(nbytes, row, pairs.bytes)
                np.add.at(busy, row, pairs.busy)
        for port, more, longer in zip(self._ports, nbytes[1:].tolist(), busy[1:].tolist(), strict=True):
            port.bytes += more
            port.busy += min(longer, self._until - self._from)  # messages that do not compete overlap


def step_times(network: Network | FlowNetwork, hosts: Numbers, members: Sequence[int]) -> StepTimes | None:
    """For ranks `members` of the run, on these hosts. None for a network that has no vectorised times."""
    if isinstance(network, FlowNetwork):
        return FlowTimes(network, hosts, members)
    if type(network) is LinkNetwork:
        return LinkTimes(network, hosts)
    return FreeTimes(network) if type(network) is FreeNetwork else None
