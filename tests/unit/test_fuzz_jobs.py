"""A thousand broken job files, seeded: each is accepted or refused with a message; never a traceback."""

from __future__ import annotations

import datetime
import random
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hpctrain.errors import ClusterError, JobError
from hpctrain.job import Job, check_ranks
from tests.marks import mostly_slow

FILES = 1000
FULL: dict[str, Any] = {
    **{"name": "full", "seed": 7, "output": "elsewhere", "threads": "auto", "device": "cpu", "ranks": 4},
    "model": {"name": "mlp", "inputs": 64, "hidden": [32, 16]},
    "data": {"name": "digits", "validation": 0.1, "queue": "auto", "shuffle": True, "augment": ["shift"]},
    "loss": {"name": "cross_entropy", "label_smoothing": 0.1},
    "metric": {"name": "accuracy", "goal": "max"},
    "optimizer": {
        **{"name": "AdamW", "lr": 0.001, "betas": [0.9, 0.999], "elementwise": True},
        "schedule": {"name": "cosine", "end": 0.1, "warmup": {"fraction": 0.05}},
    },
    "train": {
        **{"epochs": 3.0, "batch_size": 32, "accumulate": 1, "precision": "float32", "clip_norm": 1.0},
        **{"target": 0.99, "patience": 3, "min_delta": 0.001, "keep_checkpoints": 2, "nan": "skip"},
        **{"evaluate_every": {"epochs": 1.0}, "checkpoint_every": {"samples": 5000}, "sync_batchnorm": False},
    },
    "trace": {"enabled": True, "flush_seconds": 2.0, "resources_seconds": 1.0},
    "communicator": {"wait": "auto", "shared": True},
    "debug": {"slow": {"0": 1.5, "3": 2}},
}
SERVER = {"name": "parameter_server", "mode": "sync", "servers": 1, "colocated": False}
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": {"name": "all_reduce", "algorithm": "ring"}},
    {"strategy": SERVER},
    {"phases": [{"strategy": SERVER, "until": {"rule": "after", "epochs": 1.0}}, {"strategy": "all_reduce"}]},
    {"phases": [{"until": {"rule": "target", "metric": 0.9}}, {"strategy": SERVER, "enter": {"ramp": {"steps": 5}}}]},
    {"strategy": "switch"},
    {"strategy": {"name": "switch", "first": SERVER, "until": {"rule": "after", "steps": 9}, "then": "all_reduce"}},
    {"strategy": {"name": "switch", "until": {"threshold": 0.1, "window": 3}, "enter": {"momentum": "scale"}}},
]
ODD: list[Any] = [
    *(True, False, 0, -1, 1, 2**31, 2**63 - 1, 2**63, -(2**70), 10**400, 0.0, -0.0, -1.5, 1e-320),
    *(1e308, float("nan"), float("inf"), float("-inf"), "", " ", "x", "auto", "nan", "none", "default"),
    *("<lambda in a.py:3>", "a:b", "a.b:c.d", "os:system", "json:dumps", "hpctrain.job:Job", "../x"),
    *("\0", "\x1b[2J", "\u2028", "é" * 300, "x" * 10_000, "{}", "{text}", "%s"),
    *([], [[]], [{}], [1, "a", {"b": 2.5}, [True]], {}, {"": 1}, {"name": {}}, {"name": []}, {"name": 3}),
    *({"a": {"b": {"c": []}}}, {"epochs": 1, "steps": 2}, {"rule": 1}, {"0": 2}, {"-1": 2}, {"\u0661": 2}),
    *({"0": 2, "00": 3}, {"__class__": 1, "self": 2, "model_config": 3}, [[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]),
    *(datetime.date(2024, 2, 29), datetime.time(1, 2), datetime.datetime(1, 1, 1)),
]  # fmt: skip
REAL = [
    *(
        "seed",
        "name",
        "train.steps",
        "train.epochs",
        "train.evaluate_every.steps",
        "strategy",
        "strategy.name",
    ),
    *(
        "phases",
        "phases.0.strategy.name",
        "phases.0.until.epochs",
        "phases.1.enter.momentum",
        "strategy.until",
        "strategy.until.threshold",
        "strategy.first.name",
        "strategy.then.servers",
        "strategy.enter.ramp",
        "optimizer.name",
        "optimizer.lr",
        "model.hidden",
    ),
    *(
        "model",
        "optimizer.schedule",
        "optimizer.schedule.warmup",
        "data.augment",
        "data.augment.0",
        "debug.slow.1",
    ),
]
KEYS = [
    "",
    " ",
    "a b",
    "name",
    "self",
    "cls",
    "__init__",
    "_object",
    "options",
    "model_fields",
    "x.y",
    "é",
    "\0",
    "0",
]


def containers(value: Any) -> list[Any]:
    """Every table and list in `value`."""
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    here = [value] if isinstance(value, (dict, list)) else []
    return here + [found for item in items for found in containers(item)]


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def mutate(job: dict[str, Any], dice: random.Random) -> None:
    """One random change: another value, or a key added, removed, renamed or moved."""
    place = dice.choice(containers(job))
    value = copied(dice.choice([*ODD, dice.choice(containers(FULL)), dice.randint(-5, 5), dice.uniform(-2, 2)]))
    if isinstance(place, list):
        place.insert(dice.randint(0, len(place)), value)
        return
    key = dice.choice([*place, dice.choice(KEYS)])
    change = dice.choice(["value", "value", "value", "remove", "rename", "move", "add"])
    if change == "value":
        place[key] = value
    elif change == "add":
        place[dice.choice(KEYS)] = value
    elif key in place:
        taken = place.pop(key)
        if change == "rename":
            place[key[1:] + dice.choice("xyz")] = taken
        elif change == "move":
            target = dice.choice([found for found in containers(job) if isinstance(found, dict)])
            target[key] = copied(taken)


def broken_text(text: str, dice: random.Random) -> bytes:
    """A few bytes of the file changed, removed or doubled."""
    content = bytearray(text.encode())
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(content))
        end = at + dice.randint(1, 12)
        content[at:end] = dice.choice(
            [b"", bytes([dice.randrange(256)]), content[at:end] * 2, b"[", b'"', b"\n", b"=", b"."]
        )
    return bytes(content)


