"""DiLoCo over virtual ranks: what it equals where another algorithm is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.comm.virtual.world import World
from tests import helpers


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def _trained(folder: Path, size: int, strategy: helpers.Tables, **tables: Any) -> Any:
    job = helpers.make_job(folder, strategy=strategy, train={"steps": 12, "precision": "float64"}, **tables)
    return World(size).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))[0]


def test_without_an_outer_optimizer_it_is_local_sgd(tmp_path: Path):
    plain = {"name": "diloco", "every": 4, "outer_lr": 1.0, "outer_momentum": 0.0}
    adam = {"name": "Adam", "lr": 0.01}
    found = _trained(tmp_path, 3, plain, optimizer=adam)
    np.testing.assert_array_equal(found, _trained(tmp_path, 3, {"name": "local_sgd", "every": 4}, optimizer=adam))


def test_outer_steps_are_nesterovs(tmp_path: Path):
    """With one SGD step between outer steps the two rates multiply."""
    strategy = {"name": "diloco", "every": 1, "outer_lr": 0.7, "outer_momentum": 0.9}
    found = _trained(tmp_path, 2, strategy, optimizer={"name": "SGD", "lr": 0.1})
    nesterov = {"name": "SGD", "lr": 0.07, "momentum": 0.9, "nesterov": True}
    assert helpers.difference(found, _trained(tmp_path, 2, {"name": "all_reduce"}, optimizer=nesterov)) < 1e-12


def test_outer_velocity_is_kept_in_checkpoints(tmp_path: Path):
    strategy = {"name": "diloco", "every": 2}
    for error in World(2).run(lambda comm: helpers.resumed_bits(comm, tmp_path, strategy, {"name": "Adam"})):
        assert error is None
