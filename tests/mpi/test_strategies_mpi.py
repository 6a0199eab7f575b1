"""Strategies on real ranks: the test bodies that also run over virtual ranks. Run by mpiexec with --with-mpi."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import helpers
from tests.helpers_mpi import Join

pytestmark = pytest.mark.mpi
FOUR = ["shared", "message", "servers", "all_serve"]


def _strategy(agree: str, size: int) -> helpers.Tables:
    """Skips if there are too few ranks."""
    strategy, servers = helpers.SYNCHRONOUS[agree]
    if size <= servers:
        pytest.skip(f"needs {servers + 1} ranks")
    if size > 4 and agree not in ("shared", "servers"):  # more ranks than cores are slow
        pytest.skip("on at most 4 ranks")
    return {**strategy, "servers": size} if strategy.get("servers") == -1 else strategy


@pytest.mark.parametrize("agree", [*FOUR, "overlap"])
def test_sgd_equals_one_process_in_float32(join: Join, folder: Path, agree: str) -> None:
    comm = join()
    _strategy(agree, comm.size)
    assert helpers.equivalence(comm, folder, agree, "momentum", "float32") < 1e-5


@pytest.mark.parametrize("ranks_per_node", [1, 2, 3])
@pytest.mark.parametrize("agree", ["shared", "hierarchical", "overlap"])
def test_several_nodes(join: Join, folder: Path, agree: str, ranks_per_node: int) -> None:
    comm = join(ranks_per_node)
    if comm.size <= ranks_per_node:
        pytest.skip(f"needs {ranks_per_node + 1} ranks")
    _strategy(agree, comm.size)
    assert helpers.equivalence(comm, folder, agree, "all", "float64") < 1e-10
