"""The stripe table: rows, live counts, pages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pool.errors import FormatError
from pool.format.geometry import geometry
from pool.table import DATA, META, NOWHERE, PAGE_ROWS, Stripe, StripeTable, row_dtype

SHAPE = geometry(2, 1, 4)


def make_row(number: int, kind: int = DATA, *, lost: bool = False) -> Stripe:
    places = ((0, number), (1, number + 1), (NOWHERE, 0) if lost else (2, number + 2))
    return Stripe(number, kind, SHAPE, places)


def pages_of(table: StripeTable) -> dict[int, memoryview]:
    rows = table.snapshot()
    return {
        n: memoryview(rows[n * PAGE_ROWS : (n + 1) * PAGE_ROWS].tobytes())
        for n in range(table.pages())
    }


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 6)), max_size=400))
def test_rows_come_and_go_like_in_a_dictionary(steps: list[tuple[int, int]]) -> None:
    table, model = StripeTable(3), dict[int, int]()
    for number, live in steps:
        if number in model:
            assert table.remove(number) == make_row(number)
            del model[number]
        else:
            table.add(make_row(number), live)
            model[number] = live
    assert len(table) == len(model)
    assert {row.id: table.live_of(row.id) for row in table.stripes()} == model
    assert sorted(table.dead()) == sorted(n for n, live in model.items() if not live)
    again = StripeTable.restore(3, pages_of(table))
    assert {row.id: row for row in again.stripes()} == {n: make_row(n) for n in model}
    again.add(make_row(1000), 1)
    assert again.get(1000) == make_row(1000)


def test_the_table_grows_by_pages_and_keeps_every_row() -> None:
    table = StripeTable(3)
    for number in range(1, 3 * PAGE_ROWS + 2):
        table.add(make_row(number), 1)
    assert table.pages() >= 4
    assert table.dirty == set(range(4))
    assert all(table.get(number) == make_row(number) for number in range(1, 3 * PAGE_ROWS + 2))


def test_kill_takes_one_block_per_name_and_never_more_than_there_are() -> None:
    table = StripeTable(3)
    table.add(make_row(5), 3)
    table.add(make_row(6), 1)
    table.kill([5, 6, 5])
    assert (table.live_of(5), table.live_of(6)) == (1, 0)
    assert table.dead() == [6]
    with pytest.raises(FormatError, match="stripe 6 counts fewer live blocks"):
        table.kill([6])
    table.add_live(5, 1)
    assert table.live_of(5) == 2
    with pytest.raises(AssertionError):
        table.add_live(5, -3)


def test_the_emptiest_come_first_and_only_those_of_the_kind() -> None:
    table = StripeTable(3)
    room = SHAPE.blocks
    for number, live in ((1, room), (2, 1), (3, 2), (4, 0)):
        table.add(make_row(number), live)
    table.add(make_row(9, META), 1)
    assert table.emptiest(10, DATA, 0.97) == [2, 3]
    assert table.emptiest(1, DATA, 0.97) == [2]
    assert table.emptiest(10, DATA, 1.01) == [2, 3, 1]
    assert table.emptiest(10, META, 0.97) == [9]
    assert StripeTable(3).emptiest(5, DATA, 1.0) == []


def test_places_leave_out_what_is_not_stored() -> None:
    table = StripeTable(3)
    table.add(make_row(1), 1)
    table.add(make_row(4, lost=True), 1)
    devices, slots = table.places()
    found = sorted(zip(devices.tolist(), slots.tolist(), strict=True))
    assert found == [(0, 1), (0, 4), (1, 2), (1, 5), (2, 3)]
    assert (table.on_device(2), table.on_device(0), table.on_device(7)) == (1, 2, 0)
    assert StripeTable(3).on_device(0) == 0


def test_damaged_pages_are_refused() -> None:
    table = StripeTable(3)
    table.add(make_row(1), 1)
    page = pages_of(table)[0]
    with pytest.raises(FormatError, match="wrong size"):
        StripeTable.restore(3, {0: page[:-1]})
    twice = np.frombuffer(page, row_dtype(3)).copy()
    twice[1] = twice[0]
    with pytest.raises(FormatError, match="two rows"):
        StripeTable.restore(3, {0: memoryview(twice.tobytes())})
    assert len(StripeTable.restore(3, {})) == 0
