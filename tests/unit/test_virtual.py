"""Virtual ranks: messages, waiting, time, memory, failures, and what torch keeps per thread."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.comm.virtual import globals as own
from hpctrain.comm.virtual.globals import AskedState, CopiedState, python_state
from hpctrain.comm.virtual.network import FreeNetwork, LinkNetwork
from hpctrain.comm.virtual.scheduler import DeadlockError
from hpctrain.comm.virtual.world import World
from hpctrain.data.generators import Generators, kept
from hpctrain.errors import HpctrainError
from hpctrain.trace.recorder import Recorder
from tests.helpers import barriers_are_traced, messages_are_traced

TAG = 2


def run(size: int, *courses: Callable[[Any], Any], **options: Any) -> list[Any]:
    """Rank r runs courses[r]; further ranks run the last one."""
    return World(size, **options).run(lambda comm: courses[min(comm.rank, len(courses) - 1)](comm))


def taken(comm, source=0, tag=TAG, length=1):
    buffer = np.full(length, -1.0)
    comm.recv(buffer, source, tag)
    return buffer[0]


# -- messages --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("network", [FreeNetwork, LinkNetwork])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_a_message_arrives(network, dtype):
    def receive(comm):
        into = np.zeros(5, dtype)
        elements = comm.recv(into, 0, TAG)
        return elements, into.tolist()

    _, got = run(2, lambda c: c.send(np.arange(3).astype(dtype), 1, TAG), receive, network=network())
    assert got == (3, [0, 1, 2, 0, 0])


def test_message_too_long_for_its_buffer_is_an_error():
    with pytest.raises(ValueError, match="40 bytes does not fit a buffer of 8: recv rank 0"):
        run(2, lambda c: c.send(np.zeros(5), 1, TAG), lambda c: c.recv(np.zeros(1), 0, TAG))


def test_messages_keep_their_order_per_tag():
    def send(comm):
        requests = [comm.start_send(np.array([float(i)]), 1, tag) for i, tag in enumerate([2, 3, 2, 3])]
        comm.wait_all(requests)

    def receive(comm):
        return [taken(comm, 0, tag) for tag in (3, 2, 3, 2)]

    assert run(2, send, receive)[1] == [1, 0, 3, 2]


def test_rank_may_send_to_itself():
    def body(comm):
        buffer = np.zeros(1)
        return comm.sendrecv(np.array([5.0]), 0, buffer, 0, TAG), buffer[0]

    assert run(1, body) == [(1, 5)]


def test_short_message_is_buffered_when_sent():
    def send(comm):
        buffer = np.array([1.0])
        comm.send(buffer, 1, TAG)
        buffer[0] = 9

    def receive(comm):
        comm.sleep(1)
        return taken(comm, 0)

    assert run(2, send, receive, network=LinkNetwork())[1] == 1


def test_send_receives_no_elements():
    assert run(2, lambda c: c.start_send(np.zeros(1), 1, TAG).wait(), taken)[0] == 0


def test_only_receives_can_be_cancelled():
    def send(comm):
        request = comm.start_send(np.zeros(1), 1, TAG)
        with pytest.raises(NotImplementedError, match="only a receive"):
            request.cancel()
        request.wait()

    run(2, send, taken)


def test_wait_any_returns_the_first_completed():
    def receive(comm):
        buffers = np.zeros((3, 1))
        requests = [comm.start_recv(buffers[i], i + 1, TAG) for i in range(3)]
        order = []
        for _ in range(3):
            index = comm.wait_any([r for i, r in enumerate(requests) if i not in order])
            order.append([i for i in range(3) if i not in order][index])
        return order, comm.now()

    def send(comm):
        comm.sleep(10 - comm.rank)
        comm.send(np.zeros(1), 0, TAG)

    assert run(4, receive, send)[0] == ([2, 1, 0], 9 * 10**9)


def test_wait_any_of_messages_in_flight():
    """Both are already in flight, and the second arrives first; the later arrival of the first wakes no rank
    wrongly."""

    def receive(comm):
        comm.sleep(1e-9)
        far, near, last = np.zeros(1), np.zeros(1), np.zeros(2000)
        requests = [comm.start_recv(far, 2, TAG), comm.start_recv(near, 1, TAG)]
        first = comm.wait_any(requests), comm.now()
        elements = comm.recv(last, 1, TAG)
        return first, (elements, last[-1], comm.now())

    def send_near(comm):
        comm.send(np.ones(1), 0, TAG)
        comm.sleep(5)
        comm.send(np.ones(2000), 0, TAG)

    def send_far(comm):
        comm.send(np.ones(1), 0, TAG)

    got = run(3, receive, send_near, send_far, nodes=(0, 0, 1), network=LinkNetwork(latency=10**9))
    assert got[0][0] == (1, 501)
    assert got[0][1] == (2000, 1, 5 * 10**9 + 501 + 500 + 2000)


def test_cancelled_receive_takes_nothing():
    def receive(comm):
        lost = np.zeros(1)
        comm.start_recv(lost, 0, TAG).cancel()
        comm.barrier()
        return taken(comm, 0), lost[0]

    def send(comm):
        comm.barrier()
        comm.send(np.array([4.0]), 1, TAG)

    assert run(2, send, receive)[1] == (4, 0)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 40)), max_size=40))
def test_every_message_arrives_once_and_in_order(size, messages):
    """All ranks post all their sends and receives at once, over a network with both kinds of messages."""
    plan = [(a % size, b % size, n) for a, b, n in messages]

    def body(comm):
        requests, buffers = [], []
        for index, (source, dest, length) in enumerate(plan):
            if dest == comm.rank:
                buffers.append((index, np.zeros(length)))
                requests.append(comm.start_recv(buffers[-1][1], source, TAG))
            if source == comm.rank:
                requests.append(comm.start_send(np.full(length, float(index)), dest, TAG))
        comm.wait_all(requests)
        return all((buffer == index).all() for index, buffer in buffers)

    network = LinkNetwork(eager_limit=128)
    assert all(World(size, [r % 3 for r in range(size)], network).run(body))


# -- deadlock and failures -------------------------------------------------------------------------------------
def test_deadlock_lists_which_rank_waits_for_what():
    def body(comm):
        comm.recv(np.zeros(4), (comm.rank + 1) % comm.size, TAG)

    with pytest.raises(DeadlockError) as caught:
        run(3, body)
    text = str(caught.value)
    for rank in range(3):
        assert f"rank {rank} waits for recv rank {(rank + 1) % 3} (tag 2, 32 bytes)" in text


def test_deadlock_of_sends_occurs_on_the_free_network():
    with pytest.raises(DeadlockError, match=r"rank 0 waits for send rank 1 .*; rank 1 waits for send rank 0"):
        run(2, lambda c: c.send(np.zeros(1), 1 - c.rank, TAG))


@pytest.mark.parametrize(
    ("course", "message"),
    [
        (lambda c: c.barrier(), r"rank 0 waits for recv rank 1 \(tag 1, 1 bytes\)"),
        (lambda c: c.split(0), r"rank 0 waits for split with ranks \[1\]"),
        (lambda c: c.arena(3, np.dtype(np.float32), "node"), r"rank 0 waits for arena with ranks \[1\]"),
        (lambda c: taken(c, 1), "rank 0 waits for recv rank 1"),
        (
            lambda c: c.wait_any([c.start_recv(np.zeros(1), 1, t) for t in (2, 3)]),
            r"recv rank 1 \(tag 2, 8 bytes\) or recv rank 1 \(tag 3",
        ),
        (lambda c: c.start_all_reduce(np.zeros(1)).wait(), "rank 0 waits for a started all-reduce of rank 0"),
        (lambda c: c.spawn(lambda: taken(c, 1)).join(), "a thread of rank 0 waits for recv rank 1"),
    ],
)
def test_deadlock_of_every_verb(course, message):
    with pytest.raises(DeadlockError, match=message):
        run(2, course, lambda c: None)


def test_deadlock_in_a_subset_uses_ranks_of_the_run():
    def body(comm):
        part = comm.split(comm.rank % 2)
        if comm.rank == 3:
            part.recv(np.zeros(1), 0, TAG)

    with pytest.raises(DeadlockError, match=r"rank 3 waits for recv rank 1"):
        run(4, body)


def test_deadlock_waiting_for_a_notice_names_the_late_ranks():
    def body(comm):
        arena = comm.arena(1, np.dtype(np.float64), "node")
        if comm.rank != 1:
            comm.notify(arena)
            comm.wait(arena)

    with pytest.raises(DeadlockError, match=r"notify of epoch 1 by ranks \[1\]"):
        run(3, body)


def test_exception_of_a_rank_surfaces_and_the_others_clean_up():
    cleared = []

    def wait(comm):
        try:
            comm.barrier()
        finally:
            cleared.append(comm.rank)

    def fail(comm):
        raise LookupError("rank 2 went wrong")

    with pytest.raises(LookupError, match="rank 2 went wrong"):
        run(4, wait, wait, fail, wait)
    assert sorted(cleared) == [0, 1]  # rank 3 had not begun


def test_clean_up_may_try_to_communicate():
    cleared = []

    def wait(comm):
        try:
            comm.barrier()
        finally:
            try:
                comm.barrier()
            finally:
                cleared.append(comm.rank)

    world = World(3)
    with pytest.raises(IndexError):
        world.run(lambda comm: wait(comm) if comm.rank < 2 else [][comm.rank])
    assert sorted(cleared) == [0, 1]


def test_world_can_be_reused_after_a_failure():
    world = World(2)
    with pytest.raises(DeadlockError):
        world.run(lambda comm: taken(comm, 1 - comm.rank))
    assert world.run(lambda comm: comm.rank) == [0, 1]


def test_worlds_nest():
    def body(comm):
        inner = World(3).run(lambda c: c.gather_json(c.rank))
        comm.barrier()
        return inner[0]

    assert World(2).run(body) == [[0, 1, 2]] * 2


# -- time ------------------------------------------------------------------------------------------------------
def test_sleeping_ranks_wake_in_time_order():
    woken = []

    def body(comm):
        comm.sleep((comm.size - comm.rank) * 0.5)
        woken.append((comm.rank, comm.now()))

    world = World(3)
    world.run(body)
    assert woken == [(2, 5 * 10**8), (1, 10**9), (0, 15 * 10**8)]
    assert world.time == 15 * 10**8


def test_spans_of_the_caller_take_their_cost():
    asked = []

    def compute(rank, kind, nbytes, flops):
        asked.append((rank, kind, nbytes, flops))
        return 100 * (rank + 1)

    def body(comm):
        with comm.span("forward", 8, flops=3.0):
            pass
        mine = comm.now()
        comm.barrier()
        return mine, comm.now()

    assert run(2, body, compute=compute) == [(100, 200), (200, 200)]
    assert asked == [(0, "forward", 8, 3.0), (1, "forward", 8, 3.0)]  # the barrier costs its messages only


def test_tracing_takes_no_virtual_time():
    def body(comm):
        with comm.span("update"):
            comm.all_reduce(np.ones(100))
        return comm.now()

    def compute(rank, kind, nbytes, flops):
        return 1000

    plain, traced = (
        run(5, body, network=LinkNetwork(), compute=compute, recorders=recorders)
        for recorders in (None, [Recorder() for _ in range(5)])
    )
    assert plain == traced


def test_repeated_run_takes_the_same_turns_and_time():
    def body(comm):
        rng = np.random.default_rng(comm.rank)
        for _ in range(5):
            comm.sleep(float(rng.random()) * 1e-3)
            comm.all_reduce(np.ones(rng.integers(1, 2) * 700), algorithm="ring")
            if comm.rank:
                comm.send(np.zeros(1), 0, TAG)
            else:
                waiting = {rank: comm.start_recv(np.zeros(1), rank, TAG) for rank in range(1, comm.size)}
                while waiting:
                    order.append(list(waiting)[comm.wait_any(list(waiting.values()))])
                    waiting.pop(order[-1])
        return comm.now()

    seen = []
    for _ in range(2):
        order: list[Any] = []
        world = World(7, [0, 0, 0, 1, 1, 2, 2], LinkNetwork())
        seen.append((world.run(body), world.time, world.resumptions, order))
    assert seen[0] == seen[1]


# -- started collectives --------------------------------------------------------------------------------------
def test_started_all_reduce_progresses_by_itself():
    """It overlaps with its rank's computation."""

    def body(comm):
        buffer = np.ones(10**6, np.float32)
        request = comm.start_all_reduce(buffer)
        early = request.test()
        comm.sleep(1)
        done = request.test()
        request.wait()
        return early, done, buffer[0], comm.now()

    assert run(3, body, nodes=range(3), network=LinkNetwork()) == [(False, True, 3, 10**9)] * 3


