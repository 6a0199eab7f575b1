"""How many bytes a worker's own contribution takes once encoded: in closed form, from the codec and the shapes."""

from __future__ import annotations

from typing import Any, cast

import torch

from hpctrain.bench.codecs import Loopback
from hpctrain.codecs import codec_by
from hpctrain.codecs.joint import JointAddend, JointCodec
from hpctrain.codecs.options import NAMES
from hpctrain.codecs.wire import WireCodec
from hpctrain.job import Job
from hpctrain.replica.layout import Layout
from hpctrain.replica.replica import Replica

AFTER = 2**62  # samples: any warm-up is over
TURNS = 2  # ACP-SGD sends its factors in turn


def model_layout(job: Job) -> Layout:
    """The parameters of the job's model. Raises ModelError."""
    return Replica(job.model.bind()()).layout


def payload_per_step(job: Job, layout: Layout) -> float:
    """Bytes per worker and step in the job's first phase: its gradient's, or a round's change over its steps."""
    codec = getattr(job.schedule[0].strategy.options, "codec", "none")
    return message_bytes(codec, layout) / steps_per_round(job)


def ratios(job: Job) -> dict[str, float]:
    """By codec, with its usual options: how many times less a message takes than the job's model's parameters."""
    layout = model_layout(job)
    full = layout.length * layout.dtype.itemsize
    return {name: full / message_bytes(name, layout) for name in NAMES if name != "none"}


def steps_per_round(job: Job) -> int:
    """Of the job's first phase."""
    every = getattr(job.schedule[0].strategy.options, "every", 1)
    return every if isinstance(every, int) else 1


def message_bytes(name: Any, layout: Layout) -> float:
    """Bytes of one message, or of all messages of a sum, after any warm-up, with all parameters of the layout in one
    stretch."""
    codec, values = codec_by(name), torch.zeros(layout.length, dtype=torch.float32)
    codec.position = AFTER
    if isinstance(codec, WireCodec):
        return codec.nbytes(values)
    if not isinstance(codec, JointCodec):
        return values.nbytes
    comm = Loopback()
    memory = [codec.memory(slot, values.dtype) for slot in layout.slots]
    addend = JointAddend([cast(Any, comm)] * codec.stages, values, None, layout.slots, memory)
    for _ in range(TURNS):
        for _ in codec.reduce(addend):
            pass
    return comm.sent / TURNS
