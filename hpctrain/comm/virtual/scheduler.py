"""Coroutines on a virtual clock, used by virtual ranks. Deterministic, in one thread.

A task runs until it must wait; then the next runnable task runs, in the order in which they became runnable. When no
task is runnable, the clock advances to the next event. What each process has for itself under MPI (torch's modes, the
global generators) is kept per task; see `globals`.
"""

from __future__ import annotations

import heapq
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import greenlet

from hpctrain.comm.virtual.globals import Generators, Globals, GlobalsBefore, Modes

LAST = 2**62  # added to the number of an event that comes after the others of its time


class DeadlockError(RuntimeError):
    """No task can continue; the message lists what each task waits for."""


class Task:
    """One coroutine. `waits`: what it waits for, for messages; `joiner`: the task that waits for its end."""

    waits: Any = None
    queued = False
    finished = False
    result: Any = None
    error: BaseException | None = None
    joiner: Task | None = None
    call: None = None  # a `Timer` has a function here
    inside = 0  # depth of collectives: until they return, no code runs that could use torch's modes or a generator
    modes: Modes | None = None  # saved; None while they are active
    generators: Generators | None = None  # saved when another task last needed its own

    def __init__(self, name: str) -> None:
        self.name = name
        self.glet: Any = None
        self.resume: Callable[[], Any]


class Timer:
    """A call at a time. Set `finished` to cancel it."""

    __slots__ = ("argument", "call", "finished")

    def __init__(self, call: Callable[[Any], None], argument: Any) -> None:
        self.call, self.argument, self.finished = call, argument, False


