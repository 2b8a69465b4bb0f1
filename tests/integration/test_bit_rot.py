"""Bits flipped in the device files of an open pool: always right bytes, always counted, repaired.

The files are real, and so is the page cache: warm reads find the flips in memory, cold ones on the
disk. Flips hit at most `m` devices, which is what the code can bear.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from backends.open import open_backend
from pool import MemberSpec, Pool, PoolSpec, create_pool
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
from pool.maintenance import QUIET_SECONDS
from pool.mover import InlineMover

KIB = 1024
BLOCK = 4 * KIB
DATA, PARITY, FILES = 3, 2, 6
FILE_SIZE = 8192 * KIB
VOLUME_SIZE = 2048 * KIB
JOURNAL = 2048 * KIB


class Bench:
    """A pool on files, and what its volume must read as."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"disk{number}.img" for number in range(FILES)]
        self.rng = random.Random(7)
        self.content = bytearray(VOLUME_SIZE)
        self.flipped: dict[tuple[int, int], int] = {}
        self._pool: Pool | None = None

    @property
    def pool(self) -> Pool:
        assert self._pool is not None
        return self._pool

    async def create(self) -> None:
        urls = [f"file://{path}?size={FILE_SIZE}" for path in self.paths]
        files = [await open_backend(url, create=True) for url in urls]
        spec = PoolSpec("tank", DATA, PARITY, slot_size=16 * KIB, journal_size=JOURNAL)
        await create_pool(spec, [MemberSpec(file) for file in files], rng=self.rng)
        for file in files:
            await file.close()
        await self.open()
        await self.pool.create_volume("v", VOLUME_SIZE)

    async def open(self) -> None:
        files = [await open_backend(f"file://{path}") for path in self.paths]
        self._pool = await Pool.open(files, mover=InlineMover(), rng=self.rng)

    async def close(self) -> None:
        if self._pool is not None:
            await self._pool.close()
            self._pool = None

    async def write(self, block: int, count: int) -> None:
        data = self.rng.randbytes(count * BLOCK)
        await self.pool.volume("v").write(block * BLOCK, memoryview(data))
        self.content[block * BLOCK : (block + count) * BLOCK] = data

    async def fill(self) -> None:
        """Packed stripes, and behind them a journal that holds live blocks."""
        for block in range(0, 400, 50):
            await self.write(block, 50)
        await self.settle()
        for block in self.rng.sample(range(400, 500), 12):
            await self.write(block, 1)
        await self.pool.volume("v").flush()

    async def settle(self) -> None:
        """Return when maintenance has nothing to do, with the map in memory: what is moved while a
        test runs is not read at its old place again."""
        await asyncio.sleep(2 * QUIET_SECONDS)
        await self.pool.checkpoint()
        await asyncio.sleep(2 * QUIET_SECONDS)
        await self.pool.volume("v").extents(0, VOLUME_SIZE, 1000)

    def forget_cache(self) -> None:
        """Drop the files from the page cache."""
        for path in self.paths:
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def flip(self, device: int, offset: int) -> None:
        """Change one bit of a file behind the pool's back, and note what was there."""
        with self.paths[device].open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            self.flipped.setdefault((device, offset), byte)
            file.seek(offset)
            file.write(bytes([byte ^ 1 << self.rng.randrange(8)]))

    def unrepaired(self) -> list[tuple[int, int]]:
        """Flipped places that are not what they were."""
        images = [path.read_bytes() for path in self.paths]
        return [(d, at) for (d, at), byte in self.flipped.items() if images[d][at] != byte]

    def mapped(self) -> Iterator[tuple[int, int, int]]:
        """(tag, device, byte offset) of the place that a read of each mapped block looks at."""
        state = self.pool.engine.state
        for layer_map in state.maps.values():
            for leaf in layer_map.leaves.values():
                for _, location, _ in leaf.mapped():
                    yield self._place(location)

    def _place(self, location: int) -> tuple[int, int, int]:
        state = self.pool.engine.state
        tag = location >> TAG_SHIFT
        if tag == TAG_JOURNAL:
            replica = state.journal.replicas[0]
            return tag, replica.member, state.journal.offset(replica, location & POSITION_MASK)
        assert tag == TAG_STRIPE
        row = state.row(stripe_of(location))
        device, slot = row.places[location >> SHARD_SHIFT & SHARD_MASK]
        start = state.members[device].layout.slot_offset(slot) + row.shape.header_bytes
        return tag, device, start + (location & BLOCK_MASK) * BLOCK

    async def read_all(self, step: int) -> None:
        """Every byte must be right, by whichever path."""
        volume = self.pool.volume("v")
        for at in range(0, VOLUME_SIZE, step):
            into = memoryview(bytearray(min(step, VOLUME_SIZE - at)))
            if not volume.try_read(at, into):
                await volume.read(at, into)
            assert into == self.content[at : at + len(into)], f"wrong bytes at {at}"

    def counter(self, name: str) -> int:
        counters: dict[str, int] = self.pool.status()["counters"]
        return counters.get(name, 0)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.create()
    await bench.fill()
    # After a new start nothing is in the engine's own memory.
    await bench.close()
    await bench.open()
    await bench.settle()
    yield bench
    await bench.close()


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("step", [BLOCK, 64 * KIB], ids=["4k", "64k"])
async def test_every_flip_that_a_read_meets_is_counted_and_repaired(
    bench: Bench, cold: bool, step: int
) -> None:
    """All mapped blocks of `m` devices are bad at once, among them the journal's first replica."""
    primary = bench.pool.engine.state.journal.replicas[0].member
    other = next(number for number in range(FILES) if number != primary)
    places = [place for place in bench.mapped() if place[1] in (primary, other)]
    assert {TAG_JOURNAL, TAG_STRIPE} == {tag for tag, _, _ in places}
    for _, device, start in places:
        bench.flip(device, start + bench.rng.randrange(BLOCK))
    if cold:
        bench.forget_cache()
    await bench.read_all(step)
    assert bench.unrepaired() == []
    assert bench.counter("repaired_blocks") == len(places)
    assert bench.counter("bad_blocks") > 0
    by_device = {row["index"]: row["errors"] for row in bench.pool.status()["devices"]}
    assert all((errors > 0) == (index in (primary, other)) for index, errors in by_device.items())
    assert await bench.pool.check() == []
    # Nothing is left to repair.
    bench.forget_cache()
    await bench.read_all(step)
    assert bench.counter("repaired_blocks") == len(places)


