"""The oracle itself: what it must accept, and what it must not."""

from __future__ import annotations

import pytest

from .oracle import SECTOR, Op, Oracle, Violation, stamp


def written(*ops: Op | None, sectors: int = 8) -> bytes:
    """A volume in which sector i shows what `ops[i]` wrote; None and zeroings are zeros."""
    parts = [
        bytes(SECTOR) if op is None or op.zero else stamp(op.id, at, at + 1)
        for at, op in enumerate(ops)
    ]
    return b"".join(parts) + bytes((sectors - len(ops)) * SECTOR)


def volume() -> Oracle:
    oracle = Oracle()
    oracle.add_volume("v", 8 * SECTOR)
    return oracle


def do(oracle: Oracle, first: int, end: int, *, zero: bool = False, after: Op | None = None) -> Op:
    """An operation that was issued and acknowledged before anything else was issued."""
    op = oracle.begin("v", first, end, zero=zero, after=after)
    oracle.acknowledge([op])
    return op


def test_any_prefix_is_right_and_a_gap_is_not() -> None:
    for kept in range(4):
        oracle = volume()
        ops = [do(oracle, i, i + 1) for i in range(3)]
        lost = oracle.check_recovered("v", written(*ops[:kept]), power_lost=True)
        assert lost == 3 - kept
    oracle = volume()
    ops = [do(oracle, i, i + 1) for i in range(3)]
    with pytest.raises(Violation, match="P3"):
        oracle.check_recovered("v", written(ops[0], None, ops[2]), power_lost=True)


def test_what_was_flushed_must_be_there_and_what_was_acknowledged_if_the_power_stayed() -> None:
    oracle = volume()
    first = do(oracle, 0, 1)
    oracle.flushed(oracle.tick())
    do(oracle, 1, 2)
    with pytest.raises(Violation, match="lost write 1"):
        oracle.check_recovered("v", written(), power_lost=True)
    with pytest.raises(Violation, match="lost write 2"):
        oracle.check_recovered("v", written(first), power_lost=False)
    assert oracle.check_recovered("v", written(first), power_lost=True) == 1


def test_old_content_under_a_newer_write_is_wrong() -> None:
    oracle = volume()
    old, new = do(oracle, 0, 2), do(oracle, 0, 1)
    later = do(oracle, 3, 4)
    with pytest.raises(Violation, match="overwritten"):
        oracle.check_recovered("v", written(old, old, None, later), power_lost=True)
    oracle.check_recovered("v", written(new, old, None, later), power_lost=True)


def test_concurrent_writes_take_either_order_but_not_both() -> None:
    oracle = volume()
    a, b = oracle.begin("v", 0, 2), oracle.begin("v", 0, 2)
    oracle.acknowledge([a, b])
    with pytest.raises(Violation, match="overwrite the other"):
        oracle.check_recovered("v", written(a, b), power_lost=True)
    oracle.check_recovered("v", written(a, a), power_lost=True)


def test_pieces_come_in_order() -> None:
    oracle = volume()
    front = oracle.begin("v", 0, 1)
    piece = oracle.begin("v", 1, 2, after=front)
    with pytest.raises(Violation):
        oracle.check_recovered("v", written(None, piece), power_lost=True)


def test_zeros_need_a_zeroing_that_can_be_last() -> None:
    oracle = volume()
    trim = do(oracle, 0, 2, zero=True)
    write = do(oracle, 0, 2)
    oracle.flushed(oracle.tick())
    with pytest.raises(Violation, match="zeros"):
        oracle.check_recovered("v", written(write, trim), power_lost=True)
    do(oracle, 1, 2, zero=True)
    oracle.check_recovered("v", written(write, None), power_lost=True)


def test_what_was_pinned_stays() -> None:
    oracle = volume()
    write = do(oracle, 0, 1)
    oracle.check_recovered("v", written(write), power_lost=True)
    with pytest.raises(Violation):
        oracle.check_recovered("v", written(), power_lost=True)


def test_reads_show_what_is_there_or_being_written() -> None:
    oracle = volume()
    old = do(oracle, 0, 1)
    begun = oracle.tick()
    new = oracle.begin("v", 0, 1)
    for op in (old, new):
        oracle.check_read("v", 0, written(op, sectors=1), begun)
    oracle.acknowledge([new])
    with pytest.raises(Violation, match="P4"):
        oracle.check_read("v", 0, written(old, sectors=1), oracle.tick())


def test_foreign_bytes_and_refused_writes_are_wrong() -> None:
    oracle = volume()
    refused = oracle.begin("v", 0, 1)
    oracle.refuse("v", [refused])
    with pytest.raises(Violation, match="refused"):
        oracle.check_recovered("v", written(refused), power_lost=True)
    with pytest.raises(Violation, match="nobody wrote"):
        oracle.check_recovered("v", b"\1" + bytes(8 * SECTOR - 1), power_lost=True)


def test_zeros_may_come_from_a_later_zeroing_than_the_first_that_fits() -> None:
    """Of two that were never answered only the second took effect: the first covers more."""
    oracle = volume()
    old = do(oracle, 0, 2)
    oracle.begin("v", 0, 2, zero=True)
    second = oracle.begin("v", 0, 1, zero=True)
    assert oracle.check_recovered("v", written(second, old), power_lost=False) == 0


def test_one_zeroing_may_be_what_is_seen_here_and_not_there() -> None:
    """A later zeroing covers part of the first one: what is seen beside it was written between."""
    oracle = volume()
    first = oracle.begin("v", 0, 3, zero=True)
    seen = do(oracle, 2, 3)
    between = do(oracle, 0, 1)
    oracle.acknowledge([first])
    second = do(oracle, 0, 1, zero=True)
    assert between.acked < second.issued
    assert oracle.check_recovered("v", written(second, first, seen), power_lost=False) == 0


def test_a_zeroing_whose_first_piece_is_not_there_is_not_what_is_seen() -> None:
    """The pieces of one that was never answered would fit, but for the first of them."""
    oracle = volume()
    old = do(oracle, 0, 2)
    front = oracle.begin("v", 1, 2, zero=True)
    oracle.begin("v", 0, 1, zero=True, after=front)
    later = do(oracle, 0, 1, zero=True)
    assert oracle.check_recovered("v", written(later, old), power_lost=False) == 0


def test_of_two_zeroings_in_a_circle_the_one_goes_that_the_other_can_be() -> None:
    """The rear piece of the first never took effect, and what is seen there is the second's; its
    front piece did, and nothing else made the zeros under it."""
    oracle = volume()
    base = do(oracle, 0, 8)
    front = oracle.begin("v", 2, 3, zero=True)
    oracle.begin("v", 3, 7, zero=True, after=front)
    second = do(oracle, 5, 7, zero=True)
    ops = [base, base, front, base, base, second, second, base]
    assert oracle.check_recovered("v", written(*ops), power_lost=False) == 0
