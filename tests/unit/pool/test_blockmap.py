"""Leaves and layer maps against plain dictionaries: both forms, checkpoints, paging."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pool.blockmap import LEAF_BLOCKS, LEAF_SHIFT, SPARSE_MAX, LayerMap, Leaf
from pool.format import page
from pool.format.location import HOLE
from pool.format.page import Pointer

blocks = st.integers(0, LEAF_BLOCKS - 1)
locations = st.one_of(st.just(HOLE), st.integers(1, 2**64 - 1))
changes = st.lists(
    st.one_of(
        st.tuples(blocks, st.lists(locations, min_size=1, max_size=1)),
        st.tuples(blocks, st.lists(locations, min_size=1, max_size=60)),
        st.tuples(st.integers(0, 112), st.lists(locations, min_size=300, max_size=400)),
    ),
    max_size=12,
)


@given(changes, st.integers(0, 12))
def test_both_forms_of_a_leaf_do_the_same(
    steps: list[tuple[int, list[int]]], dense_after: int
) -> None:
    leaf, model = Leaf(), dict[int, tuple[int, int]]()
    for number, (first, found) in enumerate(steps):
        if number == dense_after:
            leaf.make_dense()
        found = found[: LEAF_BLOCKS - first]
        old = [model.get(first + i, (HOLE, 0))[0] for i in range(len(found))]
        crcs = [location % 2**32 for location in found]
        if len(found) == 1:
            assert leaf.set(first, found[0], crcs[0]) == old[0]
        else:
            assert leaf.set_run(first, array("Q", found), array("I", crcs)).tolist() == old
        for i, location in enumerate(found):
            model.pop(first + i, None)
            if location != HOLE:
                model[first + i] = (location, crcs[i])
        assert leaf.count == len(model)
        assert [leaf.get(block)[0] for block in range(LEAF_BLOCKS)] == [
            model.get(block, (HOLE, 0))[0] for block in range(LEAF_BLOCKS)
        ]
    rows = [(block, *model[block]) for block in sorted(model)]
    assert list(leaf.mapped()) == rows
    form, body = leaf.encode()
    again = Leaf.decode(form, memoryview(body))
    assert list(again.mapped()) == rows
    assert again.count == len(rows)
    assert (form == page.FORM_DENSE) == (len(rows) > SPARSE_MAX)
    assert bool(body) == bool(rows)


class MapModel(RuleBasedStateMachine):
    """A layer map with checkpoints that succeed or fail and leaves that are paged in and out.

    `disk` has the page of every pointer; a dictionary of blocks is the truth.
    """

    def __init__(self) -> None:
        super().__init__()
        self.map = LayerMap(1)
        self.now: dict[int, int] = {}
        self.disk: dict[Pointer, dict[int, int]] = {}
        self.live: set[Pointer] = set()
        self.frozen: dict[int, int] | None = None
        self.todo: list[int] = []
        self.fresh: dict[int, Pointer] = {}
        self.serial = 1

    leaves = st.integers(0, 5)

    def _load(self, number: int) -> None:
        pointer = self.map.pointers.get(number)
        if number in self.map.leaves or pointer is None:
            return
        leaf = Leaf()
        for block, location in self.disk[pointer].items():
            leaf.set(block, location, 0)
        self.map.install(number, leaf, pointer)

    @rule(number=leaves, block=blocks)
    def write(self, number: int, block: int) -> None:
        self._load(number)
        self.serial += 1
        self.map.touch(number).set(block, self.serial, 0)
        self.now[(number << LEAF_SHIFT) + block] = self.serial

    @rule(number=leaves)
    def remove(self, number: int) -> None:
        self._load(number)
        _, pointer = self.map.remove(number)
        if pointer is not None:
            self.live.remove(pointer)
        first = number << LEAF_SHIFT
        self.now = {b: at for b, at in self.now.items() if not first <= b < first + LEAF_BLOCKS}

    @precondition(lambda self: self.frozen is None)
    @rule()
    def freeze(self) -> None:
        self.todo = sorted(self.map.freeze())
        self.frozen, self.fresh = dict(self.now), {}

    @precondition(lambda self: self.todo)
    @rule()
    def write_page(self) -> None:
        """The page shows the leaf as it was at the freeze, whatever happened since."""
        assert self.frozen is not None
        number = self.todo.pop()
        first = number << LEAF_SHIFT
        expected = {
            b - first: at for b, at in self.frozen.items() if first <= b < first + LEAF_BLOCKS
        }
        found = self.map.frozen_page(number)
        if found is None:
            assert expected == {}
            return
        leaf = Leaf.decode(found[0], memoryview(found[1]))
        assert {block: location for block, location, _ in leaf.mapped()} == expected
        self.serial += 1
        pointer = Pointer(self.serial, 0, 0, 0)
        self.disk[pointer] = expected
        self.fresh[number] = pointer

    @precondition(lambda self: self.frozen is not None and not self.todo)
    @rule(committed=st.booleans())
    def thaw(self, committed: bool) -> None:
        self.live |= set(self.fresh.values()) if committed else set()
        for pointer in self.map.thaw(self.fresh if committed else None):
            self.live.remove(pointer)
        self.frozen = None

    @rule(budget=st.integers(0, 5000))
    def evict(self, budget: int) -> None:
        before = self.map.memory
        freed = self.map.evict(budget)
        assert self.map.memory == before - freed

    @invariant()
    def every_block_is_found(self) -> None:
        found: dict[int, int] = {}
        assert self.map.dirty <= set(range(6))
        for number in self.map.present(0, 1 << 20):
            leaf = self.map.leaves.get(number)
            first = number << LEAF_SHIFT
            if leaf is None:
                page_of = self.disk[self.map.pointers[number]]
                found |= {first + block: location for block, location in page_of.items()}
            else:
                found |= {first + block: location for block, location, _ in leaf.mapped()}
        assert found == self.now

    @invariant()
    def every_pointer_is_live_and_no_other_page(self) -> None:
        assert set(self.map.pointers.values()) == self.live

    @invariant()
    def missing_and_present_agree_however_they_are_asked(self) -> None:
        wide = self.map.missing(0, 1 << 30)
        assert wide == [n for n in range(6) if self.map.missing(n << LEAF_SHIFT, 1)]
        assert self.map.present(0, 1 << 30) == [
            n for n in range(6) if self.map.present(n << LEAF_SHIFT, LEAF_BLOCKS)
        ]


TestMapModel = MapModel.TestCase
TestMapModel.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
