"""Ranks with differing inputs: one message naming key and ranks, before anything hangs or is summed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

from hpctrain.comm.alike import Topic, check_alike
from hpctrain.comm.base import Communicator
from hpctrain.comm.virtual.world import World
from hpctrain.data.loader import Loader
from hpctrain.data.order import Order
from hpctrain.data.splits import Splits
from hpctrain.errors import DataError, HpctrainError, JobError, ModelError
from tests import helpers
from tests.marks import mostly_slow

STRATEGIES: list[helpers.Tables] = [
    {"name": "all_reduce"},
    {"name": "all_reduce", "exchange": "message"},
    {"name": "parameter_server", "mode": "sync"},
    {"name": "parameter_server", "mode": "async", "servers": 3, "colocated": True},
]


def refused(folder: Path, tables_of: Callable[[int], helpers.Tables], size: int = 3) -> HpctrainError:
    """The error that every rank raises for differing jobs; no files are left."""
    errors = []

    def body(comm: Communicator) -> None:
        with pytest.raises(HpctrainError) as caught:
            helpers.quiet_train(comm, helpers.make_job(folder / "runs", **tables_of(comm.rank)))
        assert caught.value.everywhere
        errors.append(caught.value)

    World(size).run(body)
    assert len(errors) == size
    assert len({str(error) for error in errors}) == 1
    assert not (folder / "runs").exists()
    return errors[0]



JOBS: dict[str, tuple[Callable[[int], helpers.Tables], str]] = {
    "batch": (
        lambda rank: {"train": {"batch_size": 8 + 8 * (rank == 1)}},
        "train.batch_size = 8 on ranks 0 and 2 and 16 on rank 1; all ranks must be given the same job",
    ),
    "steps": (
        lambda rank: {"train": {"steps": 4 + rank}},
        "train.steps = 4 on rank 0, 5 on rank 1 and 6 on rank 2; all ranks must be given the same job",
    ),
    "epochs instead": (
        lambda rank: {"train": {"epochs": 1} if rank else {}},
        "train.steps = 8 on rank 0 and not given on ranks 1 and 2 (1 more differs); all ranks must be given the same "
        "job",
    ),
    "rate": (
        lambda rank: {"optimizer": {"name": "SGD", "lr": 0.1 if rank < 2 else 0.2}},
        "optimizer.lr = 0.1 on ranks 0 and 1 and 0.2 on rank 2; all ranks must be given the same job",
    ),
    "an option": (
        lambda rank: {"optimizer": {"name": "SGD", "lr": 0.1, **({"momentum": 0.9} if rank == 2 else {})}},
        "optimizer.momentum = not given on ranks 0 and 1 and 0.9 on rank 2; all ranks must be given the same job",
    ),
    "the name": (
        lambda rank: {"name": "x" * 60 + "y" * 30 * (rank != 1)},
        "name = ..." + "x" * 20 + "y" * 30 + '" on ranks 0 and 2 and ...' + "x" * 20 + '" on rank 1; all ranks must be '
        "given the same job",
    ),
    "ranks": (
        lambda rank: {"ranks": 3 + (rank == 1)},
        "ranks = 3 on ranks 0 and 2 and 4 on rank 1; all ranks must be given the same job",
    ),
    "traces": (
        lambda rank: {"trace": {"enabled": rank > 0}},
        "trace.enabled = false on rank 0 and true on ranks 1 and 2; all ranks must be given the same job",
    ),
    "a later phase": (
        lambda rank: {
            "phases": [
                {"strategy": STRATEGIES[0], "until": {"rule": "after", "steps": 2}},
                {"strategy": {"name": "parameter_server", "servers": 1 + (rank == 2)}},
            ]
        },
        "phases.1.strategy.servers = 1 on ranks 0 and 1 and 2 on rank 2; all ranks must be given the same job",
    ),
}


@pytest.mark.parametrize("what", list(JOBS))
def test_differing_jobs_are_refused(tmp_path: Path, what: str) -> None:
    tables, sentence = JOBS[what]
    error = refused(tmp_path, tables)
    assert isinstance(error, JobError)
    assert str(error) == sentence


@pytest.mark.parametrize("strategy", mostly_slow(STRATEGIES, STRATEGIES[:2]))
def test_differing_jobs_are_refused_under_every_strategy(tmp_path: Path, strategy: helpers.Tables) -> None:
    seeds = iter([11, 12, 13])
    error = refused(tmp_path, lambda rank: {"seed": next(seeds), "strategy": strategy})  # as if drawn from the clock
    assert str(error).startswith("seed = 11 on rank 0, 12 on rank 1 and 13 on rank 2; ")
    error = refused(tmp_path, lambda rank: {"model": lambda: model_of("wider", rank), "strategy": strategy})
    assert str(error).startswith("parameter 0.weight is float32 of shape (4, 7) on rank 0 and float32 of shape (5, 7)")
    error = refused(tmp_path, lambda rank: {"data": {"name": helpers.Counted(20 + rank)}, "strategy": strategy})
    assert str(error).startswith("the data set has 20 samples on rank 0, 21 samples on rank 1 and 22 samples on rank 2")


def model_of(what: str, rank: int) -> nn.Module:
    """A different model on rank 2."""
    model: Any = nn.Sequential(nn.Linear(7, 5 if what == "wider" and rank else 4), nn.Tanh())
    other = rank == 2
    if what == "order" and other:
        model[0]._parameters = dict(reversed(list(model[0]._parameters.items())))
    if what == "frozen" and other:
        model[0].bias.requires_grad_(False)
    if what == "longer" and other:
        model.append(nn.Linear(4, 4))
    if what == "buffer":
        model.register_buffer("bank", torch.zeros(3 + other))
    return model


MODELS = {
    "order": "the order of the parameters is 0.weight, 0.bias on ranks 0 and 1 and 0.bias, 0.weight on rank 2 (1 more "
    "differs)",
    "frozen": "parameter 0.bias is float32 of shape (4,) on ranks 0 and 1 and missing on rank 2 (2 more differ)",
    "longer": "parameter 2.weight is missing on ranks 0 and 1 and float32 of shape (4, 4) on rank 2 (2 more differ)",
    "buffer": "buffer bank is float32 of shape (3,) on ranks 0 and 1 and float32 of shape (4,) on rank 2",
}


@pytest.mark.parametrize("what", list(MODELS))
def test_differing_models_are_refused(tmp_path: Path, what: str) -> None:
    error = refused(tmp_path, lambda rank: {"model": lambda: model_of(what, rank)})
    assert isinstance(error, ModelError)
    assert str(error) == f"{MODELS[what]}; all ranks must build the same model"


def test_differing_parameter_groups_are_refused(tmp_path: Path) -> None:
    def tables(rank: int) -> helpers.Tables:
        def groups(model: nn.Module) -> list[dict[str, Any]]:
            return [{"params": list(model.parameters()), "weight_decay": 0.1 * rank}]

        return {"optimizer": {"name": "SGD", "lr": 0.1, "groups": groups}}

    assert str(refused(tmp_path, tables, 2)).startswith(
        "group 0 of the optimizer is 0.weight and later parameters, with weight_decay = 0.0 on rank 0 and 0.weight and "
        "later parameters, with weight_decay = 0.1 on rank 1; "
    )


class Numbers(IterableDataset[Any]):
    """A stream of unknown length."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(helpers.points(self.count))


