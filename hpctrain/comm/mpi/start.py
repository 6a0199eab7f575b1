"""Importing this module initialises MPI (thread level MULTIPLE), unless already done. MPI ends with Python."""

from __future__ import annotations

import os

import mpi4py

from hpctrain.launcher.started import netmod_for

mpi4py.rc(initialize=False, finalize=True)  # else the import below would, before the library can be identified
from mpi4py import MPI  # noqa: E402 (mpi4py is configured before this import, and by nothing else)

__all__ = ["MPI"]

if not MPI.Is_initialized():
    os.environ |= netmod_for(MPI.Get_library_version(), os.environ)
    MPI.Init_thread(MPI.THREAD_MULTIPLE)
