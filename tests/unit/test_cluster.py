"""Roles and devices: pure functions, tested without ranks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.cluster import (
    Role,
    assign_roles,
    device_for,
    share_of_cores,
    threads_for,
)
from hpctrain.errors import ClusterError


@pytest.mark.parametrize(
    ("nodes", "servers", "chosen"),
    [
        ([0, 0, 0, 0], 1, (3,)),
        ([0, 0, 0, 0], 3, (1, 2, 3)),
        ([0, 0, 1, 1], 1, (3,)),
        ([0, 0, 1, 1], 2, (1, 3)),
        ([0, 0, 1, 1], 3, (1, 2, 3)),
        ([0, 1, 0, 1], 2, (2, 3)),
        ([0, 0, 1, 1, 2, 2], 4, (1, 3, 4, 5)),
        ([0, 1, 1, 1], 2, (2, 3)),  # node 0 has only rank 0
        ([0, 0, 0, 1], 2, (2, 3)),
        ([0], 0, ()),
    ],
)
def test_dedicated_servers(nodes: list[int], servers: int, chosen: tuple[int, ...]) -> None:
    roles = assign_roles(nodes, servers, colocated=False)
    assert roles.servers == chosen
    assert roles.workers == tuple(rank for rank in range(len(nodes)) if rank not in chosen)


@pytest.mark.parametrize(
    ("nodes", "servers", "chosen"),
    [([0, 0, 0], 1, (2,)), ([0, 0, 1, 1], 2, (1, 3)), ([0, 0, 1, 1], 4, (0, 1, 2, 3)), ([0], 1, (0,))],
)
def test_colocated_servers(nodes: list[int], servers: int, chosen: tuple[int, ...]) -> None:
    roles = assign_roles(nodes, servers, colocated=True)
    assert (roles.servers, roles.workers) == (chosen, tuple(range(len(nodes))))
    assert {roles.of(rank) for rank in range(len(nodes))} == {Role.WORKER}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24), st.data())
def test_servers_are_spread_over_nodes(nodes: list[int], data: st.DataObject) -> None:
    colocated = data.draw(st.booleans())
    servers = data.draw(st.integers(0, len(nodes) - (not colocated)))
    roles = assign_roles(nodes, servers, colocated)
    assert len(roles.servers) == servers
    assert roles.servers == tuple(sorted(set(roles.servers)))
    assert roles.of(0) is Role.WORKER
    if not colocated:
        assert sorted(roles.workers + roles.servers) == list(range(len(nodes)))
    room = Counter(nodes)
    if not colocated:
        room[nodes[0]] -= 1
    mine = Counter(nodes[rank] for rank in roles.servers)
    most = max(mine.values(), default=0)
    assert all(mine[node] >= most - 1 - (not colocated) or mine[node] == room[node] for node in room)


@pytest.mark.parametrize(
    ("size", "servers", "colocated", "message"),
    [
        (4, 4, False, r"strategy.servers = 4: of 4 ranks at most 3 can be servers, since rank 0 is always a worker"),
        (1, 1, False, r"of 1 rank at most 0 can be servers"),
        (4, 9, False, r"at most 3 .*; start more ranks or lower strategy.servers"),
        (2, 3, True, r"of 2 ranks at most 2 can have a server beside it"),
    ],
)
def test_too_many_servers(size: int, servers: int, colocated: bool, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        assign_roles([0] * size, servers, colocated)


def test_unbound_ranks_share_the_cores() -> None:
    node = set(range(8))
    shares = [share_of_cores(node, [node] * ranks) for ranks in (1, 3, 8, 100)]
    assert [threads_for(share, "auto") for share in shares] == [8, 2, 1, 1]
    assert [share < 1 for share in shares] == [False, False, False, True]
    assert threads_for(shares[1], 5) == 5


def test_bound_rank_has_its_cores_to_itself() -> None:
    bound = [{0, 1, 2, 3}, {4, 5, 6, 7}, {8}, {8}]
    assert [share_of_cores(mine, bound) for mine in bound] == [4, 4, 0.5, 0.5]


def test_devices() -> None:
    assert device_for("cpu", 0, 4) == device_for("auto", 3, 0) == "cpu"
    assert [device_for("auto", rank, 2) for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    assert device_for("cuda", 5, 4) == "cuda:1"
    with pytest.raises(ClusterError, match='device = "cuda": torch finds no GPU'):
        device_for("cuda", 0, 0)
