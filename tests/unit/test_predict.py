"""`hpctrain predict`: boxes of a trained detector in pictures of other sizes; what is refused."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageColor
from torch.utils.data import Subset

from hpctrain.cli import main
from hpctrain.comm.virtual.world import World
from hpctrain.data.splits import Splits, load_data
from hpctrain.errors import JobError
from hpctrain.filenames import MODEL
from hpctrain.ingest.picture import upright_picture
from hpctrain.job import Job
from hpctrain.models.average_precision import intersection_over_union
from hpctrain.run.prepare import prepare_evaluation
from hpctrain.vision.drawing import PALETTE, drawn
from hpctrain.vision.predict import Detection, Predictor
from tests import helpers

BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
SIZE = 96, 64  # of the pictures in their files; the model takes 64 by 64
Captured = pytest.CaptureFixture[str]
Objects = list[tuple[str, tuple[int, int, int, int]]]


def scene(seed: int, size: tuple[int, int] = SIZE) -> tuple[Image.Image, Objects]:
    """A grey picture with a blue square in one half and a red one in the other."""
    random = np.random.default_rng(seed)
    pixels = random.integers(110, 146, (size[1], size[0], 3), dtype=np.uint8)
    objects: Objects = []
    for place, kind in enumerate(random.permutation(["blue", "red"])):
        side = int(random.integers(18, 36)) * min(size) // 80
        left = int(random.integers(0, size[0] // 2 - side)) + place * size[0] // 2
        top = int(random.integers(0, size[1] - side))
        pixels[top : top + side, left : left + side] = (40, 40, 220) if kind == "blue" else (220, 40, 40)
        objects.append((str(kind), (left, top, left + side, top + side)))
    return Image.fromarray(pixels), objects


def voc(folder: Path, splits: dict[str, int]) -> Path:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    number = 0
    for split, count in splits.items():
        names = [f"{number + place:03d}" for place in range(count)]
        (folder / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            picture, objects = scene(int(name))
            picture.save(folder / "JPEGImages" / f"{name}.png")
            text = "".join(BOX.format(kind, *box) for kind, box in objects)
            (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
        number += count
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a detector of squares, made as the documentation says: ingest, train."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("squares")
    data = folder / "squares.h5"
    source = voc(folder / "voc", {"train": 48, "val": 6})
    assert main(["ingest", "voc", str(source), str(data), "-n=1", "--size=64"]) == 0
    job = Job(
        model={"name": "detector", "classes": 2, "width": 16},
        data={"name": "ingested", "file": str(data), "augment": ["flip_boxes"]},
        loss="model",
        metric={"name": "average_precision", "classes": ["blue", "red"]},
        optimizer={"name": "AdamW", "lr": 0.01, "schedule": {"name": "cosine"}},
        train={"epochs": 12, "batch_size": 4, "evaluate_every": {"fraction": 1}, "clip_norm": 5.0},
        output=str(folder / "runs"),
        trace={"enabled": False},
        threads=1,
    )
    found = World(1).run(lambda comm: helpers.quiet_train(comm, job))[0].metrics
    assert found["metric"] > 0.8
    return next((folder / "runs").iterdir())


def predicted(capsys: Captured, *words: Any, status: int = 0) -> tuple[str, str]:
    assert main(["predict", *map(str, words)]) == status
    out, err = capsys.readouterr()
    return out, err


def refused(capsys: Captured, *words: Any) -> str:
    """The one line that the command prints, which fails before anything is written."""
    out, err = predicted(capsys, *words, status=2)
    assert (out, err.count("\n")) == ("", 1)
    return err


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures that the model has not seen: twice as large, and taller than wide."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name, seed, size in (("large.jpg", 1001, (192, 128)), ("tall.png", 1002, (80, 96))):
        scene(seed, size)[0].save(folder / name)
    return folder


def test_boxes_are_found_and_drawn(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    files, out, table = sorted(pictures.iterdir()), tmp_path / "a" / "out", tmp_path / "found.json"
    printed, _ = predicted(capsys, run, *files, "-o", out, "--json", table, "--threshold", 0.35)
    assert printed == f"{files[0]}: 1 blue, 1 red\n{files[1]}: 1 blue, 1 red\n"
    table_rows = json.loads(table.read_text())["pictures"]
    for row, file, (seed, size) in zip(table_rows, files, [(1001, (192, 128)), (1002, (80, 96))], strict=True):
        _, objects = scene(seed, size)
        assert row["picture"] == str(file)
        assert all(0.35 <= found["score"] <= 1 for found in row["detections"])
        found = {each["class"]: each["box"] for each in row["detections"]}
        for kind, box in objects:
            overlap = intersection_over_union(torch.tensor([found[kind]]), torch.tensor([box], dtype=torch.float32))
            assert float(overlap) > 0.5
        with Image.open(out / f"{file.stem}.png") as drawing:
            assert drawing.size == size
            for kind, colour in zip(("blue", "red"), PALETTE, strict=False):
                rows, columns = (np.asarray(drawing) == ImageColor.getrgb(colour)).all(2).nonzero()
                left, _, right, bottom = found[kind]
                assert rows.max() == pytest.approx(bottom, abs=1.5)
                assert columns[rows == rows.max()].min() == pytest.approx(left, abs=1.5)
                assert columns[rows == rows.max()].max() == pytest.approx(right, abs=1.5)
    assert sorted(path.name for path in out.iterdir()) == ["large.png", "tall.png"]


def test_a_high_threshold_leaves_nothing(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    out, _ = predicted(capsys, run, pictures / "tall.png", "-o", tmp_path / "out", "--threshold", 1)
    assert out == f"{pictures / 'tall.png'}: nothing found\n"
    with Image.open(tmp_path / "out" / "tall.png") as drawing, Image.open(pictures / "tall.png") as picture:
        assert drawing.tobytes() == picture.tobytes()


def test_others_are_done_if_some_cannot_be_read(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    (pictures / "text.jpg").write_text("no picture")
    torn = (pictures / "large.jpg").read_bytes()
    (pictures / "torn.jpg").write_bytes(torn[: len(torn) // 3])
    words = [pictures / name for name in ("text.jpg", "missing.jpg", "torn.jpg", "tall.png")]
    to = ["-o", tmp_path / "out", "--json", tmp_path / "j.json"]
    out, err = predicted(capsys, run, *words, pictures, *to, status=2)
    assert out == f"{pictures / 'tall.png'}: 1 blue, 1 red\n"
    assert err.startswith(f"hpctrain: 4 of 5 pictures left out: {pictures / 'text.jpg'} cannot be read (it is of no")
    assert f"; {pictures / 'missing.jpg'} is missing; {pictures / 'torn.jpg'} cannot be read (" in err
    assert err.endswith(f"; {pictures} cannot be read (Is a directory)\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["tall.png"]
    rows = json.loads((tmp_path / "j.json").read_text())["pictures"]
    assert [row.get("problem", "")[:10] for row in rows] == ["cannot be ", "is missing", "cannot be ", "", "cannot be "]


def test_the_best_model_is_used_if_it_was_kept(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    best = run / "best.safetensors"
    best.write_bytes(b"not a model")
    try:
        assert f"{best} is truncated or not a safetensors file" in refused(
            capsys, run, pictures / "tall.png", "-o", tmp_path / "out"
        )
    finally:
        best.unlink()


def test_size_is_asked_for_if_the_data_set_is_gone(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    data = run.parent.parent / "squares.h5"
    data.rename(data.with_suffix(".away"))
    try:
        words = [run, pictures / "tall.png", "-o", tmp_path / "out"]
        assert refused(capsys, *words) == (
            f"hpctrain: {data}, which says how large the run's pictures are, is not there; give it with "
            "--size and --fit\n"
        )
        assert "give it with --size and --fit" in refused(capsys, *words, "--size", 64)  # with another fit it may fail
        assert predicted(capsys, *words, "--size", 64, "--fit", "pad")[0] == f"{words[1]}: 1 blue, 1 red\n"
    finally:
        data.with_suffix(".away").rename(data)


def test_a_data_set_that_is_not_the_runs_is_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the job named squares.h5, and in the current folder lay another file of that name."""
    moved, data = tmp_path / "moved", tmp_path / "squares.h5"
    shutil.copytree(run, moved)
    job = (moved / "job.toml").read_text()
    (moved / "job.toml").write_text(job.replace(str(run.parent.parent / "squares.h5"), "squares.h5"))
    monkeypatch.chdir(tmp_path)
    words = [moved, pictures / "tall.png", "-o", tmp_path / "out"]
    options = [str(data), "-n=1", "--size=64"]
    assert main(["ingest", "voc", str(run.parent.parent / "voc"), *options, "--classes=red,blue"]) == 0
    capsys.readouterr()
    assert refused(capsys, *words) == (
        "hpctrain: squares.h5, the run's data.file, has the classes red, blue, but the run's metric.classes are blue, "
        "red; call the command in the folder where the run was started, or give --size and --fit\n"
    )
    data.unlink()
    assert main(["ingest", "folder", str(pictures.parent), *options]) == 0
    capsys.readouterr()
    assert "data.file, was made by `hpctrain ingest folder`, not by `... voc`; call" in refused(capsys, *words)
    assert predicted(capsys, *words, "--size", 64, "--fit", "pad")[0] == f"{words[1]}: 1 blue, 1 red\n"


