"""Applies committed journal extents to the map. Run time and replay share it, in journal order.

All of it is synchronous: a commit and its effect on the map are one step for every reader. The
leaves touched must be resident; whoever stages (or replays) sees to that.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import numpy as np

from pool.blockmap import LEAF_BLOCKS, LEAF_MASK, LEAF_SHIFT, LayerMap, Leaf
from pool.format.location import (
    HOLE,
    JOURNAL,
    STRIPE_MASK,
    STRIPE_SHIFT,
    TAG_SHIFT,
    TAG_STRIPE,
    ZERO,
)
from pool.format.record import KIND_CATALOG, KIND_DATA, KIND_TRIM, KIND_ZERO
from pool.journal import Committed
from pool.state import State


def apply(
    state: State, committed: Iterable[Committed], catalog: Callable[[Committed], None]
) -> None:
    """Make a commit visible. Catalog extents go to `catalog`. No await here: atomic."""
    fifo = state.fifo
    maps = state.maps
    for extent in committed:
        if extent.kind == KIND_CATALOG:
            catalog(extent)
            continue
        layer_map = maps.get(extent.layer)
        if layer_map is None:
            continue
        if extent.kind == KIND_DATA:
            fifo.append((extent.position, extent.layer, extent.block, extent.count, extent.version))
            if extent.count == 1:
                _map_block(state, layer_map, extent.block, extent.position, extent.crcs[0])
            else:
                _map_run(state, layer_map, extent)
        elif extent.kind == KIND_TRIM:
            _unmap(state, layer_map, extent.block, extent.count)
        elif extent.kind == KIND_ZERO:
            _unmap(state, layer_map, extent.block, extent.count)
            _map_zeros(state, layer_map, extent.block, extent.count)


def _map_block(state: State, layer_map: LayerMap, block: int, position: int, crc: int) -> None:
    leaf = layer_map.touch(block >> LEAF_SHIFT)
    old = leaf.set(block & LEAF_MASK, JOURNAL | position, crc)
    if old == HOLE:
        state.used += 1
    elif old >> TAG_SHIFT == TAG_STRIPE:
        state.killed.append(old >> STRIPE_SHIFT & STRIPE_MASK)


def _map_run(state: State, layer_map: LayerMap, extent: Committed) -> None:
    block, at = extent.block, 0
    while at < extent.count:
        start = block & LEAF_MASK
        now = min(extent.count - at, LEAF_BLOCKS - start)
        first = JOURNAL | (extent.position + at)
        locations = array("Q", range(first, first + now))
        old = layer_map.touch(block >> LEAF_SHIFT).set_run(
            start, locations, array("I", extent.crcs[at : at + now])
        )
        _account(state, np.frombuffer(old, np.uint64), now)
        block += now
        at += now


def _account(state: State, old: np.typing.NDArray[np.uint64], mapped: int) -> None:
    """Book the locations that were replaced by `mapped` mapped blocks."""
    state.used += mapped - int(np.count_nonzero(old))
    state.kill_locations(old)


def _unmap(state: State, layer_map: LayerMap, block: int, count: int) -> None:
    """Forget a range, at the cost of what is mapped in it."""
    end = block + count
    for number in layer_map.present(block, count):
        first = number << LEAF_SHIFT
        if block <= first and first + LEAF_BLOCKS <= end:
            drop_leaf(state, layer_map, number)
            continue
        leaf = layer_map.touch(number)
        _unmap_part(state, leaf, max(block - first, 0), min(end - first, LEAF_BLOCKS))


def drop_leaf(state: State, layer_map: LayerMap, number: int) -> None:
    """Take a resident leaf out of the map and book everything it mapped."""
    assert number in layer_map.leaves or number not in layer_map.pointers, "leaf is paged out"
    leaf, pointer = layer_map.remove(number)
    if pointer is not None:
        state.killed.append(pointer.stripe)
    if leaf is not None and leaf.count:
        _account(state, np.frombuffer(leaf.locations, np.uint64), 0)


def _unmap_part(state: State, leaf: Leaf, start: int, end: int) -> None:
    if leaf.index is None:
        holes = array("Q", bytes(8 * (end - start)))
        old = leaf.set_run(start, holes, array("I", bytes(4 * (end - start))))
        _account(state, np.frombuffer(old, np.uint64), 0)
        return
    for block in [block for block in leaf.index if start <= block < end]:
        old_one = leaf.set(block, HOLE, 0)
        state.used -= 1
        if old_one >> TAG_SHIFT == TAG_STRIPE:
            state.killed.append(old_one >> STRIPE_SHIFT & STRIPE_MASK)


def _map_zeros(state: State, layer_map: LayerMap, block: int, count: int) -> None:
    """Map provisioned zeros over a range that has just been unmapped."""
    end = block + count
    while block < end:
        start = block & LEAF_MASK
        now = min(end - block, LEAF_BLOCKS - start)
        leaf = layer_map.touch(block >> LEAF_SHIFT)
        leaf.set_run(start, array("Q", [ZERO]) * now, array("I", bytes(4 * now)))
        state.used += now
        block += now
