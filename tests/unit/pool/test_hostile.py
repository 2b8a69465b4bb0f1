"""Content with right checksums that no writer made is refused where it is decoded, by name."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pool.blockmap import Leaf
from pool.check import Report
from pool.entries import check_leaf
from pool.errors import FormatError
from pool.format import root as root_format
from pool.format import top
from pool.format.geometry import geometry, layout
from pool.format.location import JOURNAL, ZERO, in_stripe
from pool.format.page import PAGE_MAX, Pointer
from pool.rows import Limits, bad_rows
from pool.slots import FreeSlots
from pool.table import DATA, META, NOWHERE, Stripe, StripeTable
from tests.unit.pool.support import sound_root

WHERE = layout(2 << 20, 64 << 10, 4)

# -- roots -----------------------------------------------------------------------------------


def with_checkpoint() -> dict[str, Any]:
    """A root after a checkpoint: one anchor, one part of the top page."""
    root = sound_root(WHERE)
    root["next"]["stripe"] = 10
    root["checkpoint"]["anchors"] = [[5, META, 2, 1, 1, 3, 0, [0, 1, 1, 2, 2, 3]]]
    root["checkpoint"]["top"] = [[5, 0, 80, 1]]
    return root


def put(root: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Change one place of a root."""
    holder: Any = root
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = value


def paths(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all places in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, below in items:
        found.append((*above, key))
        if isinstance(below, dict | list):
            found += paths(below, (*above, key))
    return found


def test_a_sound_root_is_one() -> None:
    root_format.validate(with_checkpoint())
    root_format.validate(with_checkpoint() | {"from": "later"})


def test_no_number_or_list_of_a_root_may_be_anything_else() -> None:
    tried = 0
    for path in paths(with_checkpoint()):
        value: Any = with_checkpoint()
        for step in path:
            value = value[step]
        if not isinstance(value, int | list):
            continue
        for wrong in (None, True, 1.5, "x", {}, 10**30, -1):
            root = with_checkpoint()
            put(root, path, wrong)
            with pytest.raises(FormatError, match="^root"):
                root_format.validate(root)
            tried += 1
    assert tried > 300


def test_every_key_of_a_root_must_be_there() -> None:
    optional = {"owner", "reason"}
    for path in paths(with_checkpoint()):
        if isinstance(path[-1], str) and path[-1] not in optional:
            root = with_checkpoint()
            holder: Any = root
            for step in path[:-1]:
                holder = holder[step]
            del holder[path[-1]]
            with pytest.raises(FormatError, match=f"has no {path[-1]}"):
                root_format.validate(root)


MEMBER, STREAM, ANCHOR = ("members", 0), ("streams", 0), ("checkpoint", "anchors", 0)
HOSTILE_ROOTS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "k of 0": (("code", "data"), 0),
    "k of 10^9": (("code", "data"), 10**9),
    "slots of 0 blocks": (("code", "slot_blocks"), 0),
    "slots larger than they may be": (("code", "slot_blocks"), 1 << 20),
    "a name of two lines": (("name",), "tank\ntank"),
    "a journal of 0 blocks": ((*STREAM, "blocks"), 0),
    "a journal larger than its zone": ((*STREAM, "blocks"), 17),
    "a journal elsewhere": ((*STREAM, "replicas", 0, "offset"), 0),
    "a replica on no member": ((*STREAM, "replicas", 0, "member"), 7),
    "a replica twice": ((*STREAM, "replicas", 1, "member"), 0),
    "a replica that is behind by a number": ((*STREAM, "replicas", 1, "behind"), 1),
    "no replica": ((*STREAM, "replicas"), []),
    "no stream": (("streams",), []),
    "a replay behind the ring": ((*STREAM, "replay"), 33),
    "a tail behind the replay": ((*STREAM, "tail"), 17),
    "a version of a later term": ((*STREAM, "version"), 4 << 40),
    "the last term": (("term",), (1 << 24) - 1),
    "no members": (("members",), []),
    "an index twice": (("members", 1, "index"), 0),
    "a uuid twice": (("members", 1, "uuid"), "00" * 16),
    "a state of its own": ((*MEMBER, "state"), "dead"),
    "labels that are no text": ((*MEMBER, "labels"), {"host": 1}),
    "slots over the end": ((*MEMBER, "slots"), 1 << 20),
    "slots over the journal": ((*MEMBER, "slots_offset"), WHERE.journal_offset),
    "a journal over the superblocks": ((*MEMBER, "journal_offset"), 0),
    "a layout off the blocks": ((*MEMBER, "journal_bytes"), WHERE.journal_bytes - 1),
    "slots of another size": ((*MEMBER, "slot_blocks"), 8),
    "a code wider than the table": (("code", "parity"), 2),
    "a width of 0": (("checkpoint", "width"), 0),
    "a width of 10^9": (("checkpoint", "width"), 10**9),
    "an anchor on an unknown device": ((*ANCHOR, 7, 0), 9),
    "an anchor in a slot out of range": ((*ANCHOR, 7, 1), 10**6),
    "an anchor twice on a device": ((*ANCHOR, 7, 2), 0),
    "an anchor that is data": ((*ANCHOR, 1), DATA),
    "an anchor with a new id": ((*ANCHOR, 0), 10),
    "an anchor that does not fit": ((*ANCHOR, 5), 4),
    "an anchor of 3+1 in a table of 3": ((*ANCHOR, 2), 3),
    "a top page outside": (("checkpoint", "top", 0, 1), 1 << 30),
    "a top page of no bytes": (("checkpoint", "top", 0, 2), 0),
    "a top page in no anchor": (("checkpoint", "top", 0, 0), 6),
    "ids used up": (("next", "stripe"), 1 << 40),
}


