"""Reading what is bad: reconstructed, repaired, counted; or an honest error."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import pytest

from backends.base import BLOCK_SIZE
from backends.fault_script import READS, Delay, Fail, Hang, Rule
from pool import Pool
from pool.errors import DataLost
from pool.format import page
from pool.format.location import (
    BLOCK_MASK,
    POSITION_MASK,
    SHARD_MASK,
    SHARD_SHIFT,
    TAG_JOURNAL,
    TAG_SHIFT,
    TAG_STRIPE,
    stripe_of,
)
from pool.table import Stripe
from tests.sim.loop import run
from tests.unit.pool.support import MIB, Disk, make_disks, make_pool, open_pool, read, write

DATA, PARITY = 3, 2
STRIPES = 64
Scenario = Callable[["Bench"], Awaitable[None]]


class Bench:
    """A pool whose volume `v` has its first blocks in stripes and block 200 in the journal."""

    pool: Pool
    disks: list[Disk]

    def __init__(self) -> None:
        self.disks = make_disks(6)
        self.data = b"".join(number.to_bytes(4, "little") * 1024 for number in range(STRIPES))
        self.late = b"late" * 1024

    async def start(self) -> None:
        await make_pool(self.disks, DATA, PARITY)
        await self.reopen()
        await self.pool.create_volume("v", MIB)
        await write(self.pool, "v", 0, self.data)
        await write(self.pool, "v", 200 * BLOCK_SIZE, self.late)
        await self.pool.close()
        # In a new life nothing is in the ring; the map is loaded, no data is read.
        await self.reopen()
        await self.pool.volume("v").extents(0, MIB, 10)

    async def reopen(self) -> None:
        self.pool = await open_pool(self.disks)

    def location(self, block: int) -> int:
        leaf = next(iter(self.pool.engine.state.maps.values())).leaves[0]
        return leaf.get(block)[0]

    def packed_block(self) -> int:
        """A block that lies in a stripe."""
        return next(b for b in range(STRIPES) if self.location(b) >> TAG_SHIFT == TAG_STRIPE)

    def row(self, block: int) -> Stripe:
        return self.pool.engine.state.row(stripe_of(self.location(block)))

    def shard_offset(self, row: Stripe, shard: int) -> tuple[Disk, int]:
        """Disk and byte where a shard's slot begins."""
        device, slot = row.places[shard]
        where = self.pool.engine.state.members[device].layout
        return self.disks[device], where.slot_offset(slot)

    def spoil(
        self, block: int, shards: int, *, parity_first: bool = False
    ) -> list[tuple[Disk, int]]:
        """Flip a bit in the shard of a block, and in others at the same height."""
        location, row = self.location(block), self.row(block)
        wanted = location >> SHARD_SHIFT & SHARD_MASK
        others = sorted((s for s in range(row.shape.shards) if s != wanted), reverse=parity_first)
        order = [wanted, *others]
        places = []
        for shard in order[:shards]:
            disk, start = self.shard_offset(row, shard)
            at = start + row.shape.header_bytes + (location & BLOCK_MASK) * BLOCK_SIZE + 99
            disk.flip(at)
            places.append((disk, at))
        return places

    def count(self, name: str) -> int:
        counters: dict[str, int] = self.pool.status()["counters"]
        return counters.get(name, 0)

    def block(self, number: int) -> bytes:
        return self.data[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE]


def with_pool(scenario: Scenario) -> None:
    async def whole() -> None:
        bench = Bench()
        await bench.start()
        await scenario(bench)
        await bench.pool.close()

    run(whole())


@pytest.mark.parametrize("bad", [1, 2])
def test_bad_blocks_within_the_parity_are_reconstructed_and_repaired(bad: int) -> None:
    async def scenario(bench: Bench) -> None:
        block = bench.packed_block()
        places = bench.spoil(block, bad)
        before = [disk.data[at] for disk, at in places]
        assert not bench.pool.volume("v").try_read(
            block * BLOCK_SIZE, memoryview(bytearray(BLOCK_SIZE))
        )
        assert await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE) == bench.block(block)
        assert all(disk.data[at] == old ^ 1 for (disk, at), old in zip(places, before, strict=True))
        assert bench.count("repaired_blocks") == bad
        assert bench.count("bad_blocks") == bad
        assert bench.count("reconstructed_blocks") == 1
        assert await bench.pool.check() == []

    with_pool(scenario)


