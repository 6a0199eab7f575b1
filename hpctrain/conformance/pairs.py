"""Strategies with codecs: every pair, and the promise that each must keep.

A strategy with an option `codec` makes a pair with every codec, and with those that have a memory of their own kind. A
pair that makes no sense is refused, with a reason; every other one must train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hpctrain.codecs.options import NAMES
from hpctrain.comm.base import Communicator
from hpctrain.conformance import task
from hpctrain.conformance.checks import Check, between, equal, hold, if_deterministic, workers_of
from hpctrain.conformance.task import Subject, quietly
from hpctrain.errors import HpctrainError, JobError, ModelError
from hpctrain.job import Job, registry
from hpctrain.job.spec import options_class
from hpctrain.trace.schema import Kind

CODECS: tuple[Any, ...] = (
    *(name for name in NAMES if name != "none"),
    {"name": "topk", "keep": 0.1, "bits": 2},
    {"name": "topk", "keep": 0.1, "momentum": 0.5, "warmup": {"samples": 100}},
    {"name": "topk", "keep": 0.1, "feedback": "ef21"},
    {"name": "demo", "decay": 0.9},
    {"name": "sign", "block": 64, "majority": True},
)
T = TypeVar("T")
BEGIN, MIDDLE, STEPS = 48, 144, 10  # samples before, and in, the phase of the strategy; steps of four workers in all


class RefusedPairError(HpctrainError):
    """The strategy refuses the codec; the message is the reason."""


def accepted(make: Callable[[], T]) -> T:
    """What `make` returns. Raises RefusedPairError instead of an error about a job that makes no sense."""
    try:
        return make()
    except (JobError, ModelError) as error:
        raise RefusedPairError(str(error)) from None


@dataclass(frozen=True)
class Pair(Subject):
    """A strategy with a codec. A job with a pair that makes no sense raises RefusedPairError."""

    def job(self, folder: Path | str, **tables: Any) -> Job:
        make = super().job
        return accepted(lambda: make(folder, **tables))


def pairs_of(name: str) -> list[Pair]:
    """The strategy `name` with each codec, and else with the first options that it is tested with; none if it has no
    option `codec`. Raises JobError."""
    kind = registry.resolve("strategy", name)
    model = options_class(kind)
    if model is None or "codec" not in model.model_fields:
        return []
    return [Pair(name, {**kind.tested_with[0], "codec": codec}) for codec in CODECS]


def registered_pairs() -> list[Pair]:
    """Those of every built-in strategy."""
    return [pair for name in registry.STRATEGIES for pair in pairs_of(name)]


def job_of(pair: Subject, folder: Path | str, workers: int, **tables: Any) -> Job:
    """A job with phases before and after, in bfloat16, with accumulation and clipping, and a checkpoint in each phase.
    `workers`: of the pair. Raises JobError."""
    end = BEGIN + MIDDLE * workers // 4
    train = {
        "steps": STEPS, "batch_size": 3, "accumulate": 2, "clip_norm": 0.5, "precision": "bfloat16",
        "checkpoint_every": {"samples": BEGIN}, "keep_checkpoints": 9,
    }  # fmt: skip
    return task.small_job(folder, train=train, phases=between(pair, BEGIN, end), **tables)


def trains_with_its_codec(comm: Communicator, pair: Subject, folder: Path) -> None:
    """In bfloat16, with accumulation, clipping, and other phases before and after, all ranks end with the same finite
    parameters; messages between nodes are encoded; a run resumed in the strategy's phase ends with the same bits."""
    workers = workers_of(comm, pair)
    job = accepted(lambda: job_of(pair, folder, workers))
    comm.recorder.drain()
    whole = accepted(lambda: quietly(comm, job))
    found = equal(comm, whole)
    hold(bool(np.isfinite(found).all()), "the final parameters are not finite")
    encoded = int((comm.recorder.drain()["spans"]["kind"] == Kind.ENCODE).sum())
    hold(len(set(comm.nodes)) == 1 or any(comm.gather_json(encoded)), "nothing was encoded")
    if if_deterministic(pair, workers) is not None:
        return
    if comm.rank == 0:
        files = (whole.folder / "checkpoints").iterdir()
        cursors = sorted({int(file.name.partition(".")[0]) for file in files if file.name[0].isdigit()})
        inside = next(place for place, cursor in enumerate(cursors) if cursor > BEGIN)
        task.forget_after(whole.folder, inside)
    comm.barrier()
    again = equal(comm, quietly(comm, job, resume=whole.folder))
    hold(bool((again == found).all()), "a run resumed in the strategy's phase ends with different parameters")


def _has_codec(subject: Subject, workers: int) -> str | None:
    codec = subject.options.get("codec", "none")
    return None if codec != "none" else "it is tested without a codec"


TRAINS_WITH_ITS_CODEC = Check("trains with its codec", trains_with_its_codec, _has_codec)