@pytest.mark.parametrize("name", HOSTILE_ROOTS)
def test_a_root_that_cannot_be_is_refused(name: str) -> None:
    root = with_checkpoint()
    put(root, *HOSTILE_ROOTS[name])
    with pytest.raises(FormatError, match="^root") as caught:
        root_format.validate(root)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_anything_else_is_no_root() -> None:
    for value in (None, 7, "root", [], {}, {"name": 1}):
        with pytest.raises(FormatError, match="^root"):
            root_format.validate(value)


# -- top page --------------------------------------------------------------------------------

TOP = {
    "width": 3, "used": 7, "catalog": {}, "table": [[0, 5, 0, 80, 1], [1, 5, 80, 80, 1]],
    "directories": [[1, 0, 6, 0, 64, 2]],
}  # fmt: skip


def decode(value: object) -> top.Top:
    return top.decode(json.dumps(value).encode(), width=3, directory_max=100)


def test_a_top_page_is_decoded_whole_or_refused() -> None:
    found = decode(TOP)
    assert found.table == {0: Pointer(5, 0, 80, 1), 1: Pointer(5, 80, 80, 1)}
    assert found.directories == {(1, 0): Pointer(6, 0, 64, 2)}
    wrong: tuple[dict[str, Any], ...] = (
        {"width": 4}, {"used": -1}, {"used": "7"}, {"catalog": []}, {"table": [[1, 5, 0, 80, 1]]},
        {"table": [[0, 5, 0, 80, 1]] * 2}, {"table": [[1 << 40, 5, 0, 80, 1]]}, {"table": [[0]]},
        {"table": 3}, {"directories": [[1, 101, 6, 0, 64, 2]]}, {"directories": [None]},
        {"directories": [[1, 0, 6, 0, 64, 2]] * 2}, {"directories": [[1, 0, 6, 0, -64, 2]]},
    )  # fmt: skip
    for change in wrong:
        with pytest.raises(FormatError, match="^top page"):
            decode(copy.deepcopy(TOP) | change)
    for body in (b"", b"[" * 100_000, b"\xff", b"[]", b"1" * 5000):
        with pytest.raises(FormatError, match="^top page"):
            top.decode(body, width=3, directory_max=100)


def test_a_pointer_leads_into_its_stripe() -> None:
    size = 1 << 20
    assert Pointer(1, 0, 40, 0).inside(size)
    assert Pointer(1, size - 40, 40, 0).inside(size)
    for offset, length in ((0, 39), (0, PAGE_MAX + 1), (size - 39, 40), (size, 40), (-8, 40)):
        assert not Pointer(1, offset, length, 0).inside(size)
    assert not Pointer(1, (1 << 32) - 1, (1 << 32) - 1, 0).inside(size)


# -- rows and leaves -------------------------------------------------------------------------

SHAPE = geometry(2, 1, 4)
LIMITS = Limits({0: 10, 1: 10, 2: 10}, 4, 100)


