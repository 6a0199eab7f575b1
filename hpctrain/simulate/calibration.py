"""What a machine's computing and messages cost: measured once, kept in a TOML file that a person can read and edit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator

from hpctrain.errors import ClusterError, JobError
from hpctrain.job import file as tomlfile
from hpctrain.job.messages import faults
from hpctrain.options import Table

SLACK = 0.01
NO_CODEC, SUM = "none", "reduce"
BEYOND = 2.0  # a cost is known for as much as this factor more or less than what was measured
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class MeasuredCost(Table):
    """`fixed_s` + `each_s` * n seconds of one core. `least`, `most`: of n, as far as it was measured. `spread`: the
    standard deviation of single measurements, relative to the mean."""

    fixed_s: Seconds = 0.0
    each_s: Seconds = 0.0
    least: float = 0.0
    most: float = 0.0
    spread: Annotated[float, Field(ge=0, le=100)] = 0.0

    def seconds(self, n: float) -> float:
        """Of one core, for n samples or bytes."""
        return self.fixed_s + self.each_s * n

    def knows(self, n: float) -> bool:
        """Whether n is near what was measured; yes if the calibration does not say what was."""
        return not self.most or self.least / BEYOND <= n <= self.most * BEYOND


class PassWork(Table):
    """What a pass of a model does: `flops` for each sample, and how many `operators` it calls for a batch."""

    flops: Annotated[float, Field(gt=0)]
    operators: Annotated[int, Field(ge=1)]


class ModelWork(Table):
    """What the passes of a model do."""

    forward: PassWork
    backward: PassWork


class ModelCosts(Table):
    """The passes of one model. `order`: the parameters, as indices in the arena, in the order in which backward
    completes their gradients; `shares`: of the pass, the part that ends with each of them. They add up to 1.
    `work`: what the passes do, from which the costs of other models follow; None: not known."""

    name: str
    parameters: Annotated[int, Field(ge=1)]
    forward: MeasuredCost  # n: samples of a micro-batch
    backward: MeasuredCost
    order: Annotated[list[int], Field(min_length=1)]
    shares: list[Annotated[float, Field(ge=0, le=1)]]
    work: ModelWork | None = None

    @model_validator(mode="after")
    def _one_share_for_each_parameter(self) -> Self:
        if len(self.order) != len(self.shares) or len(set(self.order)) < len(self.order) or min(self.order) < 0:
            raise ValueError("order must have each parameter's index (0, 1, ...) once, and shares as many numbers")
        if abs(sum(self.shares) - 1.0) > SLACK:
            raise ValueError(f"shares must add up to 1, not {sum(self.shares):g}")
        return self


class LinkCosts(Table):
    """Messages between two ranks. `latency_s`: one way. `bytes_per_s`: of one message on its way, None: the link's rate
    in the cluster file. `overhead_s`: of the sender and of the receiver, for each message. `efficiency`: the share of a
    link's rate that carries data. `seniority`: how far a message is behind those that it finds on its links: with n
    of them, its share is theirs times (1 - seniority) ** n."""

    latency_s: Seconds = 0.0
    bytes_per_s: Annotated[float, Field(ge=1e3)] | None = None
    overhead_s: Seconds = 0.0
    efficiency: Annotated[float, Field(gt=0, le=1)] = 1.0
    eager_bytes: Annotated[int, Field(ge=0)] = 16384
    seniority: Annotated[float, Field(ge=0, le=1)] = 0.0


class HandlingCosts(Table):
    """What messages take of a core. `message_s`, `byte_s`: of the sender's and of the receiver's, for each; `napping`:
    the share that a rank uses while it waits with naps; `step_s`: what other threads (data, trace) use in a step."""

    message_s: Seconds = 5e-6
    byte_s: Annotated[float, Field(ge=0, le=1)] = 5e-10
    napping: Annotated[float, Field(ge=0, le=1)] = 0.05
    step_s: Seconds = 0.0


class Calibration(Table):
    """What was measured. `source`: the command or the runs. `spans`: by kind (reduce, update ...), for bytes; `codecs`:
    the same by codec ("none" is one), for those kinds that depend on it. `step`: what a step costs besides its spans.
    `turns`: how many times longer computing takes while ranks take turns on a core.
    `error`: how far a computing time may be off, relative (one standard deviation); `error_other_model`: of a model
    that was never run."""

    source: str = ""
    model: ModelCosts
    spans: dict[str, MeasuredCost] = Field(default_factory=dict)
    codecs: dict[str, dict[str, MeasuredCost]] = Field(default_factory=dict)
    step: MeasuredCost = MeasuredCost()
    between: LinkCosts = LinkCosts(latency_s=50e-6, overhead_s=5e-6, efficiency=0.94, seniority=0.3)
    within: LinkCosts = LinkCosts(latency_s=1e-6, bytes_per_s=5e9, overhead_s=1e-6)
    handling: HandlingCosts = HandlingCosts()
    turns: Annotated[float, Field(ge=1, le=10)] = 1.2
    error: Annotated[float, Field(ge=0, le=10)] = 0.15
    error_other_model: Annotated[float, Field(ge=0, le=10)] = 0.6  # docs/simulation.md

    def span(self, kind: str, codec: str = NO_CODEC) -> MeasuredCost:
        """What spans of that kind cost, where values are sent with that codec. Raises ClusterError if that is not
        known."""
        found = self.codecs.get(codec, {}).get(kind) or self.spans.get(kind)
        if found is None and kind == SUM:  # a plain one, whatever is sent
            found = self.codecs.get(NO_CODEC, {}).get(kind)
        if found is None:
            what = f'"{kind}" costs' if codec == NO_CODEC else f'"{kind}" with codec "{codec}" costs'
            raise ClusterError(
                f"the calibration ({self.source}) does not tell what {what}, which this job does; calibrate with this "
                "job: hpctrain calibrate --measure JOB"
            )
        return found

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """From a TOML file. Raises ClusterError with all mistakes."""
        try:
            tables = tomlfile.read(path)
            if (other := tomlfile.other_than("calibration file", tables)) is not None:
                raise ClusterError(f"{path} is a {other}, not a calibration file (hpctrain calibrate writes one)")
            return cls.model_validate(tables)
        except JobError as error:
            raise ClusterError(str(error).replace("job file", "calibration file")) from None
        except ValidationError as error:
            mistakes = "; ".join(str(fault).replace("the job:", "the calibration:") for fault in faults(error, cls))
            mistakes = mistakes.replace("; a job has", "; a calibration has")
            raise ClusterError(f"{path}: {mistakes}") from None

    def save(self, path: Path) -> None:
        """Write it as TOML. Raises ClusterError."""
        try:
            path.write_text(tomlfile.write(self.plain()))
        except OSError as error:
            raise ClusterError(f"{path}: the calibration cannot be written there ({error.strerror})") from None


def codec_name(options: object) -> str:
    """Of a strategy with these options; "none": without one."""
    codec = getattr(options, "codec", NO_CODEC)
    return codec if isinstance(codec, str) else str(codec.name)
