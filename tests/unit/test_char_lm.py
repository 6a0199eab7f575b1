"""Language modelling by characters: the text, the transformer, bits per character, and jobs/char_lm.toml."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from hpctrain.comm.virtual.world import World
from hpctrain.conformance.task import distance, one_process, vector
from hpctrain.data.text import tinyshakespeare
from hpctrain.errors import DataError, ModelError
from hpctrain.job import Job
from hpctrain.models.metrics import bits
from hpctrain.models.transformer import CausalBlock, transformer
from tests import helpers

ROOT = Path(__file__).resolve().parents[2]
LINE = "the quick brown fox jumps over the lazy dog, and then it sleeps.\n"
SMALL = {"name": "transformer", "tokens": 31, "context": 8, "width": 8, "depth": 2, "heads": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A text of 1,300 characters."""
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text(LINE * 20)
    return tmp_path


# -- the text ----------------------------------------------------------------------------------------------------
def test_windows_follow_each_other_and_targets_come_one_later(folder: Path) -> None:
    splits = tinyshakespeare(path=str(folder), context=10)
    kinds = sorted(set(LINE))
    windows = [splits.train[i] for i in range(len(splits.train))]
    text = "".join(kinds[code] for inputs, _ in windows for code in inputs)
    assert text == (LINE * 20)[: len(text)]
    assert len(text) == 1160  # of 1,170, because the last window lacks the character after it
    late = "".join(kinds[code] for _, targets in windows for code in targets)
    assert late == (LINE * 20)[1 : len(late) + 1]
    inputs, targets = splits.train.gather(torch.tensor([3, 0]))
    assert inputs.dtype == targets.dtype == torch.int64
    for row, index in enumerate((3, 0)):
        assert torch.equal(inputs[row], windows[index][0])
        assert torch.equal(targets[row], windows[index][1])


def test_last_tenth_of_the_text_is_the_test_part(folder: Path) -> None:
    splits = tinyshakespeare(path=str(folder / "tinyshakespeare"), context=10, limit=7)
    assert len(splits.train) == 7
    assert len(splits.test) == 12
    kinds = sorted(set(LINE))
    assert "".join(kinds[code] for code in splits.test[0][0]) == (LINE * 20)[1170:1180]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "data.context = 0: expected a whole number"),
        ({"limit": 1.5}, r"data.limit = 1.5: expected a whole number"),
        ({"path": 3}, "data.path = 3: expected the name of a folder"),
        ({"context": 130}, "has no window of data.context = 130"),
    ],
)
def test_wrong_options_are_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        tinyshakespeare(**{"path": str(folder), **options})


def test_missing_and_empty_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no input\.txt in .*tinyshakespeare or .*set data.path, or HPCTRAIN_DATA"):
        tinyshakespeare(path=str(tmp_path))
    (tmp_path / "input.txt").touch()
    with pytest.raises(DataError, match="is empty"):
        tinyshakespeare(path=str(tmp_path))


def test_the_real_text() -> None:
    path = Path(os.environ.get("HPCTRAIN_DATA") or "data") / "tinyshakespeare"
    if not path.is_dir():
        pytest.skip(f"no {path}: left out the check of tinyshakespeare itself")
    splits = tinyshakespeare()
    assert (len(splits.train), len(splits.test)) == (15_685, 1_742)
    assert int(splits.train.gather(torch.arange(len(splits.train)))[0].max()) == 64


# -- the model ---------------------------------------------------------------------------------------------------
def test_scores_depend_on_earlier_characters_only() -> None:
    torch.manual_seed(0)
    model = transformer(tokens=11, context=9, width=8, depth=2, heads=2)
    tokens = torch.randint(0, 11, (3, 9))
    scores = model(tokens)
    assert scores.shape == (3, 11, 9)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    other = model(changed)
    assert torch.equal(other[:, :, :5], scores[:, :, :5])
    assert (other[:, :, 5:] != scores[:, :, 5:]).any(1).all()
    torch.testing.assert_close(model(tokens[:, :4]), scores[:, :, :4])


