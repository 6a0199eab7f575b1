"""How long workers train by themselves before they agree, and who does: the options `every` and `island`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, WrapValidator, model_validator

from hpctrain.clock.samples import RunClock
from hpctrain.codecs import CODEC_TEXT, CodecChoice
from hpctrain.options import Options
from hpctrain.strategies.balance import STEPS_TEXT, BalanceChoice

EXAMPLES = "a number of steps, {epochs = 1} or {overhead = 0.1}"
EVERY_TEXT = (
    "steps that each worker takes between agreements. {epochs = 1}: as many as that many passes over the training "
    'samples have. "auto" or {overhead = 0.1, most = 200, guard = 0.05}: as many as keep the time of an exchange below '
    "that share of the slowest worker's computation, at most `most`, and fewer while an exchange changes the "
    "parameters by more than `guard` of their length"
)
IslandChoice = Literal["worker", "node"]
ISLAND_TEXT = (
    "who trains by itself between agreements. worker: each worker; node: the workers of a node together, who average "
    "their gradients in every step"
)
TARGET, MOST, GUARD = 0.1, 200, 0.05
FIRST = 8  # steps of an "auto" interval, until something is measured
GROWTH = 2  # times the interval in one decision, at most
TOLERANCE = 0.25  # relative change of the interval that is not worth a decision
NEW = 0.1  # weight of the latest round in the means


class EveryTable(Options):
    """An interval in epochs, or one that follows from what exchanges cost."""

    EXCLUSIVE = (frozenset({"epochs", "overhead"}),)
    epochs: float | None = Field(default=None, gt=0, le=1e6, description="passes over the training samples")
    overhead: float | None = Field(default=None, gt=0, lt=1, description="an exchange's share of the computation")
    most: int | None = Field(default=None, ge=1, le=10**6, description=f"steps; left out: {MOST}")
    guard: float | None = Field(default=None, gt=0, le=1e3, description=f"relative change; left out: {GUARD}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.overhead is None):
            raise ValueError(f"must be {EXAMPLES}")
        if self.epochs is not None and (self.most is not None or self.guard is not None):
            raise ValueError("has most or guard beside epochs; these belong to overhead")
        return self


def _every(value: object, handler: object) -> int | Literal["auto"] | EveryTable:
    """The handler, a union's, would report a fault of each member."""
    if isinstance(value, (dict, EveryTable)):
        return EveryTable.model_validate(value)
    if value == "auto":
        return "auto"
    if isinstance(value, int) and not isinstance(value, bool):
        if value >= 1:
            return value
        raise ValueError("must be at least 1")
    raise ValueError(f'must be {EXAMPLES}, or "auto"')


EveryChoice = Annotated[
    int | Literal["auto"] | EveryTable,
    WrapValidator(_every),
    Field(json_schema_extra={"allowed": 'at least 1, "auto", or a table of epochs or of overhead, most and guard'}),
]


class LocalOptions(Options):
    """The options of strategies whose workers train by themselves between agreements."""

    every: EveryChoice = Field(description=EVERY_TEXT)
    island: IslandChoice = Field("worker", description=ISLAND_TEXT)
    codec: CodecChoice = Field("none", description=CODEC_TEXT)
    balance: BalanceChoice = Field("none", description=STEPS_TEXT)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.island == "node" and self.balance != "none":
            raise ValueError(
                'has island = "node" with balance, but the workers of a node take every step together; leave one out'
            )
        return self


@dataclass(frozen=True)
class RoundCost:
    """What a round cost one worker. `computing`, `exchanging`: seconds; `change`: how far its parameters were from what
    was agreed on, relative to the length of the latter."""

    computing: float
    exchanging: float
    change: float


