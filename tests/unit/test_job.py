"""The job: loading and dumping files, overrides, objects in place of names, and a message for every mistake."""

from __future__ import annotations

import datetime
import math
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from hpctrain import options
from hpctrain.errors import ClusterError, JobError
from hpctrain.job import Amount, Job, PhaseTable, check_ranks, registry
from hpctrain.job.explain import as_markdown, as_text, explain
from hpctrain.job.messages import table_of
from hpctrain.options import Table

HERE = __name__


class Tiny:
    """A strategy, as far as a job uses it."""

    class Options(options.Options):
        servers: int = Field(default=1, ge=1, le=64, description="how many")
        mode: typing.Literal["sync", "async"] = Field(default="sync", description="which way")
        shares: tuple[float, ...] = Field(default=(), description="a tuple, which TOML has not")
        when: int | typing.Literal["auto"] = Field(default="auto", description="a union")
        codec: str | None = Field(default=None, description="may be none | or text")


class Loose:
    """A strategy whose options accept extra keys and convert values."""

    class Options(BaseModel):
        model_config = ConfigDict(extra="allow")
        count: int = 3


class Later:
    """A strategy with an option that has the name of a table of a switch."""

    class Options(options.Options):
        until: str = Field(default="end", description="text")


class Until:
    """A rule."""

    class Options(options.Options):
        steps: int = Field(ge=1, description="required")


@pytest.fixture(autouse=True)
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(registry.STRATEGIES, "tiny", f"{HERE}:Tiny")
    monkeypatch.setitem(registry.STRATEGIES, "loose", f"{HERE}:Loose")
    monkeypatch.setitem(registry.RULES, "until", f"{HERE}:Until")
    yield


FULL = """
name = "full"
seed = 7
output = "elsewhere"
threads = 2
device = "cpu"
ranks = 4
[model]
name = "mlp"
inputs = 64
hidden = [32, 16]
nested = { since = 2024-02-29, deep = [{ a = 1 }, { a = 2.5 }], text = "\\u00e9\\n\\"" }
[data]
name = "mnist"
limit = 100
validation = 0.1
queue = "static"
augment = ["shift", "flip"]
[loss]
label_smoothing = 0.1
[metric]
goal = "min"
[optimizer]
name = "AdamW"
lr = 1e-5
betas = [0.9, 0.999]
elementwise = true
schedule = { name = "step", gamma = 0.5, warmup = { fraction = 0.05 } }
[train]
steps = 100
clip_norm = 1
target = 0.99
patience = 3
min_delta = 0.001
evaluate_every = { samples = 5000 }
checkpoint_every = { epochs = 0.5 }
[[phases]]
strategy = { name = "tiny", mode = "async", shares = [0.5, 0.5], when = 3 }
until = { rule = "until", steps = 10 }
[[phases]]
strategy = "all_reduce"
[debug.slow]
3 = 2
0 = 1.5
"""


def load(folder: Path, text: str, *overrides: str) -> Job:
    file = folder / "job.toml"
    file.write_text(text, encoding="utf-8")
    return Job.load(file, overrides)


def mistakes(call: Any, *arguments: Any, **keys: Any) -> list[str]:
    with pytest.raises(JobError) as caught:
        call(*arguments, **keys)
    return str(caught.value).splitlines()


# Loading and dumping files


def test_dumped_job_loads_as_the_same_job_and_text(tmp_path: Path) -> None:
    for job in (Job(), load(tmp_path, FULL), Job(train={"steps": 3}), Job(strategy="tiny")):
        again = load(tmp_path, job.dump())
        assert again == job
        assert again.dump() == job.dump()


def test_every_default_is_written_out(tmp_path: Path) -> None:
    text = Job(strategy="tiny").dump()
    for row in explain():
        plain = not set(row.key) & set("*") and not row.key.startswith("phases")
        if plain and row.default not in ("none", "by optimizer") and not row.description.startswith("("):
            assert f"{row.key.split('.')[-1]}" in text, row.key
    assert 'mode = "sync"' in text and "lr = 0.1" in text and "[train.evaluate_every]\nepochs = 1.0" in text


def test_none_is_the_default_where_allowed() -> None:
    def visit(model: type[BaseModel]) -> None:
        for name, field in model.model_fields.items():
            if type(None) in typing.get_args(field.annotation):
                assert field.default is None, f"{model.__name__}.{name} would not survive a dump"
            inner = table_of(field.annotation)
            if inner is not None and issubclass(inner, Table):
                visit(inner)

    visit(Job)


def test_full_job_has_the_written_values(tmp_path: Path) -> None:
    job = load(tmp_path, FULL)
    assert job.model.options["hidden"] == [32, 16]
    assert job.model.options["nested"]["since"] == datetime.date(2024, 2, 29)
    assert job.optimizer.options == {"betas": [0.9, 0.999]}
    assert job.optimizer.schedule.options == {"gamma": 0.5}
    assert job.optimizer.schedule.warmup is not None and job.optimizer.schedule.warmup.unit == "fraction"
    assert job.train.epochs is None and job.train.clip_norm == 1.0
    assert job.train.evaluate_every.value == 5000 and list(job.debug.slow.items()) == [(0, 1.5), (3, 2.0)]
    first, last = job.schedule
    assert first.strategy.options.shares == (0.5, 0.5) and first.until is not None
    assert (first.until.name, first.until.options.steps) == ("until", 10)
    assert (last.strategy.name, last.until) == ("all_reduce", None)
    assert first.strategy.resolve() is Tiny and first.until.resolve() is Until