def table() -> StripeTable:
    made = StripeTable(3)
    made.add(Stripe(5, DATA, SHAPE, ((0, 1), (1, 1), (2, 1))), 3)
    made.add(Stripe(6, META, SHAPE, ((0, 2), (1, 2), (NOWHERE, 0))), 2)
    return made


def test_rows_that_can_be() -> None:
    assert list(bad_rows(table().snapshot(), LIMITS)) == []


@pytest.mark.parametrize(
    ("column", "value", "stripe", "text"),
    [
        ("id", 6, 6, "has two rows"),
        ("id", 100, 100, "has an id that was never given out"),
        ("kind", 3, 5, "is of an unknown kind"),
        ("data", 0, 5, "has an impossible number of shards"),
        ("data", 33, 5, "has an impossible number of shards"),
        ("data", 3, 5, "has an impossible number of shards"),
        ("parity", 0, 5, "has an impossible number of shards"),
        ("parity", 9, 5, "has an impossible number of shards"),
        ("header", 0, 5, "does not fit its slots"),
        ("shard", 0, 5, "does not fit its slots"),
        ("shard", 4, 5, "does not fit its slots"),
        ("live", 7, 5, "counts more live blocks than it has"),
        ("device", [0, 7, 2], 5, "has a shard on a device that is no member"),
        ("slot", [1, 10, 1], 5, "has a shard in a slot that its device does not have"),
        ("device", [0, 0, 2], 5, "has two shards on one device"),
        ("slot", [1, 2, 1], 6, "claims slot 2 of device 1, which is stripe 5's"),
    ],
)
def test_rows_that_cannot_be(column: str, value: Any, stripe: int, text: str) -> None:
    rows = table().snapshot()
    [at] = np.flatnonzero(rows["id"] == 5)
    rows[column][at] = value
    rows = rows[np.argsort(rows["kind"] != DATA, kind="stable")]
    assert list(bad_rows(rows, LIMITS)) == [(stripe, text)]


def test_a_checkpoint_keeps_no_stripe_without_a_live_block() -> None:
    rows = table().snapshot()
    rows["live"][np.flatnonzero(rows["id"] == 5)] = 0
    assert list(bad_rows(rows, LIMITS)) == []
    assert list(bad_rows(rows, replace(LIMITS, stored=True))) == [
        (5, "has no live block, and was kept")
    ]


def test_what_is_behind_the_shards_of_a_row_means_nothing() -> None:
    rows = table().snapshot()
    [at] = np.flatnonzero(rows["id"] == 6)
    rows["data"][at] = 1
    rows["device"][at, 2], rows["slot"][at, 2] = 77, 10**6
    assert list(bad_rows(rows, LIMITS)) == []


@pytest.mark.parametrize(
    "location",
    [1, ZERO + 1, in_stripe(7, 0, 0), in_stripe(6, 0, 0), in_stripe(5, 2, 0), in_stripe(5, 0, 3)],
)
def test_entries_that_cannot_be(location: int) -> None:
    leaf = Leaf()
    for block, place in enumerate((ZERO, JOURNAL | 7, in_stripe(5, 1, 2))):
        leaf.set(block, place, 0)
    check_leaf(leaf, table())
    leaf.set(9, location, 0)
    for _ in range(2):
        with pytest.raises(FormatError, match="^it maps a block to"):
            check_leaf(leaf, table())
        leaf.make_dense()


# -- memory ----------------------------------------------------------------------------------


def test_slots_far_apart_cost_no_list_of_those_between() -> None:
    slots = FreeSlots(1 << 32)
    slots.occupy({0, 2, (1 << 32) - 1})
    assert [slots.take() for _ in range(3)] == [1, 3, 4]
    slots.give(3)
    slots.give(2)
    assert [slots.take(), slots.take(), slots.take()] == [2, 3, 5]
    slots.give((1 << 32) - 1)
    assert slots.free == (1 << 32) - 6


def test_a_report_is_bounded_and_its_lines_are_lines() -> None:
    report = Report()
    for number in range(5000):
        report.wrong("row", f"stripe {number}\nis wrong", stripe=number)
    lines = report.lines()
    assert len(lines) == 1001
    assert lines[0] == "stripe 0 is wrong"
    assert lines[-1] == "4000 more faults were found"
