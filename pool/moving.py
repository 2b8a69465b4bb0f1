"""The mover's logic: copy live blocks into new stripes, switch the map, count what died.

Everything that moves data (destage, collector; rebuild and re-encoding later) picks live blocks and
calls `move`. Versions are copied unchanged (R12). The map switches block by block, by
compare-and-swap on the old location, and only after the whole stripe is synced (R11); a block that
was overwritten meanwhile simply stays dead in its new stripe.

Until the next checkpoint is committed, the old copies stay where they are (journal tail and slots
are released by the checkpoint alone, R21), so a crash at any point finds every block in its old
place.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_MASK, LEAF_SHIFT
from pool.errors import DataLost, PoolStopped
from pool.format.location import (
    BLOCK_MASK,
    POSITION_MASK,
    SHARD_MASK,
    SHARD_SHIFT,
    TAG_JOURNAL,
    TAG_SHIFT,
    in_stripe,
    stripe_of,
)
from pool.loader import Loader
from pool.placement import NoSpace
from pool.reader import Reader
from pool.state import State
from pool.stripe_writer import Job, JournalSource, Outcome, ShardSource, StripeJob
from pool.table import DATA, NOWHERE, Stripe

#: How often a job is tried anew after members failed or sources were bad.
ATTEMPTS = 8
#: Blocks switched between two turns of the event loop.
SWITCH_SLICE = 1024


class LiveBlock(NamedTuple):
    """A mapped block to be moved."""

    layer: int
    block: int
    location: int
    crc: int
    version: int


@dataclass(frozen=True, slots=True)
class Moving:
    """What a move needs of the engine."""

    state: State
    reader: Reader
    loader: Loader
    #: Expels members that failed and returns when the root says so.
    expel: Callable[[dict[int, str]], Awaitable[None]]
    #: Stripes that cannot be read in full; moving them is not tried again.
    stuck: set[int] = field(default_factory=set)


async def move(moving: Moving, blocks: list[LiveBlock]) -> int:
    """Move blocks into new stripes; returns how many were switched. Raises NoSpace, DataLost (some
    source cannot be read; nothing of its stripe was switched), PoolStopped."""
    blocks = sorted(blocks)
    switched = 0
    pending = list(_cut(blocks, moving.state.shape().blocks))
    inline: dict[int, bytes] = {}
    lost: DataLost | None = None
    for _ in range(ATTEMPTS):
        rows = _place(moving.state, len(pending))
        jobs = [
            _job(moving.state, row, part, inline) for row, part in zip(rows, pending, strict=True)
        ]
        outcome = await moving.state.mover.run(Job(moving.state.uuid, jobs))
        await note_failures(moving, outcome)
        again = []
        for row, part in zip(rows, pending, strict=True):
            if row.id in outcome.written:
                switched += await _switch(moving, row, part)
                continue
            moving.state.unplace(row.places)
            again.append((row.id, part))
        if not again:
            if lost is not None:
                raise lost
            return switched
        bad = {stripe: [at for s, at in outcome.bad if s == stripe] for stripe, _ in again}
        pending = []
        for stripe, part in again:
            try:
                for at in bad[stripe]:
                    found = part[at]
                    inline[found.location] = await moving.reader.run(found.location, [found.crc])
            except (DataLost, KeyError) as error:
                moving.state.counters["unmovable_stripes"] += 1
                lost = error if isinstance(error, DataLost) else DataLost(str(error))
                continue
            pending.append(part)
        if not pending:
            break
        # The pool may have narrowed: cut anew.
        flat = [block for part in pending for block in part]
        pending = list(_cut(flat, moving.state.shape().blocks))
    raise lost or PoolStopped(f"stripes could not be written in {ATTEMPTS} attempts")


async def note_failures(moving: Moving, outcome: Outcome) -> None:
    """Draw the consequences of members that failed a job: full ones get no more shards, others
    go."""
    state = moving.state
    for member, count in outcome.bytes.items():
        state.counters["stripe_bytes"] += count
        state.counters[f"member_{member}_bytes"] += count
    broken = {}
    for index, (message, is_full) in outcome.failed.items():
        if is_full:
            state.members[index].full = True
            state.counters["members_full"] += 1
        else:
            broken[index] = message
    if outcome.failed:
        state.update_limit()
    if broken:
        await moving.expel(broken)


def _cut(blocks: list[LiveBlock], size: int) -> Iterator[list[LiveBlock]]:
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _place(state: State, count: int) -> list[Stripe]:
    rows: list[Stripe] = []
    try:
        while len(rows) < count:
            rows.append(state.new_row(DATA))
    except (NoSpace, PoolStopped):
        for row in rows:
            state.unplace(row.places)
        raise
    return rows


def _job(state: State, row: Stripe, part: list[LiveBlock], inline: dict[int, bytes]) -> StripeJob:
    """What the stripe writer is to do for one stripe."""
    count, room = len(part), row.shape.blocks
    columns = list(zip(*part, strict=True))
    layers, blocks = np.zeros(room, np.uint32), np.zeros(room, np.uint64)
    versions, crcs = np.zeros(room, np.uint64), np.zeros(room, np.uint32)
    layers[:count], blocks[:count], versions[:count] = columns[0], columns[1], columns[4]
    crcs[:count] = columns[3]
    job = StripeJob(
        row.id, DATA, row.shape, row.places, count, layers, blocks, versions, crcs
    )  # fmt: skip
    at = 0
    while at < count:
        location = part[at].location
        given = inline.get(location)
        if given is not None:
            job.inline.append((at, given))
            at += 1
            continue
        run = 1
        while at + run < count and part[at + run].location == location + run and (
            part[at + run].location not in inline
        ):  # fmt: skip
            run += 1
        run = _add_source(state, job, location, at, run)
        at += run
    return job


def _add_source(state: State, job: StripeJob, location: int, at: int, run: int) -> int:
    """Add the source of up to `run` consecutive blocks; returns how many it covers."""
    if location >> TAG_SHIFT == TAG_JOURNAL:
        position = location & POSITION_MASK
        run = min(run, state.journal_blocks - position % state.journal_blocks)
        replica = state.journal.replicas[0]
        offset = state.journal.offset(replica, position)
        job.sources.append(JournalSource(replica.member, offset, at, run))
        return run
    row = state.row(stripe_of(location))
    shard, block = location >> SHARD_SHIFT & SHARD_MASK, location & BLOCK_MASK
    device, slot = row.places[shard]
    run = min(run, row.shape.shard_blocks - block)
    offset = row.shape.header_bytes + block * BLOCK_SIZE
    member = device if device != NOWHERE and state.members[device].present else NOWHERE
    job.sources.append(ShardSource(member, row.id, shard, slot, offset, at, run))
    return run


async def _switch(moving: Moving, row: Stripe, part: list[LiveBlock]) -> int:
    """Point the map at the new stripe, for every block that still is where it was."""
    state = moving.state
    needed = {(block.layer, block.block >> LEAF_SHIFT) for block in part}
    while await moving.loader.ensure(needed):
        pass
    # No await until the row is in the table: atomic.
    live = 0
    per_shard = row.shape.shard_blocks
    for i, block in enumerate(part):
        layer_map = state.maps.get(block.layer)
        if layer_map is None:
            continue
        number = block.block >> LEAF_SHIFT
        leaf = layer_map.leaves.get(number)
        if leaf is None or not leaf.holds(block.block & LEAF_MASK, block.location):
            continue
        if not leaf.dirty:
            layer_map.touch(number)
        shard, at = divmod(i, per_shard)
        leaf.set(block.block & LEAF_MASK, in_stripe(row.id, shard, at), block.crc)
        if block.location >> TAG_SHIFT != TAG_JOURNAL:
            state.killed.append(stripe_of(block.location))
        live += 1
    state.counters["moved_blocks"] += live
    state.counters["overtaken_blocks"] += len(part) - live
    if live:
        state.table.add(row, live)
    else:
        state.unplace(row.places)
    await asyncio.sleep(0)
    return live