def test_job_with_a_strategy_has_one_phase() -> None:
    [phase] = Job(strategy={"name": "tiny", "servers": 2}).schedule
    assert phase.until is None and phase.strategy.options.servers == 2
    assert Job().schedule[0].strategy.name == "all_reduce"


def test_learning_rate_defaults_to_the_optimizers() -> None:
    assert (Job().optimizer.lr, Job(optimizer="Adam").optimizer.lr) == (0.1, 0.001)
    assert Job(optimizer={"name": "a.b:C", "lr": 2}).optimizer.lr == 2.0


# Mistakes in files


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"a = \xff", "is not UTF-8 text (line 1)"),
        (b"\xff\xfen\x00", "is not UTF-8 text"),
        (b"name = \nseed = 1", "is not valid TOML: Invalid value (at line 1, column 8)"),
        (b"seed = 1\nseed = 2", "is not valid TOML: Cannot overwrite a value"),
        (b"a = " + b"[" * 5000, "is not valid TOML"),
        (b"a = " + b"9" * 5000, "is not valid TOML"),
        (b"a = 2024-13-45", "is not valid TOML"),
        (b"#" * (2**20 + 1), "is larger than"),
    ],
)
def test_files_that_are_not_toml(tmp_path: Path, content: bytes, sentence: str) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes(content)
    [line] = mistakes(Job.load, file)
    assert line.startswith(str(file)[:70]) and sentence in line


def test_missing_files_folders_and_strange_paths(tmp_path: Path) -> None:
    (tmp_path / "other.toml").write_text("")
    [line] = mistakes(Job.load, tmp_path / "job.toml")
    assert "there is no job file" in line and "(in that folder: other.toml)" in line
    [line] = mistakes(Job.load, tmp_path)
    assert line.endswith("is a folder, not a job file")
    (tmp_path / "job.toml").write_text("")
    [line] = mistakes(Job.load, tmp_path)
    assert "is a folder; did you mean" in line
    assert "cannot be read" in mistakes(Job.load, tmp_path / "job.toml" / "x")[0]
    assert mistakes(Job.load, "a\0b")
    assert mistakes(Job.load, "x" * 5000)
    assert Job.load(tmp_path / "job.toml") == Job()


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_bytes(b"\xef\xbb\xbfseed = 3")
    assert Job.load(tmp_path / "job.toml").seed == 3


def test_mistakes_name_the_file_unless_they_come_from_an_override(tmp_path: Path) -> None:
    with pytest.raises(JobError) as caught:
        load(tmp_path, "seed = -1", "train.batch_size=0")
    first, second = str(caught.value).splitlines()
    assert first.endswith("job.toml: seed = -1: must be an integer, at least 0 and at most 9223372036854775807")
    assert second == "train.batch_size = 0: must be an integer, at least 1 and at most 1000000000"


def test_long_path_is_shown_in_full(tmp_path: Path) -> None:
    folder = tmp_path / ("a folder with a long name" * 4) / "and one more"
    folder.mkdir(parents=True)
    with pytest.raises(JobError) as caught:
        load(folder, "seed = -1")
    assert str(caught.value).startswith(f"{folder}/job.toml: seed = -1: ")
    with pytest.raises(JobError, match="did you mean") as caught:
        Job.load(folder)
    assert f"{folder}/job.toml" in str(caught.value)


# Mistakes in jobs