def test_started_all_reduces_may_be_waited_for_in_any_order_among_other_verbs():
    def body(comm):
        buffers = [np.full(50, float(i)) for i in range(4)]
        requests = [comm.start_all_reduce(buffer) for buffer in buffers]
        if comm.rank % 2:
            comm.barrier()
        for index in np.random.default_rng(comm.rank).permutation(4):
            requests[index].wait()
        if not comm.rank % 2:
            comm.barrier()
        return [buffer[0] for buffer in buffers]

    assert run(5, body) == [[0, 5, 10, 15]] * 5


def test_wait_any_of_started_all_reduces():
    def body(comm):
        buffer = np.ones(3, ml_dtypes.bfloat16)
        return comm.wait_any([comm.start_all_reduce(buffer)]), float(buffer[0])

    assert run(3, body) == [(0, 3)] * 3


def test_split_orders_by_key_and_leaves_out_ranks_without_a_color():
    def body(comm):
        color = None if comm.rank == 5 else comm.rank % 2
        part = comm.split(color, -comm.rank)
        if part is None:
            return None
        return part.rank, part.members, part.nodes, part.gather_json(comm.rank)

    got = run(6, body, nodes=[7, 7, 7, 8, 8, 8])
    assert got[4] == (0, (4, 2, 0), (0, 1, 1), [4, 2, 0])
    assert got[1] == (1, (3, 1), (0, 1), [3, 1])
    assert got[5] is None


