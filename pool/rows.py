"""What rows of the stripe table must be, whoever wrote them. Pure (`docs/format.md`, "Table page").

A row that breaks a rule would make the engine read or write outside of its slots, or give one slot
to two stripes. So opening refuses such a table (`recovery.load_checkpoint`), and `pool check` holds
the table that is in use against the same rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from backends.base import BLOCK_SIZE
from pool.format.geometry import (
    HEADER_FIXED,
    HEADER_PER_BLOCK,
    HEADER_PER_DATA_BLOCK,
    MAX_DATA,
    MAX_PARITY,
)
from pool.state import State
from pool.table import DATA, META, NOWHERE, Stripe, row_dtype

Rows = npt.NDArray[np.void]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Limits:
    """What rows are held against."""

    #: Slots of each member, by its index.
    slots: Mapping[int, int]
    slot_blocks: int
    #: Ids from here on were never given out (R1).
    next_stripe: int
    #: Whether the rows are those of a checkpoint, which keeps no stripe without a live block.
    stored: bool = False


def limits(state: State, *, stored: bool = False) -> Limits:
    """What rows of this pool are held against; `stored` ones are just read from a checkpoint."""
    slots = {index: member.layout.slots for index, member in state.members.items()}
    return Limits(slots, state.slot_blocks, state.next_stripe, stored)


def all_rows(state: State) -> Rows:
    """The table's rows and the anchors, as rows."""
    anchors = list(state.committed.anchors.values())
    return np.concatenate([state.table.snapshot(), as_rows(anchors, state.table.width)])


def as_rows(stripes: list[Stripe], width: int) -> Rows:
    """Anchors in the form of the table. Their shards must be at most `width`."""
    rows = np.zeros(len(stripes), row_dtype(width))
    rows["device"] = NOWHERE
    for row, stripe in zip(rows, stripes, strict=True):
        shape = stripe.shape
        row["id"], row["kind"], row["live"] = stripe.id, stripe.kind, 1
        row["data"], row["parity"] = shape.data, shape.parity
        row["header"], row["shard"] = shape.header_blocks, shape.shard_blocks
        for at, (device, slot) in enumerate(stripe.places):
            row["device"][at], row["slot"][at] = device, slot
    return rows


def bad_rows(rows: Rows, limits: Limits) -> Iterator[tuple[int, str]]:
    """(stripe, what is wrong) of every row that breaks a rule; rows with id 0 are empty."""
    used = rows[rows["id"] != 0]
    sound = np.ones(len(used), np.bool_)
    for mask, text in (*_shapes(used, limits), *_places(used, limits)):
        for stripe in used["id"][mask & sound].tolist():
            yield stripe, text
        sound &= ~mask
    yield from _claimed_twice(used[sound])


def _shapes(used: Rows, limits: Limits) -> Iterator[tuple[Mask, str]]:
    ids, k, m = used["id"], used["data"].astype(np.int64), used["parity"].astype(np.int64)
    header, shard = used["header"].astype(np.int64), used["shard"].astype(np.int64)
    _, first = np.unique(ids, return_index=True)
    again = np.ones(len(ids), np.bool_)
    again[first] = False
    yield again, "has two rows"
    yield ids >= limits.next_stripe, "has an id that was never given out"
    yield ~np.isin(used["kind"], (DATA, META)), "is of an unknown kind"
    width = used.dtype["device"].shape[0]
    yield (
        (k < 1) | (k > MAX_DATA) | (m < 1) | (m > MAX_PARITY) | (k + m > width),
        "has an impossible number of shards",
    )
    need = HEADER_FIXED + shard * (HEADER_PER_DATA_BLOCK * k + HEADER_PER_BLOCK * (k + m))
    wrong = (header < 1) | (shard < 1) | (header + shard > limits.slot_blocks)
    yield wrong | (need > header * BLOCK_SIZE), "does not fit its slots"
    full = (used["kind"] == DATA) & (used["live"] > k * shard)
    yield full, "counts more live blocks than it has"
    yield (used["live"] == 0) & limits.stored, "has no live block, and was kept"


def _places(used: Rows, limits: Limits) -> Iterator[tuple[Mask, str]]:
    """Devices and slots, of the entries that have a shard. Called when the shapes were looked
    at."""
    width = used.dtype["device"].shape[0]
    shards = used["data"].astype(np.int64) + used["parity"]
    stored = (np.arange(width) < shards[:, None]) & (used["device"] != NOWHERE)
    known = np.zeros(NOWHERE + 1, np.int64)
    for member, slots in limits.slots.items():
        known[member] = slots
    there = np.isin(used["device"], list(limits.slots))
    yield (stored & ~there).any(axis=1), "has a shard on a device that is no member"
    beyond = stored & (used["slot"] >= known[used["device"]])
    yield beyond.any(axis=1), "has a shard in a slot that its device does not have"
    order = np.sort(np.where(stored, used["device"].astype(np.int64), -1 - np.arange(width)))
    yield (order[:, 1:] == order[:, :-1]).any(axis=1), "has two shards on one device"


def _claimed_twice(used: Rows) -> Iterator[tuple[int, str]]:
    width = used.dtype["device"].shape[0]
    shards = used["data"].astype(np.int64) + used["parity"]
    stored = (np.arange(width) < shards[:, None]) & (used["device"] != NOWHERE)
    rows, columns = np.nonzero(stored)
    devices = used["device"][rows, columns].astype(np.uint64)
    slots = used["slot"][rows, columns].astype(np.uint64)
    places = devices << np.uint64(32) | slots
    order = np.argsort(places, kind="stable")
    same = np.flatnonzero(places[order][1:] == places[order][:-1])
    for at in same.tolist():
        one, other = order[at], order[at + 1]
        yield (
            int(used["id"][rows[other]]),
            f"claims slot {int(slots[other])} of device {int(devices[other])}, which is stripe "
            f"{int(used['id'][rows[one]])}'s",
        )