class Interval:
    """A fixed number of steps. `start` must be called once the phase is known, before `steps` counts. `usual`: it is
    the strategy's default, which may be longer than a short run."""

    def __init__(self, steps: int = 1, usual: bool = False) -> None:
        self.steps, self._usual = steps, usual

    def unfit(self, epoch: int | None, size: int, total: int) -> str | None:
        """Why the interval does not suit a run, in words that follow the strategy's key; or None. In samples: `epoch`
        (None: not known yet), `size` (of a step of all workers), `total` (of the run)."""
        if epoch is None or self._usual:
            return None
        every, steps = self._length(epoch, size), RunClock(epoch, size, total).rounds(total)
        if every <= max(1, steps):
            return None
        return (
            f"every = {every}, but the run has only {steps} steps, so that some parameters, or all, would be exchanged "
            "only at its end; lower it, or train longer"
        )

    def start(self, epoch: int | None, size: int) -> None:
        """Begin a phase; the arguments are those of `unfit`."""
        if epoch is not None:
            self.steps = self._length(epoch, size)

    def _length(self, epoch: int, size: int) -> int:
        return self.steps

    @property
    def measures(self) -> bool:
        """Whether `observe` must be called after every round."""
        return False

    def observe(self, costs: Sequence[RoundCost], steps: int) -> str:
        """Take the costs of a round of `steps`, of all workers. Returns why the interval changes, or ""."""
        return ""

    def numbers(self) -> dict[str, Any]:
        """What must be kept in checkpoints; the same on all workers."""
        return {}

    def load(self, numbers: dict[str, Any]) -> None:
        """Continue from the result of `numbers`."""


class EpochInterval(Interval):
    """As many steps as `epochs` passes over the training samples have."""

    def __init__(self, epochs: float) -> None:
        super().__init__(2)  # not known before `start`, but more than one
        self.epochs = epochs

    def unfit(self, epoch: int | None, size: int, total: int) -> str | None:
        if epoch is None:
            return (
                f"every = {{epochs = {self.epochs:g}}} needs training data of known length; give the stream a __len__, "
                "or give every in steps"
            )
        return super().unfit(epoch, size, total)

    def _length(self, epoch: int, size: int) -> int:
        return max(1, round(self.epochs * -(-epoch // size)))


class OverheadInterval(Interval):
    """Keeps the time of an exchange at a share `target` of the slowest worker's computation between exchanges.

    After the rule of floDl's ElChe: the slowest worker counts; the interval follows the measured overhead, and is
    halved while exchanges change the parameters by more than `guard` of their length, because workers then drift apart.
    Here both times are means that fade, so that one late message does not change the interval.
    """

    def __init__(self, target: float = TARGET, most: int = MOST, guard: float = GUARD) -> None:
        super().__init__(min(FIRST, most))
        self.target, self.most, self.guard = target, most, guard
        self._rounds = 0
        self._computing = self._exchanging = 0.0  # seconds: means per step and per exchange

    def unfit(self, epoch: int | None, size: int, total: int) -> str | None:
        """None: it adapts."""
        return None

    @property
    def measures(self) -> bool:
        return True

    def observe(self, costs: Sequence[RoundCost], steps: int) -> str:
        self._rounds += 1
        weight = max(1.0 / self._rounds, NEW)
        self._computing += weight * (max(cost.computing for cost in costs) / steps - self._computing)
        self._exchanging += weight * (max(cost.exchanging for cost in costs) - self._exchanging)
        change = max(cost.change for cost in costs)
        if self._computing <= 0.0:
            return ""
        if change > self.guard:
            wanted, why = self.steps // 2, f"an exchange changes the parameters by {change:.2g}, above {self.guard:g}"
        else:
            overhead = self._exchanging / (self._computing * self.steps)
            wanted = min(math.ceil(self.steps * overhead / self.target), GROWTH * self.steps)
            why = f"exchanges take {overhead:.1%} of the slowest worker's computation, and {self.target:.0%} is wanted"
        wanted = min(max(1, wanted), self.most)
        if abs(wanted - self.steps) <= TOLERANCE * self.steps:
            return ""
        self.steps = wanted
        return why

    def numbers(self) -> dict[str, Any]:
        means = {"computing": self._computing, "exchanging": self._exchanging}
        return {"steps": self.steps, "rounds": self._rounds, **means}

    def load(self, numbers: dict[str, Any]) -> None:
        self.steps, self._rounds = min(int(numbers["steps"]), self.most), int(numbers["rounds"])
        self._computing, self._exchanging = float(numbers["computing"]), float(numbers["exchanging"])


def interval_of(options: Any) -> Interval:
    """A new interval, as the option `every` says; of one step if a strategy has no such option."""
    every: int | Literal["auto"] | EveryTable = getattr(options, "every", 1)
    if isinstance(every, int):
        fields = getattr(type(options), "model_fields", {})
        return Interval(every, usual="every" in fields and every == fields["every"].default)
    if every == "auto":
        return OverheadInterval()
    if every.epochs is not None:
        return EpochInterval(every.epochs)
    return OverheadInterval(every.overhead or TARGET, every.most or MOST, every.guard or GUARD)
