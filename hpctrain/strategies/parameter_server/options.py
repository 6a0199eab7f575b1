"""The keys of strategy.name = "parameter_server"."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from hpctrain.codecs import CodecChoice, CodecTable
from hpctrain.codecs.options import JOINT, NAMES, ROUNDS, PullChoice
from hpctrain.options import Options
from hpctrain.strategies.balance import BATCHES_TEXT, BalanceChoice


class ParameterServerOptions(Options):
    """The keys of strategy.name = "parameter_server"."""

    mode: Literal["async", "bounded", "sync"] = Field(
        "async",
        description="async: one update for each gradient, as it arrives; bounded: the same, but no worker is more "
        "than `bound` steps ahead of the slowest; sync: one update per round, with all workers' "
        "gradients summed in rank order",
    )
    servers: int = Field(1, ge=1, description="how many ranks own a shard of the parameters")
    colocated: bool = Field(
        False, description="run the servers in threads of worker ranks instead of on ranks of their own"
    )
    shards: Literal["device", "host"] = Field(
        "device",
        description="where servers on GPUs keep and update their shards: in the GPU's memory, or in pinned host memory",
    )
    shard_sizes: Literal["equal", "bandwidth"] = Field(
        "equal",
        description="equal: all servers own as much; bandwidth: in proportion to the bytes per second that their links "
        "carry, measured when the phase begins (equal where workers and servers share memory: nothing is sent)",
    )
    chunk_mb: float = Field(
        1.0,
        gt=0,
        le=1e6,
        description="size of the chunks, in MiB, in which gradients and parameters travel between nodes, in both "
        "directions at once, and which a server updates one after another. A shard is one chunk if it is not sent, if "
        "the optimizer needs whole parameters, or with train.clip_norm in mode sync",
    )
    codec: CodecChoice = Field(
        "none",
        description="how gradients and parameters are written into messages between nodes. none: as they are; "
        "bfloat16, float16: in 16 bits (float16 with a scale for each message); any other codec of all_reduce but "
        "powersgd and acp: gradients with that codec, parameters in bfloat16; for evaluations, checkpoints and the end "
        "of a phase parameters are sent as they are",
    )
    pull: PullChoice = Field(
        None,
        description="how parameters are written into messages between nodes, if not as `codec` says. none: as they "
        "are; bfloat16, float16: in 16 bits; any other codec of `codec`: the difference to what this worker last "
        "received, for which servers keep a model for each worker of another node, and each worker one; a worker's "
        "first push of a phase has its model besides",
        json_schema_extra={"default": "by codec"},
    )
    bound: int = Field(
        3,
        ge=0,
        le=10**6,
        description="how many steps the fastest worker may be ahead of the slowest, counted from the last point "
        "where all workers were synchronised, such as an evaluation (mode bounded)",
    )
    lr_per_update: Literal["auto", "workers", "staleness", "none"] = Field(
        "auto",
        description="what the learning rate is divided by for the gradient of one worker (modes async and bounded): "
        "the number of workers, the gradient's staleness (at least 1), or nothing; auto: the number of "
        "workers, to the power of 0.75 for adaptive optimizers such as Adam",
    )
    momentum_correction: bool = Field(
        True,
        description="keep a separate SGD velocity for each worker, with Nesterov momentum (DANA-Slim: Hakimi et al. "
        "2019); with a single velocity, late gradients make training unstable (modes async and bounded)",
    )
    clip_pushes: float | None = Field(
        None,
        gt=1,
        le=1e9,
        description="scale a gradient down if its norm is more than this many times the running mean of that "
        "worker's gradient norms (modes async and bounded); left out: 2 for SGD, no limit for adaptive "
        "optimizers such as Adam",
    )
    delay_compensation: Literal["none", "constant", "adaptive"] = Field(
        "none",
        description="correct stale gradients to first order for the parameters' change since they were read "
        "(DC-ASGD, Zheng et al. 2017)",
    )
    delay_lambda: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="strength of delay_compensation; left out: 0.04 for constant, 2.0 for adaptive, as published",
    )
    balance: BalanceChoice = Field("none", description=f"{BATCHES_TEXT} (mode sync)")
    backup_workers: int = Field(
        0,
        ge=0,
        description="close a round without waiting for this many of the slowest workers; their late gradients are "
        "dropped (mode sync)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, codec in (("codec", self.codec), ("pull", self.pull)):
            if str(codec) in JOINT:
                taken = ", ".join(f'"{name}"' for name in NAMES if name not in JOINT)
                raise ValueError(f'has {name} = "{codec}", which sums over workers only, not at a server; use {taken}')
            for key in ROUNDS if isinstance(codec, CodecTable) else ():
                if getattr(codec, key):
                    raise ValueError(f"has {name}.{key}, {WHY_ROUNDS[key]}; leave {key} out")
        if isinstance(self.pull, CodecTable) and self.pull.decay is not None:
            raise ValueError("has pull.decay, but what a pull leaves out is in the next difference; leave decay out")
        self._check_balance()
        defaults = type(self).model_fields
        for key, modes in MODE_KEYS.items():
            if self.mode not in modes and getattr(self, key) != defaults[key].default:
                needed = " or ".join(f'"{mode}"' for mode in modes)
                raise ValueError(f'has {key} with mode = "{self.mode}", where it has no effect; set mode = {needed}')
        if self.shard_sizes != "equal" and self.servers == 1:
            raise ValueError(f'has shard_sizes = "{self.shard_sizes}" with servers = 1, where it has no effect')
        if self.delay_lambda is not None and self.delay_compensation == "none":
            raise ValueError('has delay_lambda with delay_compensation = "none", where it has no effect')
        return self

    def _check_balance(self) -> None:
        if self.balance != "none" and not self.lockstep:
            raise ValueError(
                f'has balance = "{self.balance}" with mode = "{self.mode}", whose workers take their samples from a '
                'shared queue, slow ones fewer: leave balance out, or set mode = "sync"'
            )
        if self.balance != "none" and self.backup_workers:
            raise ValueError(
                f'has balance = "{self.balance}" with backup_workers = {self.backup_workers}, which drops what slow '
                "workers compute, so that their speed does not matter; leave one of them out"
            )

    @property
    def lockstep(self) -> bool:
        """Whether all workers take every step together."""
        return self.mode == "sync"

    def per_update(self, workers: int, adaptive: bool, staleness: int) -> float:
        """The learning rate's factor for one worker's gradient, by its staleness in versions, with `workers` workers.
        `adaptive`: whether the size of the optimizer's updates does not grow with the gradients (Adam and similar)."""
        if self.lr_per_update == "none":
            return 1.0
        if self.lr_per_update == "staleness":
            return 1.0 / max(1, staleness)
        adapts = self.lr_per_update == "auto" and adaptive
        return workers ** -(ADAPTIVE_POWER if adapts else 1.0)


# One worker's gradient is noisier than a round's, so Adam already takes shorter steps along it. A smaller batch calls
# for the square root (Malladi et al. 2022), late gradients for a smaller rate. The value lies in between; for results
# see docs/asynchrony.md.
ADAPTIVE_POWER = 0.75
WHY_ROUNDS = {  # why a server cannot take these keys of a codec
    "majority": "a vote on sums between workers",
    "feedback": "an estimate that all workers keep of each other, which a server does not",
    "momentum": "which is for workers that agree in rounds: a server has a velocity for each worker",
    "warmup": "which is for workers that agree in rounds: a server reads messages of one length",
}
MODE_KEYS = {
    "bound": ("bounded",),
    "backup_workers": ("sync",),
    "lr_per_update": ("async", "bounded"),
    "momentum_correction": ("async", "bounded"),
    "clip_pushes": ("async", "bounded"),
    "delay_compensation": ("async", "bounded"),
}
