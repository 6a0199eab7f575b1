"""A task queue: results in the order of the tasks, from any executor, with a bounded number of tasks under way.

An executor is what `concurrent.futures` calls so: processes of this machine (`processes`), this process itself
(`Inline`), or other ranks (`hpctrain.comm.mpi.executor`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


def ordered(
    executor: Executor, function: Callable[[Task], Result], tasks: Iterable[Task], ahead: int
) -> Iterator[Result]:
    """The results of `function` for each task, in their order. At most `ahead` tasks are under way or wait to be taken.

    Raises what a task raised; later tasks are then cancelled.
    """
    under_way: deque[Future[Result]] = deque()
    try:
        for task in tasks:
            under_way.append(executor.submit(function, task))
            if len(under_way) >= ahead:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        for future in under_way:
            future.cancel()


class Inline(Executor):
    """Computes each task in the calling process, at once."""

    def submit(
        self, fn: Callable[Parameters, Result], /, *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Future[Result]:
        future: Future[Result] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def processes(count: int, *preload: str) -> Iterator[Executor]:
    """An executor over `count` processes of this machine, which end with this one, however it ends.

    They are forked from a server that has loaded the modules `preload`, never from this process, whose MPI and threads
    would not survive that.
    """
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with ProcessPoolExecutor(count, context, _begin) as executor:
        yield executor


def _begin() -> None:
    """Begin a process: interruptions are for its parent to handle, and it must not outlive a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
