"""Local SGD (Stich 2019, algorithm 1): workers train by themselves and average their parameters now and then."""

from __future__ import annotations

from pydantic import Field

from hpctrain.strategies.interval import EVERY_TEXT, EveryChoice, LocalOptions
from hpctrain.strategies.round import Round, RoundStrategy, Step


class LocalSGDOptions(LocalOptions):
    """The keys of strategy.name = "local_sgd"."""

    every: EveryChoice = Field(8, description=EVERY_TEXT)


class LocalSGD(RoundStrategy):
    """Each worker, or island of them, has an optimizer of its own; a round of `every` steps ends with the mean of what
    they changed, weighted by samples."""

    Options = LocalSGDOptions
    options: LocalSGDOptions
    tested_with = (
        {"every": 3},
        {"every": 1},
        {},
        {"every": 3, "island": "node"},
        {"every": 2, "codec": "bfloat16"},
        {"every": 4, "balance": "throughput"},
        {"every": 3, "codec": "topk"},
    )

    def begin(self) -> None:
        self.values = self.phase.replica.values[self.exchange.low : self.exchange.high]
        self.anchor = self.values.clone()

    def local(self, step: Step) -> None:
        self.optimize(step.gradient, step)

    def apply(self, round: Round) -> None:
        self.exchange.mean.copy_(self.values).sub_(self.anchor).mul_(round.share)
        self.anchor.add_(self.exchange.reduce(1.0))
        self.values.copy_(self.anchor)
