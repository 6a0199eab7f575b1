"""Chooses how device buffers are sent: staged through pinned memory, or passed directly to MPI."""

from __future__ import annotations

from hpctrain.comm.base import Communicator
from hpctrain.comm.device.communicator import DeviceCommunicator
from hpctrain.comm.device.cuda_aware import cuda_aware
from hpctrain.comm.device.direct import DirectCommunicator
from hpctrain.comm.device.gpu import Gpu
from hpctrain.comm.device.staged import StagedCommunicator


def open_device(comm: Communicator, index: int, wanted: str = "auto") -> tuple[DeviceCommunicator, str]:
    """The communicator for arenas on cuda:`index`, and the path it uses, as a sentence. Collective over `comm`.

    `wanted`: whether MPI is CUDA-aware: "yes", "no", or "auto" to detect it.
    """
    aware, why = cuda_aware(comm, wanted, index)
    gpu = Gpu.open(index)
    if aware:
        return DirectCommunicator.around(comm, gpu), f"device buffers are passed directly to MPI: {why}"
    return StagedCommunicator.around(comm, gpu), f"device buffers are staged through pinned memory: {why}"
