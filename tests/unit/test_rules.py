"""Rules that end phases: when they fire, what they report, and how they are resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.clock.decisions import Ask, Conductor
from hpctrain.clock.rules import Rule
from hpctrain.clock.samples import RunClock
from hpctrain.errors import JobError
from hpctrain.job import Job
from hpctrain.job.phases import RuleSpec
from hpctrain.trace.events import Event

CLOCK = RunClock(epoch=100, round=10, total=10_000)
HERE = __name__


def rule(keys: dict[str, Any], clock: RunClock = CLOCK, start: int = 0) -> Rule:
    """The rule as a job's phase creates it."""
    spec = RuleSpec.model_validate(keys)
    made: Rule = spec.resolve()(spec.options, clock, start)
    return made


def losses_of(intervals: Sequence[float], rounds: int = 10) -> list[float]:
    return [loss for loss in intervals for _ in range(rounds)]


def observed(
    made: Rule, losses: Sequence[float], samples: int = 10, start: int = 0
) -> tuple[int, str | None, list[str]]:
    """(number of losses until it fired, its reason or None, its news)."""
    news = []
    for index, loss in enumerate(losses):
        why = made.observe(start + (index + 1) * samples, loss)
        if made.news is not None:
            news.append(str(made.news))
            made.news = None
        if why is not None:
            return index + 1, why, news
    return len(losses), None, news


FALLING = [2.0, 1.5, 1.0, 0.6, 0.5, 0.49, 0.48, 0.47, 0.46, 0.45, 0.44, 0.43]


# -- loss_stable ------------------------------------------------------------------------------------------------
def test_loss_stable_fires_when_the_mean_change_is_small() -> None:
    steps, why, news = observed(rule({"rule": "loss_stable"}), losses_of(FALLING))
    # changes of 0.01 over the six newest, of the first loss 2: 0.0050; one interval sooner (0.1 + 5 * 0.01) / 6 / 2
    assert (steps, why) == (110, "loss_stable 0.0050 <= 0.01")
    assert news == [
        "loss_stable 0.1267 > 0.01",
        "loss_stable 0.0858 > 0.01",
        "loss_stable 0.0450 > 0.01",
        "loss_stable 0.0125 > 0.01",
        "loss_stable 0.0050 <= 0.01",
    ]


def test_statistic_is_the_mean_change_over_the_first_loss() -> None:
    losses = [4.0, 1.0, 1.5, 1.25]
    _, why, news = observed(rule({"rule": "loss_stable", "window": 3, "rounds": 1}), losses)
    assert (why, news) == (None, ["loss_stable 0.3125 > 0.01"])  # (3 + 0.5 + 0.25) / 3 / 4


def test_plateau_at_the_start_does_not_end_the_phase() -> None:
    plateau = [2.3] * 9
    _, why, news = observed(rule({"rule": "loss_stable"}), losses_of(plateau))
    assert why is None and news[0] == "loss_stable 0 <= 0.01, not armed: loss 2.3 of first 2.3"
    assert observed(rule({"rule": "loss_stable", "armed": 2.0}), losses_of(plateau))[1] == "loss_stable 0 <= 0.01"
    fall = [*plateau, 1.0, *[1.2] * 7]  # once armed it stays armed
    assert observed(rule({"rule": "loss_stable"}), losses_of(fall))[:2] == (170, "loss_stable 0 <= 0.01")


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({}, 110),
        ({"threshold": 0.02}, 100),
        ({"window": 4}, 90),
        ({"rounds": 5, "threshold": 0.011}, 65),
        ({"armed": 0.2175}, 120),
        ({"threshold": 0.0}, None),
    ],
)
def test_every_number_is_a_key(keys: dict[str, Any], steps: int | None) -> None:
    found, why, _ = observed(rule({"rule": "loss_stable", **keys}), losses_of(FALLING))
    assert (found if why else None) == steps


def test_losses_are_weighted_by_samples() -> None:
    """The last round of an epoch is smaller."""
    made = rule({"rule": "loss_stable_published", "window": 2, "rounds": 2}, RunClock(epoch=15, round=10, total=999))
    for cursor, loss in ((10, 1.0), (15, 4.0), (25, 2.0), (30, 2.0)):
        made.observe(cursor, loss)
    assert made.state()["losses"] == [2.0, 2.0]  # (10 * 1 + 5 * 4) / 15


def test_asynchronous_interval_has_one_update_per_batch_of_its_rounds() -> None:
    """Four workers, batches of 5: a round of 20 samples is four updates, from any workers."""
    clock = RunClock(epoch=10_000, round=20, total=10_000)
    rounds = losses_of(FALLING)
    updates = [loss + extra for loss in rounds for extra in (-0.1, 0.1, -0.05, 0.05)]
    steps, why, _ = observed(rule({"rule": "loss_stable"}, clock), updates, samples=5)
    assert (steps, why) == (4 * 110, "loss_stable 0.0050 <= 0.01")


