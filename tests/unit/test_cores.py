"""Cores of hosts in virtual time, and what waiting and messages take of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest

from hpctrain.comm.virtual.platform import Platform
from hpctrain.comm.waiting import nap
from hpctrain.hosts import Description
from hpctrain.simulate.attention import WaitingRanks
from hpctrain.simulate.calibration import HandlingCosts
from hpctrain.simulate.cores import KEPT, LATE, PERIOD, Machine
from hpctrain.simulate.passes import Processor, Spells

MS = 1_000_000
Work = Callable[[float], None]


def pause(world: Platform, nanoseconds: int) -> None:
    task, end = world.current, world.time + nanoseconds
    assert task is not None
    if nanoseconds:
        world.wake_at(end, task)
    while world.time < end:
        world.block("its turn")


def ends(world: Platform, works: Sequence[tuple[Work, int, int]]) -> list[int]:
    """When tasks end that begin at the second number and compute for as long as the third says."""
    found = [0] * len(works)

    def task(number: int, work: Work, begin: int, length: int) -> None:
        pause(world, begin)
        work(length)
        found[number] = world.time

    world.run_all([(f"{number}", partial(task, number, *each)) for number, each in enumerate(works)])
    return found


@pytest.fixture
def world() -> Platform:
    return Platform((0,), None, None, isolate_torch=False)


def test_tasks_of_a_host_take_turns_on_its_cores(world: Platform) -> None:
    host = Machine(world, None).host(1.0)
    assert ends(world, [(host.work, 0, 6 * MS), (host.work, 1, 6 * MS)]) == [10 * MS, 12 * MS]


def test_hosts_of_one_machine_share_its_cores(world: Platform) -> None:
    machine = Machine(world, 1.0)
    first, second = machine.host(None), machine.host(None)
    assert max(ends(world, [(first.work, 0, 3 * MS), (second.work, 0, 3 * MS)])) == 6 * MS


def test_hosts_of_their_own_do_not(world: Platform) -> None:
    first, second = Machine(world, None).host(1.0), Machine(world, None).host(1.0)
    assert ends(world, [(first.work, 0, 3 * MS), (second.work, 0, 3 * MS)]) == [3 * MS, 3 * MS]


@pytest.mark.parametrize(("cores", "ranks"), [(0.5, 1), (0.25, 1), (0.5, 2), (1.5, 2)])
def test_a_part_of_a_core_is_that_much_in_the_long_run(world: Platform, cores: float, ranks: int) -> None:
    host = Machine(world, None).host(cores)
    length = 300 * MS
    found = max(ends(world, [(host.work, 0, length)] * ranks))
    assert found == pytest.approx(ranks * length / cores, abs=2 * PERIOD)


def test_a_quota_stops_a_burst_and_no_more(world: Platform) -> None:
    """Half a core: 5 ms in a period at full speed, a little more before Linux notices, and then the next period."""
    host = Machine(world, None).host(0.5)
    begin = host.refresh + PERIOD  # of a period, after a pause
    short, long = 4 * MS, 5 * MS + KEPT + LATE + MS
    found = ends(world, [(host.work, begin, short), (host.work, begin + 3 * PERIOD, long)])
    assert found[0] == begin + short
    assert begin + 4 * PERIOD < found[1] <= begin + 4 * PERIOD + 2 * MS


def test_what_was_used_while_waiting_counts(world: Platform) -> None:
    host = Machine(world, None).host(0.5)
    begin = host.refresh + PERIOD

    def work(length: float) -> None:
        host.used(9 * MS, begin)
        host.work(length)

    (found,) = ends(world, [(work, begin + 9 * MS, MS)])
    assert begin + PERIOD + MS <= found < begin + PERIOD + 2 * MS


def test_a_rank_that_polls_does_not_pay_for_long(world: Platform) -> None:
    """However many ranks of a host poll for however long, the next period is theirs again."""
    host = Machine(world, None).host(0.5)
    begin = host.refresh + 10 * PERIOD + 9 * MS  # late in a period

    def work(length: float) -> None:
        host.used(begin, 0)
        host.work(length)

    found = ends(world, [(work, begin, MS)] * 4)
    assert max(found) <= begin + 2 * PERIOD


def test_taking_turns_costs_time(world: Platform) -> None:
    host = Machine(world, None, turns=1.25).host(1.0)
    assert max(ends(world, [(host.work, 0, 4 * MS), (host.work, 0, 4 * MS)])) == pytest.approx(9 * MS, abs=MS)


def test_one_task_takes_no_turns(world: Platform) -> None:
    assert ends(world, [(Machine(world, None, turns=1.25).host(1.0).work, 0, 4 * MS)]) == [4 * MS]


def processors(world: Platform, cores: float | None) -> list[Processor]:
    (host,) = Description.model_validate({"hosts": [{} if cores is None else {"cores": cores}]}).each()
    return [Processor(world, host, Machine(world, None).host(cores), Spells(host, 0), 0, 0)]


@pytest.mark.parametrize(("naps", "late"), [(False, 0.0), (True, nap(0.008) / 2)])
def test_waiting_ranks_notice_the_end_late_if_they_nap(world: Platform, naps: bool, late: float) -> None:
    attention = WaitingRanks(world, processors(world, None), HandlingCosts(), naps)

    def wait(_: float) -> None:
        since = world.time
        pause(world, 8 * MS)
        attention.waited(0, since, "naps")

    (found,) = ends(world, [(wait, 0, 0)])
    assert found == pytest.approx(8 * MS + late * 1e9, abs=10)


@pytest.mark.parametrize(("nbytes", "wait", "left"), [(10_000, 8, 0.0), (4_000_000, 8, 2.0), (4_000_000, 0, 10.0)])
def test_messages_are_handled_while_waiting_and_the_rest_afterwards(
    world: Platform, nbytes: int, wait: int, left: float
) -> None:
    """A message costs 2.5 ns for each byte."""
    costs = HandlingCosts(message_s=0.0, byte_s=2.5e-9, napping=0.0)
    ranks = processors(world, None)
    attention = WaitingRanks(world, ranks, costs, naps=False)

    def work(length: float) -> None:
        attention.handled(0, nbytes)
        since = world.time
        pause(world, wait * MS)
        if wait:
            attention.waited(0, since, "naps")
        ranks[0].work(length / 1e9)

    (found,) = ends(world, [(work, 0, MS)])
    assert found == pytest.approx((wait + left + 1) * MS, abs=10)
