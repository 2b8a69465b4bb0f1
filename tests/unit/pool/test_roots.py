"""Which root is the pool's, and with how many members it may be opened."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.errors import PoolError
from pool.format.geometry import layout
from pool.format.superblock import Superblock, digest, encode_root
from pool.roots import Found, active, check_enough, choose_root, quorum

WHERE = layout(2 << 20, 64 << 10, 4)


def make_root(
    generation: int, *, members: int = 5, gone: tuple[int, ...] = (), parity: int = 2,
    writer: str = "w", name: str = "tank",
) -> dict[str, Any]:  # fmt: skip
    rows = [
        {"index": i, "url": f"disk{i}", "state": "gone" if i in gone else "active"}
        for i in range(members)
    ]
    code = {"data": 2, "parity": parity}
    return {
        "name": name, "generation": generation, "members": rows, "code": code, "writer": writer,
    }  # fmt: skip


def found_on(device: int, root: dict[str, Any], pool: bytes = b"p" * 16) -> Found:
    block = Superblock(
        pool, bytes([device]) * 16, device, WHERE, root["generation"], root,
        digest(encode_root(root)),
    )  # fmt: skip
    return Found(device, 0, block)


@pytest.mark.parametrize(
    ("members", "parity", "wanted"),
    [(3, 1, 2), (4, 1, 3), (5, 1, 3), (2, 1, 2), (6, 2, 4), (5, 2, 3), (3, 2, 3), (12, 3, 7)],
)
def test_quorum(members: int, parity: int, wanted: int) -> None:
    assert quorum(members, parity) == wanted


@given(st.integers(1, 40), st.integers(0, 8))
def test_two_quorums_always_meet(members: int, parity: int) -> None:
    assert 2 * quorum(members, parity) > members


def test_the_newest_root_is_chosen_whatever_the_order() -> None:
    old, new = make_root(6), make_root(7)
    found = [found_on(0, old), found_on(1, new), found_on(2, new)]
    for order in itertools.permutations(found):
        assert choose_root(order).root == new


def test_a_root_on_one_device_only_is_good_enough_if_no_other_claims_its_generation() -> None:
    assert choose_root([found_on(0, make_root(6)), found_on(4, make_root(7))]).generation == 7


def test_of_a_fork_the_one_with_a_quorum_is_chosen() -> None:
    left, right = make_root(7, writer="a"), make_root(7, writer="b")
    found = [found_on(i, left if i < 3 else right) for i in range(5)]
    for order in (found, found[::-1]):
        assert choose_root(order).root == left


def test_the_quorum_of_a_fork_counts_only_its_own_members() -> None:
    """Three of four that expelled one outweigh the one that does not know it."""
    left = make_root(7, members=4, parity=1, gone=(3,), writer="a")
    right = make_root(7, members=4, parity=1, writer="b")
    found = [found_on(0, left), found_on(1, left), found_on(3, right)]
    assert choose_root(found).root == left
    # The expelled device's own copy is no vote.
    found = [found_on(0, left), found_on(3, left), found_on(1, right)]
    with pytest.raises(PoolError):
        choose_root(found)


def test_a_fork_without_a_quorum_is_for_the_operator_to_settle() -> None:
    left, right = make_root(7, writer="a"), make_root(7, writer="b")
    found = [found_on(0, left), found_on(1, left), found_on(2, right), found_on(3, right)]
    with pytest.raises(PoolError, match="two histories .* generation 7: leave out the devices"):
        choose_root(found)


def test_an_old_fork_does_not_matter_any_more() -> None:
    found = [
        found_on(0, make_root(7, writer="a")),
        found_on(1, make_root(7, writer="b")),
        found_on(2, make_root(8)),
    ]
    assert choose_root(found).generation == 8


def test_no_pool_and_several_pools_are_refused() -> None:
    with pytest.raises(PoolError, match="none of the devices belongs to a pool: check the URLs"):
        choose_root([])
    found = [found_on(0, make_root(1)), found_on(1, make_root(1, name="other"), b"q" * 16)]
    with pytest.raises(PoolError, match=r"different pools \(other, tank\): name one's"):
        choose_root(found)


@pytest.mark.parametrize(
    ("parity", "gone", "present", "writable", "enough"),
    [
        (2, (), {0, 1, 2, 3, 4}, True, True),
        (2, (), {0, 1, 2}, True, True),
        (2, (), {0, 1}, True, False),
        (2, (), {0, 1}, False, True),
        (2, (), set(), False, False),
        (2, (3, 4), {0, 1, 2}, True, True),
        (2, (3, 4), {0, 1}, True, False),
        # A member that the root does not count is no help.
        (2, (3, 4), {0, 1, 3, 4}, True, False),
        (1, (), {0, 1, 2, 3}, True, True),
        (1, (), {0, 1, 2}, True, False),
    ],
)
def test_check_enough(
    parity: int, gone: tuple[int, ...], present: set[int], writable: bool, enough: bool
) -> None:
    root = make_root(1, gone=gone, parity=parity)
    if enough:
        check_enough(root, present, writable=writable)
        return
    with pytest.raises(PoolError, match="devices found, . are needed; missing: ") as caught:
        check_enough(root, present, writable=writable)
    for index in active(root):
        assert (f"disk{index}" in str(caught.value)) == (index not in present)
