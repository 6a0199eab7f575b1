"""The strategies on real ranks: the bodies that also run over virtual ones. Run by mpiexec with --with-mpi."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import helpers
from tests.helpers_mpi import Join

pytestmark = pytest.mark.mpi
FOUR = ["shared", "message", "servers", "all_serve"]


def _strategy(agree: str, size: int) -> helpers.Tables:
    """Skips where there are too few ranks."""
    strategy, servers = helpers.SYNCHRONOUS[agree]
    if size <= servers:
        pytest.skip(f"needs {servers + 1} ranks")
    if size > 4 and agree not in ("shared", "servers"):  # more ranks than cores take their time
        pytest.skip("on at most 4 ranks")
    return {**strategy, "servers": size} if strategy.get("servers") == -1 else strategy


@pytest.mark.parametrize(
    ("agree", "recipe"),
    [(agree, "all") for agree in helpers.SYNCHRONOUS]
    + [(agree, recipe) for agree in FOUR for recipe in ("momentum", "adam", "clip", "accumulate")],
)
def test_equals_one_process_in_float64(join: Join, folder: Path, agree: str, recipe: str) -> None:
    comm = join()
    _strategy(agree, comm.size)
    if recipe != "all" and comm.size != 4:
        pytest.skip("this recipe on 4 ranks only")
    assert helpers.equivalence(comm, folder, agree, recipe, "float64") < 1e-10


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


@pytest.mark.parametrize(("agree", "optimizer"), list(zip(FOUR, ["Adam", "SGD", "SGD", "Adam"], strict=True)))
def test_a_resumed_run_has_the_same_bits(join: Join, folder: Path, agree: str, optimizer: str) -> None:
    comm = join()
    keys = {"name": optimizer, "lr": 0.01} | ({"momentum": 0.9} if optimizer == "SGD" else {})
    helpers.resumed_bits(comm, folder, _strategy(agree, comm.size), keys)


@pytest.mark.parametrize("agree", FOUR)
def test_every_sample_once_per_epoch(join: Join, folder: Path, agree: str) -> None:
    comm = join()
    helpers.every_sample_once(comm, folder, strategy=_strategy(agree, comm.size))


def test_roles_change_and_no_sample_is_lost(join: Join, folder: Path) -> None:
    comm = join()
    phases = [
        {"strategy": _strategy("shared", comm.size), "until": {"rule": "after", "samples": 20}},
        {"strategy": _strategy("servers", comm.size), "until": {"rule": "after", "samples": 31}},
        {"strategy": _strategy("message", comm.size)},
    ]
    helpers.every_sample_once(comm, folder, epochs=4, phases=phases)


@pytest.mark.parametrize("agree", [*FOUR, "overlap"])
def test_a_loss_that_is_not_finite_is_told_on_every_rank(join: Join, folder: Path, agree: str) -> None:
    comm = join()
    told = comm.gather_json(helpers.nan_told(comm, folder, _strategy(agree, comm.size)))
    assert len(set(told)) == 1
    assert "loss is nan on rank " in told[0]


@pytest.mark.parametrize("agree", [*FOUR, "overlap"])
def test_rounds_in_which_workers_differ(join: Join, folder: Path, agree: str) -> None:
    """Targets that do not count, parameters without a gradient: equal to one process."""
    comm = join()
    assert helpers.uneven_rounds(comm, folder, _strategy(agree, comm.size), helpers.SYNCHRONOUS[agree][1]) < 1e-10


@pytest.mark.parametrize("agree", FOUR)
def test_such_a_step_can_be_skipped(join: Join, folder: Path, agree: str) -> None:
    comm = join()
    helpers.nan_skipped(comm, folder, _strategy(agree, comm.size))
