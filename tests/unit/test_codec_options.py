"""The option `codec`: a name or a table, in files and on the command line, and a message for every mistake."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from hpctrain.codecs import CodecChoice, CodecName, CodecTable, codec_by, wire_codec_by
from hpctrain.codecs.demo import LargestFrequencies
from hpctrain.codecs.half import BFloat16
from hpctrain.codecs.library import LibrarySum
from hpctrain.codecs.options import JOINT, NAMES, TAKES
from hpctrain.codecs.powersgd import AlternatingPowerSGD, PowerSGD
from hpctrain.codecs.quantise import Int4, Int8
from hpctrain.codecs.sign import MajoritySign, Sign
from hpctrain.codecs.topk import TopK
from hpctrain.codecs.wire import WireCodec
from hpctrain.errors import JobError
from hpctrain.job import Job
from hpctrain.job.explain import explain
from hpctrain.strategies.local_sgd import LocalSGD

DIGITS = Path(__file__).parents[2] / "jobs" / "digits.toml"
CHOICE: TypeAdapter[Any] = TypeAdapter(CodecChoice)


def _codec(*overrides: str, job: Job | None = None) -> Any:
    given = (job or Job()).override(overrides)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Job(**tomllib.loads(given.dump()))
    assert again == given
    assert given.strategy is not None
    return given.strategy.options.codec


def test_names_and_tables_are_taken():
    assert _codec() == "none"
    assert _codec("strategy.codec=int8") == "int8"
    assert _codec("strategy.codec=bfloat16") == "bfloat16"
    assert _codec('strategy.codec={name = "int8"}') == "int8"  # a name alone stays one
    for strategy in ("all_reduce", "local_sgd", "parameter_server"):
        table = _codec(f"strategy={strategy}", 'strategy.codec={name = "int8", block = 64}')
        assert table == CodecTable(name="int8", block=64)


def test_keys_of_a_table_are_overridden_one_by_one(tmp_path: Path):
    assert _codec("strategy.codec=int8", "strategy.codec.block=64") == CodecTable(name="int8", block=64)
    assert _codec("strategy.codec.block=64", "strategy.codec=int8") == CodecTable(name="int8", block=64)
    file = tmp_path / "job.toml"
    file.write_text("seed = 1")
    assert _codec(job=Job.load(file, ["strategy.codec.block=64", "strategy.codec=int8"])).block == 64
    file.write_text('strategy = {name = "local_sgd", codec = "int8"}')
    job = Job.load(file, ["strategy.codec.block=64"])
    assert _codec(job=job) == CodecTable(name="int8", block=64)
    assert _codec("strategy.codec=int4", job=job) == "int4"  # a new name has its own keys
    assert _codec("strategy.codec=int8", job=job) == CodecTable(name="int8", block=64)
    assert _codec("strategy.codec=default", job=job) == "none"
    assert _codec("strategy=all_reduce", job=job) == "none"
    switched = Job(strategy="switch").override(["strategy.first.codec=int4", "strategy.first.codec.block=8"])
    assert switched.schedule[0].strategy.options.codec == CodecTable(name="int4", block=8)


def test_a_name_and_keys_below_it_become_a_table(tmp_path: Path):
    """Also where the strategy has no such key, or is the user's own, so that the message is about what is wrong."""
    given = ["strategy.codec=topk", "strategy.codec.keep=0.02"]
    assert _codec("strategy=local_sgd", *given) == CodecTable(name="topk", keep=0.02)
    file = tmp_path / "job.toml"
    file.write_text('strategy = {name = "local_sgd", codec = "topk"}')
    assert _codec(job=Job.load(file, ["strategy.codec.keep=0.1"])) == CodecTable(name="topk", keep=0.1)
    with pytest.raises(JobError, match=r'strategy\.codec: unknown key \(strategy "all_reduce" has it\)'):
        Job.load(DIGITS, given)
    own = Job.load(DIGITS, ["strategy=tests.unit.test_codec_options:Own", *given])
    assert own.schedule[0].strategy.options.codec == CodecTable(name="topk", keep=0.02)


class Own(LocalSGD):
    """A user's strategy."""


