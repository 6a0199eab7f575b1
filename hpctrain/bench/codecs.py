"""How long codecs take and what they send, on one rank with one thread."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.codecs import CodecTable, codec_by
from hpctrain.codecs.options import JOINT, NAMES
from hpctrain.codecs.wire import WireCodec

ELEMENTS = 10_000_000  # float32, normally distributed
REPETITIONS = 7
GIGABIT = 1e9 / 8  # bytes per second
TABLES: dict[str, CodecTable] = {
    **{name: CodecTable(name=name) for name in NAMES if name not in ("none", *JOINT)},
    "topk, 2 bits": CodecTable(name="topk", bits=2),
    "sign, majority": CodecTable(name="sign", majority=True),
}
ENCODE, REST, DECODE, ADD = "encode", "encode, rest", "decode", "decode, add"
TIMES = (ENCODE, REST, DECODE, ADD)
BYTES, RATIO = "MB", "ratio"


def measure_codecs(progress: Callable[[str], None]) -> FigureTable:
    """Milliseconds to encode (without and with what the message leaves out) and to decode (storing and adding), the
    message's size, and how many times smaller it is than the values."""
    values = torch.randn(ELEMENTS, generator=torch.Generator().manual_seed(0))
    full = values.nbytes
    table = FigureTable(
        "codecs",
        f"codecs: {ELEMENTS:,} float32 ({full / 1e6:.3g} MB) on one core, ms; what a message has",
        [*TIMES, BYTES, RATIO],
        notes=[f"To send the values as they are takes {full / GIGABIT * 1e3:.0f} ms at 1 Gbit/s."],
    )
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in TABLES}
    for repetition in range(REPETITIONS + 1):
        progress(f"codecs, {repetition + 1} of {REPETITIONS + 1}")
        for name, options in TABLES.items():
            codec = codec_by(options)
            assert isinstance(codec, WireCodec)
            taken[name].append(_times(codec, values))
    for name, options in TABLES.items():
        columns = zip(TIMES, zip(*taken[name][1:], strict=True), strict=True)  # the first one touches memory
        codec = codec_by(options)
        assert isinstance(codec, WireCodec)
        size = codec.nbytes(values)
        table.rows[name] = {column: Sample(tuple(1e3 * each for each in seconds), "ms") for column, seconds in columns}
        table.rows[name] |= {BYTES: Sample((size / 1e6,), "MB"), RATIO: Sample((full / size,), "1")}
    return table


def _times(codec: WireCodec, values: Tensor) -> tuple[float, ...]:
    """Seconds of each of TIMES."""
    length, dtype = codec.shape(values)
    message, found, rest = torch.zeros(length, dtype=dtype), torch.zeros_like(values), torch.zeros_like(values)
    calls: list[Callable[[], None]] = [
        lambda: codec.encode(values, message),
        lambda: codec.encode(values, message, rest),
        lambda: codec.decode(message, found),
        lambda: codec.decode(message, found, add=True),
    ]
    return tuple(map(_seconds, calls))


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
