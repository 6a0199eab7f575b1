"""The option `codec` of strategies: a name, or a table with a name and the options of that codec."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, WrapValidator, model_validator

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
}
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

    def __str__(self) -> str:
        return self.name

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key, names in TAKES.items():
            if getattr(self, key) is not None and self.name not in names:
                needed = " or ".join(f'"{name}"' for name in names)
                raise ValueError(f'has {key} with name = "{self.name}", where it has no effect; set name = {needed}')
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


def _listed(names: Sequence[CodecName]) -> str:
    return ", ".join(f'"{name}"' for name in names)


CodecChoice = Annotated[
    CodecName | CodecTable, WrapValidator(_codec), Field(json_schema_extra={"allowed": f"{_listed(NAMES)}, or a table"})
]