def test_messages_of_different_communicators_do_not_mix():
    def body(comm):
        other = comm.split(0)
        if comm.rank == 0:
            requests = [c.start_send(np.array([v]), 1, TAG) for c, v in ((comm, 1.0), (other, 2.0))]
            comm.wait_all(requests)
            return None
        return [taken(c, 0) for c in (other, comm)]

    assert run(2, body)[1] == [2, 1]


# -- memory ----------------------------------------------------------------------------------------------------
def test_shared_arenas_are_seen_by_the_ranks_of_a_node():
    def body(comm):
        arena = comm.arena(comm.rank, np.dtype(np.float32), "node")
        assert not arena.mine.any()
        arena.mine[:] = comm.rank
        comm.notify(arena)
        comm.wait(arena)
        found = [part.tolist() for part in arena.parts]
        comm.barrier()
        arena.free()
        return found

    got = run(4, body, nodes=[0, 1, 0, 1])
    assert got[0] == got[2] == [[], [2, 2]]
    assert got[1] == got[3] == [[1], [3, 3, 3]]


def test_arena_once_per_node():
    def body(comm):
        arena = comm.arena(4 if comm.local_rank == 0 else 0, np.dtype(np.int64), "node")
        arena.parts[0][comm.local_rank] = comm.rank + 10
        comm.notify(arena)
        comm.wait(arena)
        return arena.parts[0].tolist()

    assert run(4, body, nodes=[0, 0, 1, 1]) == [[10, 11, 0, 0]] * 2 + [[12, 13, 0, 0]] * 2