class Scheduler:
    """Runs tasks. `time`: virtual nanoseconds; `resumptions`: the number of switches between tasks."""

    def __init__(self, isolate_torch: bool = True) -> None:
        self.time = 0
        self.resumptions = 0
        self.current: Task | None = None
        torch = sys.modules.get("torch") if isolate_torch else None
        self._globals = Globals(torch) if torch is not None else None
        self._owner: Task | None = None  # whose generators are active
        self._ready: deque[Task] = deque()
        self._events: list[tuple[int, int, Task | Timer]] = []
        self._sequence = 0
        self._tasks: dict[Task, None] = {}  # those that have not ended, in the order of their start
        self._failed: list[Task] = []
        self._hub: Any = None
        self._starting: Task | None = None
        self._dying = False

    def run_all(self, courses: Sequence[tuple[str, Callable[[], Any]]]) -> list[Any]:
        """Run (name, function) pairs as tasks until they end; returns their results.

        Raises the first exception of a task, or DeadlockError.
        """
        self._hub, self._dying = greenlet.getcurrent(), False
        before, self._owner = GlobalsBefore(self._globals) if self._globals is not None else None, None
        tasks = [self.start(name, function) for name, function in courses]
        try:
            self._loop(tasks)
        finally:
            self._end()
            if before is not None:
                before.restore()
        return [task.result for task in tasks]

    def run_courses(self, courses: Sequence[Iterator[None]]) -> None:
        """Run generators as tasks, which is cheaper: each yields where it must wait until something wakes it. They use
        nothing of torch's state."""
        for course in courses:
            task = Task("a course")
            task.resume = partial(next, course, None)
            self.wake(task)
        while (following := self._next()) is not None:
            self.current, following.queued = following, False
            following.resume()

    def start(self, name: str, function: Callable[[], Any], inside: int = 0) -> Task:
        """Start a runnable task; it inherits torch's modes and the generators' states. `inside` 1: it uses neither."""
        task = Task(name)
        task.glet = greenlet.greenlet(lambda: self._body(task, function), parent=self._hub)
        task.resume = lambda: self._start_from_hub(task)
        task.inside = inside
        if self._globals is not None and not inside:
            task.modes, task.generators = self._globals.modes(), self._globals.copied()
        self._tasks[task] = None
        self.wake(task)
        return task

    def _body(self, task: Task, function: Callable[[], Any]) -> None:
        self.current, task.queued = task, False
        self.restore(task)
        try:
            task.result = function()
        except greenlet.GreenletExit:
            raise
        except BaseException as error:
            task.error = error
            self._failed.append(task)
        task.finished = True
        del self._tasks[task]
        if task.joiner is not None:
            self.wake(task.joiner)

    def _start_from_hub(self, task: Task) -> None:
        """A coroutine inherits the stack depth of its starter, so only the hub starts coroutines."""
        self._starting = task
        self._hub.switch()

    def wake(self, task: Task) -> None:
        """Make the task runnable, after those that already are."""
        if not task.queued:
            task.queued = True
            self._ready.append(task)

    def wake_later(self, time: int) -> None:
        """Wake the current task when the clock reaches `time`."""
        assert self.current is not None
        self.wake_at(time, self.current)

    def wake_at(self, time: int, task: Task) -> None:
        """Make the task runnable when the clock reaches `time`."""
        if time > self.time:
            self._sequence += 1
            heapq.heappush(self._events, (time, self._sequence, task))
        elif not task.queued:
            task.queued = True
            self._ready.append(task)

    def call_at(self, time: int, call: Callable[[Any], None], argument: Any = None, last: bool = False) -> Timer:
        """Call `call(argument)` when the clock reaches `time`, at the earliest when no task is runnable. `last`: after
        all other events of that time."""
        self._sequence += 1
        timer = Timer(call, argument)
        heapq.heappush(self._events, (time, self._sequence + (LAST if last else 0), timer))
        return timer

    def block(self, waits: Any) -> None:
        """Suspend the current task until another wakes it, perhaps for an outdated reason: recheck the condition then.

        `waits` is shown in a deadlock.
        """
        task = self.current
        assert task is not None
        if self._dying:
            raise greenlet.GreenletExit
        task.waits = waits
        if task.modes is None and self._globals is not None:
            task.modes = self._globals.modes()
        following = self._ready.popleft() if self._ready else self._next()
        if following is not task:
            (following.resume if following is not None else self._hub.switch)()
            self.current = task
            self.resumptions += 1
        task.queued = False
        if task.modes is not None and not task.inside:
            self.restore(task)

    def _next(self) -> Task | None:
        """The next runnable task, after advancing the clock if necessary; None if there will never be one."""
        if self._ready:
            return self._ready.popleft()
        while self._events:
            time, _, event = heapq.heappop(self._events)
            if event.finished:
                continue
            self.time = time
            if event.call is None:
                return event
            event.call(event.argument)
            if self._ready:
                return self._ready.popleft()
        return None

    def restore(self, task: Task) -> None:
        """Restore the task's modes, from when it was suspended, and its generators, if another task has used its own
        since then."""
        if task.modes is None or self._globals is None:
            return
        self._globals.set_modes(task.modes)
        task.modes = None
        if self._owner is not task:
            if self._owner is not None:
                self._owner.generators = self._globals.generators()
            self._owner = task
            if task.generators is not None:
                self._globals.set_generators(task.generators)

    def _loop(self, tasks: Sequence[Task]) -> None:
        left = list(tasks)
        while True:
            self._raise_failure(tasks)
            while left and left[-1].finished:
                left.pop()
            if not left:
                return
            following, self._starting = self._starting or self._next(), None
            if following is None:
                self._deadlock()
            elif following.glet:
                following.resume()
            else:
                following.resume = following.glet.switch
                following.resume()

    def _raise_failure(self, tasks: Sequence[Task]) -> None:
        """As under MPI, an error that every rank raises by itself may stay in its thread until joined."""
        for task in self._failed:
            assert task.error is not None
            if task in tasks or not getattr(task.error, "everywhere", False):
                raise task.error

    def _deadlock(self) -> None:
        if self._failed and self._failed[0].error is not None:
            raise self._failed[0].error
        waiting = [f"{task.name} waits for {_describe(task.waits)}" for task in self._tasks]
        raise DeadlockError("deadlock of virtual ranks: " + "; ".join(waiting))

    def _end(self) -> None:
        self._dying, self._owner = True, None
        for task in list(self._tasks):
            if task.glet:
                task.glet.throw()
        self._tasks.clear()
        self._ready.clear()
        self._events.clear()


def _describe(waits: Any) -> str:
    if isinstance(waits, (list, tuple)):
        return " or ".join(_describe(wait) for wait in waits)
    return str(waits)
