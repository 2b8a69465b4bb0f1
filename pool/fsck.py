"""`pool check`: verifies the map, the table and every shard against each other. Never writes.

It runs beside guests: a mismatch counts only if it is still there when looked at again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from backends.base import BLOCK_SIZE, DeviceError
from pool.blockmap import LEAF_SHIFT, Leaf
from pool.checksum import block_crcs
from pool.engine import Engine
from pool.errors import DataLost, FormatError
from pool.format import stripe as stripe_format
from pool.format.location import TAG_SHIFT, TAG_STRIPE, stripe_of
from pool.state import State
from pool.table import DATA, NOWHERE, Stripe
from pool.words import counted

FAULTS_MAX = 1000


async def check_pool(engine: Engine, progress: Callable[[int, int], None]) -> list[str]:
    """One line per fault found, at most `FAULTS_MAX`; in the end one per device that is missing."""
    state = engine.state
    away = Counter[int]()
    stripes = sorted(state.table.rows)
    total = len(stripes) + sum(len(m.pointers) + len(m.leaves) for m in state.maps.values())
    faults, done = await _check_map(engine, progress, total)
    for stripe in stripes:
        done += 1
        progress(min(done, total), total)
        if stripe in state.table and len(faults) < FAULTS_MAX:
            faults += await _check_stripe(engine, state.table.get(stripe), away)
    for anchor in list(state.committed.anchors.values()):
        if anchor.id in state.committed.anchors:
            faults += await _check_stripe(engine, anchor, away)
    return faults[:FAULTS_MAX] + [
        f"device {device} is missing: {counted(shards, 'shard')} on it could not be checked"
        for device, shards in sorted(away.items())
    ]


async def _check_map(
    engine: Engine, progress: Callable[[int, int], None], total: int
) -> tuple[list[str], int]:
    """Every location must name a stripe that exists; live counts must equal what the map says."""
    state = engine.state
    faults: list[str] = []
    done = 0
    counts = Counter[int]()
    mapped, seen = 0, state.journal.head if state._journal else 0
    for layer, layer_map in list(state.maps.items()):
        for number in layer_map.present(0, 1 << 50):
            done += 1
            if done % 64 == 0:
                progress(min(done, total), total)
                await asyncio.sleep(0)
            try:
                while await engine.loader.ensure([(layer, number)]):
                    pass
            except DataLost as error:
                faults.append(f"layer {layer}, block {number << LEAF_SHIFT}: {error}")
                continue
            leaf = layer_map.leaves.get(number)
            if leaf is not None:
                mapped += leaf.count
                faults += _check_leaf(state, layer, number, leaf, counts)
    state.settle()
    if state._journal is not None and state.journal.head != seen:
        # Guests wrote meanwhile: counts taken over time do not add up exactly.
        return faults, done
    faults += [
        f"stripe {row.id} counts {state.table.live_of(row.id)} live blocks, the map has "
        f"{counts[row.id]}"
        for row in state.table.stripes()
        if row.kind == DATA and counts[row.id] != state.table.live_of(row.id)
    ]
    if mapped != state.used:
        faults.append(f"the pool counts {state.used} mapped blocks, the map has {mapped}")
    return faults, done


def _check_leaf(
    state: State, layer: int, number: int, leaf: Leaf, counts: Counter[int]
) -> list[str]:
    """Count the blocks of a leaf by stripe; every stripe must exist."""
    faults = []
    for block, location, _ in leaf.mapped():
        if location >> TAG_SHIFT == TAG_STRIPE:
            counts[stripe_of(location)] += 1
            if stripe_of(location) not in state.table:
                at = (number << LEAF_SHIFT) + block
                faults.append(f"layer {layer}, block {at} is in a stripe that does not exist")
    return faults


async def _check_stripe(engine: Engine, row: Stripe, away: Counter[int]) -> list[str]:
    """Every stored shard must have the right header and the right bytes; `away` counts those on
    devices that are missing."""
    state = engine.state
    faults = []
    with state.gate.inside():
        for shard, (device, slot) in enumerate(row.places):
            where = f"stripe {row.id}, shard {shard} on device {device}"
            if device == NOWHERE:
                faults.append(f"stripe {row.id}, shard {shard} is missing: it was never stored")
                continue
            member = state.members.get(device)
            if member is None or not member.present or member.shards is None:
                away[device] += 1
                continue
            size = row.shape.header_bytes + row.shape.shard_bytes
            try:
                data = await member.shards.read(row.id, shard, slot, 0, size)
                header = stripe_format.decode(data)
            except (DeviceError, FormatError) as error:
                faults.append(f"{where}: {error}")
                continue
            if (header.stripe, header.shard, header.shape) != (row.id, shard, row.shape):
                faults.append(f"{where}: holds stripe {header.stripe}, shard {header.shard}")
                continue
            found = block_crcs(memoryview(data)[row.shape.header_bytes :])
            first = shard * row.shape.shard_blocks
            expected = header.contents.crcs[first : first + row.shape.shard_blocks].tolist()
            bad = sum(a != b for a, b in zip(found, expected, strict=True))
            if bad:
                faults.append(f"{where}: {bad} of {len(found)} blocks of {BLOCK_SIZE} are wrong")
    return faults
