"""The MPI library itself: its name, version and capabilities."""

from __future__ import annotations

import ctypes

from hpctrain.comm.base import Buffer
from hpctrain.comm.mpi.start import MPI


def launched_together() -> int:
    """The number of processes that, according to the MPI library, were started together."""
    return MPI.COMM_WORLD.size


def name() -> str:
    """The MPI library's own name and version, on one line."""
    return MPI.Get_library_version().splitlines()[0].strip("\x00 ")


def standard() -> str:
    """The version of the MPI standard that the library implements, such as "4.1"."""
    return ".".join(map(str, MPI.Get_version()))


def thread_level() -> str:
    """The thread level that the library provides: "MPI_THREAD_MULTIPLE", which `world` needs, or less."""
    levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
    return next(f"MPI_THREAD_{name}" for name in levels if getattr(MPI, f"THREAD_{name}") == MPI.Query_thread())


def cuda_support() -> bool | None:
    """Whether the MPI library reports that it accepts device pointers. None if it does not report this."""
    library = ctypes.CDLL(MPI.__file__)
    if hasattr(library, "MPIX_Query_cuda_support"):
        return bool(library.MPIX_Query_cuda_support())
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")  # since MPI 4.1; for example "mpi,system,cuda:device"
    info.Free()
    return None if kinds is None else any(kind.strip().startswith("cuda") for kind in kinds.split(","))


def try_on_self(out: Buffer, into: Buffer) -> None:
    """Send `out` to this process itself, and add it to the received copy, leaving twice `out` in `into`."""
    MPI.COMM_SELF.Sendrecv(out, 0, recvbuf=into, source=0)
    MPI.SUM.Reduce_local(out, into)
    MPI.COMM_SELF.Allreduce(MPI.IN_PLACE, into)