MISTAKES = [
    ("trian = 3", "trian: unknown key (did you mean train?); a job has name, seed,"),
    ("batch_size = 3", "batch_size: unknown key (did you mean train.batch_size?); a job has"),
    (
        "train.batchsize = 3",
        "train.batchsize: unknown key (did you mean batch_size?); train has epochs, steps,",
    ),
    ('"a b" = 3', '"a b": unknown key; a job has'),
    ("train = 3", "train = 3: must be a table"),
    ("train = [{}]", "train = a list of 1: must be a table"),
    ("model = 3", 'model = 3: must be a table such as {name = "..."}, or a name'),
    ("seed = true", "seed = true: must be an integer"),
    ("seed = 1.0", "seed = 1.0: must be an integer"),
    ('seed = "1"', 'seed = "1": must be an integer'),
    ("seed = {a = 1}", "seed = a table: must be an integer"),
    ("seed = 2024-01-01", "seed = 2024-01-01: must be an integer"),
    (f"seed = {2**70}", "seed = an integer of 71 bits: must be an integer"),
    ("name = 3", "name = 3: must be text"),
    ('name = ""', 'name = "": must be usable as a file name'),
    ('name = "a/b"', 'name = "a/b": must be usable as a file name'),
    ('name = "-rf"', 'name = "-rf": must be usable as a file name'),
    ('name = ".."', 'name = "..": must be usable as a file name'),
    (f'name = "{"x" * 101}"', "at most 100 bytes"),
    ('output = ""', 'output = "": must be text, not empty'),
    ('output = "a\\u0000b"', "must not contain the character NUL"),
    ("threads = 0", 'threads = 0: must be "auto" or an integer, at least 1'),
    ("threads = true", 'threads = true: must be "auto" or an integer, at least 1'),
    ('device = "gpu"', 'device = "gpu": must be one of "auto", "cpu", "cuda"'),
    ("ranks = 0", "ranks = 0: must be an integer, at least 1"),
    (
        'model.name = "lenet"',
        'model.name = "lenet": unknown model (did you mean lenet5?); use one of mlp, lenet5',
    ),
    ('model.name = ""', 'model.name = "": unknown model; use one of'),
    ("model.name = 3", "model.name = 3: must be text"),
    ('model."a b" = 3', 'model."a b" = 3: is not the name of a keyword argument'),
    ("model.x = nan", "model.x = nan: must be a number"),
    ("model.x = [1, {y = nan}]", "model.x.1.y = nan: must be a number"),
    (f"model.x = {2**64}", "model.x = an integer of 65 bits: must be at most 9223372036854775807 in size"),
    (f"model.x = {'[' * 30}{']' * 30}", "nested more than 16 levels deep"),
    ("data.validation = 1", "data.validation = 1: must be a number, at least 0 and below 1"),
    ("data.validation = -0.1", "data.validation = -0.1: must be a number, at least 0 and below 1"),
    ('data.augment = "shift"', 'data.augment = "shift": must be a list of text'),
    ('data.augment = ["shfit"]', 'data.augment.0 = "shfit": unknown augmentation (did you mean shift?)'),
    ("data.augment = [3]", "data.augment.0 = 3: must be text"),
    ('data.shuffle = "yes"', 'data.shuffle = "yes": must be true or false'),
    (
        'optimizer.name = "LBFGS"',
        'optimizer.name = "LBFGS": cannot be used: it evaluates the loss several times',
    ),
    ("optimizer.lr = 0", "optimizer.lr = 0: must be a number, above 0"),
    ("optimizer.lr = nan", "optimizer.lr = nan: must be a number, above 0"),
    ("optimizer.lr = inf", "optimizer.lr = inf: must be a number, above 0"),
    (
        'optimizer.name = "a.b:C"',
        'optimizer.lr: is needed: hpctrain has no default learning rate for optimizer "a.b:C"',
    ),
    ("optimizer.params = [1]", "optimizer.params: is the model's parameters"),
    (
        'optimizer.schedule = "cosin"',
        'optimizer.schedule.name = "cosin": unknown schedule (did you mean cosine?)',
    ),
    ("optimizer.schedule.warmup = 3", "optimizer.schedule.warmup = 3: must be a table"),
    ("train.epochs = 0", "train.epochs = 0: must be a number, above 0"),
    ("train = {epochs = 1, steps = 1}", "train.steps = 1: train.epochs = 1 is also given; use one of the two"),
    ("train.steps = 0.5", "train.steps = 0.5: must be an integer, at least 1"),
    ('train.nan = "halt"', 'train.nan = "halt": must be one of "stop", "skip"'),
    ("train.clip_norm = -1", "train.clip_norm = -1: must be a number, above 0"),
    ("train.target = inf", "train.target = inf: must be a number"),
    ("train.min_delta = 0.1", "train.min_delta = 0.1: has no effect without train.patience"),
    (
        "train.evaluate_every = {}",
        "train.evaluate_every = an empty table: must have exactly one of epochs, steps,",
    ),
    ("train.evaluate_every = {epochs = 1, steps = 1}", "must have exactly one of epochs, steps, samples"),
    (
        "train.evaluate_every.fraction = 2",
        "train.evaluate_every.fraction = 2: must be a number, above 0 and at most 1",
    ),
    ("train.evaluate_every.epoch = 2", "train.evaluate_every.epoch: unknown key (did you mean epochs?)"),
    ('strategy = "tinny"', 'strategy.name = "tinny": unknown strategy (did you mean tiny?)'),
    ("strategy.name = 3", "strategy.name = 3: must be text, the name of a strategy"),
    (
        'strategy = {name = "tiny", server = 2}',
        "strategy.server: unknown key (did you mean servers?); strategy",
    ),
    (
        'strategy = {name = "tiny", servers = 0}',
        "strategy.servers = 0: must be an integer, at least 1 and at most 64",
    ),
    ('strategy = {name = "tiny", servers = true}', "strategy.servers = true: must be an integer"),
    ('strategy = {name = "tiny", servers = "2"}', 'strategy.servers = "2": must be an integer'),
    ('strategy = {name = "tiny", when = 1.5}', 'strategy.when = 1.5: must be an integer or text, "auto"'),
    ('strategy = {name = "tiny", shares = [1, "x"]}', "strategy.shares"),
    ('strategy = {name = "tiny", mode = "asinc"}', 'strategy.mode = "asinc": must be one of "sync", "async"'),
    ('strategy = {name = "loose", count = nan}', "strategy.count = nan: must be a number"),
    ('strategy = {name = "loose", count = "3"}', 'strategy.count = "3": must be an integer'),
    (
        'strategy = "no_such_module:X"',
        'strategy.name = "no_such_module:X": there is no module no_such_module',
    ),
    (
        'strategy = "json:dumps"',
        'strategy.name = "json:dumps": is not a strategy: it must be a class with a pydantic',
    ),
    ("phases = []", "phases = an empty list: must be a list of tables, not empty"),
    ("phases = {}", "phases = an empty table: must be a list of tables"),
    ("phases = [3]", "phases.0 = 3: must be a table"),
    ("phases = [{}, {}]", "phases.0.until: is missing: only the last phase may continue"),
    ("phases = [{}]\nstrategy = {}", "strategy: phases are also given"),
    (
        "phases = [{until = {rule = 'utnil'}}]",
        'phases.0.until.rule = "utnil": unknown rule (did you mean until?)',
    ),
    ("phases = [{until = {rule = 'until'}}]", "phases.0.until.steps: is missing; it has no default"),
    (
        "phases = [{until = {rule = 'until', steps = 0}}]",
        "phases.0.until.steps = 0: must be an integer, at least 1",
    ),
    ("phases = [{until = {rule = 'after'}}]", "phases.0.until"),
    (
        "phases = [{strategy = {name = 'tiny', servers = 0}}]",
        "phases.0.strategy.servers = 0: must be an integer",
    ),
    (
        "phases = [{unitl = 3}]",
        "phases.0.unitl: unknown key (did you mean until?); phases.0 has strategy, until",
    ),
    ('strategy = {name = "switch", frist = "tiny"}', "strategy.frist: unknown key (did you mean first?); strategy"),
    ('strategy = {name = "switch", first = 3}', "strategy.first = 3: must be a table such as {name"),
    ('strategy = {name = "switch", first = "tinny"}', 'strategy.first.name = "tinny": unknown strategy (did you mean'),
    (
        'strategy = {name = "switch", first = {name = "tiny", servers = 0}}',
        "strategy.first.servers = 0: must be an integer, at least 1 and at most 64",
    ),
    (
        'strategy = {name = "switch", until = {thresold = 1}}',
        'strategy.until.thresold: unknown key (did you mean threshold?); rule "loss_stable" has rule, window,',
    ),
    (
        'strategy = {name = "switch", until = {fraction = 0.2}}',
        'strategy.until.fraction: unknown key (rule "after" has it); rule "loss_stable" has rule, window,',
    ),
    ('strategy = {name = "switch", until = {window = 0}}', "strategy.until.window = 0: must be an integer, at least 1"),
    (
        'strategy = {name = "switch", until = {threshold = -1}}',
        "strategy.until.threshold = -1: must be a number, at least 0",
    ),
    ('strategy = {name = "switch", until = {armed = nan}}', "strategy.until.armed = nan: must be a number"),
    ('strategy = {name = "switch", until = {armed = inf}}', "strategy.until.armed = inf: must be a number"),
    ('strategy = {name = "switch", until = "target"}', "strategy.until.metric: is missing; it has no default"),
    (
        'strategy = {name = "switch", until = "after"}',
        "strategy.until = an empty table: must have exactly one of epochs",
    ),
    ('strategy = {name = "switch", enter = {momentum = "kept"}}', 'strategy.enter.momentum = "kept": must be one of'),
    ('strategy = {name = "switch", enter = {lr = 1}}', "strategy.enter.lr: unknown key"),
    ('strategy = {name = "switch", enter = {scale = 0}}', "strategy.enter.scale = 0: must be a number, above 0"),
    ('strategy = {name = "switch", enter = {ramp = {steps = 0}}}', "strategy.enter.ramp.steps = 0: must be an integer"),
    (
        'strategy = {name = "switch", enter = {ramp = {}}}',
        "strategy.enter.ramp = an empty table: must have exactly one",
    ),
    (
        'strategy = {name = "switch", then = "switch"}',
        'strategy.then.name = "switch": consists of phases itself, so it cannot be one of them; name another',
    ),
    ('strategy = {name = "switch", first = "hpctrain.job.phases:Switch"}', "consists of phases itself"),
    (
        'phases = [{strategy = "switch"}]',
        'phases.0.strategy.name = "switch": consists of phases itself, so it cannot be one of them; name another',
    ),
    ("phases = [{enter = {}}]", "phases.0.enter: has no effect in the first phase; leave it out"),
    (
        "phases = [{until = {rule = 'until', steps = 1}}, {enter = {momentum = 'none'}}]",
        'phases.1.enter.momentum = "none": must be one of "keep", "scale", "reset", "ramp"',
    ),
    ("debug.slow = [2]", "debug.slow = a list of 1: must be a table"),
    ("debug.slow.x = 2", "debug.slow.x: must be a rank, each once: a whole number from 0"),
    ("debug.slow = {1 = 2, 01 = 3}", "debug.slow.01: must be a rank, each once"),
    ("debug.slow.1 = 0.5", "debug.slow.1 = 0.5: must be a number, at least 1"),
    ("debug.slow.1 = nan", "debug.slow.1 = nan: must be a number, at least 1"),
    ("ranks = 2\ndebug.slow.2 = 2", "debug.slow.2: ranks = 2, so ranks are 0 to 1"),
    (
        'model.name = "<lambda in train.py:12>"',
        "was an object of the program that made this run; start that program",
    ),
    (
        'strategy.name = "<Mine in train.py:12>"',
        "was an object of the program that made this run; start that program",
    ),
    (
        'data.augment = ["<f in train.py:12>"]',
        "was an object of the program that made this run; start that program",
    ),
]


