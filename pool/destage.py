"""Destage: packs live journal blocks into stripes, oldest first (R7, R9)."""

from __future__ import annotations

from pool.blockmap import LEAF_MASK, LEAF_SHIFT
from pool.format.location import JOURNAL
from pool.moving import LiveBlock, Moving, move
from pool.state import JournalExtent


async def destage(moving: Moving, stripes: int, *, force: bool) -> int:
    """Pack up to `stripes` stripes of the oldest live journal blocks; returns how many blocks were.

    Without `force` only full stripes are written: what is left over stays in the journal. With it
    the last one may be short. Raises NoSpace, DataLost, PoolStopped; the journal is then as
    before."""
    state = moving.state
    room = state.shape().blocks
    taken: list[JournalExtent] = []
    blocks: list[LiveBlock] = []
    while state.fifo and len(blocks) < stripes * room and len(taken) < stripes * room * 4:
        extent = state.fifo[0]
        live = live_blocks(moving, extent)
        if live is None:
            numbers = _leaves(extent)
            await moving.loader.ensure((extent[1], number) for number in numbers)
            continue
        if len(blocks) + len(live) > stripes * room and blocks:
            break
        # What is taken is put back unless it was moved: the checkpoint must see it.
        taken.append(state.fifo.popleft())
        blocks += live
    keep = 0 if force else len(blocks) % room
    moved = blocks[: len(blocks) - keep]
    try:
        if moved:
            # Nothing that the stripes hold may be younger than what the journal can lose (R9).
            await state.journal.flush()
            await move(moving, moved)
    except BaseException:
        state.fifo.extendleft(reversed(taken))
        raise
    state.counters["destaged_extents"] += len(taken)
    _put_back(moving, blocks[len(blocks) - keep :])
    return len(moved)


def _leaves(extent: JournalExtent) -> range:
    """Numbers of the leaves under an extent."""
    return range(extent[2] >> LEAF_SHIFT, ((extent[2] + extent[3] - 1) >> LEAF_SHIFT) + 1)


def live_blocks(moving: Moving, extent: JournalExtent) -> list[LiveBlock] | None:
    """The blocks of an extent that the map still finds in the journal; None if a leaf that it needs
    is paged out."""
    position, layer, first, count, version = extent
    layer_map = moving.state.maps.get(layer)
    if layer_map is None:
        return []
    live = []
    location = JOURNAL | position
    leaf, number = None, -1
    for block in range(first, first + count):
        if block >> LEAF_SHIFT != number:
            number = block >> LEAF_SHIFT
            leaf = layer_map.leaves.get(number)
            if leaf is None and number in layer_map.pointers:
                return None
        if leaf is not None:
            found, crc = leaf.get(block & LEAF_MASK)
            if found == location:
                live.append(LiveBlock(layer, block, location, crc, version))
        location += 1
    return live


def _put_back(moving: Moving, left: list[LiveBlock]) -> None:
    """Return what was left over to the front of the queue, block by block, in journal order."""
    fifo = moving.state.fifo
    for block in sorted(left, key=lambda b: b.location, reverse=True):
        position = block.location & (JOURNAL - 1)
        fifo.appendleft((position, block.layer, block.block, 1, block.version))