def test_waiting_for_notices_is_a_barrier_within_the_node():
    def body(comm):
        arena = comm.arena(1, np.dtype(np.float64), "node")
        for step in range(20):
            comm.sleep(((comm.rank * 7 + step) % 5) * 1e-3)
            arena.mine[0] = step
            comm.notify(arena)
            comm.wait(arena)
            assert all(part[0] == step for part in arena.parts)
            comm.notify(arena)
            comm.wait(arena)

    run(5, body)


def test_private_arenas_are_private():
    def body(comm):
        arena = comm.arena(2, np.dtype(np.float64))
        arena.mine += comm.rank
        comm.barrier()
        return len(arena.parts), arena.mine.tolist()

    assert run(2, body) == [(1, [0, 0]), (1, [1, 1])]


def test_nothing_is_left_of_shared_objects():
    """Arenas, parts and started all-reduces do not accumulate in a long run."""
    left = []

    def body(comm):
        for _ in range(3):
            comm.arena(3, np.dtype(np.float32), "node")
            comm.split(comm.rank % 2)
            comm.start_all_reduce(np.ones(3)).wait()
        comm.barrier()
        left.append(len(comm.group.meetings))

    run(4, body, nodes=[0, 0, 1, 1])
    assert left == [0] * 4


def test_world_is_garbage_collected():
    world = World(3)
    world.run(lambda comm: comm.barrier())
    gone = weakref.ref(world)
    del world
    gc.collect()
    assert gone() is None


# -- threads ---------------------------------------------------------------------------------------------------
def test_spawned_function_runs_concurrently():
    def body(comm):
        thread = comm.spawn(lambda: taken(comm, comm.rank) + 1)
        comm.send(np.array([float(comm.rank)]), comm.rank, TAG)
        return thread.join()

    assert run(3, body) == [1, 2, 3]


