"""Free slots and the gate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.gate import Gate
from pool.slots import SPARE, FreeSlots


@given(st.integers(1, 30), st.sets(st.integers(0, 29)), st.lists(st.integers(-1, 29), max_size=80))
def test_which_slot_is_taken(total: int, taken: set[int], steps: list[int]) -> None:
    """The lowest of those written before, but no more than leave `SPARE` of them."""
    slots = FreeSlots(total)
    used = {slot for slot in taken if slot < total}
    slots.occupy(used)
    written = set(range(max(min(SPARE, total), max(used, default=-1) + 1)))
    for number, step in enumerate(steps):
        free = set(range(total)) - used
        spare, fresh = free & written, free - written
        beyond = number % 3 > 0
        if step in used:
            slots.give(step, written=number % 4 > 0)
            used.remove(step)
            written = written | {step} if number % 4 else written - {step}
        elif spare or (fresh and beyond):
            slot = slots.take(beyond=beyond)
            if beyond and fresh and len(spare) <= SPARE:
                # Any that was tried before comes before one that was not.
                assert slot in fresh
                written |= {slot}
            else:
                assert slot == min(spare)
            used.add(slot)
        else:
            with pytest.raises(IndexError):
                slots.take(beyond=beyond)
        spare = written - used
        assert (slots.used, slots.free, slots.spare) == (len(used), total - len(used), len(spare))


def test_a_slot_cannot_be_given_twice() -> None:
    slots = FreeSlots(4)
    slot = slots.take()
    slots.give(slot)
    with pytest.raises(KeyError):
        slots.give(slot)


def test_the_gate_runs_at_once_when_nobody_is_inside() -> None:
    gate, done = Gate(), list[str]()
    gate.defer(lambda: done.append("a"))
    assert done == ["a"]
    assert gate.waiting == 0


def test_the_gate_waits_for_those_who_were_inside_and_for_nobody_else() -> None:
    gate, done = Gate(), list[str]()
    with gate.inside():
        gate.defer(lambda: done.append("first"))
        late = gate.inside()
        late.__enter__()
        gate.defer(lambda: done.append("second"))
        assert (done, gate.waiting) == ([], 2)
    assert done == ["first"]
    late.__exit__(None, None, None)
    assert done == ["first", "second"]


@given(st.lists(st.integers(-1, 5), max_size=60))
def test_the_gate_against_its_definition(steps: list[int]) -> None:
    """-1 defers; any other number enters or leaves as that reader."""
    gate = Gate()
    readers: dict[int, object] = {}
    waits: list[tuple[int, set[object]]] = []
    done: list[int] = []
    for number, step in enumerate(steps):
        if step == -1:
            waits.append((number, set(readers.values())))
            gate.defer(lambda number=number: done.append(number))  # type: ignore[misc]
        elif step in readers:
            pin = readers.pop(step)
            pin.__exit__(None, None, None)  # type: ignore[attr-defined]
        else:
            readers[step] = pin = gate.inside()
            pin.__enter__()
        inside = set(readers.values())
        assert done == [n for n, pins in waits if not pins & inside]
        assert gate.waiting == len(waits) - len(done)
