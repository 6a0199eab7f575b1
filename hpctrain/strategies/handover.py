"""How the state of strategies that agree in rounds is dealt out to its owners, and gathered from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain.comm.base import BFLOAT16, Communicator
from hpctrain.replica.state import Section, State, recv_state, start_send_state

if TYPE_CHECKING:
    from hpctrain.replica.layout import Layout
    from hpctrain.strategies.exchange import Exchange


def dealt(comm: Communicator, state: State | None, exchange: Exchange, layout: Layout) -> State | None:
    """This rank's stretch of the state that rank 0 holds; None if there is none. Collective."""
    if not comm.broadcast_json(state is not None):
        return None
    if state is None:
        return recv_state(comm, 0)
    stretches = exchange.stretches()
    parts = [state.cut(*bounds, [slot.name for slot in layout.slots_in(*bounds)]) for bounds in stretches]
    sends = [start_send_state(comm, parts[rank], rank) for rank in range(1, comm.size)]
    comm.wait_all([request for started in sends for request in started])
    return parts[0]


def mean_moments(peers: Communicator | None, state: State) -> State:
    """The optimizer state where every worker has its own: the mean over those that own the same stretch, and the first
    one's plain numbers. `peers`: these; None: there is only one. Collective over them."""
    if peers is None:
        return state
    rows = peers.gather_json({path: [list(a.shape), str(a.dtype)] for path, a in state.arrays()})
    here = dict(state.arrays())
    for path, (shape, dtype) in sorted({path: row[path] for row in reversed(rows) for path in row}.items()):
        array = here.get(path, _zeros(shape, dtype))
        peers.all_reduce(array.reshape(-1))
        array /= peers.size
        state.place(path, array)
    numbers = peers.gather_json(state.optimizer.numbers)
    state.optimizer.numbers = next((found for found in numbers if found), {})
    return state


def fill(section: Section, saved: Section) -> None:
    """Write the saved values into the arrays and numbers of `section`."""
    for key, array in section.flat.items():
        if key in saved.flat:
            array[...] = saved.flat[key]
    for name, own in section.named.items():
        for key, array in own.items():
            if key in saved.named.get(name, {}):
                array[...] = saved.named[name][key]
    for name, numbers in saved.numbers.items():
        section.numbers.setdefault(name, {}).update(numbers)


def _zeros(shape: list[int], dtype: str) -> Any:
    return np.zeros(shape, BFLOAT16 if dtype == "bfloat16" else dtype)
