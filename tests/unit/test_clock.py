"""The clock of a run, the rules that end phases, and everything timed by samples."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from hpctrain.clock.decisions import Ask, Conductor, EarlyStopping
from hpctrain.clock.rates import FunctionCourse, Pace, constant, cosine, linear, step
from hpctrain.clock.rules import After, AfterOptions, Rule
from hpctrain.clock.samples import Every, RunClock, interval, run_total
from hpctrain.data.order import round_bounds
from hpctrain.errors import JobError
from hpctrain.job import Amount, Job
from hpctrain.trace.events import Event, RuleStatistic


def cursors(epoch: int, round_size: int, start: int, count: int) -> list[int]:
    """The ends of `count` rounds from `start` on, as in the trainer."""
    found = []
    for _ in range(count):
        start = round_bounds(start, epoch, round_size, 1)[-1]
        found.append(start)
    return found


CLOCK = RunClock(epoch=100, round=32, total=1000)


@pytest.mark.parametrize(
    ("amount", "samples"),
    [
        (Amount(epochs=1), 100),
        (Amount(epochs=0.25), 25),
        (Amount(epochs=1e-9), 1),
        (Amount(samples=7), 7),
        (Amount(fraction=0.07), 70),
        (Amount(fraction=0.0701), 71),
        (Amount(fraction=1), 1000),
        (Amount(steps=1), 32),
        (Amount(steps=3), 96),
        (Amount(steps=4), 100),
        (Amount(steps=5), 132),
        (Amount(steps=8), 200),
    ],
)
def test_amounts_in_samples(amount: Amount, samples: int) -> None:
    assert CLOCK.samples(amount) == samples


def test_rounding_errors_do_not_round_fractions_up() -> None:
    for percent in range(1, 101):
        assert RunClock(1, 1, 100).samples(Amount(fraction=percent / 100)) == percent


SIZES = st.integers(1, 60)


@given(SIZES, SIZES, st.integers(0, 200), st.integers(1, 30))
def test_steps_across_uneven_epochs(epoch: int, size: int, start: int, count: int) -> None:
    clock = RunClock(epoch, size, 0)
    ends = cursors(epoch, size, start, count)
    assert clock.until(start, Amount(steps=count)) == ends[-1]
    assert clock.until(start, Amount(samples=count)) == start + count
    if start == 0:
        assert [clock.rounds(end) for end in ends] == list(range(1, count + 1))
        assert run_total(Job(train={"steps": count}).train, epoch, size) == ends[-1]


def test_round_ends_when_its_last_sample_is_consumed() -> None:
    """Asynchronous updates end within rounds."""
    assert [CLOCK.rounds(cursor) for cursor in (0, 31, 32, 33, 96, 99, 100, 131, 132)] == [0, 0, 1, 1, 3, 3, 4, 4, 5]
    assert [CLOCK.round_end(rounds) for rounds in (1, 3, 4, 5)] == [32, 96, 100, 132]


def test_totals() -> None:
    assert run_total(Job(train={"epochs": 2.5}).train, 100, 32) == 250
    assert run_total(Job(train={"epochs": 0.001}).train, 100, 32) == 1
    assert run_total(Job(train={"steps": 5}).train, 100, 32) == 132


# -- rules ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "start", "ends"),
    [
        ({"steps": 3}, 0, 96),
        ({"steps": 4}, 0, 100),
        ({"steps": 3}, 64, 132),  # 96, 100, 132
        ({"steps": 2}, 96, 132),
        ({"epochs": 1}, 64, 164),
        ({"samples": 50}, 0, 64),
        ({"fraction": 0.1}, 32, 132),
    ],
)
def test_after(options: dict[str, Any], start: int, ends: int) -> None:
    rule = After(AfterOptions.model_validate(options), CLOCK, start)
    for cursor in cursors(100, 32, start, 20):
        why = rule.observe(cursor, 1.0)
        assert (why is not None) == (cursor >= ends)
        if why is not None:
            assert why == f"after {cursor - start} >= {CLOCK.until(start, rule.options) - start} samples"
    assert rule.state() == {}
    rule.load({})


def test_after_needs_exactly_one_amount() -> None:
    for keys in ({}, {"steps": 1, "epochs": 1.0}):
        with pytest.raises(ValidationError, match="exactly one"):
            AfterOptions.model_validate(keys)
    for bad in ({"steps": 0}, {"fraction": 1.5}, {"epochs": -1.0}, {"samples": 1.5}):
        with pytest.raises(ValidationError):
            AfterOptions.model_validate(bad)


# -- decisions ------------------------------------------------------------------------------------------------
def decisions(conductor: Conductor, start: int = 0, count: int = 12) -> dict[int, Ask]:
    found, before = {}, start
    for cursor in cursors(100, 32, start, count):
        found[cursor] = conductor.decide(before, cursor, 0.5, Ask.NOTHING)
        before = cursor
    return found


def asked(found: dict[int, Ask], what: Ask) -> list[int]:
    return [cursor for cursor, ask in found.items() if ask & what]


def test_conductor_by_samples() -> None:
    found = decisions(Conductor(300, 100, 150, None))
    assert asked(found, Ask.EVALUATE) == [100, 200, 300]
    assert asked(found, Ask.CHECKPOINT) == [164, 300]
    assert asked(found, Ask.STOP) == [300]
    assert asked(decisions(Conductor(10**6, 0, 0, None)), Ask(31)) == []
    assert asked(decisions(Conductor(300, 1000, 0, None)), Ask.EVALUATE) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_conductor_by_rounds(steps: int) -> None:
    """Counted in rounds, although the last round of an epoch has fewer samples."""
    found = decisions(Conductor(10**6, interval(CLOCK, Amount(steps=steps)), 0, None))
    assert asked(found, Ask.EVALUATE) == list(found)[steps - 1 :: steps]


def test_intervals() -> None:
    assert interval(CLOCK, Amount(epochs=2)) == 200
    assert interval(CLOCK, Amount(steps=2)) == Every(CLOCK, 2)


@given(SIZES, SIZES, st.integers(1, 200), st.integers(0, 300))
def test_no_mark_is_skipped(epoch: int, size: int, every: int, start: int) -> None:
    """However the run is split into steps, there is one evaluation per mark with a step in between."""
    conductor = Conductor(10**9, every, every, None)
    before = start
    for cursor in cursors(epoch, size, start, 20):
        marks = [mark for mark in range(before + 1, cursor + 1) if mark % every == 0]
        assert bool(conductor.decide(before, cursor, 0.0, Ask.NOTHING) & Ask.EVALUATE) == bool(marks)
        before = cursor


def test_conductor_ends_phases() -> None:
    conductor = Conductor(1000, 0, 0, After(AfterOptions.model_validate({"steps": 2}), CLOCK, 64))
    found = decisions(conductor, start=64, count=3)
    assert found == {96: Ask.NOTHING, 100: Ask.END_PHASE, 132: Ask.END_PHASE}
    assert conductor.why == "after 68 >= 36 samples"


def test_the_run_ends_before_the_phase() -> None:
    conductor = Conductor(64, 0, 0, After(AfterOptions.model_validate({"steps": 2}), CLOCK, 0))
    assert decisions(conductor, count=2) == {32: Ask.NOTHING, 64: Ask.STOP}
    assert conductor.why == ""


def test_conductor_grants_wishes() -> None:
    conductor = Conductor(1000, 32, 0, None)
    assert conductor.decide(0, 32, 0.0, Ask.INTERRUPT) == Ask.INTERRUPT | Ask.EVALUATE


@given(
    SIZES,
    SIZES,
    st.integers(0, 200),
    st.integers(1, 300),
    st.one_of(st.integers(0, 90), st.integers(1, 9).map(lambda steps: (steps,))),
    st.one_of(st.integers(0, 90), st.integers(1, 9).map(lambda steps: (steps,))),
    st.sampled_from([None, {"steps": 3}, {"samples": 40}, {"epochs": 0.7}, {"fraction": 0.2}]),
    st.integers(0, 60),
)
def test_due_is_the_next_position_with_a_request(
    epoch: int, size: int, cursor: int, total: int, evaluate: Any, checkpoint: Any, after: Any, start: int
) -> None:
    clock = RunClock(epoch, size, total)
    rule = After(AfterOptions.model_validate(after), clock, min(start, cursor)) if after else None
    marks = [Every(clock, *unit) if isinstance(unit, tuple) else unit for unit in (evaluate, checkpoint)]
    conductor = Conductor(total, marks[0], marks[1], rule)
    nearest = cursor + 1
    while not conductor.decide(cursor, nearest, 0.5, Ask.NOTHING):
        nearest += 1
    assert conductor.due(cursor) == nearest


class Talkative(Rule):
    """Has news in every step, and ends the phase at a loss or a metric below 0."""

    def observe(self, cursor: int, loss: float) -> str | None:
        self.news = RuleStatistic("talkative", loss, "against", 0.0)
        return "seen enough" if loss < 0 else None

    def evaluated(self, cursor: int, metric: float, higher_is_better: bool) -> str | None:
        return f"metric {metric:g}, {higher_is_better}" if metric < 0 else None


def test_news_of_a_rule_is_reported_once() -> None:
    reported: list[Event] = []
    conductor = Conductor(1000, 0, 0, Talkative(None, CLOCK, 0), notify=reported.append)
    assert conductor.decide(0, 32, 1.0, Ask.NOTHING) == Ask.NOTHING
    assert conductor.evaluated(32, 1.0) == Ask.NOTHING
    assert conductor.decide(32, 64, -1.0, Ask.NOTHING) == Ask.END_PHASE and conductor.why == "seen enough"
    assert reported == [RuleStatistic("talkative", loss, "against", 0.0) for loss in (1.0, -1.0)]


def test_rule_may_end_the_phase_after_an_evaluation() -> None:
    conductor = Conductor(1000, 0, 0, Talkative(None, CLOCK, 0), higher_is_better=False)
    assert conductor.evaluated(32, -1.0) == Ask.END_PHASE and conductor.why == "metric -1, False"
    assert Conductor(1000, 0, 0, None).evaluated(32, -1.0) == Ask.NOTHING


# -- stopping -------------------------------------------------------------------------------------------------
def test_target() -> None:
    progress = EarlyStopping(0.9, None, 0.0)
    assert progress.judge(0.89) is None
    assert progress.judge(0.9) == "target 0.9 reached: 0.9000"
    lower = EarlyStopping(0.5, None, 0.0, higher_is_better=False)
    assert lower.judge(0.6) is None
    assert lower.judge(0.4) is not None


def test_patience_and_min_delta() -> None:
    progress = EarlyStopping(None, 2, 0.1)
    assert [progress.judge(value) is None for value in (0.5, 0.55, 0.65, 0.7, 0.74)] == [True, True, True, True, False]
    assert (progress.best, progress.waited) == (0.65, 2)
    lower = EarlyStopping(None, 1, 0.0, higher_is_better=False)
    assert [lower.judge(value) is None for value in (0.5, 0.4, 0.4)] == [True, True, False]


def test_progress_survives_a_checkpoint() -> None:
    progress = EarlyStopping(0.9, 3, 0.1)
    progress.judge(0.5)
    progress.judge(0.5)
    assert EarlyStopping(**vars(progress)) == progress


def test_nan_metric_never_improves() -> None:
    progress = EarlyStopping(0.9, 2, 0.0)
    assert progress.judge(0.5) is None
    assert progress.judge(math.nan) is None
    assert progress.judge(math.nan) is not None
    assert progress.best == 0.5


def test_nan_as_the_first_metric() -> None:
    progress = EarlyStopping(None, 2, 0.0)
    assert progress.judge(math.nan) is None
    assert progress.judge(0.5) is None
    assert progress.best == 0.5


# -- the learning rate ----------------------------------------------------------------------------------------
def test_courses() -> None:
    assert [constant(x) for x in (0, 0.5, 1)] == [1, 1, 1]
    assert [linear(x, end=0.2) for x in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])
    assert [cosine(x, end=0.2) for x in (0, 0.5, 1)] == pytest.approx([1, 0.6, 0.2])
    assert [step(x, gamma=0.5, every=0.25) for x in (0, 0.24, 0.25, 0.5, 1)] == [1, 1, 0.5, 0.25, 0.0625]
    assert [step(n / 3) for n in range(4)] == pytest.approx([1, 0.1, 0.01, 0.001])


def test_warmup_then_course() -> None:
    course = FunctionCourse(linear, {}, warmup=4, total=14)
    assert [course.factor(cursor) for cursor in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [course.factor(cursor) for cursor in (4, 9, 14, 20)] == pytest.approx([1, 0.5, 0, 0])
    assert FunctionCourse(linear, {}, warmup=20, total=10).factor(9) == pytest.approx(10 / 21)
    assert FunctionCourse(linear, {}, warmup=10, total=10).factor(10) == 1


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (step, {"every": 0}, "optimizer.schedule: .*zero"),
        (linear, {"end": "low"}, "check the keys"),
        (linear, {"stop": 1}, "stop"),
        (lambda progress: -progress, {}, "at 25% of the run is -0.25; expected"),
        (lambda progress: math.nan, {}, "at 0% of the run is nan"),
        (lambda progress: None, {}, "optimizer.schedule"),
    ],
)
def test_refused_courses(function: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(JobError, match=message):
        FunctionCourse(function, options, 0, 100)


# -- how a phase begins ---------------------------------------------------------------------------------------
COURSE = FunctionCourse(linear, {}, warmup=10, total=110)


def pace(learning_rate: str, momentum: str = "keep", ramp: int = 0) -> Pace:
    """The pace of a phase that begins at 60 of 110 samples."""
    return Pace(COURSE, 60, learning_rate, momentum, scale=0.25, ramp=ramp)


def test_course_continues_or_is_scaled() -> None:
    assert [pace("auto").rate(cursor) for cursor in (60, 85, 110)] == pytest.approx([0.5, 0.25, 0])
    assert [pace("keep").rate(cursor) for cursor in (60, 85, 110)] == pytest.approx([0.5, 0.25, 0])
    assert [pace("scale").rate(cursor) for cursor in (60, 85, 110)] == pytest.approx([0.125, 0.0625, 0])


def test_course_restarts_over_the_remaining_samples() -> None:
    """Its warm-up too: 10 of 110 samples become 5 of 50."""
    found = [pace("reset").rate(cursor) for cursor in (60, 62, 65, 110)]
    assert found == pytest.approx([1 / 6, 3 / 6, 1, 0])
    whole = Pace(COURSE, 0, "reset", "keep", 1.0, 0)
    assert [whole.rate(cursor) for cursor in range(111)] == [COURSE.factor(cursor) for cursor in range(111)]
    assert Pace(COURSE, 110, "reset", "keep", 1.0, 0).rate(110) >= 0


def test_ramp_rises_to_the_course_and_is_never_zero() -> None:
    rates = [pace("ramp", ramp=4).rate(cursor) / COURSE.factor(cursor) for cursor in range(60, 66)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert pace("ramp").rate(60) == 0.5


def test_momentum() -> None:
    cursors = (60, 62, 64, 99)
    for policy, factors in {
        "keep": [1.0, 1.0, 1.0, 1.0],
        "reset": [1.0, 1.0, 1.0, 1.0],
        "scale": [0.25, 0.25, 0.25, 0.25],
        "ramp": [0.2, 0.6, 1.0, 1.0],
    }.items():
        found = pace("auto", policy, ramp=4)
        assert [found.momentum_factor(cursor) for cursor in cursors] == pytest.approx(factors)
        assert found.resets == (policy == "reset")
        assert found.rate(60) == 0.5


@pytest.mark.parametrize(
    ("policy", "applies"), [("auto", True), ("keep", False), ("scale", False), ("reset", True), ("ramp", True)]
)
def test_which_policies_scale_the_rate_of_asynchronous_updates(policy: str, applies: bool) -> None:
    assert pace(policy).per_update == applies
