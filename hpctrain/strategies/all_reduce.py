"""All-reduce: every worker applies the same averaged gradient in every step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from hpctrain.codecs import CODEC_TEXT, CodecChoice, codec_by
from hpctrain.options import Options
from hpctrain.strategies.balance import BATCHES_TEXT, BalanceChoice
from hpctrain.strategies.base import Needs
from hpctrain.strategies.round import Round, RoundStrategy
from hpctrain.strategies.tuning import USUAL, best_bucket_mb

if TYPE_CHECKING:
    from hpctrain.comm.base import Communicator
    from hpctrain.strategies.exchange import Exchange


def _bucket_mb(value: object) -> object:
    if value == "auto" or (isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf):
        return value
    raise ValueError('must be "auto" or a number above 0')


class AllReduceOptions(Options):
    """The keys of strategy.name = "all_reduce"."""

    exchange: Literal["auto", "shared", "message"] = Field(
        "auto",
        description="shared: sum from node-shared memory, with the optimizer sliced over the node's ranks; "
        "message: all-reduce the whole gradient; auto: shared where possible, or message if every worker has a node of "
        "its own; across nodes with overlap, unless an algorithm is chosen",
    )
    algorithm: Literal["library", "ring", "halving_doubling", "tree", "hierarchical"] = Field(
        "library", description="how messages are all-reduced (across nodes, or everywhere with exchange = message)"
    )
    codec: CodecChoice = Field("none", description=CODEC_TEXT)
    balance: BalanceChoice = Field("none", description=BATCHES_TEXT)
    overlap: bool = Field(
        False, description="start all-reducing buckets while backward still runs, also where exchange is not auto"
    )
    bucket_mb: Annotated[float | Literal["auto"], PlainValidator(_bucket_mb)] = Field(
        "auto",
        description="size of the buckets with overlap or a codec, in MiB; auto: measured when a run on several nodes "
        "begins, and kept in its job.toml",
        json_schema_extra={"allowed": '"auto", or above 0'},
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.algorithm != "library" and (self.overlap or self.codec != "none"):
            given = "overlap = true" if self.overlap else f'codec = "{self.codec}"'
            raise ValueError(f'has {given}, which needs algorithm = "library"')
        return self


class AllReduce(RoundStrategy):
    """Synchronous data parallelism: N workers with batch b equal one process with batch N*b."""

    Options = AllReduceOptions
    options: AllReduceOptions
    measured = ("bucket_mb",)
    tested_with = (
        {"exchange": "shared"},
        {"exchange": "message"},
        {"exchange": "message", "algorithm": "ring"},
        {"exchange": "message", "algorithm": "halving_doubling"},
        {"exchange": "message", "algorithm": "tree"},
        {"algorithm": "hierarchical"},
        {"exchange": "message", "overlap": True, "bucket_mb": 0.0005},
        {"codec": "bfloat16", "bucket_mb": 0.0005},
        {"codec": "float16", "exchange": "message"},
        {"codec": "int8", "exchange": "message"},
        {"codec": {"name": "topk", "keep": 0.1}, "bucket_mb": 0.0005},
        {"codec": "sign", "exchange": "message"},
        {"codec": "demo", "exchange": "message"},
        {"codec": {"name": "powersgd", "rank": 1}, "bucket_mb": 0.0005},
        {"codec": "acp", "exchange": "message"},
        {"balance": "throughput"},
        {"balance": "throughput", "exchange": "message", "overlap": True, "bucket_mb": 0.0005},
    )

    def __init__(self, options: AllReduceOptions) -> None:
        super().__init__(options)
        self.exact = options.codec == "none"
        self.needs = Needs(parameters="rank" if options.exchange == "message" else "node")

    @staticmethod
    def tune(options: AllReduceOptions, comm: Communicator) -> dict[str, Any]:
        automatic = options.exchange == "auto" and options.algorithm == "library"
        needed = automatic or options.overlap or options.codec != "none"
        return {"bucket_mb": best_bucket_mb(comm)} if needed and len(set(comm.nodes)) > 1 else {}

    def make_exchange(self) -> Exchange:
        from hpctrain.strategies.exchange import BucketExchange, MessageExchange
        from hpctrain.strategies.shared import SharedBucketExchange, SharedExchange

        options, nodes = self.options, self.phase.worker_comm.nodes
        across = len(set(nodes)) > 1
        alone = len(set(nodes)) == len(nodes)  # no worker has another one to share memory with
        automatic = across and options.exchange == "auto" and options.algorithm == "library"
        early, encoded = automatic or options.overlap, options.codec != "none"
        codec = codec_by(options.codec, self.phase.seed, self.phase.dealing.epoch)
        early = early and not (codec.remembers and self.phase.updating.skips)  # else what is skipped would be kept
        size = int((USUAL if options.bucket_mb == "auto" else options.bucket_mb) * 2**20)
        if self.phase.members.shared and not (automatic and alone):
            if across and (early or encoded):
                return SharedBucketExchange(self.phase, codec, size, early)
            return SharedExchange(self.phase, options.algorithm)
        if early or encoded:
            return BucketExchange(self.phase, codec, size, early)
        return MessageExchange(self.phase, options.algorithm)

    def apply(self, round: Round) -> None:
        self.descend(round)
