"""Contents of the traces of real ranks."""

from __future__ import annotations

import pytest

from tests import helpers
from tests.helpers_mpi import Join


def test_every_message_is_traced_at_both_ends(join: Join) -> None:
    comm = join(traced=True)
    if comm.size == 1:
        pytest.skip("one rank has nobody to send to")
    helpers.messages_are_traced(comm)


def test_every_barrier_is_traced_on_all_ranks(join: Join) -> None:
    helpers.barriers_are_traced(join(traced=True))