def test_classes_in_another_order_are_refused_before_training(run: Path) -> None:
    """Also where a share of the training part is held back; without names there is nothing to compare."""
    job = Job.load(run / "job.toml", ["metric.classes=['red', 'blue']"])
    for given in (None, Splits(Subset(load_data(job).train, [0]))):
        with pytest.raises(JobError, match=r"^metric\.classes = \['red', 'blue'\], but .* are \['blue', 'red'\]; name"):
            World(1).run(partial(prepare_evaluation, job, splits=given))
    World(1).run(lambda comm: prepare_evaluation(job.override(["metric.classes=[]"]), comm))


def test_pictures_are_turned_upright(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    """A picture that lies on its side in its file, with EXIF that says so: boxes and drawing are of what people see."""
    tall, turned = pictures / "tall.png", tmp_path / "turned.png"
    with Image.open(tall) as picture:
        exif = picture.getexif()
        exif[ExifTags.Base.Orientation] = 6
        picture.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    predicted(capsys, run, tall, turned, "-o", tmp_path / "out", "--json", tmp_path / "found.json")
    rows = json.loads((tmp_path / "found.json").read_text())["pictures"]
    assert rows[0]["detections"] == rows[1]["detections"] != []
    drawings = [np.asarray(Image.open(tmp_path / "out" / name)) for name in ("tall.png", "turned.png")]
    assert np.array_equal(drawings[0], drawings[1])


def test_nothing_with_the_score_0_is_found(run: Path, pictures: Path) -> None:
    """The model fills up with such rows, which a threshold of 0 lets through."""
    predictor, picture = Predictor(run), upright_picture(pictures / "tall.png")
    found = predictor.detections(picture, 0.0)
    assert len(found) < 100
    assert min(each.score for each in found) > 0


def other_run(folder: Path) -> Path:
    """A run of another kind."""
    job = helpers.make_job(folder, train={"steps": 1, "batch_size": 4}, trace={"enabled": False}, threads=1)
    World(1).run(lambda comm: helpers.quiet_train(comm, job))
    return next(folder.iterdir())


def test_wrong_runs_are_refused(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    words, out = (pictures / "tall.png", "-o", tmp_path / "out"), tmp_path / "out"
    assert f"{tmp_path}/no is not a run folder: it has no job.toml" in refused(capsys, tmp_path / "no", *words)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "job.toml").write_text((run / "job.toml").read_text())
    assert refused(capsys, tmp_path / "begun", *words) == (
        f"hpctrain: {tmp_path}/begun has no model yet: it is saved when the run ends\n"
    )
    other = other_run(tmp_path / "runs")
    assert f"{other} is not a detection run: its model" in refused(capsys, other, *words)
    (tmp_path / "begun" / MODEL).write_bytes((other / MODEL).read_bytes())
    assert "does not fit the job's model" in predicted(capsys, tmp_path / "begun", *words, status=2)[1]
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threshold", 1.5], "--threshold 1.5: expected a score from 0 to 1"),
        (["--size", 0], "--size 0: expected a number of pixels"),
        (["--size", 40], "sides that are multiples of 16, not (1, 3, 40, 40)"),
        (["--fit", "cut"], "--fit cut: expected pad or stretch"),
        (["--json", "no/such/folder.json"], "--json no/such/folder.json: expected the name of a file"),
    ],
)
def test_wrong_options_are_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: Captured, words: list[Any], message: str
) -> None:
    assert message in refused(capsys, run, pictures / "tall.png", "-o", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_no_file_is_replaced_or_written_twice(run: Path, pictures: Path, tmp_path: Path, capsys: Captured) -> None:
    before = (pictures / "tall.png").read_bytes()
    assert "this would replace" in refused(capsys, run, pictures / "tall.png", "-o", pictures)
    assert (pictures / "tall.png").read_bytes() == before
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "tall.jpg").write_bytes(before)
    words = [run, pictures / "tall.png", tmp_path / "more" / "tall.jpg", "-o", tmp_path / "out"]
    assert "be in one file; call the command once for each, with another -o" in refused(capsys, *words)
    words = [run, pictures / "tall.png", "-o", tmp_path / "out", "--json"]
    (tmp_path / "out").mkdir()
    assert "this would replace that picture" in refused(capsys, *words, pictures / "tall.png")
    assert f"boxes of {words[1]} are to be in that file" in refused(capsys, *words, tmp_path / "out" / "tall.png")
    assert (pictures / "tall.png").read_bytes() == before
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, run, pictures / "tall.png", "-o", tmp_path / "file")


def test_drawing_at_the_borders_of_small_and_large_pictures() -> None:
    """Labels stay inside the picture."""
    for size in ((40, 30), (2000, 1500)):
        picture = Image.new("RGB", size, "white")
        wide, high = map(float, size)
        corner = Detection("cell", 0, 0.5, (0.0, 0.0, wide / 2, high / 2))
        far = Detection("long name", 9, 0.25, (wide - 5, high - 6, wide, high))
        drawing = np.asarray(drawn(picture, [corner, far]))
        assert drawing.shape == (size[1], size[0], 3)
        assert tuple(drawing[1, 1]) == ImageColor.getrgb(PALETTE[0])
        columns = (drawing == ImageColor.getrgb(PALETTE[9 % len(PALETTE)])).all(2).nonzero()[1]
        assert columns.min() < wide - 30  # the label is wider than the box, and begins further left
        assert np.asarray(picture).min() == 255
