"""The stretch of a simulated run that predictions come from: whole rounds, after the first ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hpctrain.comm.virtual.flows import FlowNetwork
from hpctrain.simulate.recording import COMPUTING, TimeTally

BEGIN, END = 0.2, 0.95  # of the samples


@dataclass(frozen=True)
class Moment:
    """Totals up to some virtual time (nanoseconds). `spent`: by rank and kind of span; `ports`: bytes and nanoseconds
    in use, by name; `samples`: the run's cursor; `steps`: by rank."""

    time: int
    samples: int
    steps: tuple[int, ...]
    spent: tuple[dict[str, int], ...]
    ports: dict[str, tuple[int, int]]

    @classmethod
    def now(cls, time: int, samples: int, tallies: Sequence[TimeTally], network: FlowNetwork) -> Moment:
        """The totals at this time."""
        return cls(
            time,
            samples,
            tuple(len(tally.steps) for tally in tallies),
            tuple(dict(tally.nanoseconds) for tally in tallies),
            {port.name: (port.bytes, port.busy) for port in network.ports()},
        )


@dataclass
class Window:
    """From the first round that begins at or after 20 % of the samples to the last that ends before 95 %; in a shorter
    run, all but the first round. `round`: samples in one."""

    total: int
    round: int
    first: Moment | None = field(default=None, init=False)
    last: Moment | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        rounds = max(1, self.total // self.round)
        self._low = min(max(1, round(BEGIN * rounds)), rounds - 1) * self.round
        self._high = max(int(END * rounds), self._low // self.round + 1) * self.round

    def wants(self, cursor: int) -> bool:
        """Whether the totals at this cursor are a bound of the window."""
        return (self.first is None and cursor >= self._low) or (self.last is None and cursor >= self._high)

    def take(self, moment: Moment) -> None:
        """The totals that it wanted, or those at the end of the run."""
        if self.first is None:
            self.first = moment
        else:
            self.last = moment


@dataclass(frozen=True)
class Stretch:
    """What happened between two moments."""

    first: Moment
    last: Moment

    @property
    def seconds(self) -> float:
        """Virtual time."""
        return (self.last.time - self.first.time) / 1e9

    @property
    def samples(self) -> int:
        """Of all workers."""
        return self.last.samples - self.first.samples

    def steps(self, rank: int) -> int:
        """That this rank took."""
        return self.last.steps[rank] - self.first.steps[rank]

    def spent(self, rank: int) -> dict[str, float]:
        """The rank's seconds by kind of span."""
        before = self.first.spent[rank]
        return {kind: (ns - before.get(kind, 0)) / 1e9 for kind, ns in self.last.spent[rank].items()}

    def computing(self, rank: int) -> float:
        """The rank's seconds in passes, sums, updates and codecs."""
        return sum(seconds for kind, seconds in self.spent(rank).items() if kind in COMPUTING)

    def ports(self) -> dict[str, tuple[int, float]]:
        """(bytes, share of the time in use) of everything that messages passed."""
        found = {}
        for name, (nbytes, busy) in self.last.ports.items():
            before = self.first.ports[name]
            found[name] = nbytes - before[0], (busy - before[1]) / max(1, self.last.time - self.first.time)
        return found
