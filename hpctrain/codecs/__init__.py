"""How values are written on the wire while they are summed or sent: one file for each codec.

Codecs compute with torch on stretches of a replica's arena, so they lie above `replica` and not in `comm`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from hpctrain.codecs.base import Codec
    from hpctrain.codecs.wire import WireCodec

CodecName = Literal["none", "bfloat16", "float16"]
CODEC_TEXT = (
    "how gradients (local_sgd: changes) are written into messages; ranks that share memory send none. none: as they "
    "are; bfloat16, float16: in 16 bits, added in float32 (float16 with a scale for each message)"
)


def codec_by(name: CodecName) -> Codec:
    """A new codec of that name."""
    from hpctrain.codecs.half import BFloat16, Float16
    from hpctrain.codecs.library import LibrarySum

    made: dict[str, type[Codec]] = {"none": LibrarySum, "bfloat16": BFloat16, "float16": Float16}
    return made[name]()


def wire_codec_by(name: CodecName) -> WireCodec | None:
    """A new codec of that name, for messages that are not summed on their way; None for "none"."""
    from hpctrain.codecs.wire import WireCodec

    codec = codec_by(name)
    return codec if isinstance(codec, WireCodec) else None
