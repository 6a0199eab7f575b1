"""The option `codec` of strategies: a name, or a table with a name and the options of that codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, WrapValidator, model_validator

from hpctrain.errors import JobError
from hpctrain.options import Options
from hpctrain.text import did_you_mean

CodecName = Literal["none", "bfloat16", "float16", "int8", "int4", "sign", "topk", "demo", "powersgd", "acp"]
NAMES: tuple[CodecName, ...] = get_args(CodecName)
JOINT: tuple[CodecName, ...] = ("powersgd", "acp")  # which a server cannot take
TAKES: dict[str, tuple[CodecName, ...]] = {
    "keep": ("topk", "demo"),
    "block": ("int8", "int4", "sign", "topk"),
    "bits": ("topk",),
    "majority": ("sign",),
    "rank": JOINT,
    "feedback": ("topk", "demo"),
    "momentum": ("topk", "demo"),
    "decay": ("topk", "demo", "sign"),
    "warmup": ("topk",),
}
ROUNDS = ("majority", "feedback", "momentum", "warmup")  # keys for workers that agree in rounds: no servers
EF21_MOMENTUM = 0.9
CHUNK = 4096  # elements from which topk chooses, and frequencies from which demo does
EXAMPLE = '{name = "topk", keep = 0.01}'
CODEC_TEXT = (
    "how gradients (local_sgd, diloco: changes) are written into messages; ranks that share memory send none. none: as "
    "they are; bfloat16, float16: in 16 bits, added in float32 (float16 with a scale for each message); int8, int4: in "
    "8 or 4 bits, rounded at random so that the mean is right (QSGD); sign: in 1 bit, with a scale for each block; "
    "topk: the largest elements of each block; demo: the largest frequencies of each block (DeMo's); powersgd, acp: "
    "each matrix as a product of two narrow ones (acp: one of the two in turn). A table gives a name and the keys "
    f"below: {EXAMPLE}"
)


class WarmUp(Options):
    """How long a warm-up lasts, from the start of the run."""

    EXCLUSIVE = (frozenset({"epochs", "samples"}),)
    epochs: float | None = Field(default=None, gt=0, le=1e6, description="in epochs")
    samples: int | None = Field(default=None, ge=1, le=2**62, description="in samples of all workers")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.epochs is None) == (self.samples is None):
            raise ValueError("must have one of epochs and samples, such as {epochs = 4}")
        return self

    def length(self, epoch: int | None) -> int:
        """In samples. `epoch`: the samples per epoch, or None if unknown; then JobError if it is given in epochs."""
        if self.samples is not None:
            return self.samples
        if epoch is None:
            raise JobError(
                "codec.warmup.epochs: data.name is a stream of unknown length, so epochs cannot be counted; set "
                "codec.warmup.samples instead"
            )
        return round((self.epochs or 0.0) * epoch)


class CodecTable(Options):
    """A codec and its options."""

    KEY: ClassVar[str] = "name"
    name: CodecName = Field(description="the codec")
    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the elements (demo: frequencies) of a block that are sent, at least one of 4096 or of "
        "`block`; left out: 0.01, demo 32 of 4096",
    )
    block: int | None = Field(
        default=None,
        ge=8,
        le=2**15,
        multiple_of=8,
        description="elements that have one scale or, with topk, from which the largest are chosen; left out: 4096, "
        "int8 and int4 2048",
    )
    bits: Literal[2, 32] | None = Field(
        default=None,
        description="of each value that topk sends. 2: its sign and one of two magnitudes (as SparseLoCo); left out or "
        "32: the value as it is",
    )
    majority: bool | None = Field(
        default=None,
        description="each element of a sum has the sign that most ranks give it (sign); left out: the sum's own",
    )

    rank: int | None = Field(
        default=None,
        ge=1,
        le=2**15,
        description="columns of the factors of a matrix (powersgd, acp), at most its smaller side; a matrix of which "
        "that saves nothing is sent as it is; left out: 2",
    )
    feedback: Literal["residual", "ef21"] | None = Field(
        default=None,
        description="how later messages make up for what topk and demo leave out. residual: it is added to the next "
        "values; ef21: messages have the changes of an estimate that all ranks keep (EF21-SGDM), as many values again; "
        "left out: residual",
    )
    momentum: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="momentum of what each worker sends, instead of the optimizer's. topk: momentum correction (Deep "
        "Gradient Compression); topk and demo with feedback = ef21: EF21-SGDM's; left out: none, ef21 0.9",
    )
    decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="factor of what topk, demo and sign left out, at each message: less than 1 makes it a momentum "
        "instead of the optimizer's (demo: 0.999 as published, with optimizer SignSGD); left out: 1",
    )
    warmup: WarmUp | None = Field(
        default=None,
        description="for how long topk keeps more, 25 % at first, falling exponentially to `keep` in four parts; left "
        "out: not at all",
    )

    @property
    def own_momentum(self) -> tuple[str, float]:
        """The key that gives the codec a momentum of its own, and that momentum; 0 if it has none."""
        if self.feedback == "ef21":
            return ("feedback", EF21_MOMENTUM) if self.momentum is None else ("momentum", self.momentum)
        if self.decay is not None and self.decay < 1:
            return "decay", self.decay
        return "momentum", self.momentum or 0.0

    def __str__(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in TAKES.items():
            if getattr(self, key) is not None and self.name not in names:
                needed = " or ".join(f'"{name}"' for name in names)
                raise ValueError(f'has {key} with name = "{self.name}", where it has no effect; set name = {needed}')
        if self.name == "demo" and self.momentum is not None and self.feedback != "ef21":
            raise ValueError('has momentum with name = "demo", which needs feedback = "ef21"; or set decay')
        if self.decay is not None and (self.momentum or self.feedback == "ef21"):
            other = "momentum" if self.momentum else "feedback"
            raise ValueError(f"has decay and {other}, which both say what becomes of what was left out; leave one out")
        width = self.block or CHUNK
        if self.keep is not None and round(self.keep * width) == 0:
            least = math.ceil(1e6 / width) / 1e6
            raise ValueError(
                f"has keep = {self.keep:g} of blocks of {width}: less than one of each, so nothing would be sent; "
                f"set keep = {least:g} or more{', or a longer block' if self.name == 'topk' else ''}"
            )
        return self


def _codec(value: object, handler: object) -> CodecName | CodecTable:
    """A name alone stays one, however it was written. The handler, a union's, would report a fault of each member."""
    if isinstance(value, str):
        for name in NAMES:
            if value == name:
                return name
        raise ValueError(f"must be one of {_listed(NAMES)}, or a table such as {EXAMPLE}{did_you_mean(value, NAMES)}")
    if not isinstance(value, (dict, CodecTable)):
        raise ValueError(f"must be the name of a codec, or a table such as {EXAMPLE}")
    if isinstance(value, dict) and "name" not in value:
        raise ValueError(f"has no name; set name to one of {_listed(NAMES)}")
    table = CodecTable.model_validate(value)
    return table if set(table.plain()) > {"name"} else table.name


def _codec_or_none(value: object, handler: object) -> CodecName | CodecTable | None:
    return None if value is None else _codec(value, handler)


def _listed(names: Sequence[CodecName]) -> str:
    return ", ".join(f'"{name}"' for name in names)


CodecChoice = Annotated[
    CodecName | CodecTable, WrapValidator(_codec), Field(json_schema_extra={"allowed": f"{_listed(NAMES)}, or a table"})
]
PullChoice = Annotated[
    CodecName | CodecTable | None,
    WrapValidator(_codec_or_none),
    Field(json_schema_extra={"allowed": f"{_listed(NAMES)}, or a table"}),
]
