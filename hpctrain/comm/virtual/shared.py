"""Objects shared by virtual ranks: groups, meetings, and arenas."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.comm.base import Arena, Buffer
from hpctrain.comm.virtual.requests import Boxes
from hpctrain.comm.virtual.scheduler import Task


class VirtualGroup:
    """State shared by the ranks of one communicator."""

    def __init__(self, nodes_of_run: Sequence[int], members: tuple[int, ...], number: int) -> None:
        self.members = members
        self.number = number
        hosts = [nodes_of_run[rank] for rank in members]
        order = {host: index for index, host in enumerate(dict.fromkeys(hosts))}
        self.nodes = tuple(order[host] for host in hosts)
        on_node: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            on_node.setdefault(node, []).append(rank)
        self.local_ranks = {node: tuple(ranks) for node, ranks in on_node.items()}
        self.all_ranks = tuple(range(len(members)))
        self.apart = len(order) == len(members)
        self.boxes: Boxes = defaultdict(deque)
        self.meetings: dict[Any, Meeting] = {}
        self.loop: Any = None  # see `loops.loop_of`


class Meeting:
    """Values that ranks of a group share temporarily: deleted when all of them have taken it."""

    def __init__(self) -> None:
        self.values: dict[int, Any] = {}
        self.tasks: list[Task] = []
        self.taken = 0


@dataclass(frozen=True, slots=True)
class Absentees:
    """Who is missing at a meeting, for a message: there are many ranks, and few messages."""

    what: str
    members: tuple[int, ...]
    ranks: Sequence[int]
    meeting: Meeting

    def __str__(self) -> str:
        return f"{self.what} with ranks {[self.members[r] for r in self.ranks if r not in self.meeting.values]}"


class VirtualArena(Arena):
    """`epochs`: how often each rank of the node has notified; `waiting`: the tasks that wait for other ranks."""

    def __init__(self, parts: list[Buffer], index: int, epochs: list[int], waiting: list[Task], id: int) -> None:
        self.parts = parts
        self.index = index
        self.mine = parts[index]
        self.epochs = epochs
        self.waiting = waiting
        self.id = id

    def free(self) -> None:
        self.parts = []
        self.mine = None
