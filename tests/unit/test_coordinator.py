"""The coordinator of a parameter server alone: headers in, replies and decisions out. The records on the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.clock.decisions import Ask, Conductor
from hpctrain.clock.rules import Rule
from hpctrain.clock.samples import RunClock
from hpctrain.data.queue import Stretch
from hpctrain.strategies.contribution import Contribution
from hpctrain.strategies.parameter_server.coordinator import (
    ENDS,
    MODES,
    Message,
    Terms,
)
from hpctrain.strategies.parameter_server.options import ParameterServerOptions
from hpctrain.strategies.parameter_server.wire import (
    RESULTS,
    WHY,
    Decision,
    DecisionRecord,
    Header,
    HeaderKind,
    HeaderRecord,
    NotFinite,
    Reply,
    ReplyRecord,
    What,
)

BATCH = 4
NAN = float("nan")
QUEUES = ["shared", "static"]
LEAVE, STATE, WITHDRAW = Header(HeaderKind.LEAVE), Header(HeaderKind.STATE), Header(HeaderKind.WITHDRAW)


def coordinator(mode: str, workers: int = 3, **keys: Any) -> Any:
    """A coordinator for 10,000 samples in epochs of 1,000, without requests before the end. `keys`: options of the
    strategy, and fields of the `Terms`."""
    fields: dict[str, Any] = {
        "conductor": Conductor(10_000, 0, 0, None),
        "cursor": 0,
        "batch": BATCH,
        "nan": "stop",
        "rate": lambda cursor: 1.0,
        "momentum": lambda cursor: 1.0,
        "per_update": lambda staleness: 1.0,
        "queue": "static",
        "epoch": 1000,
        "ahead": 0,
    }
    fields |= {key: keys.pop(key) for key in list(keys) if key in fields}
    options = ParameterServerOptions.model_validate({"mode": mode, **keys})
    return MODES[mode](Terms(workers=workers, options=options, **fields))


def evaluating(every: int, total: int = 10_000) -> Conductor:
    return Conductor(total, every, 0, None)


def step(
    version: int = 0, loss: float = 1.0, samples: int = BATCH, *, end: int = 0, step: int = 0, **part: Any
) -> Header:
    """The header of a gradient computed on that version; `end`: the end of its round."""
    wish = part.pop("wish", Ask.NOTHING)
    contribution = Contribution(samples, float(part.pop("weight", samples)), loss, wish, **part)
    return Header(HeaderKind.STEP, version, end, step, contribution)


def replies(messages: Iterable[Message]) -> list[Reply]:
    return [message for message in messages if isinstance(message, Reply)]


def decisions(messages: Iterable[Message]) -> list[Decision]:
    return [message for message in messages if isinstance(message, Decision)]


def some(message: Any, *names: str) -> tuple[Any, ...]:
    """These fields of a record."""
    return tuple(getattr(message, name) for name in names)


# -- all modes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", list(MODES))
def test_last_worker_to_leave_ends_the_phase(mode: str):
    tested = coordinator(mode)
    assert len(tested.begin(0)) == 3
    assert tested.receive(2, LEAVE, 0) == tested.receive(0, LEAVE, 0) == []
    assert tested.left == {0, 2}
    assert tested.receive(1, LEAVE, 0) == [Decision(What.END)]


@pytest.mark.parametrize("mode", list(MODES))
def test_state_is_requested_from_all_servers(mode: str):
    tested = coordinator(mode)
    tested.begin(0)
    assert tested.receive(0, STATE, 0) == [Decision(What.STATE)]


@pytest.mark.parametrize("mode", list(MODES))
def test_checkpoint_keeps_version_and_dropped_count(mode: str):
    tested = coordinator(mode)
    tested.load({"version": 7.0, "dropped": 2.0, "clip of worker 0": 1.0})
    assert tested.state() == {"version": 7, "dropped": 2}
    assert [reply.version for reply in tested.begin(0)] == [7, 7, 7]


def test_replies_carry_the_reason_a_rule_ended_the_phase():
    class Flat(Rule):
        def observe(self, cursor: int, loss: float) -> str | None:
            return "loss is flat"

    conductor = Conductor(10_000, 0, 0, Flat(None, RunClock(1000, 12, 10_000), 0))
    tested = coordinator("sync", 1, conductor=conductor)
    assert [reply.why for reply in tested.begin(0)] == [""]
    (reply,) = replies(tested.receive(0, step(end=4), 0))
    assert (reply.ask, reply.why) == (Ask.END_PHASE, "loss is flat")


# -- rounds ------------------------------------------------------------------------------------------------------
def test_round_closes_when_all_workers_have_pushed():
    tested = coordinator("sync", rate=lambda cursor: 0.5 + cursor, momentum=lambda cursor: 0.25 + cursor, cursor=12)
    assert tested.begin(0) == [Reply(worker, 12, 0) for worker in range(3)]
    bits = [np.array([True, False, False]), np.array([False, True, False]), np.array([False, True, False])]
    headers = [step(0, 1.0 + worker, end=24, step=9, used=bits[worker]) for worker in range(3)]
    assert tested.receive(2, headers[2], 0) == tested.receive(0, headers[0], 0) == []
    *answers, decision = tested.receive(1, headers[1], 0)
    assert answers == [Reply(worker, 24, 1, result="applied", loss=2.0, samples=12) for worker in range(3)]
    assert some(decision, "what", "take", "give", "version", "step") == (What.UPDATE, (0, 1, 2), (0, 1, 2), 1, 9)
    assert some(decision, "weight", "rate", "momentum", "nan") == (3.0, 12.5, 12.25, None)  # as at its start
    assert decision.used.tolist() == [True, True, False]


def test_requests_after_a_round_go_to_all_workers():
    tested = coordinator("sync", conductor=evaluating(24))
    asked = []
    for number in range(1, 5):
        for worker in range(3):
            wish = Ask.CHECKPOINT if (number, worker) == (3, 1) else Ask.NOTHING
            messages = tested.receive(worker, step(number - 1, end=12 * number, wish=wish), 0)
        asked.append([reply.ask for reply in replies(messages)])
    assert asked == [[Ask.NOTHING] * 3, [Ask.EVALUATE] * 3, [Ask.CHECKPOINT] * 3, [Ask.EVALUATE] * 3]


@pytest.mark.parametrize(("loss", "bad"), [(NAN, 0), (1.0, 2)])
def test_nan_in_a_round_ends_the_phase_on_all_ranks(loss: float, bad: int):
    tested = coordinator("sync")
    tested.receive(0, step(end=12, step=5), 0)
    tested.receive(1, step(0, loss, end=12, step=5, bad=bad), 0)
    *answers, decision, last = tested.receive(2, step(end=12, step=5), 0)
    fault = tested.nan
    assert fault is not None
    assert repr(fault) == repr(NotFinite(1, loss, 5, bad))
    assert [(reply.worker, reply.nan) for reply in answers] == [(0, fault), (1, fault), (2, fault)]
    assert some(decision, "what", "take") == (What.DROP, (0, 1, 2))
    assert last == Decision(What.NAN, nan=fault)
    assert tested.left == {0, 1, 2}


@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_an_overflow_leaves_the_round_out(nan: Any):
    """Under the loss scale it is no error. All workers learn of it, also one that is late."""
    tested = coordinator("sync", nan=nan, backup_workers=1)
    tested.receive(0, step(end=12), 0)
    *answers, decision = tested.receive(1, step(0, bad=-2, end=12), 0)
    assert [(reply.result, reply.overflow, reply.nan) for reply in answers] == [("skipped", True, None)] * 2
    assert some(decision, "what", "take") == (What.DROP, (0, 1))
    late, _ = tested.receive(2, step(0, bad=-2, end=12), 0)
    assert (late.result, late.overflow) == ("dropped", True)
    tested.receive(0, step(1, end=24), 0)
    *answers, decision = tested.receive(1, step(1, end=24), 0)
    assert [(reply.result, reply.overflow) for reply in answers] == [("applied", False)] * 2
    late, _ = tested.receive(2, step(1, bad=-2, end=24), 0)
    assert (late.result, late.overflow) == ("dropped", False)


def test_nan_skip_leaves_the_round_out():
    tested = coordinator("sync", nan="skip")
    tested.receive(0, step(end=12), 0)
    tested.receive(1, step(0, NAN, end=12), 0)
    *answers, decision = tested.receive(2, step(end=12), 0)
    assert [(reply.result, reply.cursor, reply.version, reply.nan) for reply in answers] == [
        ("skipped", 12, 1, None)
    ] * 3
    assert some(decision, "what", "take", "give") == (What.DROP, (0, 1, 2), (0, 1, 2))
    for worker in range(3):
        messages = tested.receive(worker, step(1, end=24), 0)
    assert decisions(messages)[0].what is What.UPDATE


def test_backup_workers_are_not_waited_for_and_late_gradients_are_dropped():
    tested = coordinator("sync", backup_workers=1)
    assert tested.receive(0, step(end=12), 0) == []
    messages = tested.receive(2, step(end=12), 0)
    assert [(reply.worker, reply.result, reply.samples) for reply in replies(messages)] == [
        (0, "applied", 8), (2, "applied", 8)
    ]  # fmt: skip
    assert some(decisions(messages)[0], "what", "take", "give", "weight") == (What.UPDATE, (0, 2), (0, 2), 2.0)
    late, decision = tested.receive(1, step(end=12), 0)
    assert late == Reply(1, 12, 1, result="dropped", samples=BATCH, staleness=1)
    assert decision == Decision(What.DROP, take=(1,), give=(1,))
    assert tested.state() == {"version": 1, "dropped": 1}


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_late_nan_loss_is_ignored(policy: str):
    tested = coordinator("sync", backup_workers=1, nan=policy)
    tested.receive(0, step(end=12), 0)
    tested.receive(2, step(end=12), 0)
    late, _ = tested.receive(1, step(0, NAN, end=12), 0)
    assert (late.result, late.nan) == ("dropped", None)


def test_late_worker_learns_of_the_nan():
    tested = coordinator("sync", backup_workers=1)
    tested.receive(0, step(0, NAN, end=12), 0)
    messages = tested.receive(2, step(end=12), 0)
    assert tested.left == {0, 2}
    assert decisions(messages)[-1].what is What.DROP  # not the end yet
    late, decision, last = tested.receive(1, step(end=12), 0)
    assert (late.worker, late.nan) == (1, tested.nan)
    assert decision == Decision(What.DROP, take=(1,), give=(1,))
    assert last == Decision(What.NAN, nan=tested.nan)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_all_are_dismissed_when_waiting_for_a_withdrawn_worker(first: int):
    tested = coordinator("sync")
    steps: list[tuple[int, Header]] = [(1, step(end=12)), (2, step(end=12))]
    steps.insert(first, (0, WITHDRAW))
    assert [tested.receive(worker, header, 0) for worker, header in steps[:2]] == [[], []]
    *answers, decision = tested.receive(*steps[2], 0)
    assert answers == [Reply(worker, 0, 0, Ask.LEAVE, "dropped") for worker in range(3)]
    assert decision == Decision(What.DROP, take=(1, 2), give=(0, 1, 2), exact=True)


def test_rounds_continue_without_a_withdrawn_backup_worker_until_a_request():
    tested = coordinator("sync", backup_workers=1, conductor=evaluating(24))
    assert tested.receive(1, WITHDRAW, 0) == []
    tested.receive(0, step(end=12), 0)
    assert [reply.ask for reply in replies(tested.receive(2, step(end=12), 0))] == [Ask.NOTHING] * 2
    tested.receive(0, step(1, end=24), 0)
    messages = tested.receive(2, step(1, end=24), 0)
    assert [(reply.worker, reply.ask) for reply in replies(messages)] == [
        (worker, Ask.EVALUATE | Ask.LEAVE) for worker in (1, 0, 2)
    ]  # fmt: skip
    assert some(decisions(messages)[0], "take", "give") == ((0, 2), (0, 2, 1))


def test_round_waits_only_for_the_remaining_workers():
    tested = coordinator("sync", 4, backup_workers=1)
    tested.receive(1, WITHDRAW, 0)
    tested.receive(2, WITHDRAW, 0)
    assert tested.receive(0, step(end=16), 0) == []
    assert some(decisions(tested.receive(3, step(end=16), 0))[0], "what", "take") == (What.UPDATE, (0, 3))


def test_nan_ends_the_phase_on_a_withdrawn_backup_worker_too():
    tested = coordinator("sync", backup_workers=1)
    tested.receive(1, WITHDRAW, 0)
    tested.receive(0, step(end=12), 0)
    messages = tested.receive(2, step(0, NAN, end=12), 0)
    assert [(reply.worker, reply.nan, reply.ask) for reply in replies(messages)] == [
        (worker, tested.nan, Ask.NOTHING) for worker in (1, 0, 2)
    ]
    assert [some(decision, "what", "take", "give") for decision in decisions(messages)] == [
        (What.DROP, (0, 2), (0, 2, 1)), (What.NAN, (), ())
    ]  # fmt: skip


def test_all_workers_withdrawing_are_dismissed():
    tested = coordinator("sync", 2)
    assert tested.receive(0, WITHDRAW, 0) == []
    *answers, decision = tested.receive(1, WITHDRAW, 0)
    assert [reply.ask for reply in answers] == [Ask.LEAVE] * 2
    assert some(decision, "take", "give") == ((), (0, 1))


# -- asynchronous ------------------------------------------------------------------------------------------------
def test_static_queue_deals_each_worker_its_share_of_a_round():
    tested = coordinator("async", cursor=100)
    assert [reply.slices for reply in tested.begin(0)] == [((100, 104),), ((104, 108),), ((108, 112),)]
    assert [reply.slices for reply in replies(tested.receive(1, step(), 0))] == [((116, 120),)]
    assert [reply.slices for reply in replies(tested.receive(1, step(1), 0))] == [((128, 132),)]


def test_shared_queue_deals_the_next_samples_to_the_pushing_worker():
    tested = coordinator("async", queue="shared")
    assert [reply.slices for reply in tested.begin(0)] == [((0, 4),), ((4, 8),), ((8, 12),)]
    assert [reply.slices for reply in replies(tested.receive(1, step(), 0))] == [((12, 16),)]
    assert [reply.slices for reply in replies(tested.receive(1, step(1), 0))] == [((16, 20),)]
    assert [reply.slices for reply in replies(tested.receive(0, step(), 0))] == [((20, 24),)]


@pytest.mark.parametrize("queue", QUEUES)
def test_workers_get_stretches_ahead(queue: str):
    tested = coordinator("async", queue=queue, ahead=2)  # in addition to the next one
    assert [len(reply.slices) for reply in tested.begin(0)] == [3, 3, 3]
    assert [len(reply.slices) for reply in replies(tested.receive(1, step(), 0))] == [1]


def test_every_gradient_is_an_update_as_it_arrives():
    tested = coordinator(
        "async", rate=lambda cursor: 100.0 + cursor, momentum=lambda cursor: 200.0 + cursor,
        per_update=lambda staleness: 2.0**staleness,
    )  # fmt: skip
    tested.begin(0)
    used = np.array([True, False])
    found = [
        tested.receive(2, step(0, 3.0, step=7), 10),
        tested.receive(2, step(1, 5.0, weight=2.0), 11),
        tested.receive(0, step(0, 1.0, 3, used=used), 12),
    ]
    assert [[type(message) for message in messages] for messages in found] == [[Reply, Decision]] * 3
    assert [
        some(reply, "worker", "cursor", "version", "result", "loss", "samples", "staleness", "ask", "held")
        for reply, _ in found
    ] == [
        (2, 4, 1, "applied", 3.0, 4, 0, Ask.NOTHING, 0),
        (2, 8, 2, "applied", 4.0, 4, 0, Ask.NOTHING, 0),  # the mean of as many losses as there are workers
        (0, 11, 3, "applied", 3.0, 3, 2, Ask.NOTHING, 0),
    ]
    names = "what", "take", "give", "version", "step", "weight", "rate", "momentum"
    assert [some(decision, *names) for _, decision in found] == [
        (What.UPDATE, (2,), (2,), 1, 7, 1.0, 100.0, 200.0),
        (What.UPDATE, (2,), (2,), 2, 0, 0.5, 104.0, 204.0),
        (What.UPDATE, (0,), (0,), 3, 0, 0.75, 4 * 108.0, 208.0),
    ]
    assert found[2][1].used is used


@pytest.mark.parametrize("queue", QUEUES)
def test_replies_are_held_back_before_an_evaluation_until_all_have_pushed(queue: str):
    tested = coordinator("async", conductor=evaluating(12), queue=queue)
    tested.begin(0)
    assert tested.receive(1, step(), 1000) == [
        Decision(What.UPDATE, (1,), (), 1, weight=1.0)
    ]  # its gradient is applied, but no parameters are sent
    assert decisions(tested.receive(0, step(), 1500))[0].give == ()
    *answers, decision = tested.receive(2, step(1), 1800)
    found = [(reply.worker, reply.cursor, reply.version, reply.ask, reply.held) for reply in answers]
    assert found == [(worker, 12, 3, Ask.EVALUATE, held) for worker, held in enumerate((300, 800, 0))]
    assert [(reply.samples, reply.staleness) for reply in answers] == [(4, 1), (4, 0), (4, 1)]
    assert [reply.slices for reply in answers] == [((12, 16),), ((16, 20),), ((20, 24),)]
    assert some(decision, "take", "give", "version") == ((2,), (0, 1, 2), 3)


def test_wish_is_granted_once_all_dealt_samples_are_done():
    tested = coordinator("async", queue="shared")
    tested.begin(0)
    for worker in range(3):  # each has another stretch by now
        tested.receive(worker, step(), 0)
    assert replies(tested.receive(1, step(wish=Ask.INTERRUPT), 0)) == []
    assert replies(tested.receive(0, step(), 0)) == []
    answers = replies(tested.receive(2, step(), 0))
    assert [(reply.ask, reply.cursor, reply.slices) for reply in answers] == [(Ask.INTERRUPT, 24, ())] * 3


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_nan_ends_the_phase_on_waiting_workers_and_on_the_rest_as_they_push(mode: str):
    tested = coordinator(mode, 4, conductor=evaluating(16))
    tested.begin(0)
    assert replies(tested.receive(2, step(), 0)) == []  # held back until the evaluation
    messages = tested.receive(1, step(0, NAN, step=6), 0)
    fault = tested.nan
    assert fault is not None
    assert repr(fault) == repr(NotFinite(1, NAN, 6, 0))
    assert [(reply.worker, reply.nan) for reply in replies(messages)] == [(1, fault), (2, fault)]
    assert decisions(messages) == [Decision(What.DROP, take=(1,), give=(1, 2))]
    assert tested.left == {1, 2}
    reply, decision = tested.receive(0, step(), 0)
    assert (reply.worker, reply.nan, decision) == (0, fault, Decision(What.DROP, take=(0,), give=(0,)))
    reply, decision, last = tested.receive(3, WITHDRAW, 0)
    assert (reply.worker, reply.nan, decision) == (3, fault, Decision(What.DROP, give=(3,)))
    assert last == Decision(What.NAN, nan=fault)


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_nan_ends_the_phase_on_a_withdrawn_worker_too(mode: str):
    tested = coordinator(mode, 2)
    tested.begin(0)
    tested.receive(1, WITHDRAW, 0)
    messages = tested.receive(0, step(0, NAN), 0)
    assert [(reply.worker, reply.nan) for reply in replies(messages)] == [(0, tested.nan), (1, tested.nan)]
    assert decisions(messages) == [Decision(What.DROP, take=(0,), give=(0, 1)), Decision(What.NAN, nan=tested.nan)]


@pytest.mark.parametrize(("loss", "bad"), [(NAN, 0), (1.0, 2)])
def test_nan_skip_leaves_the_update_out(loss: float, bad: int):
    tested = coordinator("async", nan="skip")
    tested.begin(0)
    tested.receive(0, step(0, 2.0), 0)
    reply, decision = tested.receive(1, step(0, loss, bad=bad), 0)
    assert (reply.result, reply.cursor, reply.version, reply.loss, reply.nan) == ("skipped", 8, 1, 2.0, None)
    assert some(decision, "what", "take", "give", "version") == (What.DROP, (1,), (1,), 1)


@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_an_overflow_leaves_the_update_out(nan: Any):
    """Its worker alone learns of it."""
    tested = coordinator("async", nan=nan)
    tested.begin(0)
    reply, decision = tested.receive(1, step(0, 1.0, bad=-2), 0)
    assert (reply.result, reply.cursor, reply.version, reply.overflow, reply.nan) == ("skipped", 4, 0, True, None)
    assert some(decision, "what", "take", "give") == (What.DROP, (1,), (1,))
    reply, _ = tested.receive(0, step(0, 2.0), 0)
    assert (reply.result, reply.overflow) == ("applied", False)


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_after_a_withdrawal_workers_finish_their_stretches_and_are_dismissed(mode: str):
    tested = coordinator(mode, conductor=evaluating(24))
    tested.begin(0)
    assert decisions(tested.receive(1, WITHDRAW, 0)) == [Decision(What.DROP)]
    for worker in (0, 2, 0):
        tested.receive(worker, step(), 0)
    *_, decision = messages = tested.receive(2, step(), 0)
    answers = replies(messages)
    assert [(reply.worker, reply.ask, reply.result) for reply in answers] == [
        (worker, Ask.LEAVE, "dropped") for worker in range(3)
    ]  # fmt: skip
    assert some(decision, "what", "take", "give") == (What.DROP, (), (0, 1, 2))
    assert [some(each, "what", "take", "give") for each in decisions(messages)[:-1]] == [(What.UPDATE, (2,), ())]


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_worker_too_far_ahead_of_the_slowest_waits(bound: int):
    tested = coordinator("bounded", 2, bound=bound)
    tested.begin(0)
    for ahead in range(1, bound + 1):
        assert replies(tested.receive(0, step(), 0)) != [], ahead
    assert replies(tested.receive(0, step(), 100)) == []
    held = {reply.worker: reply.held for reply in replies(tested.receive(1, step(), 250))}
    assert held == {0: 150, 1: 0}


def test_released_workers_continue_fewest_steps_first():
    tested = coordinator("bounded", 2, bound=1, queue="shared")
    tested.begin(0)
    tested.receive(0, step(), 0)
    assert replies(tested.receive(0, step(), 0)) == []
    found = [(reply.worker, reply.slices) for reply in replies(tested.receive(1, step(), 0))]
    assert found == [(1, ((12, 16),)), (0, ((16, 20),))]


def test_bound_counts_from_the_last_point_all_workers_shared():
    tested = coordinator("bounded", 2, bound=2, queue="shared", conductor=evaluating(16))
    tested.begin(0)
    for worker in (0, 0, 0, 1):
        messages = tested.receive(worker, step(), 0)
    assert [reply.ask for reply in replies(messages)] == [Ask.EVALUATE] * 2
    assert [reply.worker for reply in replies(tested.receive(0, step(), 0))] == [0]


# -- whole runs --------------------------------------------------------------------------------------------------
class Play:
    """Workers that push what they are dealt until the phase ends; `choose` picks the next one."""

    def __init__(self, tested: Any, choose: Callable[[list[int]], int]) -> None:
        self.tested, self.choose = tested, choose
        self.known: list[list[Stretch]] = [[] for _ in range(tested.workers)]
        self.versions = [0] * tested.workers
        self.asks: list[Ask] = [Ask.NOTHING] * tested.workers
        self.busy: set[int] = set()  # workers that have their reply
        self.consumed: list[Stretch] = []
        self.ends: list[tuple[int, Ask]] = []  # cursor and request, the same for all workers
        self.done, self.lead = [0] * tested.workers, 0  # since all were last level

    def run(self) -> None:
        self._take(self.tested.begin(0))
        over = False
        while not over:
            worker = self.choose(sorted(self.busy - self.tested.left))
            over = self._take(self.tested.receive(worker, self._next(worker), 0))
        assert self.tested.left == set(range(self.tested.workers))

    def _next(self, worker: int) -> Header:
        self.busy.remove(worker)
        if self.asks[worker] & ENDS:
            return LEAVE
        if not self.known[worker]:
            return step(self.versions[worker], 0.0, 0)
        start, stop = stretch = self.known[worker].pop(0)
        self.consumed.append(stretch)
        self.done[worker] += 1
        return step(self.versions[worker], 1.0, stop - start)

    def _take(self, messages: list[Message]) -> bool:
        answers = replies(messages)
        for reply in answers:
            assert reply.worker not in self.busy  # one reply to each push
            assert reply.version == self.tested.version  # the parameters that are sent
            assert len(reply.slices) <= self.tested.terms.ahead + 1  # what fits into a record
            self.busy.add(reply.worker)
            self.known[reply.worker] += reply.slices
            self.versions[reply.worker], self.asks[reply.worker] = reply.version, reply.ask
        if answers and answers[0].ask:
            self._check_ask(answers)
        ahead = [done for worker, done in enumerate(self.done) if self.known[worker] and worker in self.busy]
        self.lead = max(self.lead, max(ahead, default=0) - min(ahead, default=0))
        found = decisions(messages)
        if found and found[0].what is not What.END:
            assert sorted(found[0].give) == sorted(reply.worker for reply in answers)
        return bool(found) and found[-1].what is What.END

    def _check_ask(self, answers: list[Reply]) -> None:
        """All get the same request at one cursor, up to which each sample was consumed once."""
        assert [reply.worker for reply in answers] == list(range(self.tested.workers))
        assert len({(reply.ask, reply.cursor, reply.version) for reply in answers}) == 1
        stretches = sorted(self.consumed)
        assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
        assert stretches[-1][1] == answers[0].cursor
        self.ends.append((answers[0].cursor, answers[0].ask))
        self.done = [0] * self.tested.workers


@settings(deadline=None, max_examples=80)
@given(
    workers=st.integers(1, 5), batch=st.integers(1, 4), epoch=st.integers(1, 30), ahead=st.integers(0, 3),
    every=st.integers(1, 40), bound=st.none() | st.integers(0, 3), queue=st.sampled_from(QUEUES), data=st.data(),
)  # fmt: skip
def test_each_sample_once_and_a_prefix_at_every_request(
    workers: int, batch: int, epoch: int, ahead: int, every: int, bound: int | None, queue: str, data: st.DataObject
):
    keys: Any = {"mode": "async"} if bound is None else {"mode": "bounded", "bound": bound}
    tested = coordinator(
        **keys, workers=workers, batch=batch, epoch=epoch, ahead=ahead, queue=queue,
        conductor=evaluating(every, 2 * epoch),
    )  # fmt: skip
    play = Play(tested, lambda able: data.draw(st.sampled_from(able)))
    play.run()
    assert play.ends[-1][0] == 2 * epoch
    assert play.ends[-1][1] & Ask.STOP
    if bound is not None:
        assert play.lead <= bound
    if queue == "shared":  # stops at the first end of a stretch at or past the mark
        assert all(end % every < batch for end, ask in play.ends if ask & Ask.EVALUATE)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("bound", [0, 1, 2, 3, 7])
def test_bound_is_used_and_never_exceeded(bound: int, queue: str, seed: int):
    random = np.random.default_rng(seed)
    tested = coordinator("bounded", 4, bound=bound, queue=queue, conductor=evaluating(0, 400))
    weights = np.array([8.0, 4.0, 4.0, 1.0])  # relative speeds

    def choose(able: list[int]) -> int:
        return int(random.choice(able, p=weights[able] / weights[able].sum()))

    play = Play(tested, choose)
    play.run()
    assert play.lead == bound


# -- records -----------------------------------------------------------------------------------------------------
NUMBERS = st.integers(0, 2**62)
FLOATS = st.floats(allow_nan=False) | st.just(float("inf"))
ASKS = st.builds(Ask, st.integers(0, 63))
NANS = st.builds(NotFinite, st.integers(0, 9), st.floats(), NUMBERS, NUMBERS)
WORKERS, STRETCHES = 9, 3


def sent(source: Any, target: Any) -> Any:
    """The record in `target` once the bytes of `source` have arrived."""
    for record in (source, target):
        assert (record.bytes.dtype, record.bytes.ndim) == (np.uint8, 1)
    target.bytes[:] = source.bytes
    found = target.read()
    target.bytes[:] = 255  # the next one may arrive before this one is handled
    return found


@settings(deadline=None)
@given(
    slots=st.integers(1, 70),
    kind=st.sampled_from(HeaderKind),
    numbers=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    data=st.data(),
)
def test_header_survives_the_wire(slots: int, kind: HeaderKind, numbers: tuple[int, int, int], data: st.DataObject):
    used = data.draw(
        st.none() | st.lists(st.booleans(), min_size=slots, max_size=slots).filter(lambda bits: not all(bits))
    )
    bits = None if used is None else np.array(used)
    part = Contribution(
        data.draw(st.integers(0, 2**52)), data.draw(FLOATS), data.draw(st.floats()), data.draw(ASKS), 3, bits
    )
    header, record = Header(kind, *numbers, part), HeaderRecord(slots)
    record.write(header)
    assert repr(sent(record, HeaderRecord(slots))) == repr(header)


@settings(deadline=None)
@given(
    data=st.data(), text=st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=100),
    slices=st.lists(st.tuples(NUMBERS, NUMBERS), max_size=STRETCHES), balanced=st.booleans(),
)  # fmt: skip
def test_reply_survives_the_wire(data: st.DataObject, text: str, slices: list[Stretch], balanced: bool):
    shares = data.draw(st.tuples(*[st.tuples(*[NUMBERS] * WORKERS)] * 2)) if balanced else ()
    record, other = (ReplyRecord(STRETCHES, WORKERS if balanced else 0) for _ in range(2))
    record.write(
        Reply(
            8, 7, 6, Ask.STOP, "applied", 0.5, 4, 3, 2, ((1, 2),) * STRETCHES, "an earlier one",
            NotFinite(1, 2.0, 3, 4), True, ((1,) * WORKERS,) * 2 if balanced else (),
        )
    )
    reply = Reply(
        data.draw(st.integers(0, WORKERS)), data.draw(NUMBERS), data.draw(NUMBERS), data.draw(ASKS),
        data.draw(st.sampled_from(RESULTS)), data.draw(st.floats()), data.draw(NUMBERS), data.draw(NUMBERS),
        data.draw(NUMBERS), tuple(slices), text, data.draw(st.none() | NANS),
        data.draw(st.booleans()), shares,
    )  # fmt: skip
    record.write(reply)
    assert repr(sent(record, other)) == repr(reply)


@settings(deadline=None)
@given(slots=st.integers(1, 70), what=st.sampled_from(What), data=st.data())
def test_decision_survives_the_wire(slots: int, what: What, data: st.DataObject):
    workers = st.sets(st.integers(0, WORKERS - 1)).map(lambda chosen: tuple(sorted(chosen)))
    used = data.draw(
        st.none() | st.lists(st.booleans(), min_size=slots, max_size=slots).filter(lambda bits: not all(bits))
    )
    decision = Decision(
        what, data.draw(workers), data.draw(workers), data.draw(NUMBERS), data.draw(NUMBERS), data.draw(FLOATS),
        data.draw(FLOATS), data.draw(FLOATS), None if used is None else np.array(used), data.draw(st.none() | NANS),
        data.draw(st.booleans()),
    )  # fmt: skip
    record = DecisionRecord(WORKERS, slots)
    record.write(Decision(What.NAN, (1, 2), (3,), nan=NotFinite(1, 2.0, 3, 4)))
    record.write(decision)
    assert repr(sent(record, DecisionRecord(WORKERS, slots))) == repr(decision)


@pytest.mark.parametrize("character", ["a", "é", "訓", "🚂"])
def test_long_reason_is_cut_between_two_characters(character: str):
    record, fits = ReplyRecord(1), character * (WHY // len(character.encode()))
    for text in (fits, fits + character, 3 * fits):
        record.write(Reply(0, 0, 0, why=text))
        found = record.read().why
        if text == fits:
            assert found == text
        else:
            assert WHY - 6 <= len(found.encode()) <= WHY
            assert found == character * (len(found) - 1) + "…"


def test_too_many_stretches_in_a_reply_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        ReplyRecord(1).write(Reply(0, 0, 0, slices=((0, 1), (1, 2))))
