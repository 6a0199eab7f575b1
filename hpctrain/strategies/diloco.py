"""DiLoCo (Douillard et al. 2023, algorithm 1): workers train by themselves for many steps; then an outer optimizer
takes one step with the mean of their changes."""

from __future__ import annotations

from pydantic import Field

from hpctrain.codecs import CODEC_TEXT, CodecChoice
from hpctrain.options import Options
from hpctrain.replica.state import Section
from hpctrain.strategies.balance import STEPS_TEXT, BalanceChoice
from hpctrain.strategies.round import Round, RoundStrategy, Step


class DiLoCoOptions(Options):
    """The keys of strategy.name = "diloco"."""

    every: int = Field(100, ge=1, description="steps that each worker takes between outer steps")
    outer_lr: float = Field(0.7, gt=0, le=10, description="the outer learning rate; 1 and no momentum: local_sgd")
    outer_momentum: float = Field(
        0.9,
        ge=0,
        lt=1,
        description='outer momentum (Nesterov\'s); 0 with codec = "topk", whose memory takes its place (SparseLoCo)',
    )
    codec: CodecChoice = Field("none", description=CODEC_TEXT)
    balance: BalanceChoice = Field("none", description=STEPS_TEXT)


class DiLoCo(RoundStrategy):
    """Each worker has an inner optimizer of its own, the job's. The outer one is SGD with Nesterov's momentum; its
    gradient is the mean of what the workers' steps have taken away, weighted by samples."""

    Options = DiLoCoOptions
    options: DiLoCoOptions
    plain = False
    tested_with = (
        {"every": 3},
        {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0},
        {"every": 2, "outer_momentum": 0.0, "codec": {"name": "topk", "keep": 0.1, "bits": 2}},
        {"every": 4, "balance": "throughput"},
    )

    def length(self) -> int:
        return self.options.every

    def begin(self) -> None:
        import torch

        from hpctrain.replica.tensors import as_array

        self.anchor = self.phase.replica.values.clone()
        self.velocity = torch.zeros_like(self.anchor)
        self.outer = Section(flat={"velocity": as_array(self.velocity)})

    def common(self) -> Section:
        return self.outer

    def local(self, step: Step) -> None:
        self.optimize(self.phase.replica.gradient, step)

    def apply(self, round: Round) -> None:
        values, change = self.phase.replica.values, self.phase.replica.gradient
        rate, momentum = self.options.outer_lr, self.options.outer_momentum
        change.copy_(self.anchor).sub_(values).mul_(round.share)
        mean = self.exchange.reduce(1.0)
        self.velocity.mul_(momentum).add_(mean)
        self.anchor.sub_(mean, alpha=rate).sub_(self.velocity, alpha=rate * momentum)
        values.copy_(self.anchor)
