"""Ranks as an executor (`concurrent.futures`)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import cast

from hpctrain.comm.mpi.start import MPI

# mpi4py is configured by the import above, and must not be imported before.
from mpi4py.futures import MPICommExecutor  # isort: skip


@contextmanager
def ranks() -> Iterator[Executor | None]:
    """An executor over all ranks but 0, for rank 0. Collective: the others compute its tasks within this context, until
    rank 0 leaves it, and get None."""
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield cast(Executor | None, executor)