def test_differing_data_is_refused(tmp_path: Path) -> None:
    def parts(rank: int) -> helpers.Tables:
        test = helpers.points(9) if rank != 1 else None
        return {"data": {"name": lambda: Splits(helpers.points(20), None, test)}}

    error = refused(tmp_path, parts)
    assert isinstance(error, DataError)
    assert str(error) == (
        "the test part of the data set has 9 samples on ranks 0 and 2 and no samples on rank 1; every rank must see "
        "the same data set: hpctrain deals out the samples itself"
    )
    error = refused(tmp_path, lambda rank: {"data": lambda: helpers.points(20) if rank else Numbers(20)}, 2)
    assert "an unknown number of samples on rank 0 and 20 samples on rank 1" in str(error)


# -- streams of unknown length --------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", [STRATEGIES[0], STRATEGIES[2]])
@pytest.mark.parametrize("lengths", [(40, 44), (44, 40), (40, 100), (40, 41)])
def test_unequal_streams_are_refused(tmp_path: Path, strategy: helpers.Tables, lengths: tuple[int, int]) -> None:
    def body(comm: Communicator) -> None:
        data = {"name": Numbers(lengths[comm.rank % 2])}
        job = helpers.make_job(tmp_path, data=data, strategy=strategy, train={"steps": 9, "batch_size": 6})
        helpers.quiet_train(comm, job)

    with pytest.raises(DataError, match=r"^the stream ends after 4\d samples on rank .* a stream must yield the same"):
        World(2 + (strategy is STRATEGIES[2])).run(body)


def test_read_ahead_on_one_rank_changes_nothing() -> None:
    """It sees the end rounds before the other ranks, but compares in the same round as they do."""

    def body(comm: Communicator) -> list[list[int]]:
        order = Order(None, shuffle=False)
        loader = Loader(Numbers(40), order, threads=0, workers=comm)
        assert loader._stream is not None
        if comm.rank == 1:
            loader._stream.look_ahead(0, 60)
            assert order.length == 40
        found, cursor = [], 0
        while cursor < 100:
            found.append(list(loader.bounds(cursor, 12, comm.size)))
            cursor = found[-1][-1]
        return found

    first, other = World(2).run(body)
    assert first == other
    assert [bounds[-1] for bounds in first[:4]] == [12, 24, 36, 40]


def test_test_streams_of_different_lengths(tmp_path: Path) -> None:
    def body(comm: Communicator) -> None:
        data = (helpers.points(24), Numbers(700 if comm.rank else 500))
        helpers.quiet_train(comm, helpers.make_job(tmp_path, data=data))

    with pytest.raises(DataError, match=r"the stream ends after 500 samples on rank 0 and continues past 504 samples"):
        World(2).run(body)


# -- what may differ, and what it costs --------------------------------------------------------------------------
def test_output_folder_is_rank_0s(tmp_path: Path) -> None:
    def body(comm: Communicator) -> Path:
        output = tempfile.mkdtemp(dir=tmp_path)
        return helpers.quiet_train(comm, helpers.make_job(output)).folder

    folders = World(2).run(body)
    assert folders[0] == folders[1]
    assert sum(any(folder.iterdir()) for folder in tmp_path.iterdir()) == 1


def test_error_counts_ranks_when_there_are_many() -> None:
    def body(comm: Communicator) -> None:
        check_alike(comm, [Topic(" = ", "mend it", JobError, {"same": "1", "key": str(min(comm.rank, 3) % 3)})])

    with pytest.raises(JobError, match=r"^key = 0 on 8 ranks from 0 to 9, 1 on rank 1 and 2 on rank 2; mend it$"):
        World(10).run(body)


def test_only_a_hash_is_exchanged_when_ranks_agree() -> None:
    facts = {f"key {number}": "value" * 100 for number in range(1000)}
    _, traces = helpers.traced(4, lambda comm: check_alike(comm, [Topic(" = ", "", JobError, facts)]))
    assert all(table["spans"]["bytes"].sum() < 1000 for table in traces)