@pytest.mark.parametrize(("text", "sentence"), MISTAKES)
def test_every_mistake_is_one_message(tmp_path: Path, text: str, sentence: str) -> None:
    [line] = mistakes(load, tmp_path, text)
    assert sentence in line, line
    assert len(line) < 600 and "pydantic.dev" not in line


def test_all_mistakes_are_listed_up_to_ten(tmp_path: Path) -> None:
    lines = mistakes(load, tmp_path, "seed = -1\nranks = 0\nx = 1\ntrain = {epochs = -1, steps = -1}")
    assert [line.split(": ")[1].split(" = ")[0] for line in lines] == [
        "seed",
        "ranks",
        "train.epochs",
        "train.steps",
        "x",
    ]
    lines = mistakes(load, tmp_path, "\n".join(f"x{i} = 1" for i in range(25)))
    assert len(lines) == 11 and lines[-1] == "... and 15 more"


def test_values_in_messages_are_short_and_printable(tmp_path: Path) -> None:
    [line] = mistakes(load, tmp_path, f'device = "{"x" * 5000}"')
    assert len(line) < 300
    [line] = mistakes(load, tmp_path, 'device = "\\u001b[2J\\n"')
    assert line.isprintable()


# Overrides


def changed(job: Job, *overrides: str) -> Job:
    return job.override(overrides)