def accepted(file: Path, overrides: list[str]) -> bool:
    """Whether the file is a job; any failure other than a message fails the test."""
    try:
        job = Job.load(file, overrides)
        check_ranks(job, 4)
    except (JobError, ClusterError) as error:
        lines = str(error).splitlines()
        assert 1 <= len(lines) <= 11
        assert all(0 < len(line) < 900 and line.isprintable() for line in lines), lines
        assert "validation error" not in str(error) and "pydantic.dev" not in str(error)
        return False
    file.write_text(job.dump(), encoding="utf-8")
    assert Job.load(file) == job
    return True


@pytest.mark.parametrize("part", mostly_slow(range(4), (0,)))
def test_fuzzed_job_files(tmp_path: Path, part: int) -> None:
    dice, count = random.Random(part), 0
    for _ in range(FILES // 4):
        job = {**copied(FULL), **copied(dice.choice(STRATEGIES))}
        for _ in range(dice.choice([1, 1, 2, 5])):
            mutate(job, dice)
        text = tomli_w.dumps(job)
        content = broken_text(text, dice) if dice.random() < 0.3 else text.encode()
        file = tmp_path / "job.toml"
        file.write_bytes(content)
        count += accepted(file, [])
    assert FILES // 40 < count < FILES // 5  # neither everything passes nor nothing


def test_fuzzed_overrides(tmp_path: Path) -> None:
    dice, count = random.Random(5), 0
    file = tmp_path / "base.toml"
    for _ in range(500):
        job = {**copied(FULL), **copied(dice.choice(STRATEGIES))}
        file.write_text(tomli_w.dumps(job), encoding="utf-8")
        words = [
            "train",
            "steps",
            "phases",
            "0",
            "1",
            "strategy",
            "name",
            "until",
            "model",
            "optimizer",
            "schedule",
        ]
        words += [
            "debug",
            "slow",
            "data",
            "augment",
            "seed",
            "x",
            "",
            "'",
            "epochs",
            "rule",
            "servers",
            "first",
            "then",
            "enter",
            "-1",
            "9" * 30,
        ]
        overrides = []
        for _ in range(dice.randint(1, 3)):
            key = dice.choice([".".join(dice.choices(words, k=dice.randint(1, 4))), dice.choice(REAL)])
            overrides.append(key + dice.choice(["=", "=", "=", ""]) + override_value(dice))
        count += accepted(file, overrides)
    assert count > 5  # not everything is refused


def override_value(dice: random.Random) -> str:
    plain = [
        "default",
        "1",
        "0.5",
        "adam",
        "all_reduce",
        "switch",
        "loss_stable",
        "{rule='after', steps=3}",
        "[",
        "{}",
        "[1,2]",
        "{epochs=1}",
        "\n[x]\ny=1",
        "1\nz=2",
        "\udcff",
    ]
    return dice.choice([*plain, str(dice.choice([odd for odd in ODD if odd != 10**400]))])


def test_fuzzed_python_arguments() -> None:
    dice = random.Random(6)
    things: list[Any] = [
        *ODD,
        None,
        object(),
        int,
        print,
        lambda: 0,
        (1, 2),
        {1: 2},
        b"bytes",
        1j,
        {1, 2},
        Job(),
        Job,
    ]
    for _ in range(1000):
        keys = {dice.choice([*FULL, "strategy", "phases"]): dice.choice(things) for _ in range(dice.randint(1, 3))}
        if dice.random() < 0.5:
            keys["model"] = {"name": dice.choice(things), "x": dice.choice(things)}
        try:
            Job(**keys)
        except JobError as error:
            assert str(error)
