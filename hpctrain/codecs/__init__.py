"""How values are written on the wire while they are summed or sent: one file for each codec.

Codecs compute with torch on stretches of a replica's arena, so they lie above `replica` and not in `comm`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hpctrain.codecs.options import CHUNK, CODEC_TEXT, CodecChoice, CodecName, CodecTable

if TYPE_CHECKING:
    from hpctrain.codecs.base import Codec
    from hpctrain.codecs.feedback import Feedback
    from hpctrain.codecs.wire import WireCodec

__all__ = ["CODEC_TEXT", "CodecChoice", "CodecName", "CodecTable", "codec_by", "wire_codec_by"]


def codec_by(codec: CodecName | CodecTable, seed: int = 0, epoch: int | None = None) -> Codec:
    """A new codec of that name, or as that table says. `seed`: of those that draw random numbers; `epoch`: its samples,
    if they are known. Raises JobError if they are needed."""
    from hpctrain.codecs.demo import SIDE, TOP, LargestFrequencies
    from hpctrain.codecs.half import BFloat16, Float16
    from hpctrain.codecs.library import LibrarySum
    from hpctrain.codecs.powersgd import RANK, AlternatingPowerSGD, PowerSGD
    from hpctrain.codecs.quantise import BLOCK, Int4, Int8
    from hpctrain.codecs.sign import SIGNS, MajoritySign, Sign
    from hpctrain.codecs.sparse import FullValues, TwoBitValues, kept
    from hpctrain.codecs.topk import KEEP, TopK
    from hpctrain.codecs.wire import WireCodec

    table = codec if isinstance(codec, CodecTable) else CodecTable(name=codec)
    keep, block, rank = table.keep, table.block, table.rank or RANK
    warmup = table.warmup.length(epoch) if table.warmup is not None else 0
    form = TwoBitValues() if table.bits == 2 else FullValues()
    made: dict[CodecName, Callable[[], Codec]] = {
        "none": LibrarySum,
        "bfloat16": BFloat16,
        "float16": Float16,
        "int8": lambda: Int8(block or BLOCK, seed),
        "int4": lambda: Int4(block or BLOCK, seed),
        "sign": lambda: (MajoritySign if table.majority else Sign)(block or SIGNS),
        "topk": lambda: TopK(keep or KEEP, block or CHUNK, form, warmup),
        "demo": lambda: LargestFrequencies(SIDE, kept(keep, SIDE * SIDE) if keep else TOP),
        "powersgd": lambda: PowerSGD(rank, seed),
        "acp": lambda: AlternatingPowerSGD(rank, seed),
    }
    found = made[table.name]()
    if isinstance(found, WireCodec):
        found.feedback = _feedback(table)
    return found


def _feedback(table: CodecTable) -> Feedback:
    from hpctrain.codecs.feedback import Differences, Feedback, MomentumCorrection

    _, momentum = table.own_momentum
    if table.feedback == "ef21":
        return Differences(momentum)
    return MomentumCorrection(momentum) if table.momentum else Feedback(table.decay or 1.0)


def wire_codec_by(codec: CodecName | CodecTable, seed: int = 0) -> WireCodec | None:
    """The same for messages that are not summed on their way; None for "none", and for those that only sum."""
    from hpctrain.codecs.wire import WireCodec

    made = codec_by(codec, seed)
    return made if isinstance(made, WireCodec) else None