@pytest.mark.parametrize("cold", [False, True], ids=["warm", "cold"])
@pytest.mark.parametrize("seed", range(3))
async def test_flips_anywhere_in_slots_and_journal_zones(
    bench: Bench, cold: bool, seed: int
) -> None:
    """Headers, parity and dead space rot too; the volume never shows it, also not after a start."""
    rng = random.Random(seed)
    members = bench.pool.engine.state.members
    devices = rng.sample(range(FILES), PARITY)
    for device in devices:
        where = members[device].layout
        written = 2 * where.root_bytes, where.slot_offset(members[device].slots.used)
        for _ in range(400):
            bench.flip(device, rng.randrange(*written))
    hit = {
        (device, start)
        for _, device, start in bench.mapped()
        if any(d == device and start <= at < start + BLOCK for d, at in bench.flipped)
    }
    if cold:
        bench.forget_cache()
    await bench.read_all(64 * KIB)
    assert hit
    assert bench.counter("repaired_blocks") >= len(hit)
    left = bench.unrepaired()
    assert not [at for d, at in left if any(d == e and s <= at < s + BLOCK for e, s in hit)]
    await bench.close()
    await bench.open()
    await bench.read_all(BLOCK)


async def test_one_bad_shard_more_than_the_parity_is_an_error_and_no_guess(bench: Bench) -> None:
    state = bench.pool.engine.state
    location, block = next(
        (location, (number << 9) + block)
        for number, leaf in next(iter(state.maps.values())).leaves.items()
        for block, location, _ in leaf.mapped()
        if location >> TAG_SHIFT == TAG_STRIPE
    )
    row = state.row(stripe_of(location))
    wanted = location >> SHARD_SHIFT & SHARD_MASK
    others = [shard for shard in range(row.shape.shards) if shard != wanted][:PARITY]
    for shard in (wanted, *others):
        device, slot = row.places[shard]
        start = state.members[device].layout.slot_offset(slot) + row.shape.header_bytes
        bench.flip(device, start + (location & BLOCK_MASK) * BLOCK)
    volume = bench.pool.volume("v")
    into = memoryview(bytearray(BLOCK))
    assert not volume.try_read(block * BLOCK, into)
    with pytest.raises(OSError, match="needed shards are readable") as caught:
        await volume.read(block * BLOCK, into)
    assert caught.value.errno == errno.EIO
    assert bench.counter("lost_reads") == 1
    await volume.read((block + 1) * BLOCK, into)
    assert into == bench.content[(block + 1) * BLOCK : (block + 2) * BLOCK]