def test_override_accepts_toml_values_and_plain_text() -> None:
    job = changed(
        Job(), "seed=3", "name=abc", 'output="a b"', "train.clip_norm=1e-3", "data.shuffle=false",
        "model.hidden=[1, 2]", "train.evaluate_every={steps = 5}", "debug.slow.2=3", "model.text=a=b, c",
        "data.'odd'=1", "model.line=1\nx = 2",
    )  # fmt: skip
    assert (job.seed, job.name, job.output, job.train.clip_norm) == (3, "abc", "a b", 1e-3)
    assert job.model.options == {"hidden": [1, 2], "text": "a=b, c", "line": "1\nx = 2"} and not job.data.shuffle
    assert job.train.evaluate_every == Amount(steps=5) and job.debug.slow == {2: 3.0}
    assert job.data.options == {"odd": 1}


def test_override_does_not_change_the_original_job(tmp_path: Path) -> None:
    job = load(tmp_path, FULL)
    before = job.dump()
    changed(job, "model.hidden=[1]", "phases.0.strategy.servers=2", "model.nested.deep.0.a=5")
    assert job.dump() == before


def test_default_restores_the_default() -> None:
    job = Job(seed=3, train={"clip_norm": 1.0, "steps": 5}, strategy={"name": "tiny", "servers": 3})
    assert changed(job, "seed=default").seed == 0
    assert changed(job, "train.clip_norm=default").train.clip_norm is None
    assert changed(job, "train.steps=default").train.epochs == 1.0
    assert changed(job, "train=default").train == Job().train
    assert changed(job, "strategy.servers=default").schedule[0].strategy.options.servers == 1
    assert changed(job, "strategy=default") == changed(Job(), "seed=3", "train.clip_norm=1.0", "train.steps=5")


def test_one_of_two_exclusive_keys_replaces_the_other() -> None:
    job = Job(train={"epochs": 3})
    assert (changed(job, "train.steps=5").train.steps, changed(job, "train.steps=5").train.epochs) == (
        5,
        None,
    )
    assert changed(job, "train.evaluate_every.steps=5").train.evaluate_every == Amount(steps=5)
    [line] = mistakes(changed, job, "train.steps=5", "train.epochs=2")
    assert "use one of the two" in line


def test_new_name_removes_the_old_names_keys_in_any_order(tmp_path: Path) -> None:
    job = load(tmp_path, FULL)
    adam = changed(job, "optimizer.weight_decay=0.1", "optimizer.name=Adam")
    assert adam.optimizer.options == {"weight_decay": 0.1} and adam.optimizer.lr == 0.001
    assert adam.optimizer.schedule == job.optimizer.schedule and adam.optimizer.elementwise is None
    assert changed(job, "optimizer.name=AdamW").optimizer == job.optimizer
    digits = changed(job, "data.name=digits").data
    assert (digits.options, digits.validation, digits.augment) == ({}, 0.1, ["shift", "flip"])
    assert changed(job, "phases.0.strategy=loose").schedule[0].strategy.options == Loose.Options()
    again = changed(Job(strategy={"name": "tiny", "servers": 3}), "strategy.mode=async", "strategy.name=tiny")
    assert (again.schedule[0].strategy.options.servers, again.schedule[0].strategy.options.mode) == (
        3,
        "async",
    )
    assert load(tmp_path, "optimizer.lr = 0.5", "optimizer.name=SGD").optimizer.lr == 0.5
    linear = changed(load(tmp_path, FULL), "optimizer.schedule.name=linear").optimizer.schedule
    assert linear.warmup == job.optimizer.schedule.warmup and linear.options == {}


def test_strategy_and_phases_replace_each_other(tmp_path: Path) -> None:
    job = load(tmp_path, FULL)
    one = changed(job, "strategy.servers=2", "strategy.name=tiny")
    assert one.phases is None and one.schedule[0].strategy.options.servers == 2
    assert changed(job, "strategy=tiny").phases is None
    assert load(tmp_path, 'strategy = "tiny"', "strategy.servers=5").schedule[0].strategy.options.servers == 5
    two = changed(Job(), "phases=[{until={rule='until', steps=1}}, {}]")
    assert two.strategy is None and len(two.schedule) == 2
    [line] = mistakes(changed, job, "strategy.servers=2")
    assert line == (
        "override strategy.servers: this job has phases in place of strategy; set a key of phases, or set "
        "strategy.name too"
    )


