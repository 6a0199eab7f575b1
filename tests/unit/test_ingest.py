"""`hpctrain ingest`: small data sets with known answers and planted faults; resuming; what is refused."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from hpctrain.cli import main
from hpctrain.data.splits import load_data
from hpctrain.errors import DataError
from hpctrain.ingest import command, store
from hpctrain.ingest.dataset import IngestedSet, ingested
from hpctrain.ingest.journal import Journal
from hpctrain.ingest.picture import stored_picture, upright_picture
from hpctrain.ingest.reading import Item, Reading, Recipe
from hpctrain.ingest.tasks import Inline, ordered
from hpctrain.job import Job

BOX = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation><object>&c;</object></annotation>'


def picture(path: Path, size: tuple[int, int] = (80, 40), left: tuple[int, int, int] = (255, 0, 0)) -> None:
    """Of that size; its left half in that colour, its right half blue. PNG, so that pixels are known."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2], pixels[:, size[0] // 2 :, 2] = left, 255
    Image.fromarray(pixels).save(path, "PNG")


def annotate(folder: Path, name: str, *objects: tuple[str, tuple[float, ...]]) -> None:
    text = f"<annotation>{''.join(BOX.format(kind, *box) for kind, box in objects)}</annotation>"
    (folder / "Annotations" / f"{name}.xml").write_text(text)


