"""The storage under the devices runs full before the devices do (P5, R10)."""

from __future__ import annotations

import asyncio
import contextlib
import errno

from backends.base import BLOCK_SIZE
from backends.fault_script import Fail, Rule
from pool import Pool
from pool.errors import PoolFull
from pool.volume import Volume
from tests.sim.loop import run
from tests.unit.pool.support import KIB, MIB, Disk, make_disks, make_pool, open_pool, read, write

CHUNK = bytes(range(256)) * 256
#: Superblocks at the end are written when a pool is made: they have their place.
TAIL = 256 * KIB


def full(disk: Disk, start: int) -> None:
    """Let no write to the slots of a disk from `start` on succeed."""
    within = (start, disk.open().size - TAIL)
    disk.script.add(Rule(frozenset({"write"}), Fail(errno.ENOSPC), times=None, within=within))


async def cramped() -> tuple[list[Disk], Pool]:
    """A pool with a large volume `v`, and storage for half of its devices."""
    disks = make_disks(4, 4 * MIB)
    await make_pool(disks, 2, 1, journal=MIB)
    pool = await open_pool(disks)
    await pool.create_volume("v", 64 * MIB)
    for disk in disks:
        full(disk, 2 * MIB)
    return disks, pool


async def fill(volume: Volume) -> int:
    """Write until the pool is full; returns the bytes written."""
    written = 0
    with contextlib.suppress(PoolFull):
        while written < volume.size:
            await asyncio.wait_for(volume.write(written, memoryview(CHUNK)), 60)
            written += len(CHUNK)
    return written


def test_a_write_gets_enospc_and_everything_else_goes_on() -> None:
    async def scenario() -> None:
        disks, pool = await cramped()
        volume = pool.volume("v")
        written = await fill(volume)
        assert MIB < written < 64 * MIB
        assert pool.status()["counters"]["members_full"] > 0
        await asyncio.wait_for(volume.flush(), 60)
        assert await read(pool, "v", written - len(CHUNK), len(CHUNK)) == CHUNK
        await asyncio.wait_for(volume.trim(0, written), 60)
        for disk in disks:
            disk.script.clear()
        # Space is tried again by itself: no restart.
        await asyncio.sleep(60)
        for at in range(0, 2 * MIB, len(CHUNK)):
            await asyncio.wait_for(write(pool, "v", at, CHUNK), 60)
        assert await read(pool, "v", 0, len(CHUNK)) == CHUNK
        assert await pool.check() == []
        await pool.close()

    run(scenario())


def test_stripes_go_to_the_devices_that_have_room() -> None:
    async def scenario() -> None:
        disks = make_disks(4, 8 * MIB)
        await make_pool(disks, 2, 1, journal=MIB)
        pool = await open_pool(disks)
        await pool.create_volume("v", 8 * MIB)
        for disk in disks[:2]:
            full(disk, 3 * MIB)
        for at in range(0, 3 * MIB, len(CHUNK)):
            await asyncio.wait_for(write(pool, "v", at, CHUNK), 60)
        assert await read(pool, "v", MIB, len(CHUNK)) == CHUNK
        await pool.close()

    run(scenario())


def test_trims_and_overwrites_go_on_for_ever_although_the_storage_is_full() -> None:
    """Each trim takes journal space, and only what the collector gains can give it back; then all
    that was trimmed can be written again."""

    async def scenario() -> None:
        disks, pool = await cramped()
        volume = pool.volume("v")
        blocks = await fill(volume) // BLOCK_SIZE
        assert blocks > 2 * pool.engine.journal.size // 2
        for block in range(0, blocks, 2):
            await asyncio.wait_for(volume.trim(block * BLOCK_SIZE, BLOCK_SIZE), 60)
        assert pool.engine.state.used == blocks // 2
        for _ in range(4):
            for block in range(1, blocks, 2):
                data = memoryview(CHUNK)[:BLOCK_SIZE]
                await asyncio.wait_for(volume.write(block * BLOCK_SIZE, data), 60)
        # Trims of what is not there take nothing.
        head = pool.engine.journal.head
        for block in range(0, blocks, 2):
            await volume.trim(block * BLOCK_SIZE, BLOCK_SIZE)
        assert pool.engine.journal.head == head
        await asyncio.wait_for(volume.flush(), 60)
        assert await pool.check() == []
        await pool.close()
        pool = await open_pool(disks)
        data = memoryview(CHUNK)[:BLOCK_SIZE]
        assert await read(pool, "v", BLOCK_SIZE, BLOCK_SIZE) == data
        for block in range(1, blocks, 2):
            await asyncio.wait_for(pool.volume("v").write(block * BLOCK_SIZE, data), 60)
        await pool.delete_volume("v")
        await pool.close()

    run(scenario())
