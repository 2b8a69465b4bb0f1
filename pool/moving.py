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

import numpy as np

from backends.base import BLOCK_SIZE
from pool.columns import Columns, switch
from pool.errors import DataLost, PoolStopped
from pool.failpoints import reached
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

#: Stripes that are written and synced together. Several jobs of a move overlap.
JOB_STRIPES = 8
#: How often a job is tried anew after members failed or sources were bad.
ATTEMPTS = 8


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


async def move(moving: Moving, blocks: Columns) -> int:
    """Move blocks into new stripes; returns how many were switched. Raises NoSpace, DataLost (some
    source cannot be read; nothing of its stripe was switched), PoolStopped."""
    state = moving.state
    switched = 0
    pending = list(_cut(blocks.by_address(), state.shape().blocks))
    inline: dict[int, bytes] = {}
    lost: DataLost | None = None
    for _ in range(ATTEMPTS):
        rows = _place(state, len(pending))
        pairs = list(zip(rows, pending, strict=True))
        results = await asyncio.gather(
            *(
                _write(moving, pairs[start : start + JOB_STRIPES], inline)
                for start in range(0, len(pairs), JOB_STRIPES)
            ),
            return_exceptions=True,
        )
        again: list[Columns] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            switched += result[0]
            for part, bad in result[1]:
                try:
                    await _fetch(moving, part, bad, inline)
                    again.append(part)
                except DataLost as error:
                    state.counters["unmovable_stripes"] += 1
                    lost = error
        if not again:
            if lost is not None:
                raise lost
            return switched
        # The pool may have narrowed: cut anew. What needs more stripes now must not take those that
        # the checkpoint needs to release any.
        pending = list(_cut(Columns.join(again), state.shape().blocks))
        if len(pending) > max(1, state.free_stripes() - state.reserve_stripes()):
            raise NoSpace("stripes have become narrower than the move was planned for")
    text = f"stripes could not be written in {ATTEMPTS} attempts"
    raise NoSpace(text) if any(m.full for m in state.active()) else PoolStopped(text)


async def _write(
    moving: Moving, pairs: list[tuple[Stripe, Columns]], inline: dict[int, bytes]
) -> tuple[int, list[tuple[Columns, list[int]]]]:
    """Write some stripes as one job and switch what was written. Returns the blocks switched, and
    the stripes that could not be written with the numbers of their bad source blocks."""
    state = moving.state
    jobs = []
    for row, part in pairs:
        jobs.append(_job(state, row, part, inline))
        await asyncio.sleep(0)
    outcome = await state.mover.run(Job(state.uuid, jobs))
    await note_failures(moving, outcome)
    switched, failed = 0, []
    for row, part in pairs:
        if row.id in outcome.written:
            switched += await _switch(moving, row, part)
        else:
            state.release(row, written=False)
            failed.append((part, [at for stripe, at in outcome.bad if stripe == row.id]))
    return switched, failed


async def _fetch(moving: Moving, part: Columns, bad: list[int], inline: dict[int, bytes]) -> None:
    """If the stripe writer could not read some source blocks, get all of them by whatever
    redundancy there is: a device that fails now and then would spoil another attempt elsewhere.

    Raises DataLost."""
    if not bad:
        return
    rows = zip(part.locations.tolist(), part.crcs.tolist(), strict=True)
    for location, crc in rows:
        if location not in inline:
            try:
                inline[location] = await moving.reader.run(location, [crc])
            except KeyError as error:
                raise DataLost(str(error)) from None


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
            reached("full_after_mark_before_narrowing")
            state.counters["members_full"] += 1
        else:
            broken[index] = message
    if outcome.failed:
        state.update_limit()
    if broken:
        await moving.expel(broken)


def _cut(blocks: Columns, size: int) -> Iterator[Columns]:
    for start in range(0, len(blocks), size):
        yield blocks[start : start + size]


def _place(state: State, count: int) -> list[Stripe]:
    rows: list[Stripe] = []
    try:
        while len(rows) < count:
            rows.append(state.new_row(DATA))
    except (NoSpace, PoolStopped):
        for row in rows:
            state.release(row)
        raise
    return rows


def _job(state: State, row: Stripe, part: Columns, inline: dict[int, bytes]) -> StripeJob:
    """What the stripe writer is to do for one stripe."""
    pad = (0, row.shape.blocks - len(part))
    job = StripeJob(
        row.id,
        DATA,
        row.shape,
        row.places,
        len(part),
        np.pad(part.layers, pad),
        np.pad(part.blocks, pad),
        np.pad(part.versions, pad),
        np.pad(part.crcs, pad),
    )
    for start, stop in part.runs():
        location = int(part.locations[start])
        at = start
        while at < stop:
            given = inline.get(location + at - start) if inline else None
            if given is not None:
                job.inline.append((at, given))
                at += 1
                continue
            # With bad blocks about, go one by one: this is the exception.
            at += _add_source(state, job, location + at - start, at, 1 if inline else stop - at)
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


async def _switch(moving: Moving, row: Stripe, part: Columns) -> int:
    """Point the map at the new stripe, for every block that still is where it was."""
    state = moving.state
    stretches = list(part.leaves())
    while await moving.loader.ensure({(layer, number) for layer, number, _, _ in stretches}):
        pass
    reached("move_after_sync_before_switch")
    # No await until the row is in the table: atomic.
    shards, within = np.divmod(np.arange(len(part), dtype=np.uint64), row.shape.shard_blocks)
    new = np.uint64(in_stripe(row.id, 0, 0)) | shards << np.uint64(SHARD_SHIFT) | within
    live = 0
    for layer, number, start, stop in stretches:
        layer_map = state.maps.get(layer)
        if layer_map is None or number not in layer_map.leaves:
            continue
        here = slice(start, stop)
        old = part.locations[here]
        same = switch(layer_map.touch(number), part.blocks[here], old, new[here], part.crcs[here])
        live += int(np.count_nonzero(same))
        state.kill_locations(old[same])
    state.counters["moved_blocks"] += live
    state.counters["overtaken_blocks"] += len(part) - live
    if live:
        state.table.add(row, live)
    else:
        state.release(row)
    reached("move_after_switch_before_next")
    await asyncio.sleep(0)
    return live
