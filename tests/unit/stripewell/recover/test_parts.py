"""The pure parts of recover: values, ranges, the journal's effect on the map, shapes."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pool.format.geometry import geometry
from stripewell.recover.catalog import MAX_BLOCKS, Catalog, check_change
from stripewell.recover.overlay import DATA, JOURNAL, LEAF_BLOCKS, TRIM, ZERO, ZEROS, Changes
from stripewell.recover.problems import Problems
from stripewell.recover.ranges import Ranges
from stripewell.recover.report import lost_text
from stripewell.recover.root import fits
from stripewell.recover.values import Unusable, integer, json_object, plain, sequence

BLOCKS = 4 * LEAF_BLOCKS


@pytest.mark.parametrize("text", ["[", "[]", "5", "{", '{"a":' * 100_000, "[" * 100_000, "\xff"])
def test_what_is_no_object_is_unusable(text: str) -> None:
    with pytest.raises(Unusable):
        json_object(text.encode("latin-1"), "it")


@pytest.mark.parametrize("value", [True, None, 1.0, "1", -1, 11, 10**400, [], {}])
def test_only_a_whole_number_in_its_range_is_one(value: object) -> None:
    with pytest.raises(Unusable, match="it is no number from 0 to 10"):
        integer(value, "it", 10)


def test_a_list_has_its_length() -> None:
    assert sequence([1, 2], "it", 2) == [1, 2]
    with pytest.raises(Unusable, match="no list of 3"):
        sequence([1, 2], "it", 3)


def test_text_of_a_device_cannot_move_the_cursor() -> None:
    assert plain("tank") == "tank"
    assert plain("a\x1b[2J\nb").isprintable()
    assert len(plain("x" * 10_000)) <= 120


def test_ranges_merge_and_are_bounded() -> None:
    ranges = Ranges()
    ranges.add_blocks(10, np.array([True, True, False, True]))
    ranges.add_blocks(14, np.array([True, False]))
    assert (ranges.kept, ranges.blocks) == ([(10, 12), (13, 15)], 4)
    assert lost_text(ranges) == "4 blocks of 4 KiB are lost (bytes 40960-49151, 53248-61439)"
    for first in range(20, 40_020, 2):
        ranges.add(first, first + 1)
    assert ranges.blocks == 20_004
    assert len(ranges.kept) + ranges.more == 20_002
    assert len(ranges.kept) == 10_000


@pytest.mark.parametrize("seed", range(20))
def test_changes_are_those_of_a_plain_list(seed: int) -> None:
    """Against the slow way: every extent applied to every block in turn."""
    rng = random.Random(seed)
    changes = Changes()
    locations, crcs = np.zeros(BLOCKS, np.uint64), np.zeros(BLOCKS, np.uint32)
    written = set()
    for position in range(1000, 1000 + rng.randint(1, 60) * 1000, 1000):
        kind = rng.choice((DATA, TRIM, ZERO))
        first = rng.randrange(BLOCKS)
        count = rng.choice((1, 3, 700, 1 << 63)) if kind != DATA else rng.choice((1, 3, 700))
        end = min(first + count, BLOCKS)
        sums = np.array([rng.getrandbits(32) for _ in range(count if kind == DATA else 0)], "<u4")
        changes.add(kind, first, count, position, sums)
        if kind == DATA:
            written.update(block // LEAF_BLOCKS for block in range(first, first + count))
            steps = np.arange(position, position + end - first).astype(np.uint64)
            locations[first:end], crcs[first:end] = steps | JOURNAL, sums[: end - first]
        else:
            locations[first:end], crcs[first:end] = ZEROS if kind == ZERO else 0, 0
    assert changes.leaves() == sorted(written)
    window = changes.touching(0, BLOCKS)
    for leaf in range(0, BLOCKS, LEAF_BLOCKS):
        mine = changes.touching(leaf, leaf + LEAF_BLOCKS, window)
        found = np.zeros(LEAF_BLOCKS, np.uint64), np.zeros(LEAF_BLOCKS, np.uint32)
        changes.apply(mine, leaf, *found)
        here = slice(leaf, leaf + LEAF_BLOCKS)
        assert (found[0] == locations[here]).all()
        assert (found[1] == crcs[here]).all()


def test_what_is_covered_counts_no_more() -> None:
    changes = Changes()
    nothing = np.zeros(0, np.uint32)
    changes.add(DATA, 5, 2, 100, np.array([1, 2], np.uint32))
    changes.add(TRIM, 0, 1 << 63, 0, nothing)
    changes.add(ZERO, 7, 1, 0, nothing)
    mine = changes.touching(0, LEAF_BLOCKS)
    assert mine.tolist() == [1, 2]
    assert changes.covers(mine, 0, LEAF_BLOCKS)
    changes.add(DATA, MAX_BLOCKS, 1, 200, np.array([1], np.uint32))
    assert changes.leaves() == [0]


def test_shapes_are_those_that_the_format_gives() -> None:
    for k in (1, 2, 8, 32):
        for m in (1, 3, 8):
            for slot in (8, 64, 1024):
                shape = geometry(k, m, slot)
                assert fits(k, m, shape.header_blocks, shape.shard_blocks, slot)
                assert not fits(k, m, shape.header_blocks + 1, shape.shard_blocks - 1, slot)
                assert not fits(k, m, shape.header_blocks, shape.shard_blocks + 1, slot)
    for wrong in ((0, 1, 1, 3), (33, 1, 1, 3), (2, 0, 1, 3), (2, 9, 1, 3), (2, 1, 0, 4)):
        assert not fits(*wrong, 4)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"do": "snapshot", "name": "a"},
        {"do": "create", "name": "a", "layer": -1, "size": 4096},
        {"do": "create", "name": 5, "layer": 1, "size": 4096},
        {"do": "resize", "name": "a", "size": 1.5},
        {"do": "delete"},
        {"do": "forget-layer", "layer": "1"},
    ],
)
def test_changes_that_are_none(change: dict[str, object]) -> None:
    with pytest.raises(Unusable):
        check_change(change)


def test_the_catalog_follows_the_journal() -> None:
    catalog = Catalog(Problems())
    catalog.apply({"do": "create", "name": "a", "layer": 1, "size": 4096})
    catalog.apply({"do": "create", "name": "b", "layer": 2, "size": 4096})
    catalog.apply({"do": "resize", "name": "b", "size": 8192})
    catalog.apply({"do": "delete", "name": "a"})
    assert [(v.name, v.layer, v.size) for v in catalog.volumes.values()] == [("b", 2, 8192)]
    assert catalog.problems.lines == []
    catalog.apply({"do": "delete", "name": "a"})
    catalog.apply({"do": "create", "name": "b", "layer": 3, "size": 4096})
    assert len(catalog.problems.lines) == 2


def test_problems_are_bounded() -> None:
    problems = Problems()
    for number in range(1000):
        problems.add(str(number))
    assert (len(problems.lines), problems.more) == (100, 900)
