"""The MPI library itself: what it is, what it can do, how it ends."""

from __future__ import annotations

import ctypes

from hpctrain.comm.base import Buffer
from hpctrain.comm.mpi.start import MPI


def launched_together() -> int:
    """How many processes the MPI library knows to have been started together."""
    return MPI.COMM_WORLD.size


def name() -> str:
    """The MPI library's own name and version, one line."""
    return MPI.Get_library_version().splitlines()[0].strip("\x00 ")


def standard() -> str:
    """The version of the MPI standard that the library implements: "4.1"."""
    return ".".join(map(str, MPI.Get_version()))


def thread_level() -> str:
    """What the library grants to threads: "MPI_THREAD_MULTIPLE", which `world` needs, or less."""
    levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(f"MPI_THREAD_{name}" for name in levels if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def cuda_support() -> bool | None:
    """What the MPI library says: whether it takes device pointers. None where it does not say."""
    library = ctypes.CDLL(MPI.__file__)
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")  # of MPI 4.1: "mpi,system,cuda:device", say
    info.Free()
    return None if kinds is None else any(kind.strip().startswith("cuda") for kind in kinds.split(","))


def try_on_self(out: Buffer, into: Buffer) -> None:
    """Send `out` to this process itself, and add it to what arrived, leaving twice `out` in `into`."""
    MPI.COMM_SELF.Sendrecv(out, 0, recvbuf=into, source=0)
    MPI.SUM.Reduce_local(out, into)
    MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, into)
