"""Collectives built from point-to-point messages, the same for virtual and real ranks.

Each works in place on a `group` (ranks of the communicator, including this rank) of any size, with a buffer of any
length (even shorter than the group). Sums are deterministic: the same group gives the same bits, identical on all its
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from hpctrain.comm.base import Buffer, Communicator, Operation, Tag
from hpctrain.errors import HpctrainError

COMBINE: dict[str, Any] = {"sum": np.add, "max": np.maximum, "min": np.minimum}


def even_bounds(length: int, parts: int) -> list[int]:
    """`parts` + 1 bounds that cut `length` into slices whose sizes differ by at most one."""
    return [length * i // parts for i in range(parts + 1)]


def ring(comm: Communicator, buffer: Buffer, operation: Operation, group: Sequence[int]) -> None:
    """Ring all-reduce (Patarasuk and Yuan 2009): 2 (p - 1) steps, 2 (1 - 1/p) buffers sent per rank."""
    bounds = even_bounds(buffer.size, len(group))
    ring_reduce_scatter(comm, buffer, bounds, operation, group)
    ring_all_gather(comm, buffer, bounds, group)


def ring_reduce_scatter(
    comm: Communicator, buffer: Buffer, bounds: Sequence[int], operation: Operation, group: Sequence[int]
) -> None:
    """On return, the i-th rank of the group holds the reduced buffer[bounds[i]:bounds[i + 1]]."""
    size, me = len(group), group.index(comm.rank)
    left, right = group[me - 1], group[(me + 1) % size]
    combine, scratch = COMBINE[operation], _scratch(buffer, max(b - a for a, b in _pairs(bounds)))
    give = _part(buffer, bounds, me - 1)
    for step in range(size - 1):
        take = _part(buffer, bounds, me - step - 2)
        part = scratch[: take.size]
        _exchange(comm, give, right, part, left)
        combine(take, part, out=take)
        give = take


def ring_all_gather(comm: Communicator, buffer: Buffer, bounds: Sequence[int], group: Sequence[int]) -> None:
    """The i-th rank of the group provides buffer[bounds[i]:bounds[i + 1]]; all end with the whole buffer."""
    size, me = len(group), group.index(comm.rank)
    left, right = group[me - 1], group[(me + 1) % size]
    give = _part(buffer, bounds, me)
    for step in range(size - 1):
        take = _part(buffer, bounds, me - step - 1)
        _exchange(comm, give, right, take, left)
        give = take


def halving_doubling(comm: Communicator, buffer: Buffer, operation: Operation, group: Sequence[int]) -> None:
    """Recursive halving, then doubling (Rabenseifner 2004): 2 log2 p steps.

    If the group size is not a power of two, the first ranks pair up before and after (Thakur et al. 2005, section 4.5).
    """
    me, combine = group.index(comm.rank), COMBINE[operation]
    power = 1 << (len(group).bit_length() - 1)
    extra = len(group) - power
    scratch = _scratch(buffer, buffer.size)
    if me < 2 * extra and me % 2 == 0:
        _exchange(comm, buffer, group[me + 1], None, None)
        _exchange(comm, None, None, buffer, group[me + 1])
        return
    if me < 2 * extra:
        _exchange(comm, None, None, scratch, group[me - 1])
        combine(buffer, scratch, out=buffer)
    place = me // 2 if me < 2 * extra else me - extra
    partner_of = [group[2 * i + 1] if i < extra else group[i + extra] for i in range(power)]
    _halve_and_double(comm, buffer, scratch, combine, place, partner_of)
    if me < 2 * extra:
        _exchange(comm, buffer, group[me - 1], None, None)


def _halve_and_double(
    comm: Communicator, buffer: Buffer, scratch: Buffer, combine: Any, place: int, ranks: Sequence[int]
) -> None:
    low, high, trail = 0, buffer.size, []
    distance = len(ranks) // 2
    while distance:
        middle, partner = low + (high - low) // 2, ranks[place ^ distance]
        keep = (low, middle) if not place & distance else (middle, high)
        give = (middle, high) if not place & distance else (low, middle)
        part = scratch[keep[0] : keep[1]]
        _exchange(comm, buffer[give[0] : give[1]], partner, part, partner)
        into = buffer[keep[0] : keep[1]]
        combine(into, part, out=into)
        trail.append((partner, keep, give))
        (low, high), distance = keep, distance // 2
    for partner, keep, give in reversed(trail):
        _exchange(comm, buffer[keep[0] : keep[1]], partner, buffer[give[0] : give[1]], partner)


def tree(comm: Communicator, buffer: Buffer, operation: Operation, group: Sequence[int]) -> None:
    """Binomial tree to the first rank of the group and back: 2 log2 p steps of the whole buffer; for short buffers."""
    tree_reduce(comm, buffer, operation, group)
    tree_broadcast(comm, buffer, group)


def tree_reduce(comm: Communicator, buffer: Buffer, operation: Operation, group: Sequence[int]) -> None:
    """The first rank of the group ends with the reduced buffer; the other ranks' buffers are undefined."""
    size, me, distance = len(group), group.index(comm.rank), 1
    scratch = _scratch(buffer, buffer.size)
    while distance < size:
        if me & distance:
            _exchange(comm, buffer, group[me - distance], None, None)
            return
        if me + distance < size:
            _exchange(comm, None, None, scratch, group[me + distance])
            COMBINE[operation](buffer, scratch, out=buffer)
        distance *= 2


