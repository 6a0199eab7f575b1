"""DiLoCo (Douillard et al. 2023, algorithm 1): workers train by themselves for many steps; then an outer optimizer
takes one step with the mean of their changes."""

from __future__ import annotations

from pydantic import Field

from hpctrain.replica.state import Section
from hpctrain.strategies.interval import EVERY_TEXT, EveryChoice, LocalOptions
from hpctrain.strategies.outer import OuterOptimizer, OuterOptions
from hpctrain.strategies.round import Round, RoundStrategy, Step


class DiLoCoOptions(LocalOptions, OuterOptions):
    """The keys of strategy.name = "diloco"."""

    every: EveryChoice = Field(100, description=EVERY_TEXT)


class DiLoCo(RoundStrategy):
    """Each worker, or island of them, has an inner optimizer of its own, the job's. The outer one takes a step at the
    end of each round, with the mean of what the workers' steps have taken away, weighted by samples."""

    Options = DiLoCoOptions
    options: DiLoCoOptions
    plain = False
    tested_with = (
        {"every": 3},
        {"every": 2, "island": "node"},
        {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0},
        {"every": 4, "balance": "throughput"},
        {"every": 2, "outer_momentum": 0.0, "codec": {"name": "topk", "keep": 0.1, "bits": 2}},
    )

    def begin(self) -> None:
        self.values = self.phase.replica.values[self.exchange.low : self.exchange.high]
        self.outer = OuterOptimizer(self.options, self.values)

    def common(self) -> Section:
        return self.outer.section

    def local(self, step: Step) -> None:
        self.optimize(step.gradient, step)

    def apply(self, round: Round) -> None:
        self.exchange.mean.copy_(self.outer.anchor).sub_(self.values).mul_(round.share)
        self.values.copy_(self.outer.step(self.exchange.reduce(1.0), 0, self.values.numel()))
