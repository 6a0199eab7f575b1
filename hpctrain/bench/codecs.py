"""How long codecs take and what they send, on one rank with one thread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from hpctrain.bench.report import FigureTable, Sample
from hpctrain.codecs import CodecTable, codec_by
from hpctrain.codecs.joint import JointAddend, JointCodec
from hpctrain.codecs.options import JOINT, NAMES
from hpctrain.codecs.wire import WireCodec
from hpctrain.replica.layout import Slot

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
    slots = _perceptron()
    shapes = ", ".join(f"{slot.shape[0]} x {slot.shape[1]}" for slot in slots)
    table.notes.append(f"{' and '.join(JOINT)}, of rank 2: matrices of {shapes}.")
    for name in JOINT:
        progress(f"codecs, {name}")
        table.rows[name] = _joint_row(CodecTable(name=name), values, slots)
    return table


class Loopback:
    """Stands for a communicator of two ranks of which the other gives zeros, in no time. `sent`: bytes."""

    rank, size, sent = 0, 2, 0

    def span(self, *given: Any, **named: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def arena(self, length: int, dtype: Any) -> SimpleNamespace:
        return SimpleNamespace(mine=np.zeros(length, dtype))

    def start_all_reduce(self, buffer: Any) -> None:
        self.sent += buffer.nbytes


def _perceptron() -> list[Slot]:
    """The matrices of one with two equal hidden layers, in ELEMENTS elements or a little less."""
    width = int(math.sqrt(397**2 + ELEMENTS) - 397)
    slots: list[Slot] = []
    for shape in ((width, 784), (width, width), (10, width)):
        offset = slots[-1].offset + slots[-1].size if slots else 0
        slots.append(Slot(f"matrix {len(slots)}", shape, offset, math.prod(shape)))
    return slots


def _joint_row(options: CodecTable, values: Tensor, slots: list[Slot]) -> dict[str, Sample]:
    """The same of a codec that sums; it has no way to add."""
    codec, given = codec_by(options), values[: slots[-1].offset + slots[-1].size]
    assert isinstance(codec, JointCodec)
    comm, taken, sums = Loopback(), dict[str, list[float]](), 0
    for kind, rest in ((ENCODE, None), (REST, torch.zeros_like(given))):
        memory = [codec.memory(slot, given.dtype) for slot in slots]
        addend = JointAddend([cast(Any, comm)] * codec.stages, given.clone(), rest, slots, memory)
        for _ in range(REPETITIONS + 1):
            addend.values.copy_(given)
            marks = [time.perf_counter()]
            marks += [time.perf_counter() for _ in codec.reduce(addend)]
            taken.setdefault(kind, []).append(marks[-1] - marks[0])
            taken.setdefault(DECODE, []).append(time.perf_counter() - marks[-1])
            sums += 1
    row = {kind: Sample(tuple(1e3 * each for each in seconds[1:]), "ms") for kind, seconds in taken.items()}
    size = comm.sent / sums
    return row | {BYTES: Sample((size / 1e6,), "MB"), RATIO: Sample((given.nbytes / size,), "1")}


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
