"""The collector: empties stripes with few live blocks, so that their slots come free.

Greedy by live share. Versions come from the stripe header and stay as they are (R12). Stripes of
checkpoint pages are emptied by making their pages dirty: the next checkpoint writes them elsewhere.
"""

from __future__ import annotations

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_MASK, LEAF_SHIFT
from pool.errors import DataLost
from pool.format.location import in_stripe
from pool.moving import LiveBlock, Moving, move
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
    blocks: list[LiveBlock] = []
    victims: list[int] = []
    for stripe in state.table.emptiest(stripes * 8 + len(moving.stuck), DATA, WORTH):
        if stripe in moving.stuck:
            continue
        live = state.table.live_of(stripe)
        if victims and len(blocks) + live > stripes * room:
            break
        found = await _live_blocks(moving, stripe)
        if found is not None:
            blocks += found
            victims.append(stripe)
    if not blocks:
        return 0
    if len(blocks) / room > 0.98 * len(victims):
        # It would use as many stripes as it empties.
        return 0
    overtaken = state.counters["overtaken_blocks"]
    try:
        await move(moving, blocks)
    except DataLost:
        moving.stuck.update(victims)
        raise
    state.counters["collected_stripes"] += len(victims)
    state.counters["collector_overtaken"] += state.counters["overtaken_blocks"] - overtaken
    return len(victims)


async def _live_blocks(moving: Moving, stripe: int) -> list[LiveBlock] | None:
    """The blocks of a stripe that the map still finds there, or None if it cannot be read."""
    state = moving.state
    try:
        header = await moving.reader.header(state.table.get(stripe))
    except DataLost:
        moving.stuck.add(stripe)
        return None
    contents = header.contents
    rows = list(
        zip(
            contents.layers[: header.used].tolist(),
            contents.blocks[: header.used].tolist(),
            contents.versions[: header.used].tolist(),
            strict=True,
        )
    )
    needed = {(layer, block >> LEAF_SHIFT) for layer, block, _ in rows}
    while await moving.loader.ensure(needed):
        pass
    live = []
    per_shard = header.shape.shard_blocks
    for i, (layer, block, version) in enumerate(rows):
        layer_map = state.maps.get(layer)
        leaf = layer_map.leaves.get(block >> LEAF_SHIFT) if layer_map is not None else None
        if leaf is None:
            continue
        location, crc = leaf.get(block & LEAF_MASK)
        shard, at = divmod(i, per_shard)
        if location == in_stripe(stripe, shard, at):
            live.append(LiveBlock(layer, block, location, crc, version))
    return live


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
