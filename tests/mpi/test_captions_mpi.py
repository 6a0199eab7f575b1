"""`hpctrain features` over ranks: the same file as by one process, and mistakes are reported once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from hpctrain import launcher
from hpctrain.cli import main
from tests.conftest import launch

FEATURES = [sys.executable, "-m", "hpctrain", "features"]


@pytest.mark.launch
@pytest.mark.any_mpi
def test_ranks_compute_what_one_process_computes(tmp_path: Path, mpi: launcher.Mpi) -> None:
    images = [{"id": number, "file_name": f"{number}.png", "captions": ["A colour"]} for number in range(18)]
    for number, image in enumerate(images):
        Image.new("RGB", (40, 30), (10 * number, 99, 0)).save(tmp_path / str(image["file_name"]))
    (tmp_path / "captions.json").write_text(json.dumps({"images": images}))
    photos, one, ranks = (str(tmp_path / f"{name}.h5") for name in ("photos", "one", "ranks"))
    assert main(["ingest", "captions", str(tmp_path), photos, "-n", "1", "--size", "224"]) == 0
    assert main(["features", photos, one, "-n", "1"]) == 0
    ended = launch([*mpi.command(3), *FEATURES, photos, ranks], mpi, 100.0)
    assert ended.status == 0, ended.err
    assert ended.out.count("18 pictures, 1,280 features each (efficientnet_lite0); splits: all 18") == 1
    assert Path(ranks).read_bytes() == Path(one).read_bytes()
    ended = launch([*mpi.command(2), *FEATURES, photos, ranks, "-n", "2"], mpi, 100.0)
    assert (ended.status, ended.err.count("hpctrain:")) == (2, 1), ended.err
    assert "has already started 2 ranks; leave -n out" in ended.err