def test_one_bad_block_more_is_lost_and_is_not_guessed() -> None:
    async def scenario(bench: Bench) -> None:
        block = bench.packed_block()
        bench.spoil(block, PARITY + 1, parity_first=True)
        with pytest.raises(DataLost, match="2 of 3 needed shards are readable") as caught:
            await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE)
        assert caught.value.errno == errno.EIO
        assert bench.count("lost_reads") == 1
        assert bench.count("repaired_blocks") == 0
        for other in range(STRIPES):
            if other != block:
                at = other * BLOCK_SIZE
                assert await read(bench.pool, "v", at, BLOCK_SIZE) == bench.block(other)
        # New bytes heal it.
        await write(bench.pool, "v", block * BLOCK_SIZE, bench.late)
        assert await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE) == bench.late

    with_pool(scenario)


def test_shards_that_are_bad_at_different_heights_help_each_other() -> None:
    """More shards than the parity have a bad block, but never more at one height."""

    async def scenario(bench: Bench) -> None:
        block = bench.packed_block()
        row = bench.row(block)
        assert row.shape.shard_blocks >= 3
        for shard in range(row.shape.shards):
            disk, start = bench.shard_offset(row, shard)
            height = shard % row.shape.shard_blocks
            disk.flip(start + row.shape.header_bytes + height * BLOCK_SIZE)
        assert await read(bench.pool, "v", 0, len(bench.data)) == bench.data

    with_pool(scenario)


def test_a_device_that_fails_or_hangs_is_passed_over() -> None:
    async def scenario(bench: Bench) -> None:
        block = bench.packed_block()
        device = bench.row(block).places[bench.location(block) >> SHARD_SHIFT & SHARD_MASK][0]
        for action in (Fail(), Hang()):
            bench.disks[device].script.add(Rule(READS, action, times=None))
            assert await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE) == bench.block(block)
            bench.disks[device].script.clear()
        assert bench.count("read_errors") >= 2
        assert bench.pool.status()["devices"][device]["errors"] >= 2

    with_pool(scenario)


def test_bad_headers_are_passed_over() -> None:
    """As long as one shard has its header, every block can be reconstructed."""

    async def scenario(bench: Bench) -> None:
        block = bench.packed_block()
        row = bench.row(block)
        for shard in range(row.shape.shards - 1):
            disk, start = bench.shard_offset(row, shard)
            disk.flip(start + 50)
        bench.spoil(block, 1)
        assert await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE) == bench.block(block)
        assert bench.count("bad_headers") == row.shape.shards - 1
        disk, start = bench.shard_offset(row, row.shape.shards - 1)
        disk.flip(start + 50)
        bench.pool.engine.reader._headers.clear()
        bench.spoil(block, 1)
        with pytest.raises(DataLost, match="has no readable header"):
            await read(bench.pool, "v", block * BLOCK_SIZE, BLOCK_SIZE)

    with_pool(scenario)


def test_a_bad_journal_block_comes_from_another_replica_and_is_repaired() -> None:
    async def scenario(bench: Bench) -> None:
        location = bench.location(200)
        assert location >> TAG_SHIFT == TAG_JOURNAL
        journal = bench.pool.engine.journal
        assert journal.peek(location & POSITION_MASK) is None
        places = [
            (bench.disks[r.member], journal.offset(r, location & POSITION_MASK) + 7)
            for r in journal.replicas
        ]
        assert len(places) == PARITY + 1
        for disk, at in places[:-1]:
            disk.flip(at)
        assert await read(bench.pool, "v", 200 * BLOCK_SIZE, BLOCK_SIZE) == bench.late
        assert all(disk.data[at] == bench.late[7] for disk, at in places)
        assert bench.count("repaired_blocks") == PARITY
        for disk, at in places:
            disk.flip(at)
        with pytest.raises(DataLost, match="unreadable on all replicas"):
            await read(bench.pool, "v", 200 * BLOCK_SIZE, BLOCK_SIZE)

    with_pool(scenario)