def write_lists(folder: Path, **splits: Sequence[str]) -> None:
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """`a` (80 x 40) has a cat and a dog, `b` (40 x 80) a dog; both are fine. Others have one fault each."""
    folder = tmp_path / "voc"
    (folder / "Annotations").mkdir(parents=True)
    for name in ("a", "area", "outside", "broken", "bomb", "number"):
        picture(folder / "JPEGImages" / f"{name}.jpg")
        annotate(folder, name, ("cat", (8, 4, 40, 20)))
    picture(folder / "JPEGImages" / "b.png", (40, 80))
    annotate(folder, "a", ("cat", (0, 0, 40, 40)), ("dog", (40, 10, 80, 30)))
    annotate(folder, "b", ("dog", (10, 20, 30, 80)))
    annotate(folder, "area", ("cat", (5, 5, 5, 20)), ("cat", (8, 4, 40, 20)))
    annotate(folder, "outside", ("cat", (8, 4, 81, 20)))
    annotate(folder, "number", ("cat", ("nan", 4, 40, 20)))  # type: ignore[arg-type]
    annotate(folder, "missing", ("cat", (8, 4, 40, 20)))
    annotate(folder, "text", ("cat", (8, 4, 40, 20)))
    (folder / "Annotations" / "broken.xml").write_text("<annotation><object>")
    (folder / "Annotations" / "bomb.xml").write_text(BOMB)
    (folder / "JPEGImages" / "text.jpg").write_text("no picture")
    picture(folder / "JPEGImages" / "alone.jpg")
    torn = (folder / "JPEGImages" / "a.jpg").read_bytes()
    (folder / "JPEGImages" / "torn.jpg").write_bytes(torn[: len(torn) // 2])
    annotate(folder, "torn", ("cat", (8, 4, 40, 20)))
    faulty = ["area", "outside", "number", "missing", "broken", "bomb", "text", "alone", "torn"]
    write_lists(folder, train=["b", *faulty], val=["a"], trainval=["b", *faulty, "a"])
    return folder


PROBLEMS = [
    "area: object 1 (cat) has a box without area (5, 5, 5, 20); left out",
    "outside: object 1 (cat) has a box (8, 4, 81, 20) that is not inside its picture of 80 x 40 pixels; left out",
    "number: object 1 (cat) has xmin = 'nan', which is not a number; left out",
    "missing: its picture is missing; left out",
    "broken: its annotation is not valid XML (no element found: line 1, column 20); left out",
    "bomb: its annotation declares a document type, which could expand to any size; left out",
    "text: its picture cannot be read (it is of no known format); left out",
    "alone: its annotation is missing; left out",
]


def made(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """What the command prints, which succeeds."""
    status = main(["ingest", *map(str, words)])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that the command prints, which fails."""
    assert main(["ingest", *map(str, words)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_voc_boxes_splits_and_problems(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.h5"
    printed = made(capsys, "voc", voc, out, "-n", 1, "--size", 40)
    lines = printed.splitlines()
    assert lines[0] == (
        f"{out}: 5 pictures of 40 x 40 pixels (voc); 2 classes: cat 2, dog 2; splits: train 4, val 1, trainval 5"
    )
    assert lines[1] == "9 problems:"
    assert [line.strip() for line in lines[2:10]] == PROBLEMS
    assert lines[10].startswith("  torn: its picture cannot be read (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "voc"]
    train, val = IngestedSet(out, "train"), IngestedSet(out, "val")
    assert [train.name(place) for place in range(4)] == ["b", "area", "outside", "number"]
    sample = val[0]
    assert sample["boxes"].tolist() == [[0, 0, 20, 20], [20, 5, 40, 15]]
    assert sample["labels"].tolist() == [0, 1]
    assert sample["scale"].tolist() == [0.5, 0.5]
    assert (sample["boxes"] / sample["scale"].repeat(2)).tolist() == [[0, 0, 40, 40], [40, 10, 80, 30]]
    image = sample["image"]
    assert (image.shape, image.dtype) == ((3, 40, 40), torch.float32)
    assert image[:, 5, 5].tolist() == [1, 0, 0]
    assert image[:, 5, 35].tolist() == [0, 0, 1]
    assert image[:, 20:].abs().max() == 0  # black below
    upright = train[0]
    assert upright["boxes"].tolist() == [[5, 10, 15, 40], [0, 0, 0, 0]]
    assert upright["labels"].tolist() == [1, -1]
    assert upright["image"][:, :, 20:].abs().max() == 0  # black on the right
    assert train[2]["labels"].tolist() == [-1, -1]  # its box is left out, the picture is kept


def test_stretched_boxes_are_mapped_back(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--size", 20, "--fit", "stretch")
    sample = IngestedSet(tmp_path / "out.h5", "val")[0]
    assert sample["scale"].tolist() == [0.25, 0.5]
    assert sample["boxes"].tolist() == [[0, 0, 10, 20], [10, 5, 20, 15]]
    assert sample["image"][:, 19, 19].tolist() == [0, 0, 1]


def test_given_classes_keep_their_order(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, "voc", voc, tmp_path / "both.h5", "-n", 1, "--classes", "dog,cat")
    assert IngestedSet(tmp_path / "both.h5", "val")[0]["labels"].tolist() == [1, 0]
    printed = made(capsys, "voc", voc, tmp_path / "dogs.h5", "-n", 1, "--classes", "dog")
    assert "a: object 1 (cat) is of an unknown class; left out" in printed
    assert IngestedSet(tmp_path / "dogs.h5", "val")[0]["labels"].tolist() == [0]


def test_bytes_do_not_depend_on_workers(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [f"c{number}" for number in range(40)]
    for number, name in enumerate(many):
        picture(voc / "JPEGImages" / f"{name}.jpg", (20 + number, 50))
        annotate(voc, name, *[("cat", (0, 0, 10 + place, 10)) for place in range(number % 4)])
    write_lists(voc, test=many)
    made(capsys, "voc", voc, tmp_path / "1.h5", "-n", 1, "--size", 24)
    time.sleep(1.1)  # a time stamp of seconds would differ
    made(capsys, "voc", voc, tmp_path / "3.h5", "-n", 3, "--size", 24)
    assert (tmp_path / "1.h5").read_bytes() == (tmp_path / "3.h5").read_bytes()


def test_one_chunk_per_sample(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--size", 24)
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["pictures"].chunks == (1, 24, 24, 3)
        assert file["pictures"].shape == (5, 24, 24, 3)


@pytest.mark.parametrize("write", [0, 2, 4])
def test_resumes_where_it_was_stopped(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """An error in the midst of the pictures; the result has the same bytes, and nothing is read twice."""
    made(capsys, "voc", voc, tmp_path / "whole.h5", "-n", 1, "--size", 24)
    monkeypatch.setattr(command, "BATCH", 1)
    whole = store.PictureFile.write

    def failing(self: store.PictureFile, slot: int, pixels: bytes) -> None:
        if slot == write:
            raise OSError(28, "No space left on device")
        whole(self, slot, pixels)

    monkeypatch.setattr(store.PictureFile, "write", failing)
    out = tmp_path / "out.h5"
    assert "No space left on device; what has been read so far is kept" in refused(
        capsys, "voc", voc, out, "-n", 1, "--size", 24
    )
    assert not out.exists()
    monkeypatch.setattr(store.PictureFile, "write", whole)
    with open(tmp_path / "out.h5.journal", "ab") as journal:
        journal.write(b'{"name": "torn li')
    done = len((tmp_path / "out.h5.journal").read_bytes().splitlines()) - 2
    read: list[Item] = []
    usual = Recipe._read

    def noting(self: Recipe, item: Item) -> Reading:
        read.append(item)
        return usual(self, item)

    monkeypatch.setattr(Recipe, "_read", noting)
    made(capsys, "voc", voc, out, "-n", 1, "--size", 24)
    assert len(read) == 11 - done
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.h5", "voc", "whole.h5"]


def test_resumes_after_it_was_stopped_while_completing(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had added to the file by then is removed."""
    made(capsys, "voc", voc, tmp_path / "whole.h5", "-n", 1, "--size", 24)

    def failing(*given: Any) -> None:
        store.complete(*given)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(command, "complete", failing)
        refused(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--size", 24)
    with open(tmp_path / "out.h5.part", "r+b") as file:
        file.write(b"torn" * 30)  # its superblock, as if the machine had lost power
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--size", 24)
    assert (tmp_path / "out.h5").read_bytes() == (tmp_path / "whole.h5").read_bytes()


def many_classes(folder: Path, count: int) -> None:
    for number in range(count):
        picture(folder / f"class{number % 3}" / f"{number:04}.png", (300, 200), (number % 256, 7, 7))


def test_resumes_after_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`kill -9` of the command, whose processes must end as well."""
    many_classes(tmp_path / "set", 600)
    out, mark = tmp_path / "out.h5", f"{tmp_path}"
    code = (
        "import sys\nfrom hpctrain.ingest import workers\nfrom hpctrain.cli import main\n"
        "workers.SYNC_S = 0.02\nsys.exit(main())"
    )
    options = ["-n", "2", "--size", "200"]
    words = [sys.executable, "-c", code, "ingest", "folder", str(tmp_path / "set"), str(out), *options]
    environment = {**os.environ, "HPCTRAIN_TEST": mark}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal, deadline = tmp_path / "out.h5.journal", time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 40:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    done = journal.read_bytes().count(b"\n") - 1
    assert 0 < done < 600
    assert not out.exists()
    while living(mark):
        assert time.monotonic() < deadline, "its processes have outlived it"
        time.sleep(0.05)
    made(capsys, "folder", tmp_path / "set", out, "-n", 2, "--size", 200)
    made(capsys, "folder", tmp_path / "set", tmp_path / "whole.h5", "-n", 1, "--size", 200)
    assert out.read_bytes() == (tmp_path / "whole.h5").read_bytes()


def living(mark: str) -> list[str]:
    """The processes with that variable."""
    found = []
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and f"HPCTRAIN_TEST={mark}".encode() in Path(entry.path, "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            continue
    return found


def test_one_process_at_a_time(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Journal(tmp_path / "out.h5.journal", "any"):
        assert "another process is making this data set" in refused(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1)


def test_complete_file_is_left_alone(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1)
    before = (tmp_path / "out.h5").stat().st_mtime_ns
    assert made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1) == first
    assert (tmp_path / "out.h5").stat().st_mtime_ns == before


def test_strict_ends_at_the_first_problem(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where the file, or a part of it, was made without --strict."""
    for _ in range(2):
        assert f"{PROBLEMS[0]} (--strict)" in refused(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--strict")
        assert not (tmp_path / "out.h5").exists()
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1)
    assert f"{PROBLEMS[0]} (--strict)" in refused(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--strict")
    write_lists(voc, train=["b"], trainval=["b", "a"])
    assert "problem" not in made(capsys, "voc", voc, tmp_path / "fine.h5", "-n", 1, "--strict")


def test_coco_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "coco", tmp_path / "out.h5"
    for split in ("train2017", "val2017"):
        for name in "abc":
            picture(folder / split / f"{name}.jpg")
    of_train = [(1, "ein Ä"), (2, "two"), (1, "one\nmore "), (9, "of nothing"), (3, "missing")]
    texts = {"train2017": of_train, "val2017": [(1, "v")]}
    (folder / "annotations").mkdir()
    for split, captions in texts.items():
        images = [{"id": number, "file_name": f"{name}.jpg"} for number, name in ((1, "a"), (2, "b"), (3, "gone"))]
        content = {
            "images": images if split == "train2017" else images[:1],
            "annotations": [{"image_id": number, "caption": text} for number, text in captions],
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))
    lines = made(capsys, "captions", folder, out, "-n", 1, "--size", 16).splitlines()
    assert lines[0].endswith("3 pictures of 16 x 16 pixels (captions); splits: train2017 2, val2017 1")
    assert [line.strip() for line in lines[2:]] == [
        "captions_train2017.json: 1 captions are of the picture 9, which is not listed",
        "train2017/c.jpg: the picture has no caption; left out",
        "val2017/b.jpg: the picture has no caption; left out",
        "val2017/c.jpg: the picture has no caption; left out",
        "train2017/gone.jpg: its picture is missing; left out",
    ]
    train = IngestedSet(out, "train2017")
    assert [train.captions(place) for place in range(2)] == [["ein Ä", "one more"], ["two"]]
    assert train[1]["captions"].tolist() == [*b"two\0", *[0] * (len("ein Ä\0one more\0".encode()) - 4)]
    assert train.name(1) == "train2017/b.jpg"


def test_captions_beside_their_pictures_in_one_json_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "set" / "images" / "a.jpg")
    picture(tmp_path / "set" / "images" / "b.jpg")
    images = [{"id": name, "file_name": f"{name}.jpg", "coco_split": split, "captions": texts}
              for name, split, texts in (("a", "train", ["x", "\ud800"]), ("b", "val", []))]  # fmt: skip
    (tmp_path / "set" / "captions.json").write_text(json.dumps({"images": images}))
    printed = made(capsys, "captions", tmp_path / "set", tmp_path / "out.h5", "-n", 1)
    assert "images/b.jpg: it has no caption; left out" in printed
    assert IngestedSet(tmp_path / "out.h5", "train").captions(0) == ["x", "?"]  # not a character


def test_flickr8k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "flickr"
    for name in "abcd":
        picture(folder / "Flicker8k_Dataset" / f"{name}.jpg")
    texts = folder / "Flickr8k_text"
    texts.mkdir()
    lines = ("a.jpg#0\tfirst .", "a.jpg#1\tsecond", "no tab", "b.jpg#0\tthird", "c.jpg#0\tc", "e.jpg#0\te")
    (texts / "Flickr8k.token.txt").write_text("\n".join(lines))
    for name, listed in (("train", "a.jpg\n"), ("dev", "b.jpg\n"), ("test", "c.jpg\n")):
        (texts / f"Flickr_8k.{name}Images.txt").write_text(listed)
    printed = made(capsys, "captions", folder, tmp_path / "out.h5", "-n", 1).splitlines()
    assert printed[0].endswith("splits: train 1, val 1, test 1, other 0")
    assert [line.strip() for line in printed[2:]] == [
        "Flickr8k.token.txt: line 3 has no tab; left out",
        "Flicker8k_Dataset/d.jpg: the picture has no caption; left out",
        "Flicker8k_Dataset/e.jpg: its picture is missing; left out",
    ]
    assert IngestedSet(tmp_path / "out.h5", "train").captions(0) == ["first .", "second"]


# -- kinds of pictures -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("mode", "suffix"), [("I;16", "png"), ("I", "tif"), ("F", "tif")])
def test_more_than_8_bits_per_colour_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str, suffix: str
) -> None:
    """Their values would be cut off at 255, so that a picture becomes white."""
    (tmp_path / "set" / "class").mkdir(parents=True)
    file = tmp_path / "set" / "class" / f"deep.{suffix}"
    values = np.full((8, 8), 1000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    Image.fromarray(values).save(file)
    reason = f"has more than 8 bits per colour (mode {mode}); convert it to 8 bits"
    for opened in (stored_picture, upright_picture):
        with pytest.raises(ValueError) as caught:
            opened(file)
        assert str(caught.value) == reason
    message = refused(capsys, "folder", tmp_path / "set", tmp_path / "out.h5", "-n", 1)
    assert f"class/deep.{suffix}: its picture {reason}; left out" in message


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_transparent_pictures_are_put_onto_white(tmp_path: Path, mode: str) -> None:
    """Of a transparent pixel the colour in the file means nothing; here it is black."""
    colours = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    colours.paste((100, 100, 100, 255), (2, 0, 4, 2))
    if mode in ("P", "L"):  # one of the colours is transparent
        colours.convert("L").convert(mode).save(tmp_path / "a.png", transparency=0)
    else:
        colours.convert(mode).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as file:
        assert file.mode == mode
    for opened in (stored_picture, upright_picture):
        pixels = np.asarray(opened(tmp_path / "a.png"))
        assert pixels.shape == (2, 4, 3)
        assert (pixels[:, :2] == 255).all()
        assert (pixels[:, 2:] == 100).all()


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path: Path, turn: int, suffix: str) -> None:
    """Whatever the turn, the red half is on the left for people, and nothing changes as it is stored."""
    upright, file, exif = tmp_path / "upright.png", tmp_path / f"a.{suffix}", Image.Exif()
    picture(upright)
    exif[ExifTags.Base.Orientation] = turn
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose, of upright pictures into stored ones
    with Image.open(upright) as seen:
        stored = seen.transpose(Image.Transpose(back[turn])) if turn in back else seen.copy()
        stored.save(file, exif=exif, quality=95)
        assert upright_picture(file).size == seen.size
        assert np.abs(np.asarray(upright_picture(file), int) - np.asarray(seen, int)).mean() < 3
        assert np.abs(np.asarray(stored_picture(file), int) - np.asarray(stored, int)).mean() < 3


def test_damaged_exif_does_not_matter(tmp_path: Path) -> None:
    Image.new("RGB", (8, 4), (9, 9, 9)).save(tmp_path / "a.png", exif=b"Exif\0\0nothing of the kind")
    assert upright_picture(tmp_path / "a.png").getpixel((3, 3)) == (9, 9, 9)


def test_only_boxes_keep_a_picture_as_it_is_stored(
    voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same picture, which is to be turned upside down: kind voc with its boxes, and kind folder."""
    file, exif = voc / "JPEGImages" / "b.png", Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    with Image.open(file) as stored:
        stored.copy().save(file, exif=exif)
    (tmp_path / "set" / "class").mkdir(parents=True)
    (tmp_path / "set" / "class" / "b.png").write_bytes(file.read_bytes())
    made(capsys, "voc", voc, tmp_path / "voc.h5", "-n", 1, "--size", 80)
    made(capsys, "folder", tmp_path / "set", tmp_path / "folder.h5", "-n", 1, "--size", 80)
    boxes, turned = IngestedSet(tmp_path / "voc.h5", "train")[0], IngestedSet(tmp_path / "folder.h5")[0]
    assert boxes["boxes"][0].tolist() == [10, 20, 30, 80]
    assert boxes["image"][:, 9, 9].tolist() == turned["image"][:, 70, 30].tolist() == [1, 0, 0]


def test_folder_of_classes_trains_in_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split, count in (("train", 6), ("val", 3)):
        many_classes(tmp_path / "set" / split, count)
    (tmp_path / "set" / "train" / "class1" / "bad.jpg").write_text("no picture")
    (tmp_path / "set" / "train" / "class1" / "notes.txt").write_text("ignored")
    out = tmp_path / "out.h5"
    printed = made(capsys, "folder", tmp_path / "set", out, "-n", 1, "--size", 8)
    assert "3 classes: class0 3, class1 3, class2 3; splits: train 6, val 3" in printed
    assert "train/class1/bad.jpg: its picture cannot be read" in printed
    job = Job(data={"name": "ingested", "file": str(out)}, model={"name": "mlp", "inputs": 192, "outputs": 3})
    splits = load_data(job)
    assert (len(splits.train), len(splits.validation), splits.test) == (6, 3, None)
    assert splits.train.targets.tolist() == [0, 0, 1, 1, 2, 2]
    image, label = splits.train[5]
    assert (image.shape, label.item(), label.dtype) == ((3, 8, 8), 2, torch.int64)


def test_data_set_in_threads_forks_and_copies(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1, "--size", 24)
    samples = IngestedSet(tmp_path / "out.h5")
    wanted = [samples[place]["image"].sum().item() for place in range(5)]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda place: samples[place % 5]["image"].sum().item(), range(50))) == wanted * 10
    assert pickle.loads(pickle.dumps(samples))[1]["image"].sum() == wanted[1]
    code = (
        "import os, sys\nfrom hpctrain.ingest.dataset import IngestedSet\n"
        "samples = IngestedSet(sys.argv[1])\nfirst, held = samples[0]['image'].sum(), samples._file()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if samples[0]['image'].sum() == first and samples._file() is not held else 1)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) or samples._file() is not held)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "out.h5")]
    assert subprocess.run(words, timeout=60, check=False).returncode == 0
    with pytest.raises(IndexError):
        samples[5]
    assert samples[-1]["image"].sum() == wanted[4]


def test_ingested_says_what_is_wrong(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="there is no such file; `hpctrain ingest` makes one"):
        ingested(str(tmp_path / "none.h5"))
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(DataError, match="was not made by `hpctrain ingest`"):
        ingested(str(tmp_path / "text.h5"))
    made(capsys, "voc", voc, tmp_path / "out.h5", "-n", 1)
    (tmp_path / "damaged.h5").write_bytes((tmp_path / "out.h5").read_bytes())
    with h5py.File(tmp_path / "damaged.h5", "r+") as file:
        del file["split_train"]
    with pytest.raises(DataError, match=r"damaged\.h5 was not made by `hpctrain ingest`, or is damaged; make it again"):
        ingested(str(tmp_path / "damaged.h5"))
    with pytest.raises(DataError, match=r"has no split 'tran' \(did you mean train\?\); it has train, val, trainval"):
        ingested(str(tmp_path / "out.h5"), train_split="tran")


def test_users_mistakes(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.h5"
    assert "none: there is no such folder" in refused(capsys, "voc", tmp_path / "none", out)
    assert "-n 0: at least 1 process must read" in refused(capsys, "voc", voc, out, "-n", 0)
    assert "--size 0: expected" in refused(capsys, "voc", voc, out, "--size", 0)
    assert "--fit crop: expected pad or stretch" in refused(capsys, "voc", voc, out, "--fit", "crop")
    assert "--classes a,a: expected different names" in refused(capsys, "voc", voc, out, "--classes", "a,a")
    assert "in a folder that exists" in refused(capsys, "voc", voc, tmp_path / "none" / "out.h5")
    (tmp_path / "empty").mkdir()
    assert "no Pascal VOC" in refused(capsys, "voc", tmp_path / "empty", out)
    assert "no captions; expected captions*.json" in refused(capsys, "captions", tmp_path / "empty", out)
    assert "no folders of classes" in refused(capsys, "folder", tmp_path / "empty", out)
    (tmp_path / "empty" / "class").mkdir()
    assert "has no pictures where the format 'folder' has them" in refused(capsys, "folder", tmp_path / "empty", out)
    (tmp_path / "empty" / "class" / "a.jpg").write_text("no picture")
    assert "the first problem is: class/a.jpg: its" in refused(capsys, "folder", tmp_path / "empty", out)
    (tmp_path / "empty" / "captions.json").write_text("[")
    assert "is not valid JSON" in refused(capsys, "captions", tmp_path / "empty", out)
    (tmp_path / "empty" / "captions.json").write_text('{"images": [{"id": 1}]}')
    assert "does not have COCO's form" in refused(capsys, "captions", tmp_path / "empty", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "voc"]


def test_other_data_set_is_not_replaced(voc: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.h5"
    out.write_text("something else")
    assert "exists and is another data set" in refused(capsys, "voc", voc, out)
    assert out.read_text() == "something else"
    made(capsys, "voc", voc, tmp_path / "mine.h5", "-n", 1)
    assert "exists and is another data set" in refused(capsys, "voc", voc, tmp_path / "mine.h5", "--size", 8)
    assert refused(capsys, "voc", voc, tmp_path / "part.h5", "-n", 1, "--strict")
    assert "that was not completed; remove it" in refused(capsys, "voc", voc, tmp_path / "part.h5", "--size", 8)


def test_tasks_under_way_are_bounded() -> None:
    """However many there are, and results keep their order."""
    taken, under_way = [], 0

    def tasks() -> Any:
        nonlocal under_way
        for number in range(1000):
            under_way += 1
            assert under_way <= 5
            yield number

    for result in ordered(Inline(), lambda number: 2 * number, tasks(), 5):
        under_way -= 1
        taken.append(result)
    assert taken == [2 * number for number in range(1000)]


def test_reading_processes_load_no_torch() -> None:
    code = "import sys, hpctrain.ingest.command\nsys.exit(bool({'torch', 'mpi4py'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
