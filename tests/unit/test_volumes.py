"""What ranks send and receive, as traces have it, against closed forms."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from hpctrain.analysis import Analysis
from hpctrain.codecs import wire_codec_by
from hpctrain.comm.algorithms import even_bounds
from hpctrain.replica.replica import Replica
from hpctrain.strategies.contribution import Contribution
from hpctrain.strategies.parameter_server.wire import HeaderRecord, ReplyRecord
from hpctrain.trace import format_totals, open_run, sum_times
from hpctrain.views.report import tables as page
from tests import helpers
from tests.traces import HandMade, train_traced

W, STEPS = 4, 5


def _volumes(
    folder: Path, codec: object, nodes: tuple[int, ...] = tuple(range(W)), **strategy: object
) -> tuple[pd.DataFrame, int]:
    """(bytes by rank, elements of the model) of STEPS steps by messages: what these take more than one step does, which
    also sends parameters and texts."""

    def trained(steps: int) -> pd.DataFrame:
        tables: dict[str, Any] = {
            "strategy": {"name": "all_reduce", "exchange": "message", "codec": codec, **strategy},
            "train": {"steps": steps, "batch_size": 3},
        }
        job = helpers.make_job(folder / f"runs{steps}", **tables)
        run = train_traced(folder / f"run{steps}", job, W, compute=helpers.jitter(sigma=0.0), nodes=nodes)
        return Analysis(run).volumes.drop(columns=["rank", "node"])

    return trained(STEPS + 1) - trained(1), Replica(helpers.net()).layout.length


@pytest.mark.parametrize("name", ["topk", "sign", "demo", "int8", "bfloat16"])
def test_bytes_received_are_those_of_the_closed_form(tmp_path: Path, name: str):
    """Codecs that remember send their message to all others; the others a W-th to each, and the sums likewise."""
    found, length = _volumes(tmp_path, name)
    codec = wire_codec_by(name)  # type: ignore[arg-type]
    assert codec is not None
    values = torch.zeros(length)
    if codec.remembers:
        expected = [(W - 1) * codec.nbytes(values)] * W
    else:
        slices = [codec.nbytes(values[low:high]) for low, high in pairwise(even_bounds(length, W))]
        expected = [(W - 1) * own + sum(slices) - own for own in slices]
    assert found["received"].tolist() == [STEPS * each for each in expected]
    assert found["received_between"].tolist() == found["received"].tolist()
    assert found["sent"].sum() == found["received"].sum()


def test_bytes_received_of_sums_by_the_library_are_at_least_a_rings(tmp_path: Path):
    """Low rank: the factors and vectors of a step; the workers' rows besides, which are of another length."""
    found, _ = _volumes(tmp_path, {"name": "powersgd", "rank": 1})
    shapes = [tuple(p.shape) for p in helpers.net().parameters()]
    factors = sum(sum(shape) if len(shape) == 2 else shape[0] for shape in shapes)
    assert found["received"].tolist() == [0] * W
    rows = found["collective"][0] / STEPS - 4 * factors
    assert rows == W * 8 * Contribution.length(len(shapes))
    assert found["collective_received"].tolist() == pytest.approx(found["collective"] * 2 * (W - 1) / W, abs=1)


def test_a_ring_brings_twice_the_buffer_but_for_one_part(tmp_path: Path):
    """And every second message of a ring of four ranks on two nodes crosses. Rows go around, too."""
    found, length = _volumes(tmp_path, "none", nodes=(0, 0, 1, 1), algorithm="ring")
    row = 8 * Contribution.length(len(list(helpers.net().parameters())))
    per_rank = 4 * length * 2 * (W - 1) / W + (W - 1) * row
    assert found["received"].sum() == STEPS * W * per_rank
    assert found["received_between"].tolist() == [found["received"][0], 0, found["received"][2], 0]


def test_servers_get_pushes_and_workers_pulls(tmp_path: Path):
    """Of a server on a node of its own, with top-k and 16 bits; and a header, and a reply, for each."""
    found = {}
    for steps in (1, STEPS + 1):
        strategy = {"name": "parameter_server", "mode": "sync", "codec": "topk"}
        job = helpers.make_job(tmp_path / f"runs{steps}", strategy=strategy, train={"steps": steps, "batch_size": 3})
        run = train_traced(tmp_path / f"run{steps}", job, 3, compute=helpers.jitter(sigma=0.0), nodes=(0, 1, 2))
        found[steps] = Analysis(run).volumes["received"]
    got, values = (found[STEPS + 1] - found[1]).tolist(), torch.zeros(Replica(helpers.net()).layout.length)
    push, pull = wire_codec_by("topk"), wire_codec_by("bfloat16")
    assert push is not None
    assert pull is not None
    header = HeaderRecord(len(list(helpers.net().parameters()))).bytes.nbytes
    assert got[2] == 2 * STEPS * (push.nbytes(values) + header)
    assert got[:2] == [STEPS * (pull.nbytes(values) + ReplyRecord(1).bytes.nbytes)] * 2


def test_reports_and_totals_show_sent_beside_received(tmp_path: Path):
    with HandMade(tmp_path, 2) as run:
        for rank in range(2):
            run[rank].phase(0.0, 0, "worker", "all_reduce")
            run[rank].span("forward", 1.0, 2.0, 0)
            run[rank].span("reduce", 7.0, 8.0, 0, bytes=5_000_000, id=9)
        run[0].span("send", 3.0, 3.1, 0, bytes=4_000_000, peer=1, id=1 << 50)
        run[1].span("recv", 2.0, 5.0, 0, bytes=4_000_000, peer=0, id=1 << 50)
        for rank in range(2):
            run[rank].done(10.0, 0)
    opened = open_run(tmp_path)
    table = page.traffic(Analysis(opened).volumes)
    assert table is not None
    between = [] if len(table.heads) == 6 else ["4", "0"]
    assert table.heads[:4] == ["rank", "node", "sent, MB", "received, MB"]
    assert table.rows[0] == ["0", table.rows[0][1], "4", "0", *between, "5", "5"]
    assert table.rows[1] == ["1", table.rows[1][1], "0", "4", *between[::-1], "5", "5"]
    assert sum_times(opened)[["sent", "received"]].to_numpy().tolist() == [[4_000_000, 0], [0, 4_000_000]]
    lines = {line.split()[0]: line.split() for line in format_totals(opened).splitlines() if " MB" in line}
    assert lines == {"sent": ["sent", "MB", "4", "0"], "received": ["received", "MB", "0", "4"]}