def test_list_entries_are_overridden_by_index(tmp_path: Path) -> None:
    job = load(tmp_path, FULL)
    changed_job = changed(job, "phases.0.strategy.servers=9", "phases.0.until.steps=99", "data.augment.1=shift")
    first = changed_job.schedule[0]
    assert (first.strategy.options.servers, first.strategy.options.mode) == (9, "async")
    assert first.until is not None and first.until.options.steps == 99
    assert changed_job.data.augment == ["shift", "shift"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("seed", 'override "seed": expected key=value, such as train.batch_size=64'),
        ("seed=", 'override "seed=" has no value; seed=default restores the default'),
        ("=3", 'override "=3": "" is not a key'.replace('""', "")),
        ("a..b=3", "is not a key; expected words joined by dots"),
        ("a b=3", "is not a key; expected words joined by dots"),
        ("#=3", "is not a key; expected words joined by dots"),
        ("seed.x=3", "override seed: is 7, so nothing below it can be set"),
        ("phases.2.strategy=tiny", "override phases.2: phases is a list that has 2, numbered from 0"),
        ("phases.-1.strategy=tiny", "override phases.-1: phases is a list that has 2, numbered from 0"),
        ("phases.x=1", "override phases.x: phases is a list that has 2, numbered from 0"),
        ("data.augment.0=default", "element 0 of a list has no default; set the whole list"),
        ("train.batchsize=3", "train.batchsize: unknown key (did you mean batch_size?)"),
        ("data.shuffle=True", 'data.shuffle = "True": must be true or false'),
        ("name=\udcff", "must be usable as a file name"),
        ("output=\udcff", "must be valid Unicode text"),
        ("model.x=\udcff", "must be valid Unicode text"),
    ],
)
def test_overrides_that_cannot_be_applied_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    [line] = mistakes(changed, load(tmp_path, FULL), override)
    assert sentence in line


def test_single_string_is_not_a_list_of_overrides() -> None:
    [line] = mistakes(Job().override, "seed=3")
    assert "must be a list" in line


# Switch: two phases under one name


def test_switch_is_short_for_two_phases() -> None:
    job = Job(strategy={"name": "switch", "then": {"servers": 2}, "enter": {"momentum": "scale", "scale": 0.5}})
    assert job.phases is None and [job.key(0, "strategy"), job.key(1, "strategy")] == [
        "strategy.first",
        "strategy.then",
    ]
    assert [job.key(0, "until"), job.key(1, "enter")] == ["strategy.until", "strategy.enter"]
    first, second = job.schedule
    assert (first.strategy.name, second.strategy.name) == ("all_reduce", "parameter_server")
    assert first.until is not None and first.until.name == "loss_stable" and second.until is None
    assert first.enter is None and second.enter is not None
    assert (second.strategy.options.servers, second.enter.momentum, second.enter.scale) == (2, "scale", 0.5)
    table = job.plain()["strategy"]
    assert list(table) == ["name", "first", "until", "then", "enter"]
    phases = [
        {"strategy": table["first"], "until": table["until"]},
        {"strategy": table["then"], "enter": table["enter"]},
    ]
    long = Job(phases=phases)
    assert [phase.plain() for phase in long.schedule] == [phase.plain() for phase in job.schedule]
    assert [long.key(0, "until"), long.key(1, "strategy")] == ["phases.0.until", "phases.1.strategy"]


def test_switch_is_dumped_with_every_default_and_loads_again(tmp_path: Path) -> None:
    own = {"first": {"name": "tiny", "shares": [0.5]}, "until": {"rule": "until", "steps": 3}}
    for strategy in ({"name": "switch"}, {"name": "switch", **own}):
        job = Job(strategy=strategy)
        again = load(tmp_path, job.dump())
        assert again == job and again.dump() == job.dump()
    text = Job(strategy="switch").dump()
    assert '[strategy.until]\nrule = "loss_stable"\nwindow = 6\nthreshold = 0.01\nrounds = 10\narmed = 0.5' in text
    assert '[strategy.enter]\nlearning_rate = "auto"\nmomentum = "keep"' in text
    assert "[strategy.enter.ramp]\nfraction = 0.05" in text and '[strategy.then]\nname = "parameter_server"' in text


def test_later_phases_have_enter_written_out(tmp_path: Path) -> None:
    first, second = {"until": {"rule": "until", "steps": 1}}, {"strategy": "tiny"}
    job = Job(phases=[PhaseTable.model_validate(first), PhaseTable.model_validate(second)])
    assert job == Job(phases=[first, second])
    assert job.phases is not None and job.phases[0].enter is None and job.phases[1].enter is not None
    assert job.dump().count("[phases.enter]") == 1 and load(tmp_path, job.dump()) == job
    assert changed(job, "phases.1.enter.ramp.steps=5").schedule[1].enter.ramp == Amount(steps=5)  # type: ignore[union-attr]
    assert changed(job, "phases.1.enter=default") == job


@pytest.mark.parametrize(
    ("overrides", "place", "value"),
    [
        (["strategy.until.threshold=0.02"], "strategy.until.threshold", 0.02),
        (["strategy.then.servers=2"], "strategy.then.servers", 2),
        (["strategy.first.exchange=message"], "strategy.first.exchange", "message"),
        (["strategy.first=tiny", "strategy.first.servers=9"], "strategy.first.servers", 9),
        (["strategy.first.servers=9", "strategy.first=tiny"], "strategy.first.servers", 9),
        (["strategy.until.fraction=0.2", "strategy.until=after"], "strategy.until.fraction", 0.2),
        (["strategy.until=after", "strategy.until.steps=5"], "strategy.until.rule", "after"),
        (["strategy.until={rule = 'until', steps = 7}"], "strategy.until.steps", 7),
        (["strategy.until={window = 7}"], "strategy.until.rule", "loss_stable"),
        (["strategy.enter.learning_rate=ramp"], "strategy.enter.learning_rate", "ramp"),
        (["strategy.enter.ramp.steps=5"], "strategy.enter.ramp", {"steps": 5}),
        (["strategy.then.mode=sync", "strategy.then=tiny"], "strategy.then.mode", "sync"),
    ],
)
@pytest.mark.parametrize("start", ["named", "resolved", "by override"])
def test_overrides_reach_into_a_switch(
    tmp_path: Path, start: str, overrides: list[str], place: str, value: object
) -> None:
    texts = {"named": 'strategy = "switch"', "resolved": Job(strategy="switch").dump(), "by override": ""}
    job = load(tmp_path, texts[start], *overrides, *(["strategy=switch"] if start == "by override" else []))
    found: Any = job.plain()
    for key in place.split("."):
        found = found[key]
    assert found == value
    assert load(tmp_path, job.dump()) == job


