"""Local SGD (Stich 2019, algorithm 1): workers train by themselves and average their parameters now and then."""

from __future__ import annotations

from pydantic import Field

from hpctrain.codecs import CODEC_TEXT, CodecChoice
from hpctrain.options import Options
from hpctrain.strategies.balance import STEPS_TEXT, BalanceChoice
from hpctrain.strategies.round import Round, RoundStrategy, Step


class LocalSGDOptions(Options):
    """The keys of strategy.name = "local_sgd"."""

    every: int = Field(8, ge=1, description="steps that each worker takes between averages")
    codec: CodecChoice = Field("none", description=CODEC_TEXT)
    balance: BalanceChoice = Field("none", description=STEPS_TEXT)


class LocalSGD(RoundStrategy):
    """Each worker has an optimizer of its own; a round of `every` steps ends with the mean of what they changed,
    weighted by samples."""

    Options = LocalSGDOptions
    options: LocalSGDOptions
    tested_with = ({"every": 3}, {"every": 1}, {}, {"every": 2, "codec": "bfloat16"},
                   {"every": 4, "balance": "throughput"}, {"every": 3, "codec": "topk"})  # fmt: skip

    def length(self) -> int:
        return self.options.every

    def begin(self) -> None:
        self.anchor = self.phase.replica.values.clone()

    def local(self, step: Step) -> None:
        self.optimize(self.phase.replica.gradient, step)

    def apply(self, round: Round) -> None:
        values, change = self.phase.replica.values, self.phase.replica.gradient
        change.copy_(values).sub_(self.anchor).mul_(round.share)
        self.anchor.add_(self.exchange.reduce(1.0))
        values.copy_(self.anchor)