@pytest.mark.parametrize("bad", range(1, PARITY + 2))
def test_bad_map_pages_are_reconstructed_and_too_bad_ones_are_no_hole(bad: int) -> None:
    async def scenario(bench: Bench) -> None:
        state = bench.pool.engine.state
        pointer = next(iter(state.maps.values())).pointers[0]
        row = state.row(pointer.stripe)
        shard, within = divmod(pointer.offset // BLOCK_SIZE, row.shape.shard_blocks)
        at = row.shape.header_bytes + within * BLOCK_SIZE + pointer.offset % BLOCK_SIZE
        for other in [shard, *(s for s in range(row.shape.shards) if s != shard)][:bad]:
            disk, start = bench.shard_offset(row, other)
            disk.flip(start + at)
        if bad <= PARITY:
            found = await bench.pool.engine.reader.page(pointer, page.KIND_LEAF)
            assert (found.layer, found.number) == (1, 0)
            assert bench.count("repaired_blocks") == bad
            return
        with pytest.raises(DataLost):
            await bench.pool.engine.reader.page(pointer, page.KIND_LEAF)
        next(iter(state.maps.values())).evict(1 << 30)
        for _ in range(2):
            with pytest.raises(DataLost):
                await read(bench.pool, "v", 0, BLOCK_SIZE)

    with_pool(scenario)


def test_a_page_is_read_to_its_end_although_its_stripe_is_let_go_of() -> None:
    """A checkpoint takes the row from the table between two shards; the pin keeps the slots."""

    async def scenario(bench: Bench) -> None:
        state, reader = bench.pool.engine.state, bench.pool.engine.reader
        row = bench.row(bench.packed_block())
        length = row.shape.blocks * BLOCK_SIZE
        before = await reader._stripe_bytes(row, 0, length, trusted=True)
        for disk in bench.disks:
            disk.script.add(Rule(frozenset({"try_read"}), Fail(), times=None))
            disk.script.add(Rule(frozenset({"read"}), Delay(1.0)))
        reading = asyncio.ensure_future(reader._stripe_bytes(row, 0, length, trusted=True))
        await asyncio.sleep(0.5)
        state.table.remove(row.id)
        state.forget_places()
        assert await reading == before is not None

    with_pool(scenario)


def test_a_pool_open_for_reading_gives_everything_back() -> None:
    """What is in stripes and what is still in the journal, and takes nothing (P8)."""

    async def whole() -> None:
        bench = Bench()
        await bench.start()
        await bench.pool.close()
        before = [bytes(disk.data) for disk in bench.disks]
        bench.pool = await open_pool(bench.disks[PARITY:], read_only=True)
        assert await read(bench.pool, "v", 0, len(bench.data)) == bench.data
        assert await read(bench.pool, "v", 200 * BLOCK_SIZE, BLOCK_SIZE) == bench.late
        with pytest.raises(OSError, match="open for reading only"):
            await write(bench.pool, "v", 0, bench.late)
        await bench.pool.close()
        assert before == [bytes(disk.data) for disk in bench.disks]

    run(whole())


def test_reads_of_paged_out_leaves_go_on_when_the_pool_takes_no_writes() -> None:
    async def scenario(bench: Bench) -> None:
        for layer_map in bench.pool.engine.state.maps.values():
            layer_map.evict(1 << 30)
        bench.pool.engine.state.stopped = "for the test"
        assert await read(bench.pool, "v", 0, len(bench.data)) == bench.data
        with pytest.raises(OSError, match="for the test"):
            await write(bench.pool, "v", 0, b"x")

    with_pool(scenario)
