"""Whether the MPI library accepts pointers to device memory: queried, or tested in a separate process.

NOT YET RUN ON A GPU. Passing device memory to an MPI that does not support it kills the process (SIGSEGV), so it is
never tested in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from hpctrain.comm.base import Communicator
from hpctrain.comm.device.gpu import Gpu
from hpctrain.errors import ClusterError
from hpctrain.launcher.started import without_launcher

PROBE_SECONDS = 60.0
TRIAL = "from hpctrain.comm.device.cuda_aware import trial; trial({index})"


def cuda_aware(comm: Communicator, wanted: str, index: int) -> tuple[bool, str]:
    """Whether device pointers may be passed to MPI, and how this is known. The same on all ranks. Collective.

    Never tested in this process, which would not survive a negative result. `wanted`: `communicator.cuda_aware`. "yes"
    overrides what the library says of itself, but not a trial. Raises ClusterError, on all ranks, if that fails.
    """
    if wanted == "no":
        return False, 'communicator.cuda_aware = "no"'
    if not comm.concurrent:
        return False, "virtual ranks share one process"
    from hpctrain.comm.mpi import library

    answers = comm.gather_json(library.cuda_support())
    if all(answers):
        return True, "the MPI library says that it is CUDA-aware"
    if wanted == "auto" and None not in answers:
        return False, "the MPI library says that it is not CUDA-aware"
    worked = bool(comm.broadcast_json(probe(index) if comm.rank == 0 else None))
    if wanted == "auto":
        ended = "worked" if worked else "failed"
        return worked, f"the MPI library does not say whether it is CUDA-aware, and a trial {ended}"
    if not worked:
        error = ClusterError(
            'communicator.cuda_aware = "yes", but a process that passed GPU memory to the MPI library '
            f'({library.name()}) failed; use "auto" or "no", or a CUDA-aware MPI'
        )
        error.everywhere = True
        raise error
    return True, 'communicator.cuda_aware = "yes", and a trial worked'


def probe(index: int, program: str = TRIAL, seconds: float = PROBE_SECONDS) -> bool:
    """Whether a separate MPI process survives sending device memory to itself. It is a child, since it may crash."""
    environment = without_launcher(os.environ)
    home = str(Path(__file__).resolve().parents[3])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [home, *sys.path]))
    command = [sys.executable, "-c", program.format(index=index)]
    quiet = subprocess.DEVNULL
    try:
        ended = subprocess.run(
            command, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, timeout=seconds, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return ended.returncode == 0


def trial(index: int) -> None:
    """Runs in the child: send device memory to itself and add it up. Raises, or crashes, if that does not work."""
    gpu = Gpu.open(index)
    from hpctrain.comm.mpi import library

    for length in (16, 1 << 20):  # one message sent eagerly, one that waits for its receiver
        out, into = (gpu.zeros(length, np.dtype(np.float32)) for _ in range(2))
        out.fill(1.0)
        gpu.mark().synchronize()
        library.try_on_self(out, into)
        if float(into.sum()) != 2.0 * length:
            raise SystemExit(1)