def test_rounds_are_counted_from_the_start_of_the_phase() -> None:
    start = 50  # the fifth round of an epoch
    steps, why, _ = observed(rule({"rule": "loss_stable"}, start=start), losses_of(FALLING), start=start)
    assert (steps, why) == (110, "loss_stable 0.0050 <= 0.01")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("name", ["loss_stable", "loss_stable_published"])
def test_skipped_steps_do_not_count(name: str, bad: float) -> None:
    clean = observed(rule({"rule": name, "rounds": 10, "threshold": 0.02}), losses_of(FALLING))
    losses = losses_of(FALLING)
    for index in (0, 13, 14, 55, 101):
        losses[index] = bad
    assert observed(rule({"rule": name, "rounds": 10, "threshold": 0.02}), losses) == clean
    losses[20:30] = [bad] * 10  # an interval without losses does not count
    without = observed(rule({"rule": name, "rounds": 10, "threshold": 0.02}), losses_of(FALLING[:2] + FALLING[3:]))
    assert observed(rule({"rule": name, "rounds": 10, "threshold": 0.02}), losses)[1:] == without[1:]


def test_negative_losses_never_arm_the_rule_with_a_note() -> None:
    _, why, news = observed(rule({"rule": "loss_stable"}), losses_of([-1.0 - i for i in range(3)] + [-4.0] * 9))
    assert why is None and news[-1] == "loss_stable 0 <= 0.01, never armed: the first loss, -1, is negative"


# -- loss_stable_published --------------------------------------------------------------------------------------
def test_published_rule_fires_on_the_first_plateau() -> None:
    steps, why, _ = observed(rule({"rule": "loss_stable_published"}), [2.30, 2.31, 2.30, 2.29, 2.30, 2.31])
    assert (steps, why) == (6, "loss_stable_published 0.0043 <= 0.01")


def test_published_statistic_is_relative_to_the_previous_loss() -> None:
    _, why, news = observed(rule({"rule": "loss_stable_published", "window": 3}), [4.0, 2.0, 3.0])
    assert (why, news) == (None, ["loss_stable_published 0.5000 > 0.01"])  # 2/4 and 1/2


# -- target -----------------------------------------------------------------------------------------------------
def test_target_ends_the_phase_at_the_evaluation_that_reaches_it() -> None:
    reported: list[Event] = []
    conductor = Conductor(1000, 10, 0, rule({"rule": "target", "metric": 0.9}), notify=reported.append)
    assert conductor.decide(0, 10, 0.1, Ask.NOTHING) == Ask.EVALUATE and reported == []
    assert conductor.evaluated(10, 0.89) == Ask.NOTHING
    assert conductor.evaluated(10, math.nan) == Ask.NOTHING
    assert conductor.evaluated(10, 0.9) == Ask.END_PHASE and conductor.why == "target: metric 0.9000 >= 0.9"
    assert list(map(str, reported)) == [
        "target: metric 0.8900 < 0.9",
        "target: metric nan against 0.9",
        "target: metric 0.9000 >= 0.9",
    ]


def test_target_for_a_lower_is_better_metric() -> None:
    conductor = Conductor(1000, 10, 0, rule({"rule": "target", "metric": 0.5}), higher_is_better=False)
    assert conductor.evaluated(10, 0.51) == Ask.NOTHING
    assert conductor.evaluated(10, 0.5) == Ask.END_PHASE and conductor.why == "target: metric 0.5000 <= 0.5"


# -- functions --------------------------------------------------------------------------------------------------
def under(losses: list[float], limit: float = 0.55) -> bool:
    return losses[-1] < limit


def in_words(losses: list[float], *, at_least: int) -> str:
    return f"enough of {losses[0]:g}" if len(losses) >= at_least else ""


def broken(losses: list[float]) -> bool:
    return losses[10] < 1


def test_function_ends_the_phase_by_interval_losses() -> None:
    steps, why, _ = observed(rule({"rule": f"{HERE}:under"}), losses_of(FALLING))
    assert (steps, why) == (50, f"{HERE}:under after 5 intervals: True")
    assert observed(rule({"rule": f"{HERE}:under", "limit": 0.47}), losses_of(FALLING))[0] == 90
    steps, why, _ = observed(rule({"rule": f"{HERE}:in_words", "at_least": 3}), losses_of(FALLING))
    assert (steps, why) == (30, "enough of 2")