def test_new_rule_in_a_switch_removes_old_keys_and_default_restores_them() -> None:
    job = Job(strategy={"name": "switch", "until": {"threshold": 0.5, "window": 9}})
    after = changed(job, "strategy.until=after", "strategy.until.steps=5")
    assert after.plain()["strategy"]["until"] == {"rule": "after", "steps": 5}
    assert changed(after, "strategy.until=default") == changed(Job(strategy="switch"))
    assert changed(job, "strategy.until.window=default").plain()["strategy"]["until"]["window"] == 6
    assert changed(job, "strategy=all_reduce") == Job()


def test_strategy_option_named_like_a_switch_table_is_an_option() -> None:
    job = changed(Job(strategy=Later), "strategy.until=after")
    assert job.schedule[0].strategy.options.until == "after"
    job = changed(Job(strategy="switch"), "strategy.until=after", f"strategy={HERE}:Later")
    assert job.schedule[0].strategy.options.until == "after"
    [line] = mistakes(changed, job, "strategy.until=after", "strategy=switch")
    assert line.startswith("strategy.until = an empty table: must have exactly one of epochs, steps")


def test_objects_in_a_switch_are_kept(tmp_path: Path) -> None:
    class Local(Tiny):
        pass

    tables = {"first": {"name": Local, "servers": 2}, "until": {"rule": Until, "steps": 4}, "then": Local}
    job = Job(strategy={"name": "switch", **tables}).override(["strategy.first.servers=3", "seed=1"])
    first, second = job.schedule
    assert first.strategy.resolve() is Local and second.strategy.resolve() is Local and first.until is not None
    assert first.until.resolve() is Until and first.strategy.options.servers == 3
    lines = mistakes(load, tmp_path, job.dump())
    assert [line.split(": ")[1].split(" = ")[0] for line in lines] == ["strategy.first.name", "strategy.then.name"]


# Objects in place of names


def own_model(width: int, depth: int = 2) -> str:
    return f"{width}x{depth}"


def test_importable_objects_are_dumped_by_path_and_load_again(tmp_path: Path) -> None:
    import torch

    job = Job(
        model={"name": own_model, "width": 3},
        optimizer=torch.optim.Adam,
        strategy=Tiny,
        data={"augment": [own_model]},
    )
    assert (job.model.name, job.optimizer.name, job.optimizer.lr) == (f"{HERE}:own_model", "Adam", 0.001)
    assert job.schedule[0].strategy.name == "tiny" and job.data.augment == [f"{HERE}:own_model"]
    assert load(tmp_path, job.dump()) == job
    assert job.model.bind()() == "3x2" and job.optimizer.resolve() is torch.optim.Adam


def test_other_objects_are_kept_but_refused_on_loading(tmp_path: Path) -> None:
    import torch

    net, pair = torch.nn.Linear(2, 1), (["train"], ["test"])
    job = Job(
        model=net,
        data=pair,
        loss=lambda outputs, targets: 0.0,
        metric={"name": torch.nn.MSELoss(), "goal": "min"},
    )
    assert job.model.resolve() is net and job.data.resolve() is pair and job.loss.resolve()(1, 2) == 0.0
    assert job.loss.name.startswith("<lambda in test_job.py:") and job.metric.goal == "min"
    later = job.override(["seed=3"])
    assert later.model.resolve() is net and later.loss.resolve() is job.loss.resolve() and later.seed == 3
    assert changed(job, "model.name=mlp").model.thing is None
    lines = mistakes(load, tmp_path, job.dump())
    assert [line.split(": ")[1].split(" = ")[0] for line in lines] == [
        "model.name",
        "data.name",
        "loss.name",
        "metric.name",
    ]
    assert all("was an object of the program that made this run; start that program again" in line for line in lines)


def test_strategy_class_of_the_main_program_is_kept(tmp_path: Path) -> None:
    class Local(Tiny):
        pass

    job = Job(strategy={"name": Local, "servers": 2}).override(["strategy.servers=3"])
    assert job.schedule[0].strategy.resolve() is Local and job.schedule[0].strategy.options.servers == 3
    assert job.schedule[0].strategy.name.startswith("<Local in test_job.py:")
    assert "was an object" in mistakes(load, tmp_path, job.dump())[0]


