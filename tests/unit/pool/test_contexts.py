"""What a volume tells an NBD server besides data: holes, contexts, where an error is, FAST_ZERO."""

from __future__ import annotations

import errno

import pytest

from backends.base import BLOCK_SIZE
from pool import Pool
from pool.errors import DataLost
from pool.format.location import POSITION_MASK, TAG_JOURNAL, TAG_SHIFT
from tests.sim.loop import run
from tests.unit.pool.support import MIB, Disk, make_disks, make_pool, open_pool, read, write

#: Blocks of the volume: data, zeros that keep their space, holes.
DATA, ZEROS = 16, 4
HOLE, ZERO = 3, 2


async def filled() -> tuple[list[Disk], Pool]:
    disks = make_disks(4)
    await make_pool(disks, 2, 1)
    pool = await open_pool(disks)
    await pool.create_volume("v", MIB)
    await write(pool, "v", 0, b"x" * DATA * BLOCK_SIZE)
    at = DATA * BLOCK_SIZE
    await pool.volume("v").write_zeroes(at, ZEROS * BLOCK_SIZE, no_hole=True)
    return disks, pool


def test_reads_name_what_is_zero() -> None:
    async def scenario() -> None:
        _, pool = await filled()
        volume = pool.volume("v")
        into = memoryview(bytearray(b"?" * MIB))
        data = DATA * BLOCK_SIZE
        found = volume.try_read_sparse(0, into)
        assert isinstance(found, list)
        assert sum(size for _, size in found) == MIB - data
        assert found[0][0] == data
        assert bytes(into[:data]) == b"x" * data
        assert bytes(into[data:]) == b"?" * (MIB - data)
        assert volume.try_read_sparse(0, into[:data]) is True
        for block, expected in ((0, True), (DATA, ((0, 4096),)), (DATA + ZEROS, ((0, 4096),))):
            assert volume.try_read_sparse(block * BLOCK_SIZE, into[:BLOCK_SIZE]) == expected
        assert volume.try_read(0, into)
        assert bytes(into) == b"x" * data + bytes(MIB - data)
        # What begins inside of a block comes whole.
        assert volume.try_read_sparse(data - 1, into[:3]) is True
        assert bytes(into[:3]) == b"x\0\0"
        await pool.close()

    run(scenario())


def test_contexts() -> None:
    async def scenario() -> None:
        disks, pool = await filled()
        volume = pool.volume("v")
        assert volume.contexts == ("qemu:allocation-depth", "stripewell:redundancy")
        data, zeros = DATA * BLOCK_SIZE, ZEROS * BLOCK_SIZE
        rest = MIB - data - zeros
        assert await volume.extents(0, MIB, 9) == [(data, 0), (zeros, ZERO), (rest, HOLE)]
        depth = await volume.extents(0, MIB, 9, "qemu:allocation-depth")
        assert depth == [(data + zeros, 1), (rest, 0)]
        # One replica has it at once, the others when it is flushed.
        redundancy = "stripewell:redundancy"
        assert await volume.extents(0, MIB, 9, redundancy) == [(data, 0), (MIB - data, 1)]
        await volume.flush()
        assert await volume.extents(0, MIB, 9, redundancy) == [(MIB, 1)]
        await pool.close()
        # Packed, with one device missing: what is in stripes that had a shard there endures less.
        pool = await open_pool(disks[:3])
        extents = await pool.volume("v").extents(0, data, 99, redundancy)
        assert sum(size for size, _ in extents) == data
        assert {flags for _, flags in extents} == {0, 1}
        await pool.close()

    run(scenario())


def test_errors_say_which_block() -> None:
    async def scenario() -> None:
        disks, pool = await filled()
        await pool.close()
        pool = await open_pool(disks)
        state = pool.engine.state
        await pool.volume("v").extents(0, MIB, 9)
        leaf = next(iter(state.maps.values())).leaves[0]
        bad = 5
        location = leaf.get(bad)[0]
        if location >> TAG_SHIFT == TAG_JOURNAL:
            at = [
                (disks[r.member], state.journal.offset(r, location & POSITION_MASK))
                for r in state.journal.replicas
            ]
        else:
            row = state.row(location >> 24 & (1 << 38) - 1)
            at = []
            for device, slot in row.places:
                start = state.members[device].layout.slot_offset(slot)
                at += [(disks[device], start + i * BLOCK_SIZE) for i in range(4)]
        for disk, offset in at:
            disk.flip(offset + 9)
        with pytest.raises(DataLost) as caught:
            await read(pool, "v", 0, DATA * BLOCK_SIZE)
        assert caught.value.offset is not None
        assert caught.value.offset % BLOCK_SIZE == 0
        first = caught.value.offset
        assert await read(pool, "v", 0, first) == b"x" * first
        with pytest.raises(DataLost):
            await read(pool, "v", first, BLOCK_SIZE)
        await pool.close()

    run(scenario())


def test_fast_zero_and_cache() -> None:
    async def scenario() -> None:
        _, pool = await filled()
        volume = pool.volume("v")
        with pytest.raises(OSError, match="faster than written") as caught:
            await volume.write_zeroes(1, BLOCK_SIZE, no_hole=False, fast=True)
        assert caught.value.errno == errno.ENOTSUP
        assert await read(pool, "v", 0, BLOCK_SIZE) == b"x" * BLOCK_SIZE
        await volume.write_zeroes(100, 2 * BLOCK_SIZE, no_hole=False, fast=True)
        assert await read(pool, "v", 0, 3 * BLOCK_SIZE) == (
            b"x" * 100 + bytes(2 * BLOCK_SIZE) + b"x" * (BLOCK_SIZE - 100)
        )
        for layer_map in pool.engine.state.maps.values():
            await pool.checkpoint()
            layer_map.evict(1 << 30)
        assert not volume.try_read(0, memoryview(bytearray(BLOCK_SIZE)))
        await volume.cache(5, MIB - 5)
        assert volume.try_read(0, memoryview(bytearray(BLOCK_SIZE)))
        await pool.close()

    run(scenario())
