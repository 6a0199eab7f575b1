"""`hpctrain ingest` over ranks: the same file as by one process, and mistakes are reported once."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpctrain import launcher
from hpctrain.cli import main
from tests.conftest import launch

INGEST = [sys.executable, "-m", "hpctrain", "ingest", "folder"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """50 pictures of two classes, one of which is none."""
    for number in range(50):
        path = tmp_path / "set" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((30 + number, 40, 3), 5 * number, np.uint8)).save(path)
    path.write_text("no picture")
    return tmp_path / "set"


@pytest.mark.launch
def test_ranks_make_the_file_that_one_process_makes(source: Path, tmp_path: Path, mpi: launcher.Mpi) -> None:
    ended = launch([*mpi.command(3), *INGEST, str(source), str(tmp_path / "ranks.h5")], mpi, 60.0)
    assert ended.status == 0, ended.err
    assert ended.out.count("49 pictures of 256 x 256 pixels (folder); 2 classes: class0 25, class1 24") == 1
    assert ended.out.count("class1/49.png: its picture cannot be read (it is of no known format); left out") == 1
    assert main(["ingest", "folder", str(source), str(tmp_path / "one.h5"), "-n", "1"]) == 0
    assert (tmp_path / "ranks.h5").read_bytes() == (tmp_path / "one.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != "") == ["one.h5", "ranks.h5"]


@pytest.mark.launch
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none", "out.h5"], "none: there is no such folder"),
        (["set", "out.h5", "-n", "2"], "has already started 3 ranks; leave -n out"),
        (["set", "out.h5", "--strict"], "class1/49.png: its picture cannot be read"),
    ],
)
def test_mistakes_are_reported_once(
    source: Path, tmp_path: Path, mpi: launcher.Mpi, words: list[str], message: str
) -> None:
    paths = [str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:]]
    ended = launch([*mpi.command(3), *INGEST, *paths], mpi, 60.0)
    assert (ended.status, ended.err.count("hpctrain:")) == (2, 1), ended.err
    assert message in ended.err
    assert not (tmp_path / "out.h5").exists()