def test_unsuitable_objects_are_refused() -> None:
    import torch

    parameters = torch.nn.Linear(1, 1).parameters()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"optimizer": torch.optim.SGD(parameters)},
            "optimizer = <SGD object>: must be the optimizer's class",
        ),
        ({"optimizer": torch.optim.LBFGS}, "cannot be used: it evaluates the loss several times"),
        (
            {"model": torch.zeros(3)},
            "model = <Tensor object>: must be the name of a model, or a callable",
        ),
        ({"model": (1, 2)}, "model = a list of 2: must be the name of a model"),
        ({"data": [1, 2]}, "data = a list of 2: must be a table"),
        ({"data": object()}, "data = <object object>: must be a data set, a pair (train, test)"),
        ({"data": {"augment": [lambda x: x]}}, "must be importable: define it in a module of its own"),
        ({"strategy": own_model}, "is not a strategy: it must be a class with a pydantic model named Options"),
        ({"model": {"name": "mlp", "inputs": None}}, "model.inputs: None cannot be written into a job file"),
        ({"model": {"name": "mlp", "f": math.sin}}, "_or_method object>: must be a TOML value"),
        ({"seed": None}, "seed: must be an integer"),
        ({"no_such": 1}, "no_such: unknown key"),
    ]
    for keys, sentence in cases:
        [line] = mistakes(Job, **keys)
        assert sentence in line, line


def test_keyword_arguments_are_checked_against_what_is_called() -> None:
    spec = Job(model={"name": own_model, "widht": 3}).model
    assert mistakes(spec.bind) == [
        f'model "{HERE}:own_model" has no keyword widht (did you mean width?); it takes width, depth'
    ]
    assert "missing a required argument: 'width'" in mistakes(Job(model=own_model).model.bind)[0]
    assert Job(model={"name": own_model, "depth": 1}).model.bind(1)(7) == "7x1"
    assert mistakes(Job(model={"name": own_model, "width": 3}).model.bind, 1) == [
        f'model "{HERE}:own_model" has no keyword width (did you mean depth?); it takes depth'
    ]
    assert "which cannot be called" in mistakes(Job(loss=f"{HERE}:FULL").loss.bind)[0]


def test_job_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job().seed = 3


# Ranks, and the list of keys


def test_check_ranks() -> None:
    check_ranks(Job(), 2)
    check_ranks(Job(ranks=4, debug={"slow": {3: 2.0}}), 4)
    with pytest.raises(ClusterError, match="ranks = 4: a job that needs 4 ranks was started with 2; start 4, or"):
        check_ranks(Job(ranks=4), 2)
    with pytest.raises(ClusterError, match="started with 8"):
        check_ranks(Job(ranks=4), 8)
    with pytest.raises(JobError, match=r"debug.slow.3: this run has 2 ranks, 0 to 1"):
        check_ranks(Job(debug={"slow": {"3": 2.0}}), 2)
    with pytest.raises(JobError, match=r"debug.slow.2"):
        check_ranks(Job(debug={"slow": {2: 2.0}}), 2)


def test_explain_describes_every_key_once() -> None:
    rows = explain()
    keys = [(row.key, row.description.startswith("(") and row.description.split(")")[0]) for row in rows]
    assert len(set(keys)) == len(keys)
    assert all(row.type and row.default and row.description for row in rows)
    by_key = {row.key: row for row in rows}
    for key in ("name", "model.name", "model.*", "optimizer.schedule.warmup", "train.nan", "debug.slow"):
        assert key in by_key
    assert by_key["train.nan"].allowed == '"stop", "skip"'
    assert by_key["strategy.servers"].description.startswith("(")
    assert by_key["strategy.shares"] == (
        "strategy.shares",
        "list of numbers",
        "[]",
        "",
        "(tiny) a tuple, which TOML has not",
    )
    assert by_key["phases.N.until.steps"].default == "required"
    assert by_key["strategy.until"] == (
        "strategy.until",
        "table",
        '{rule = "loss_stable"}',
        "",
        "(switch) the rule that ends the first phase: the keys of phases.N.until",
    )
    assert by_key["strategy.then"].default == '{name = "parameter_server"}'
    assert by_key["phases.N.enter.momentum"].allowed == '"keep", "scale", "reset", "ramp"'
    assert {"phases.N.until.armed", "phases.N.until.metric", "strategy.enter.ramp"} <= set(by_key)


def test_explain_shows_the_real_defaults() -> None:
    job = Job()
    for row in explain():
        if (
            row.default in ("none", "required", "by optimizer")
            or row.key.startswith(("strategy", "phases"))
            or "," in row.default
        ):
            continue
        assert job.override([f"{row.key}={row.default}"]) == job, row.key


def test_explain_as_text_and_markdown() -> None:
    rows = explain()
    text, page = as_text(rows), as_markdown(rows)
    assert "train.batch_size = 32    integer (at least 1" in text
    assert max(map(len, text.splitlines())) < 250
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2
    assert {line.replace("\\|", "").count("|") for line in table} == {6}


def test_docs_job_md_matches_explain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tiny", "loose"):
        monkeypatch.delitem(registry.STRATEGIES, name)
    monkeypatch.delitem(registry.RULES, "until")
    page = Path(__file__).parents[2] / "docs" / "job.md"
    assert page.read_text(encoding="utf-8") == as_markdown(explain()), "hpctrain job explain --markdown > docs/job.md"


def test_built_in_strategies_and_rules_describe_options_and_forbid_others() -> None:
    for kind in ("strategy", "rule"):
        for name, target in registry.TABLES[kind].items():
            options = registry.resolve(kind, name).Options
            if HERE not in target:
                assert options.model_config.get("extra") == "forbid", name
                assert all(field.description for field in options.model_fields.values()), name


def test_namespaces_are_accepted_only_for_data() -> None:
    splits = types.SimpleNamespace(train=[1], validation=None, test=None)
    assert Job(data=splits).data.resolve() is splits
    assert "or a callable" in mistakes(Job, model=splits)[0]
