"""Typed events: they round-trip with any strings; unknown events are kept; messages of old versions parse."""

from __future__ import annotations

import json
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.text import escaped
from hpctrain.trace import events
from hpctrain.trace.events import (
    CheckpointWritten,
    DeviceTimesMissing,
    Event,
    Failure,
    LossScaleChanged,
    MeasuredLink,
    PhaseEntered,
    PhaseSwitch,
    PlainEvent,
    RuleStatistic,
    SamplingStopped,
    ShardsSized,
    SharesChanged,
    from_json,
    written,
)
from hpctrain.trace.files import event_of
from hpctrain.trace.versions import parsed

VALUES = {"int": st.integers(0, 2**31), "float": st.floats(), "bool": st.booleans(), "str": st.text(max_size=600)}
# The message of each, and what version 2 wrote for it if its message can be parsed.
SCALED = LossScaleChanged(65536.0, 32768.0, "overflow")  # version 2 had none
WITHOUT_SENTENCE = [
    MeasuredLink(1, True, 1e-6, 2e9),
    SamplingStopped("OSError", "no such file"),
    DeviceTimesMissing(1, "lost"),
]
SHARED = SharesChanged("samples per step", "8 8", "10 6", 1, 1.25, 1.33)
SIZED = ShardsSized("150 50", 2, 1e6, 3e6)
SENTENCES: list[tuple[Event, str]] = [
    (PhaseEntered(3, "server", "parameter_server (async)"), "phase 3: server of parameter_server (async)"),
    (RuleStatistic("loss_stable", 0.0293, "<=", 0.03), "loss_stable 0.0293 <= 0.03"),
    (RuleStatistic("loss_stable", 0.00021, ">", 1e-05), "loss_stable 0.00021 > 1e-05"),
    (
        RuleStatistic("loss_stable", 0.0, "<=", 0.01, unready="not armed: loss 2.3 of first 2.3"),
        "loss_stable 0 <= 0.01, not armed: loss 2.3 of first 2.3",
    ),
    (RuleStatistic("target", 0.975, ">=", 0.97, of="metric"), "target: metric 0.9750 >= 0.97"),
    (PhaseSwitch("after 192 >= 192 samples"), "after 192 >= 192 samples"),
    (CheckpointWritten("000000000096.safetensors"), "000000000096.safetensors"),
    (Failure("ValueError", "no: not this"), "ValueError: no: not this"),
    (PlainEvent("rebalance", "shards moved"), "shards moved"),
]


def test_message_about_the_loss_scale() -> None:
    assert str(SCALED) == "loss scale 65536 -> 32768: overflow"


def test_message_about_shares() -> None:
    why = "rank 1 computed for 1.25 times the mean; 1.33 times as fast is expected"
    assert str(SHARED) == f"samples per step 8 8 -> 10 6: {why}"


def made(kind: type[Event]) -> st.SearchStrategy[Event]:
    return st.builds(kind, **{field.name: VALUES[str(field.type)] for field in fields(kind)})


@pytest.mark.parametrize(
    "event",
    [event for event, _ in SENTENCES]
    + [MeasuredLink(1, True, 1e-6, 2e9), SamplingStopped("A", "b"), DeviceTimesMissing(3, "c"), SCALED, SHARED, SIZED],
)
def test_short_event_round_trips(event: Event) -> None:
    assert event_of(*written(event)) == event


@given(st.one_of([made(kind) for kind in events.KINDS.values()]))
def test_any_event_fits_its_columns_and_keeps_its_kind_and_numbers(event: Event) -> None:
    kind, data = written(event)
    assert len(kind) <= events.KIND_BYTES and len(data) <= events.JSON_BYTES
    found = from_json(kind.decode(), data.decode())
    assert type(found) is type(event)
    for field in fields(event):
        before, after = getattr(event, field.name), getattr(found, field.name)
        if isinstance(before, str):
            shown = escaped(before.encode(errors="replace").decode())
            assert after == shown or shown.startswith(after.removesuffix("…")) or "\\" in shown
        else:
            assert after == before or (math.isnan(after) and math.isnan(before))
    json.loads(data, parse_constant=pytest.fail)  # no NaN, which is not JSON


@given(st.text(), st.text())
def test_any_event_text_in_a_file_is_read(kind: str, text: str) -> None:
    found = from_json(kind, text)
    assert str(found) == escaped(str(found)) and found.kind == escaped(kind)


@pytest.mark.parametrize(
    "data",
    ['{"phase":"3","role":"worker","strategy":"a"}', '{"phase":true,"role":"worker","strategy":"a"}', '{"phase":1}',
     '{"phase":1e3,"role":"a","strategy":"b"}', "[1]", "3", "{", f'{{"phase":{2**70},"role":"a","strategy":"b"}}'],
)  # fmt: skip
def test_wrong_fields_make_a_plain_event(data: str) -> None:
    assert from_json("role", data) == PlainEvent("role", data)


def test_fields_of_a_newer_version_are_ignored() -> None:
    found = from_json("role", '{"phase":1,"role":"worker","strategy":"a","island":7}')
    assert found == PhaseEntered(1, "worker", "a")


def test_unknown_kind_is_kept_unchanged() -> None:
    assert from_json("rewind", '{"to":12}') == PlainEvent("rewind", '{"to":12}')


def test_control_characters_do_not_reach_a_terminal() -> None:
    kind, data = written(PhaseSwitch("\x1b[2J"))
    assert "\x1b" not in str(event_of(kind, data))


@pytest.mark.parametrize(("event", "sentence"), SENTENCES)
def test_messages_of_events_and_those_of_version_2(event: Event, sentence: str) -> None:
    assert str(event) == sentence
    assert parsed(event.kind, sentence) == event


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("role", "phase 999999999999999999999999: worker of x"),
        ("role", "%s{}"),
        ("rule", "saw 3"),
        ("rule", "a b <= c"),
    ],
)
def test_other_messages_of_version_2_are_plain_events(kind: str, text: str) -> None:
    assert parsed(kind, text) == PlainEvent(kind, text)
