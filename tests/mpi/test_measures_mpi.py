"""Metrics over real ranks: states of unequal lengths are gathered on rank 0. Run by mpiexec with --with-mpi."""

from __future__ import annotations

import pytest

from hpctrain.errors import ModelError
from tests.helpers_mpi import Join
from tests.unit.test_measures import AveragePrecision, Bleu, Fails, measure, sentences

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("cls", [Bleu, AveragePrecision])
def test_ranks_compute_the_same_value_as_one_process(join: Join, cls: type) -> None:
    comm, data = join(), sentences(7)
    alone = cls()
    alone.start()
    alone.update(*data.tensors)
    found = measure(cls, data, comm)
    assert (found.entries or found.metric) == alone.value()


def test_metric_failing_on_the_last_rank_fails_on_all(join: Join) -> None:
    comm, data = join(), sentences(9)
    data.tensors[0][:] = 0
    data.tensors[0][-1] = 4
    with pytest.raises(ModelError, match=r"update\(\) failed in test_measures.py"):
        measure({"name": Fails, "method": "update"}, data, comm, batch=1)
    comm.barrier()
