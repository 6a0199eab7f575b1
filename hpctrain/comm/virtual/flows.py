"""A network whose messages share ports: each is a flow, and flows through one port share it max-min fairly, or with an
advantage for those that came first.

Ports: the link of a host, out and in; the uplink and downlink of a rack; the memory of a host, for messages within it
above the eager limit (shorter ones stay in caches).
A flow's rate changes when another begins or ends on one of its ports, so its end is only known when it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Protocol

from hpctrain.comm.virtual.network import LATER
from hpctrain.comm.virtual.scheduler import Scheduler, Timer
from hpctrain.hosts import Description

TIE = 1 + 1e-9  # shares that differ by less are equal
LEAST = 1e-3  # weight of a message behind others, at least
FULL = 1e-9  # weight; less is that of no flow


@dataclass(frozen=True)
class MessageCosts:
    """What messages of one class of link cost, besides sharing ports. Times in nanoseconds.

    A rank's sends occupy it for `send_overhead` each, one after the other, and its arriving messages for
    `recv_overhead`. A message above `eager_limit` bytes waits for its receiver, and asks it first: one more round trip.
    `seniority`: how far a message is behind those that it finds on its links, as with TCP, where these have filled the
    queue: with n of them, its share is their share times (1 - seniority) ** n. 0: fair; 1: one after the other.
    """

    latency: int = 20_000  # one way, besides that of the sender's own link
    bandwidth: float = inf  # bytes per second of a single message, at most
    send_overhead: int = 0
    recv_overhead: int = 0
    eager_limit: int = 8192
    seniority: float = 0.0


BETWEEN, WITHIN = MessageCosts(), MessageCosts(latency=500, bandwidth=8e9)


class FlowMessage(Protocol):
    """A message as the network knows it. `ends`: when its sender may continue; `arrives`: when it has arrived; both are
    LATER until they are known. `since`: when its send was started."""

    ends: int
    arrives: int
    since: int

    @property
    def envelope(self) -> tuple[int, int, int]: ...
    def left(self, time: int) -> None: ...
    def arrived(self, time: int) -> None: ...


class Port:
    """What flows share. `capacity`: bytes per nanosecond; `bytes` that have passed; `busy`: nanoseconds in use."""

    __slots__ = ("active", "busy", "bytes", "capacity", "flows", "name", "since")

    def __init__(self, name: str, capacity: float) -> None:
        self.name, self.capacity = name, capacity
        self.bytes = self.busy = self.active = self.since = 0
        self.flows: dict[Flow, None] = {}

    def passed(self, time: int) -> float:
        """Bytes, with what has passed of messages that are under way and compete here."""
        return self.bytes + sum(flow.passed(time) for flow in self.flows)


@dataclass(frozen=True, slots=True)
class FlowPath:
    """The way from one host to another. `passed`: its ports; of these, flows compete for `ports`, or if they are not
    longer than the eager limit, for `short`. `latency` there and `back`, in nanoseconds; `alone`: bytes per nanosecond
    of a flow without competitors."""

    ports: tuple[Port, ...]
    short: tuple[Port, ...]
    passed: tuple[Port, ...]
    costs: MessageCosts
    latency: int
    back: int
    alone: float


class Flow:
    """A message on its way. `left`: bytes that were left at time `updated`; `rate`: bytes per nanosecond since then;
    `due`: when it ends if that stays so. It has a `timer` only if none that it competes with ends earlier: when that
    ends, rates change. Shares of a port are in proportion to `weight`."""

    __slots__ = (
        "bytes", "due", "following", "left", "message", "pair", "path", "ports", "rate", "timer", "updated", "weight",
    )  # fmt: skip

    def __init__(self, message: FlowMessage, path: FlowPath, pair: tuple[int, int], nbytes: int) -> None:
        self.message, self.path, self.pair, self.bytes = message, path, pair, nbytes
        self.ports = path.ports if nbytes > path.costs.eager_limit else path.short
        self.left, self.rate, self.updated, self.due = float(nbytes), 0.0, 0, 0
        self.weight = 1.0
        self.timer: Timer | None = None
        self.following: Flow | None = None  # of the same pair, which waits for this one to end

    def passed(self, time: int) -> float:
        """Bytes that have left."""
        return min(self.bytes, self.bytes - self.left + self.rate * (time - self.updated))


@dataclass
class FlowNetwork:
    """The links of a described cluster; node i of the virtual ranks is its i-th host, from 0. For one run.

    Rates of links are those of the description times `goodput`, the share that headers leave. `memory`: bytes per
    second that the ranks of a host share for messages among them, where the description gives no memory_gbyte_per_s.
    Messages of one rank to another keep their order.
    """

    cluster: Description
    between: MessageCosts = BETWEEN
    within: MessageCosts = WITHIN
    memory: float = 2e10
    goodput: float = 1.0
    carried: int = 0  # messages
    delivered: int = 0  # of these, those whose last byte has left
    sends: dict[int, int] = field(default_factory=dict)  # by rank: when it is free to send
    receives: dict[int, int] = field(default_factory=dict)
    _pairs: dict[tuple[int, int], Flow] = field(default_factory=dict)  # the last one under way or waiting
    _paths: dict[tuple[int, int], FlowPath] = field(default_factory=dict)
    _changed: dict[Port, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.hosts, self._narrowed = self.cluster.each(), self.cluster.switch.oversubscription
        per_ns = self.goodput * 1e6 / 8 / 1e9
        links = [host.link.mbit_per_s * per_ns for host in self.hosts]
        self._out = [Port(f"{h.name} out", rate) for h, rate in zip(self.hosts, links, strict=True)]
        self._in = [Port(f"{h.name} in", rate) for h, rate in zip(self.hosts, links, strict=True)]
        self._memory = [
            Port(f"{h.name} memory", self.memory / 1e9 if h.memory_gbyte_per_s is None else h.memory_gbyte_per_s)
            for h in self.hosts
        ]
        racks = dict.fromkeys(host.rack for host in self.hosts)
        total = {rack: sum(r for h, r in zip(self.hosts, links, strict=True) if h.rack == rack) for rack in racks}
        self._up = {r: Port(f"rack{r} up", rate / self._narrowed) for r, rate in total.items()}
        self._down = {r: Port(f"rack{r} down", rate / self._narrowed) for r, rate in total.items()}

    @property
    def narrowed_racks(self) -> bool:
        """Whether flows between racks can compete although no two pass the same host's link."""
        return self._narrowed > 1

    def begin(self, clock: Scheduler, nodes: Sequence[int]) -> None:
        """Run on this clock, for ranks on these nodes."""
        self._clock, self._nodes = clock, nodes
        self._changed.clear()
        self._ranks = [0] * len(self.hosts)
        for node in nodes:
            self._ranks[node] += 1

    def ports(self) -> list[Port]:
        """All ports, with what has passed them."""
        racks = [*self._up.values(), *self._down.values()] if len(self._up) > 1 else []
        return [*self._out, *self._in, *self._memory, *racks]

    def carry(self, message: FlowMessage) -> None:
        """Take a message that goes at once, or whose receive has been started; sets its `ends` and `arrives`."""
        sender, receiver, nbytes = message.envelope
        here, there = self._nodes[sender], self._nodes[receiver]
        path = self._paths.get((here, there)) or self.path(here, there)
        costs, free, now = path.costs, self.sends.get(sender, 0), self._clock.time
        start = (free if free > message.since else message.since) + costs.send_overhead
        self.sends[sender] = message.ends = start
        message.arrives = LATER
        self.carried += 1
        if nbytes > costs.eager_limit:
            message.ends = LATER
            start += path.latency
            start = (start if start > now else now) + path.back
        flow = Flow(message, path, (sender, receiver), nbytes)
        if start > now:
            self._clock.call_at(start, self._queue, flow)
        else:
            self._queue(flow)

    def path(self, here: int, there: int) -> FlowPath:
        """From one host to another."""
        if here == there:
            costs, latency, back = self.within, self.within.latency, self.within.latency
            memory = self._memory[here]
            passed: tuple[Port, ...] = (memory,)
            ports = passed if costs.bandwidth / 1e9 * self._ranks[here] > memory.capacity else ()
            short: tuple[Port, ...] = ()  # such messages stay in caches
        else:
            costs = self.between
            latency, back = (costs.latency + round(self.hosts[h].link.latency_ms * 1e6) for h in (here, there))
            passed = ports = (self._out[here], self._in[there])
            racks = self.hosts[here].rack, self.hosts[there].rack
            if racks[0] != racks[1]:
                passed = (*passed, self._up[racks[0]], self._down[racks[1]])
                if self._narrowed > 1:  # else the hosts' links are always narrower
                    ports = passed
            short = ports
        alone = min(costs.bandwidth / 1e9, *(port.capacity for port in passed))
        path = self._paths[here, there] = FlowPath(ports, short, passed, costs, latency, back, alone)
        return path

    # -- flows ---------------------------------------------------------------------------------------------------
    def _queue(self, flow: Flow) -> None:
        """Start the flow, or let it wait for those before it from the same rank to the same other one."""
        before = self._pairs.get(flow.pair)
        self._pairs[flow.pair] = flow
        if before is None:
            self._start(flow)
        else:
            before.following = flow

    def _start(self, flow: Flow) -> None:
        path, now = flow.path, self._clock.time
        for port in path.passed:
            if not port.active:
                port.since = now
            port.active += 1
        before = max((len(port.flows) for port in flow.ports), default=0)
        flow.updated, alone = now, not before
        if before and path.costs.seniority:
            flow.weight = max((1.0 - path.costs.seniority) ** before, LEAST)
        for port in flow.ports:
            port.flows[flow] = None
        if alone:
            flow.rate = path.alone
            flow.due = now + ceil(flow.left / flow.rate)
            flow.timer = self._clock.call_at(flow.due, self._end, flow)
        else:
            self._change(flow.ports)

    def _end(self, flow: Flow) -> None:
        path, message, clock = flow.path, flow.message, self._clock
        now = clock.time
        self.delivered += 1
        flow.timer = None  # which knows the flow: without the circle, both are freed at once
        for port in path.passed:
            port.bytes += flow.bytes
            port.active -= 1
            if not port.active:
                port.busy += now - port.since
        for port in flow.ports:
            del port.flows[flow]
        if busy := [port for port in flow.ports if port.flows]:
            self._change(busy)
        if message.ends == LATER:
            message.left(now)
        if path.costs.recv_overhead:
            clock.call_at(now + path.latency, self._receive, flow)
        else:
            message.arrived(now + path.latency)
        if flow.following is not None:
            self._start(flow.following)
        else:
            del self._pairs[flow.pair]

    def _receive(self, flow: Flow) -> None:
        free, now = self.receives.get(flow.pair[1], 0), self._clock.time
        self.receives[flow.pair[1]] = done = (free if free > now else now) + flow.path.costs.recv_overhead
        flow.message.arrived(done)

    # -- rates ---------------------------------------------------------------------------------------------------
    def _change(self, ports: Sequence[Port]) -> None:
        """The flows on these ports have to share them anew, once nothing else happens at this time."""
        if not self._changed:
            self._clock.call_at(self._clock.time, self._share, last=True)
        self._changed.update(dict.fromkeys(ports))

    def _share(self, _: object) -> None:
        """New rates for all flows that a change can affect."""
        known = dict[Port, None]()
        changed = list(self._changed)
        self._changed.clear()
        for port in changed:
            if port not in known and port.flows:
                self._share_among(*_connected(port, known))

    def _share_among(self, flows: dict[Flow, None], ports: Sequence[Port]) -> None:
        """New rates for flows that compete with each other, directly or not, and with no others."""
        now, earliest = self._clock.time, LATER
        for flow, rate in max_min(flows, ports).items():
            if rate != flow.rate:
                left = flow.left - flow.rate * (now - flow.updated)
                flow.left = left = left if left > 0.0 else 0.0
                flow.rate, flow.updated, flow.due = rate, now, now + ceil(left / rate)
                if flow.timer is not None:
                    flow.timer.finished, flow.timer = True, None
            if flow.due < earliest:
                earliest = flow.due
        for flow in flows:
            if flow.due == earliest and flow.timer is None:
                flow.timer = self._clock.call_at(earliest, self._end, flow)