def test_joining_a_finished_function():
    def body(comm):
        thread = comm.spawn(lambda: "done")
        comm.sleep(1)
        return thread.join(), thread.join()

    assert run(1, body) == [("done", "done")]


def test_exception_in_a_spawned_function_ends_the_run():
    def body(comm):
        comm.spawn(lambda: [][comm.rank])
        comm.barrier()
        comm.sleep(1)

    with pytest.raises(IndexError):
        run(2, body)


class Everybodys(HpctrainError):
    everywhere = True


def test_error_known_to_all_ranks_waits_for_the_join():
    def beside():
        raise Everybodys("told twice")

    def body(comm):
        thread = comm.spawn(beside)
        comm.sleep(1)
        with pytest.raises(Everybodys):
            thread.join()
        return comm.now()

    assert run(2, body) == [10**9] * 2


def test_deadlock_after_a_user_mistake_reports_the_mistake():
    def beside():
        raise Everybodys("the cause")

    def body(comm):
        comm.spawn(beside)
        taken(comm, 0)

    with pytest.raises(Everybodys, match="the cause"):
        run(1, body)


# -- torch -----------------------------------------------------------------------------------------------------
def test_grad_mode_is_per_rank():
    def body(comm):
        with torch.no_grad() if comm.rank % 2 else torch.enable_grad():
            comm.barrier()
            inside = torch.is_grad_enabled()
            comm.sleep(1e-3 * comm.rank)
            inside = inside and torch.is_grad_enabled()
        comm.barrier()
        return inside, torch.is_grad_enabled()

    assert run(4, body) == [(True, True), (False, True)] * 2
    assert torch.is_grad_enabled()


def test_autocast_is_per_rank():
    weight = torch.ones(4, 4, requires_grad=True)

    def body(comm):
        with torch.autocast("cpu", torch.bfloat16, enabled=comm.rank == 1):
            comm.barrier()
            dtype = (weight @ weight).dtype
            comm.sleep(1e-3 * comm.rank)
            again = (weight @ weight).dtype
        return dtype, again, (weight @ weight).dtype

    full, half = torch.float32, torch.bfloat16
    assert run(3, body) == [(full, full, full), (half, half, full), (full, full, full)]
    assert not torch.is_autocast_enabled("cpu")


def test_autocast_does_not_keep_stale_weights():
    """torch drops its cached casts when no thread is in autocast, which may never happen with several ranks."""

    def body(comm):
        weight, found = torch.ones(2, 2, requires_grad=True), []
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16):
                found.append((torch.eye(2) @ weight).sum().item())
                comm.sleep(1e-3 * (1 + comm.rank))
            with torch.no_grad():
                weight += 1
        return found

    assert run(2, body) == [[4, 8, 12]] * 2


def test_random_numbers_are_per_rank():
    def body(comm):
        torch.manual_seed(comm.rank)
        numbers = []
        for _ in range(4):
            numbers.append(torch.rand(3))
            comm.all_reduce(np.ones(5), algorithm="ring")
            numbers.append(torch.rand(3))
            comm.sleep(1e-3)
        return torch.cat(numbers)

    before = torch.get_rng_state()
    for rank, got in enumerate(run(4, body)):
        torch.manual_seed(rank)
        torch.testing.assert_close(got, torch.rand(24), rtol=0, atol=0)
        torch.set_rng_state(before)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("way", [python_state, AskedState])
def test_the_numbers_of_python_and_numpy_are_per_rank(way, monkeypatch):
    """Also where ranks draw in some of their turns only, and two of Python's that come in pairs."""
    monkeypatch.setattr(own, "python_state", way)

    def draw(rank, pause):
        random.seed(rank)
        np.random.seed(rank)
        numbers = []
        for turn in range(12):
            if turn % 3 != rank % 3:
                numbers += [random.random(), random.gauss(0.0, 1.0), random.randrange(10**9), np.random.rand()]
            pause(turn)
        return numbers

    def body(comm):
        return draw(comm.rank, lambda turn: comm.barrier() if turn % 2 else comm.sleep(1e-3 * (1 + comm.rank)))

    before = Generators.now()
    found = run(4, body)
    assert not Generators.now().differing(before)
    with kept():
        assert found == [draw(rank, lambda turn: None) for rank in range(4)]


def test_python_state_is_copied_without_asking():
    """In CPython; elsewhere virtual ranks would be as right, but slower."""
    assert isinstance(python_state(), CopiedState)