LISTED = '"none", "bfloat16", "float16", "int8", "int4", "sign", "topk", "demo", "powersgd", "acp"'
MISTAKES = [
    ('codec = "int9"', f'strategy.codec = "int9": must be one of {LISTED}, or a table such as {{name = "topk"'),
    ('codec = "Int8"', "(did you mean int8?)"),
    ("codec = 8", "strategy.codec = 8: must be the name of a codec, or a table such as"),
    ("codec = {}", f"strategy.codec = an empty table: has no name; set name to one of {LISTED}"),
    ("codec = {keep = 0.1}", f"strategy.codec = a table: has no name; set name to one of {LISTED}"),
    ('codec = {name = "int9"}', f'strategy.codec.name = "int9": must be one of {LISTED}'),
    ('codec = {name = "topk", keep = 0}', "strategy.codec.keep = 0: must be a number, above 0 and at most 1"),
    ('codec = {name = "topk", keep = 1.5}', "strategy.codec.keep = 1.5: must be a number, above 0 and at most 1"),
    ('codec = {name = "topk", keep = 1000}', "strategy.codec.keep = 1000: must be a number, above 0 and at most 1"),
    ('codec = {name = "topk", keep = 1e-4}', "keep = 0.0001 of blocks of 4096: less than one of each, so nothing"),
    ('codec = {name = "topk", keep = 0.05, block = 8}', "set keep = 0.125 or more, or a longer block"),
    ('codec = {name = "demo", keep = 1e-4}', "less than one of each, so nothing would be sent; set keep = 0.000245"),
    ('codec = {name = "topk", keep = "1%"}', 'strategy.codec.keep = "1%": must be a number'),
    ('codec = {name = "topk", kep = 1}', "strategy.codec.kep: unknown key (did you mean keep?)"),
    ('codec = {name = "topk", bits = 4}', "strategy.codec.bits = 4: must be one of 2, 32"),
    ('codec = {name = "int8", block = 12}', "must be an integer, at least 8 and at most 32768 and a multiple of 8"),
    ('codec = {name = "int8", keep = 0.1}', 'has keep with name = "int8", where it has no effect; set name = "topk"'),
    ('codec = {name = "topk", majority = true}', 'has majority with name = "topk"'),
    ('codec = {name = "int8", bits = 32}', 'has bits with name = "int8"'),
    ('codec = {name = "none", block = 8}', 'has block with name = "none"'),
    ('name = "parameter_server"\ncodec = {name = "sign", majority = true}', "has codec.majority, a vote on sums"),
    ('codec = {name = "powersgd", rank = 0}', "codec.rank = 0: must be an integer, at least 1 and at most 32768"),
    ('codec = {name = "acp", rank = 1.5}', "strategy.codec.rank = 1.5: must be an integer, at least 1"),
    ('codec = {name = "topk", rank = 2}', 'has rank with name = "topk", where it has no effect; set name = "powersgd"'),
    ('codec = "powersgd"\nname = "parameter_server"', 'has codec = "powersgd", which sums over workers only'),
    ('codec = {name = "acp", rank = 1}\nname = "parameter_server"', 'not at a server; use "none", "bfloat16"'),
    ('codec = "int8"\nalgorithm = "ring"', 'has codec = "int8", which needs algorithm = "library"'),
    ('codec = {name = "int8", block = 8}\nalgorithm = "ring"', 'has codec = "int8", which needs algorithm = "library"'),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES)
def test_every_mistake_is_one_message(tmp_path: Path, text: str, sentence: str):
    file = tmp_path / "job.toml"
    file.write_text(f"[strategy]\n{text}")
    with pytest.raises(JobError) as caught:
        Job.load(file)
    [line] = str(caught.value).splitlines()
    assert sentence in line, line
    assert len(line) < 400


def test_codecs_are_made_as_the_options_say():
    kinds: dict[CodecName, type] = {
        "none": LibrarySum,
        "bfloat16": BFloat16,
        "int8": Int8,
        "int4": Int4,
        "sign": Sign,
        "topk": TopK,
        "demo": LargestFrequencies,
        "powersgd": PowerSGD,
        "acp": AlternatingPowerSGD,
    }
    for name, kind in kinds.items():
        assert type(codec_by(name)) is kind
        assert (wire_codec_by(name) is None) == (name in ("none", *JOINT))
    assert type(codec_by(CodecTable(name="sign", majority=True))) is MajoritySign
    assert type(codec_by(CodecTable(name="sign", majority=False))) is Sign

    def share(table: CodecTable) -> float:
        codec, values = codec_by(table), torch.zeros(2**18)
        assert isinstance(codec, WireCodec)
        return codec.nbytes(values) / values.nbytes

    assert share(CodecTable(name="topk")) == pytest.approx(0.01 * 6 / 4, rel=0.01)
    assert share(CodecTable(name="topk", keep=0.1)) == pytest.approx(0.1 * 6 / 4, rel=0.01)
    assert share(CodecTable(name="topk", keep=0.1, bits=2)) == pytest.approx(0.1 * 2.25 / 4, rel=0.02)
    assert share(CodecTable(name="demo", keep=0.1)) == pytest.approx(0.1 * 6 / 4, rel=0.01)
    assert share(CodecTable(name="int8", block=8)) == (8 + 4) / 32
    for name in TAKES["block"]:
        assert codec_by(CodecTable(name=name, block=64)).unit == 64


def test_seeds_reach_the_codecs_that_draw():
    values = torch.linspace(-1, 1, 1000)

    def message(seed: int) -> torch.Tensor:
        codec = wire_codec_by("int8", seed)
        assert codec is not None
        sent = torch.empty(codec.shape(values)[0], dtype=torch.uint8)
        codec.encode(values, sent)
        return sent

    assert torch.equal(message(1), message(1))
    assert not torch.equal(message(1), message(2))


def test_a_codec_may_be_set_in_a_table_that_is_overridden_too():
    phases = 'phases=[{strategy={name="all_reduce"},until={steps=5}},{strategy="local_sgd"}]'
    job = Job.load(DIGITS, [phases, "phases.1.strategy.codec=int4"])
    assert job.schedule[1].strategy.options.codec == "int4"
    job = Job.load(DIGITS, ["strategy.first.codec=int4", 'strategy.first={name="all_reduce"}'])
    assert job.schedule[0].strategy.options.codec == "int4"


def test_a_choice_without_a_strategy_takes_all():
    assert CHOICE.validate_python({"name": "topk", "keep": 0.02}) == CodecTable(name="topk", keep=0.02)
    assert CHOICE.validate_python(CodecTable(name="topk")) == "topk"
    with pytest.raises(ValidationError, match="must be the name of a codec"):
        CHOICE.validate_python(None)


def test_keys_are_explained():
    rows = {row.key: row for row in explain() if row.description.startswith("(local_sgd)")}
    assert rows["strategy.codec"].type == "text or table"
    assert rows["strategy.codec"].default == '"none"'
    assert rows["strategy.codec"].allowed == ", ".join(f'"{name}"' for name in NAMES) + ", or a table"
    assert rows["strategy.codec.keep"].allowed == "above 0 and at most 1"
    assert "strategy.codec.name" not in rows
