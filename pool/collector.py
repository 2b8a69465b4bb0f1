"""The collector: empties stripes with few live blocks, so that their slots come free.

Greedy by live share. Versions come from the stripe header and stay as they are (R12). Stripes of
checkpoint pages are emptied by making their pages dirty: the next checkpoint writes them elsewhere.
"""

from __future__ import annotations

import numpy as np

from backends.base import BLOCK_SIZE
from pool.columns import Columns, find
from pool.errors import DataLost
from pool.failpoints import reached
from pool.format.location import SHARD_SHIFT, in_stripe
from pool.moving import Moving, move
from pool.state import State
from pool.table import DATA, META

#: A stripe fuller than this is not worth moving.
WORTH = 0.97


async def collect(moving: Moving, stripes: int) -> int:
    """Empty the emptiest stripes into about `stripes` new ones; returns how many were emptied.

    Raises NoSpace, PoolStopped, DataLost (the stripe that cannot be read is left alone from then
    on)."""
    state = moving.state
    state.settle()
    room = state.shape().blocks
    parts: list[Columns] = []
    victims: list[int] = []
    count = 0
    for stripe in state.table.emptiest(stripes * 8 + len(moving.stuck), DATA, WORTH):
        if stripe in moving.stuck:
            continue
        if victims and count + state.table.live_of(stripe) > stripes * room:
            break
        found = await _live_blocks(moving, stripe)
        if found is not None:
            parts.append(found)
            victims.append(stripe)
            count += len(found)
    # A move that fills as many stripes as it empties gains nothing.
    if not count or -(-count // room) >= len(victims):
        return 0
    reached("collect_after_choice_before_move")
    try:
        switched = await move(moving, Columns.join(parts))
    except DataLost:
        moving.stuck.update(victims)
        raise
    state.counters["collected_stripes"] += len(victims)
    state.counters["collector_overtaken"] += count - switched
    return len(victims)


async def _live_blocks(moving: Moving, stripe: int) -> Columns | None:
    """The blocks of a stripe that the map still finds there, or None if it cannot be read."""
    state = moving.state
    try:
        header = await moving.reader.header(state.table.get(stripe))
    except DataLost:
        moving.stuck.add(stripe)
        return None
    used, contents = header.used, header.contents
    shards, within = np.divmod(np.arange(used, dtype=np.uint64), header.shape.shard_blocks)
    locations = np.uint64(in_stripe(stripe, 0, 0)) | shards << np.uint64(SHARD_SHIFT) | within
    blocks = Columns(
        contents.layers[:used],
        contents.blocks[:used],
        locations,
        contents.crcs[:used].copy(),
        contents.versions[:used],
    )
    stretches = list(blocks.leaves())
    while await moving.loader.ensure({(layer, number) for layer, number, _, _ in stretches}):
        pass
    live = np.zeros(used, np.bool_)
    for layer, number, start, stop in stretches:
        layer_map = state.maps.get(layer)
        leaf = layer_map.leaves.get(number) if layer_map is not None else None
        if leaf is not None:
            found, crcs = find(leaf, blocks.blocks[start:stop])
            live[start:stop] = found == locations[start:stop]
            blocks.crcs[start:stop] = crcs
    return blocks[np.flatnonzero(live)]


async def collect_meta(moving: Moving, stripes: int) -> int:
    """Make the pages of the emptiest meta stripes dirty; returns how many stripes that will
    empty."""
    state = moving.state
    state.settle()
    pages = _pages_by_stripe(state)
    size = {stripe: sum(page[2] for page in found) for stripe, found in pages.items()}
    room = state.shape().blocks * BLOCK_SIZE
    chosen = sorted(size, key=lambda stripe: size[stripe])[:stripes]
    chosen = [stripe for stripe in chosen if size[stripe] < room * 3 // 4]
    if -(-sum(size[stripe] for stripe in chosen) // room) >= len(chosen):
        return 0  # as many stripes would be filled as emptied
    for stripe in chosen:
        leaves = {(layer, number) for layer, number, _ in pages[stripe]}
        while await moving.loader.ensure(leaves):
            pass
        for layer, number in leaves:
            layer_map = state.maps.get(layer)
            if layer_map is not None and number in layer_map.leaves:
                layer_map.touch(number)
    for (layer, chunk), pointer in state.directories.items():
        if pointer.stripe in chosen and layer in state.maps:
            state.maps[layer].redirect.add(chunk)
    return len(chosen)


def _pages_by_stripe(state: State) -> dict[int, list[tuple[int, int, int]]]:
    """(layer, leaf number, bytes) of the pages in every meta stripe."""
    pages: dict[int, list[tuple[int, int, int]]] = {
        row.id: [] for row in state.table.stripes() if row.kind == META
    }
    for layer, layer_map in state.maps.items():
        for number, pointer in layer_map.pointers.items():
            if pointer.stripe in pages:
                pages[pointer.stripe].append((layer, number, pointer.length))
    return pages