def _connected(port: Port, known: dict[Port, None]) -> tuple[dict[Flow, None], list[Port]]:
    """The flows on this port, those that share other ports with them, and so on; and all these ports, which are added
    to the `known` ones."""
    ports, flows = [port], dict[Flow, None]()
    known[port] = None
    for each in ports:
        for flow in each.flows:
            if flow not in flows:
                flows[flow] = None
                for other in flow.ports:
                    if other not in known:
                        known[other] = None
                        ports.append(other)
    return flows, ports


def max_min(flows: dict[Flow, None], ports: Sequence[Port]) -> dict[Flow, float]:
    """The max-min fair rates of flows that compete for these ports only, each in proportion to its weight: progressive
    filling. The ports that fill up first fix the rates of their flows; the others share what is left."""
    rates: dict[Flow, float] = {}
    crowds = [len(port.flows) for port in ports]
    most = max(crowds)
    if most == len(flows) and sum(crowds) - most == len(ports) - 1:  # they share one port only, as that of a server
        share = ports[crowds.index(most)].capacity / sum(flow.weight for flow in flows)
        if all(flow.path.alone > share * flow.weight for flow in flows):
            return {flow: share * flow.weight for flow in flows}
    left = {port: [port.capacity, sum(flow.weight for flow in port.flows)] for port in ports if port.flows}
    unfixed = dict(flows)
    while unfixed:
        share = min(capacity / weight for capacity, weight in left.values())  # of a flow with weight 1
        single = min(flow.path.costs.bandwidth / flow.weight for flow in unfixed) / 1e9
        if single <= share:
            share, limit = single, single * TIE
            fixed = [flow for flow in unfixed if flow.path.costs.bandwidth / flow.weight / 1e9 <= limit]
        else:
            limit = share * TIE
            full = [port for port, (capacity, weight) in left.items() if capacity / weight <= limit]
            fixed = [flow for flow in dict.fromkeys(f for port in full for f in port.flows) if flow in unfixed]
        for flow in fixed:
            rates[flow] = rate = share * flow.weight
            del unfixed[flow]
            for port in flow.ports:
                place = left[port]
                place[0], place[1] = max(place[0] - rate, 0.0), place[1] - flow.weight
                if place[1] <= FULL:
                    del left[port]
    return rates
