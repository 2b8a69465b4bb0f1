"""Destage: packs live journal blocks into stripes, oldest first (R7, R9)."""

from __future__ import annotations

import asyncio

from pool.blockmap import LEAF_BLOCKS, LEAF_MASK, LEAF_SHIFT
from pool.columns import Builder, Columns
from pool.failpoints import reached
from pool.format.location import JOURNAL, POSITION_MASK
from pool.moving import Moving, move
from pool.state import JournalExtent

#: Extents looked at between two turns of the event loop.
SLICE = 256


async def destage(moving: Moving, stripes: int, *, force: bool) -> int:
    """Pack up to `stripes` stripes of the oldest live journal blocks; returns how many blocks were.

    Without `force` only full stripes are written: what is left over stays in the journal. With it
    the last one may be short. Raises NoSpace, DataLost, PoolStopped; the journal is then as before.
    """
    state = moving.state
    want = stripes * state.shape().blocks
    taken: list[JournalExtent] = []
    builder = Builder()
    try:
        while state.fifo and len(builder) < want and len(taken) < want * 4:
            extent = state.fifo[0]
            if not add_live(moving, extent, builder):
                await moving.loader.ensure((extent[1], number) for number in _leaves(extent))
                continue
            # What is taken is put back unless it was moved: the checkpoint must see it.
            taken.append(state.fifo.popleft())
            if len(taken) % SLICE == 0:
                await asyncio.sleep(0)
        live = builder.build()
        keep = 0 if force else len(live) % state.shape().blocks
        moved = live[: len(live) - keep]
        if len(moved):
            # Nothing that the stripes hold may be younger than what the journal can lose (R9).
            reached("destage_after_choice_before_flush")
            await state.journal.flush(int(moved.locations.max() & POSITION_MASK) + 1)
            reached("destage_after_flush_before_move")
            await move(moving, moved)
    except BaseException:
        state.fifo.extendleft(reversed(taken))
        raise
    state.counters["destaged_extents"] += len(taken)
    _put_back(moving, live[len(live) - keep :])
    return len(moved)


def _leaves(extent: JournalExtent) -> range:
    """Numbers of the leaves under an extent."""
    return range(extent[2] >> LEAF_SHIFT, ((extent[2] + extent[3] - 1) >> LEAF_SHIFT) + 1)


def add_live(moving: Moving, extent: JournalExtent, builder: Builder) -> bool:
    """Add the blocks of an extent that the map still finds in the journal; False, with nothing
    added, if a leaf that it needs is paged out."""
    position, layer, block, count, version = extent
    layer_map = moving.state.maps.get(layer)
    if layer_map is None:
        return True
    leaves = layer_map.leaves
    if any(number not in leaves and number in layer_map.pointers for number in _leaves(extent)):
        return False
    location = JOURNAL | position
    while count:
        now = min(count, LEAF_BLOCKS - (block & LEAF_MASK))
        leaf = leaves.get(block >> LEAF_SHIFT)
        if leaf is not None:
            builder.add_live_run(leaf, layer, block, now, location, version)
        block, location, count = block + now, location + now, count - now
    return True


def _put_back(moving: Moving, left: Columns) -> None:
    """Return what was left over to the front of the queue, in journal order."""
    rows = zip(
        (left.locations & POSITION_MASK).tolist(),
        left.layers.tolist(),
        left.blocks.tolist(),
        left.versions.tolist(),
        strict=True,
    )
    for position, layer, block, version in sorted(rows, reverse=True):
        moving.state.fifo.appendleft((position, layer, block, 1, version))
