"""A convex problem with a known optimum is solved by every strategy with every codec that it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpctrain.codecs.options import JOINT, NAMES
from hpctrain.codecs.sign import Sign
from hpctrain.comm.virtual.world import World
from hpctrain.conformance import registered_pairs
from hpctrain.errors import JobError
from hpctrain.job import Job
from tests import helpers
from tests.marks import mostly_slow

SLOPES, ROWS = 40, 96


def line() -> TensorDataset:
    """A regression that no line fits exactly."""
    random = torch.Generator().manual_seed(7)
    inputs = torch.randn(ROWS, SLOPES, generator=random)
    exact = inputs @ torch.randn(SLOPES, 1, generator=random)
    return TensorDataset(inputs, exact + torch.randn(ROWS, 1, generator=random))


def straight() -> nn.Module:
    return nn.Linear(SLOPES, 1, bias=False)


LINES = 12


def lines() -> TensorDataset:
    """Several of them: their slopes are a matrix."""
    inputs, _ = line().tensors
    random = torch.Generator().manual_seed(8)
    exact = inputs @ torch.randn(SLOPES, LINES, generator=random)
    return TensorDataset(inputs, exact + torch.randn(ROWS, LINES, generator=random))


def matrix() -> nn.Module:
    return nn.Linear(SLOPES, LINES, bias=False)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


TOPK: dict[str, Any] = {"name": "topk", "keep": 0.1}
CODECS: dict[str, tuple[Any, float]] = {
    # With the tolerance: of the distance to the best slopes, relative to their size, after 300 decreasing steps.
    "none": ("none", 0.002),
    "bfloat16": ("bfloat16", 0.002),
    "float16": ("float16", 0.002),
    "int8": ("int8", 0.002),
    "int4": ("int4", 0.01),
    "sign": ({"name": "sign", "block": 8}, 0.005),
    "topk": (TOPK, 0.01),
    "demo": ("demo", 0.01),
    # These slopes are random, so no direction is better than others: with a lower rank too much of the large changes of
    # local_sgd comes late (all_reduce: rank 2 is enough).
    "powersgd": ({"name": "powersgd", "rank": 4}, 0.01),
    "acp": ({"name": "acp", "rank": 6}, 0.01),
    "topk, two bits": ({**TOPK, "bits": 2}, 0.01),
    "topk, momentum correction and warm-up": ({**TOPK, "momentum": 0.5, "warmup": {"samples": 1000}}, 0.015),
    "topk, decaying": ({**TOPK, "decay": 0.9}, 0.01),
    "topk, ef21": ({**TOPK, "feedback": "ef21", "momentum": 0.5}, 0.03),  # with long rounds 0.9 is too much
    "demo, decaying": ({"name": "demo", "decay": 0.99}, 0.01),
    "sign, majority": ({"name": "sign", "block": 8, "majority": True}, 0.02),  # a vote loses something for good
}
STRATEGIES: dict[str, helpers.Tables] = {
    "all_reduce": {},
    "local_sgd": {"every": 4},
    "diloco": {"every": 4, "outer_momentum": 0.0},
    "streaming_diloco": {"every": 4, "fragments": 2, "outer_momentum": 0.0},
    "parameter_server": {"mode": "sync", "servers": 4, "colocated": True},
}
OUTER = {"diloco": 3.0, "streaming_diloco": 3.0}  # whose outer rate is 0.7, so they are not as far
LOOSER = dict.fromkeys(STRATEGIES, 1.0) | OUTER
NAMES_OF_ALL = list(dict.fromkeys(pair.name for pair in registered_pairs()))


def _strategy(name: str) -> helpers.Tables:
    """Its table without a codec; of one that is not listed, what it is tested with first."""
    first = next(pair for pair in registered_pairs() if pair.name == name)
    return {"name": name, **STRATEGIES.get(name, {key: first.options[key] for key in first.options if key != "codec"})}


def _distance_to_the_best(folder: Path, strategy: helpers.Tables, codec: Any) -> float:
    """From where training ends."""
    several = (codec if isinstance(codec, str) else codec["name"]) in JOINT
    inputs, targets = (lines() if several else line()).tensors
    best = torch.linalg.lstsq(inputs.double(), targets.double()).solution.T.reshape(-1)
    job = helpers.make_job(
        folder,
        model=matrix if several else straight,
        data={"name": lines if several else line},
        strategy={**strategy, "codec": codec},
        optimizer={"name": "SGD", "lr": 0.1 * (LINES if several else 1), "schedule": "linear"},  # mse: of all outputs
        train={"steps": 300, "batch_size": ROWS // 4},
        loss="mse",
        metric=helpers.no_metric,
    )
    found = World(4, nodes=range(4)).run(lambda comm: helpers.vector(helpers.quiet_train(comm, job).model))
    return float(np.linalg.norm(found[0] - best.numpy()) / best.norm())


def _is_accepted(label: str, name: str) -> bool:
    """Whether the pair makes sense; tests/conformance/test_pairs.py has the reasons why not."""
    try:
        Job(strategy={**_strategy(name), "codec": CODECS[label][0]})
    except JobError:
        return False
    return True


PAIRS = [(label, name) for label in CODECS for name in NAMES_OF_ALL if _is_accepted(label, name)]
QUICK = [
    ("sign", "local_sgd"), ("topk", "parameter_server"), ("acp", "diloco"), ("topk, ef21", "streaming_diloco"),
    ("topk, momentum correction and warm-up", "local_sgd"),
]  # fmt: skip


@pytest.mark.parametrize(("label", "name"), mostly_slow(PAIRS, QUICK))
def test_a_convex_problem_is_solved_with_every_codec(tmp_path: Path, label: str, name: str):
    codec, tolerance = CODECS[label]
    assert _distance_to_the_best(tmp_path, _strategy(name), codec) < tolerance * LOOSER.get(name, 3.0)


def test_every_codec_is_there():
    assert {codec if isinstance(codec, str) else codec["name"] for codec, _ in CODECS.values()} == set(NAMES)
    assert set(QUICK) <= set(PAIRS)


def test_signs_alone_do_not_solve_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without what earlier messages left out."""
    monkeypatch.setattr(Sign, "remembers", False)
    codec, tolerance = CODECS["sign"]
    assert _distance_to_the_best(tmp_path, _strategy("local_sgd"), codec) > 3 * tolerance
