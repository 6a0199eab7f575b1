"""All-reduce: every worker applies the same averaged gradient in every step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from hpctrain.options import Options
from hpctrain.strategies.base import Needs
from hpctrain.strategies.round import Round, RoundStrategy

if TYPE_CHECKING:
    from hpctrain.strategies.exchange import Exchange


class AllReduceOptions(Options):
    """The keys of strategy.name = "all_reduce"."""

    exchange: Literal["auto", "shared", "message"] = Field(
        "auto",
        description="shared: sum from node-shared memory, with the optimizer sliced over the node's ranks; "
        "message: all-reduce the whole gradient; auto: shared where possible, or message with overlap if every worker "
        "has a node of its own and the library all-reduces",
    )
    algorithm: Literal["library", "ring", "halving_doubling", "tree", "hierarchical"] = Field(
        "library", description="how messages are all-reduced (across nodes, or everywhere with exchange = message)"
    )
    overlap: bool = Field(
        False, description="start all-reducing buckets while backward still runs (exchange = message, library only)"
    )
    bucket_mb: float = Field(4.0, gt=0, description="size of the buckets with overlap, in MiB")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.overlap and self.algorithm != "library":
            raise ValueError('has overlap = true, which needs algorithm = "library"')
        if self.overlap and self.exchange == "shared":
            raise ValueError('has overlap = true, which has no effect on exchange = "shared"')
        return self


class AllReduce(RoundStrategy):
    """Synchronous data parallelism: N workers with batch b equal one process with batch N*b."""

    Options = AllReduceOptions
    options: AllReduceOptions
    exact = True
    tested_with = (
        {"exchange": "shared"},
        {"exchange": "message"},
        {"exchange": "message", "algorithm": "ring"},
        {"exchange": "message", "algorithm": "halving_doubling"},
        {"exchange": "message", "algorithm": "tree"},
        {"algorithm": "hierarchical"},
        {"exchange": "message", "overlap": True, "bucket_mb": 0.0005},
    )

    def __init__(self, options: AllReduceOptions) -> None:
        super().__init__(options)
        self.needs = Needs(parameters="rank" if options.exchange == "message" else "node")

    def make_exchange(self) -> Exchange:
        from hpctrain.strategies.exchange import MessageExchange, OverlappedExchange, SharedExchange

        options, nodes = self.options, self.phase.worker_comm.nodes
        apart = 1 < len(nodes) == len(set(nodes))  # then there is nothing to share
        chosen = apart and options.exchange == "auto" and options.algorithm == "library"
        if self.phase.members.shared and not chosen:
            return SharedExchange(self.phase, options.algorithm)
        if options.overlap or chosen:
            return OverlappedExchange(self.phase, int(options.bucket_mb * 2**20))
        return MessageExchange(self.phase, options.algorithm)

    def apply(self, round: Round) -> None:
        self.optimize(self.exchange.reduce(round.divisor), round)