def test_failure_leaves_torch_unchanged():
    def body(comm):
        with torch.no_grad():
            torch.manual_seed(comm.rank)
            comm.barrier()
            raise LookupError

    before = torch.get_rng_state()
    with pytest.raises(LookupError):
        run(3, body)
    assert torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


# -- traces ----------------------------------------------------------------------------------------------------
def test_waiting_is_traced_and_a_message_has_one_number_at_both_ends():
    recorders = [Recorder() for _ in range(2)]

    def body(comm):
        if comm.rank == 0:
            comm.sleep(1)
            comm.send(np.zeros(5), 1, TAG)
            comm.send(np.zeros(1000), 1, TAG)
        else:
            comm.recv(np.zeros(5), 0, TAG)
            comm.sleep(1)
            comm.recv(np.zeros(1000), 0, TAG)

    run(2, body, recorders=recorders)
    sent, got = (recorder.drain()["spans"] for recorder in recorders)
    first, second = (int(number) for number in np.unique(sent["id"]))
    late = 10**9
    spans = [tuple(int(row[name]) for name in ("id", "start_ns", "end_ns", "bytes", "peer")) for row in sent]
    assert spans == [
        (first, late, late, 40, 1),
        (second, late, late, 8000, 1),
        (second, late, 2 * late, 0, 1),  # waited for its receiver; its bytes were counted
    ]
    spans = [tuple(int(row[name]) for name in ("id", "start_ns", "end_ns", "bytes", "peer")) for row in got]
    assert spans == [(first, 0, late, 40, 0), (second, 2 * late, 2 * late, 8000, 0)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_message_and_barrier_is_traced_at_all_its_ends(size: int):
    recorders = [Recorder() for _ in range(size)]
    run(size, messages_are_traced, recorders=recorders)
    run(size, barriers_are_traced, recorders=recorders)


def test_collectives_have_one_number_on_all_ranks():
    recorders = [Recorder() for _ in range(3)]
    run(3, lambda c: [c.barrier(), c.all_reduce(np.ones(9)), c.broadcast(np.ones(9), 1)], recorders=recorders)
    ids = []
    for recorder in recorders:
        spans = recorder.drain()["spans"]
        ids.append(sorted({int(s["id"]) for s in spans if s["peer"] < 0}))
    assert ids[0] == ids[1] == ids[2]
    assert len(ids[0]) == 3


def test_calls_happen_at_their_time_unless_cancelled():
    """In the order in which they were asked for, `last` ones after the others, and all after ranks that can run."""
    world, seen = World(1), []

    def body(comm):
        world.call_at(5, lambda argument: seen.append((argument, world.time)), "last", last=True)
        world.call_at(5, lambda argument: seen.append((argument, world.time)), "first")
        world.call_at(3, lambda argument: seen.append((argument, world.time)), "cancelled").finished = True
        world.call_at(900, seen.append, "never: all ranks have ended").finished = True
        comm.pass_time(5)
        seen.append(("rank", comm.now()))
        comm.pass_time(1)

    world.run(body)
    assert seen == [("first", 5), ("rank", 5), ("last", 5)]
    assert world.time == 6


# -- speed -----------------------------------------------------------------------------------------------------
def test_ring_of_many_ranks_takes_one_turn_per_message():
    """`hpctrain bench virtual` measures the speed; this tests that there are no more turns than needed."""
    world = World(128, range(128), LinkNetwork())
    got = world.run(lambda comm: _ring_sum(comm))
    assert got == [128.0] * 128
    assert world.resumptions <= 1.02 * 2 * 127 * 128


def _ring_sum(comm):
    buffer = np.ones(128, np.float32)
    comm.all_reduce(buffer, algorithm="ring")
    return float(buffer[0])


def test_waiting_for_many_messages_takes_no_more_wake_ups_than_messages() -> None:
    """Each time that one comes the receiver looks again; it must not ask anew to be woken for all the others."""
    senders = 40
    world = World(senders + 1, network=LinkNetwork(node_latency=1000))

    def body(comm: Any) -> int:
        if comm.rank:
            comm.sleep(comm.rank * 1e-9)
            comm.send(np.zeros(4), 0, 2)
            return 0
        comm.sleep(100e-9)  # all are on their way by then
        left = [comm.start_recv(np.zeros(4), rank, 2) for rank in range(1, comm.size)]
        while left:
            left.pop(comm.wait_any(left))
        return world.resumptions

    assert world.run(body)[0] < 10 * senders