def tree_broadcast(comm: Communicator, buffer: Buffer, group: Sequence[int]) -> None:
    """Broadcast from the first rank of the group to all."""
    size, me, distance = len(group), group.index(comm.rank), 1
    while distance < size:
        distance *= 2
    distance //= 2
    received = me == 0
    while distance:
        if received and me + distance < size and me % (2 * distance) == 0:
            _exchange(comm, buffer, group[me + distance], None, None)
        elif not received and me % (2 * distance) == distance:
            _exchange(comm, None, None, buffer, group[me - distance])
            received = True
        distance //= 2


def hierarchical(comm: Communicator, buffer: Buffer, operation: Operation, group: Sequence[int]) -> None:
    """Each node reduces to its first rank, a ring between these, and back: a node's link carries the bytes once."""
    nodes: dict[int, list[int]] = {}
    for rank in group:
        nodes.setdefault(comm.nodes[rank], []).append(rank)
    local = nodes[comm.nodes[comm.rank]]
    tree_reduce(comm, buffer, operation, local)
    if comm.rank == local[0]:
        ring(comm, buffer, operation, [ranks[0] for ranks in nodes.values()])
    tree_broadcast(comm, buffer, local)


def dissemination_barrier(comm: Communicator, group: Sequence[int]) -> None:
    """log2 p rounds of empty messages (Hensgen et al. 1988)."""
    size, me, distance = len(group), group.index(comm.rank), 1
    token, echo = np.zeros(1, np.uint8), np.zeros(1, np.uint8)
    while distance < size:
        _exchange(comm, token, group[(me + distance) % size], echo, group[(me - distance) % size])
        distance *= 2


Algorithm = Callable[[Communicator, Buffer, Operation, Sequence[int]], None]
ALL_REDUCE: dict[str, Algorithm] = {
    "ring": ring,
    "halving_doubling": halving_doubling,
    "tree": tree,
    "hierarchical": hierarchical,
}


def all_reduce_by(name: str) -> Algorithm:
    """The algorithm of that name; raises HpctrainError for an unknown name."""
    if name not in ALL_REDUCE:
        raise HpctrainError(f"all-reduce algorithm {name!r}: expected library, {', '.join(ALL_REDUCE)}")
    return ALL_REDUCE[name]


def _exchange(
    comm: Communicator, out: Buffer | None, dest: int | None, into: Buffer | None, source: int | None
) -> None:
    """Send and receive, skipping empty buffers (both sides know the lengths)."""
    sending = out is not None and out.size > 0
    receiving = into is not None and into.size > 0
    if sending and receiving:
        assert dest is not None and source is not None
        comm.sendrecv(out, dest, into, source, Tag.COLLECTIVE)
    elif sending:
        assert dest is not None
        comm.send(out, dest, Tag.COLLECTIVE)
    elif receiving:
        assert source is not None
        comm.recv(into, source, Tag.COLLECTIVE)


def _part(buffer: Buffer, bounds: Sequence[int], index: int) -> Buffer:
    index %= len(bounds) - 1
    return buffer[bounds[index] : bounds[index + 1]]


def _scratch(buffer: Buffer, length: int) -> Buffer:
    """An uninitialised buffer of `length` elements with the same dtype, on the same device."""
    return np.empty_like(buffer, shape=(length,))


def _pairs(bounds: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(bounds, bounds[1:], strict=False))