def test_error_in_a_function_is_one_message() -> None:
    with pytest.raises(JobError) as caught:
        observed(rule({"rule": f"{HERE}:broken"}), losses_of(FALLING))
    assert str(caught.value).startswith(f'rule "{HERE}:broken" raised IndexError at test_rules.py:')
    assert "after 1 intervals of 10 rounds: list index out of range; it is called with" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"limt": 3}, "has no keyword limt (did you mean limit?); it takes limit"),
        ({"losses": [1]}, "has no keyword losses"),
    ],
)
def test_function_not_accepting_the_keys_is_refused(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(JobError) as caught:
        Job(phases=[{"until": {"rule": f"{HERE}:under", **keys}}, {}])
    assert str(caught.value).startswith(f'phases.0.until.rule = "{HERE}:under": {sentence}')
    with pytest.raises(JobError, match=r"^strategy.until.rule = .*missing a required.* argument: 'at_least'"):
        Job(strategy={"name": "switch", "until": f"{HERE}:in_words"})


def test_function_of_the_main_program_is_kept() -> None:
    job = Job(strategy={"name": "switch", "until": {"rule": lambda losses, n=2: len(losses) >= n, "n": 4}})
    spec = job.override(["seed=3"]).schedule[0].until
    assert spec is not None and spec.name.startswith("<lambda in test_rules.py:")
    assert observed(spec.resolve()(spec.options, CLOCK, 0), losses_of(FALLING))[0] == 40


# -- phases too short for a rule --------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("keys", "rounds", "sentence"),
    [
        (
            {"rule": "loss_stable", "threshold": 9.0, "armed": 2.0},
            70,
            "takes 70 rounds, but no more than 70 remain when the phase starts; lower window (now 6) or rounds",
        ),
        (
            {"rule": "loss_stable", "window": 2, "rounds": 3, "threshold": 9.0},
            9,
            "takes 9 rounds, but no more than 9 remain when the phase starts",
        ),
        ({"rule": "loss_stable_published", "threshold": 9.0}, 6, "takes 6 rounds, but no more than 6"),
        ({"rule": f"{HERE}:under"}, 10, "called every 10 rounds, but no more than 10 remain when the phase starts"),
    ],
)
def test_run_too_short_for_one_window_is_reported(keys: dict[str, Any], rounds: int, sentence: str) -> None:
    short = rule(keys, RunClock(100, 10, rounds * 10))
    assert short.unfit(False) is None  # reported, not refused: the run may only have been shortened
    assert sentence in (short.too_short() or "")
    assert sentence.split(",")[0] in (rule(keys, RunClock(100, 10, (rounds + 3) * 10), start=30).too_short() or "")
    enough = RunClock(100, 10, (rounds + 1) * 10)
    assert rule(keys, enough).too_short() is None
    conductor = Conductor(enough.total, 0, 0, rule(keys, enough))  # one more round is enough
    asks = [conductor.decide(i * 10, i * 10 + 10, 0.1 if i else 1.0, Ask.NOTHING) for i in range(rounds + 1)]
    assert any(ask & Ask.END_PHASE for ask in asks)


def test_target_needs_evaluations() -> None:
    made = rule({"rule": "target", "metric": 0.9})
    assert made.unfit(True) is None
    assert "hold samples back with data.validation" in (made.unfit(False) or "")
    assert rule({"rule": "after", "steps": 3}).unfit(False) is None


def test_amount_beyond_the_run_is_reported() -> None:
    short = rule({"rule": "after", "epochs": 2}, RunClock(100, 10, 200))
    assert short.too_short() == "it ends a phase at sample 200 at the earliest, and the run has 200"
    assert rule({"rule": "after", "epochs": 2}, RunClock(100, 10, 201)).too_short() is None


# -- resuming ---------------------------------------------------------------------------------------------------
LOSS = st.one_of(st.floats(0.01, 3), st.sampled_from([0.0, math.nan, math.inf]))
KEYS: list[dict[str, Any]] = [
    {"rule": "loss_stable", "window": 2, "rounds": 3, "threshold": 0.2, "armed": 0.9},
    {"rule": "loss_stable_published", "window": 3, "rounds": 2, "threshold": 0.3},
    {"rule": f"{HERE}:under", "limit": 0.8},
    {"rule": "after", "steps": 9},
    {"rule": "target", "metric": 0.9},
]


def story(keys: dict[str, Any], losses: Sequence[float], size: int, cut: int | None) -> list[Any]:
    """A rule's news for each loss, and its final state; interrupted at `cut`."""
    made, found = rule(keys, start=40), []
    for index, loss in enumerate(losses):
        if index == cut:
            kept = json.loads(json.dumps(made.state(), allow_nan=False))
            made = rule(keys, start=40)
            made.load(kept)
        found.append((made.observe(40 + (index + 1) * size, loss), made.news))
        made.news = None
    return [*found, made.state()]


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: str(keys["rule"]).split(":")[-1])
@given(losses=st.lists(LOSS, min_size=1, max_size=60), cut=st.integers(0, 60), size=st.sampled_from([3, 10]))
def test_resumed_rule_continues_like_an_uninterrupted_one(
    keys: dict[str, Any], losses: list[float], cut: int, size: int
) -> None:
    assert story(keys, losses, size, cut) == story(keys, losses, size, None)


@pytest.mark.parametrize("keys", KEYS, ids=lambda keys: str(keys["rule"]).split(":")[-1])
def test_rule_can_be_interrupted_at_any_step(keys: dict[str, Any]) -> None:
    losses = [2 + math.sin(i * i) for i in range(12)] + [1.1, 0.7] + [1.9 + 0.1 * math.sin(i) for i in range(40)]
    for size in (3, 10):
        whole = story(keys, losses, size, None)
        for cut in range(len(losses)):
            assert story(keys, losses, size, cut) == whole
