"""The stretch of a simulated run that shares and bytes come from: whole rounds, after the first ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpctrain.comm.virtual.flows import FlowNetwork
from hpctrain.simulate.recording import TimeTally

BEGIN = 0.2  # of the samples, which are left out: rounds are not yet what they will be


@dataclass(frozen=True)
class Moment:
    """Totals up to some virtual time (nanoseconds). `computing`: of each rank; `ports`: bytes and nanoseconds in use,
    by name; `steps`: of rank 0."""

    time: int
    steps: int
    computing: tuple[int, ...]
    ports: dict[str, tuple[float, int]]

    @classmethod
    def now(cls, time: int, tallies: Sequence[TimeTally], network: FlowNetwork) -> Moment:
        """The totals at this time."""
        used = {port.name: port.busy + (time - port.since if port.active else 0) for port in network.ports()}
        return cls(
            time,
            len(tallies[0].steps),
            tuple(tally.computing.until(time) for tally in tallies),
            {port.name: (port.passed(time), used[port.name]) for port in network.ports()},
        )


class Window:
    """From the end of the first round at or after 20 % of `total` samples to the end of the last but one; in a shorter
    run, to its end; in one that stops before, from the end of its first round."""

    def __init__(self, total: int) -> None:
        self._low = BEGIN * total
        self._earliest: Moment | None = None
        self.first: Moment | None = None
        self.last: Moment | None = None

    def round_ended(self, cursor: int, now: Callable[[], Moment]) -> None:
        """A round has ended at that cursor; `now` makes the totals."""
        if self._earliest is None:
            self._earliest = now()
        if self.first is None and cursor >= self._low:
            self.first = now()
        elif self.first is not None:
            self.last = now()

    def close(self, now: Callable[[], Moment]) -> Stretch:
        """The run has ended."""
        last = self.last or now()
        return Stretch(self.first or self._earliest or last, last)


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
    def steps(self) -> int:
        """That rank 0 took."""
        return self.last.steps - self.first.steps

    def computing(self, rank: int) -> float:
        """The rank's seconds in passes, sums, updates and codecs, a server's beside it included."""
        return (self.last.computing[rank] - self.first.computing[rank]) / 1e9

    def ports(self) -> dict[str, tuple[float, float]]:
        """(bytes, share of the time in use) of everything that messages passed."""
        found = {}
        for name, (nbytes, busy) in self.last.ports.items():
            before = self.first.ports[name]
            share = (busy - before[1]) / max(1, self.last.time - self.first.time)
            found[name] = nbytes - before[0], min(1.0, share)  # collectives as loops count what still lies ahead
        return found