def test_attention_and_blocks_are_those_of_torch() -> None:
    """torch's own encoder layer with a causal mask, given the same weights."""
    torch.manual_seed(1)
    block = CausalBlock(8, 2, 1, 0.0)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
    ours = dict(block.named_parameters())
    pairs = {"norm1": "before_attention", "norm2": "before_layer", "linear1": "wide", "linear2": "narrow"}
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in pairs.items() for kind in ("weight", "bias")}
    names |= {f"self_attn.in_proj_{kind}": f"queries_keys_values.{kind}" for kind in ("weight", "bias")}
    names |= {f"self_attn.out_proj.{kind}": f"mixed.{kind}" for kind in ("weight", "bias")}
    layer.load_state_dict({theirs: ours[own].detach() for theirs, own in names.items()})
    values = torch.randn(3, 6, 8)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6)
    torch.testing.assert_close(block(values), layer(values, src_mask=mask, is_causal=True))


def test_sizes_and_wrong_arguments() -> None:
    assert sum(p.numel() for p in transformer().parameters()) == 112_577
    for options, message in (
        ({"width": 10, "heads": 4}, "model.width = 10 is not a multiple of model.heads = 4"),
        ({"depth": 0}, "model.depth = 0"),
        ({"tokens": "all"}, "model.tokens = 'all'"),
        ({"dropout": 1}, "model.dropout = 1"),
    ):
        with pytest.raises(ModelError, match=message):
            transformer(**options)
    with pytest.raises(ModelError, match=r"9 tokens, but model\.context = 8: give both the same length"):
        transformer(context=8)(torch.zeros(1, 9, dtype=torch.int64))


# -- the metric --------------------------------------------------------------------------------------------------
def test_bits_are_the_cross_entropy_to_base_two() -> None:
    total, counted = bits(torch.zeros(3, 8, 5), torch.ones(3, 5, dtype=torch.int64))
    assert float(total) == pytest.approx(45.0)
    assert counted == 15
    scores, targets = torch.randn(4, 7, 3), torch.randint(0, 7, (4, 3))
    targets[0, 0] = -100
    total, counted = bits(scores, targets)
    assert counted == 11
    assert float(total / counted) == pytest.approx(float(functional.cross_entropy(scores, targets)) / math.log(2))
    with pytest.raises(ModelError, match="bits: outputs of shape"):
        bits(scores.transpose(1, 2), targets)


# -- training ----------------------------------------------------------------------------------------------------
def char_job(folder: Path, *overrides: str, **tables: Any) -> Job:
    """jobs/char_lm.toml, small, on the text of the fixture."""
    keys = ["model.tokens=31", "model.width=8", "model.depth=2", "model.heads=2", "model.context=8", "data.context=8"]
    keys += [f"data.path={folder}", f"output={folder / 'runs'}", "trace.enabled=false", "threads=1", *overrides]
    return Job.load(ROOT / "jobs" / "char_lm.toml", keys)


def test_several_workers_equal_one_process(folder: Path) -> None:
    kinds = len(set(LINE))
    job = char_job(
        folder, f"model.tokens={kinds}", "strategy=all_reduce", "train.precision=float64",
        "optimizer={name='SGD', lr=0.1, momentum=0.9}", "train.epochs=1", "train.batch_size=5",
        "train.clip_norm=1000.0",
    )  # fmt: skip
    results = World(3).run(lambda comm: helpers.quiet_train(comm, job))
    data = tinyshakespeare(path=str(folder), context=8)
    windows = torch.utils.data.TensorDataset(*data.train.gather(torch.arange(len(data.train))))
    alone = one_process(job, 3, lambda: job.model.bind()(), windows, functional.cross_entropy, 0, 10)
    assert distance(vector(results[0].model), alone) < 1e-10


def test_char_lm_learns(folder: Path) -> None:
    job = char_job(folder, "train.epochs=12", "strategy.every=4", "optimizer.lr=0.03")
    found = World(2).run(lambda comm: helpers.quiet_train(comm, job))[0].metrics
    assert found["metric"] < 3.0  # of log2(31) = 4.95 at the start; the text repeats itself
    assert found["metric"] == pytest.approx(found["loss"] / math.log(2), rel=1e-5)
