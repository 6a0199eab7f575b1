"""The size of buckets that suits the network between the nodes."""

from __future__ import annotations

import numpy as np

from hpctrain.comm.base import Communicator

SIZES = [2**power for power in range(19, 25)]  # bytes, from 512 KiB (less is not worth its processor time) to 16 MiB
USUAL = 4.0  # MiB, where nothing was measured
NEAR = 1.1  # a size is good enough if a byte takes at most this many times the least
LONG = 0.1  # seconds; larger sizes are not tried after a sum that took this long
TRIES = 3


def best_bucket_mb(comm: Communicator) -> float:
    """The smallest bucket, in MiB, that an all-reduce between nodes carries at nearly full speed: small buckets start
    early and leave little to do after backward. The same on all ranks. Collective; takes less than a second."""
    leaders = comm.split(0 if comm.local_rank == 0 else None, comm.rank)
    found = None
    if leaders is not None:
        found = _measured(leaders)
        leaders.free()
    size: float = comm.broadcast_json(found)
    return size


def _measured(comm: Communicator) -> float:
    arena = comm.arena(SIZES[-1] // 4, np.dtype(np.float32), "host")
    buffer = arena.mine
    per_byte: dict[int, float] = {}
    for size in SIZES:
        seconds = min(_seconds(comm, buffer[: size // 4]) for _ in range(TRIES))
        per_byte[size] = seconds / size
        if seconds > LONG:
            break
    arena.free()
    least = min(per_byte.values())
    if not least:  # virtual ranks without a network
        return USUAL
    return next(size for size, taken in per_byte.items() if taken <= NEAR * least) / 2**20


def _seconds(comm: Communicator, buffer: np.ndarray[tuple[int], np.dtype[np.float32]]) -> float:
    """Of the slowest rank; the same on all."""
    comm.barrier()
    start = comm.now()
    comm.start_all_reduce(buffer).wait()
    taken = np.array([(comm.now() - start) / 1e9])
    comm.all_reduce(taken, "max")
    return float(taken[0])
