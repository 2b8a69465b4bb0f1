"""An old copy of a device in the place of an active member: nothing that it forgot is missed later.

Within the budget of 2+1: a replica of the journal forgets what was flushed, the next opening makes
it whole again, and only then the other replica is lost (P2, R24).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import pytest

from backends.base import BLOCK_SIZE
from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.destage import destage
from pool.format.location import POSITION_MASK, TAG_JOURNAL, TAG_SHIFT
from pool.mover import InlineMover

from .devices import Crash, SimDevice, World
from .image import Image
from .loop import run

KIB = 1024
NAMES = ("a", "b", "c")
#: `a` and `b` hold the journal.
FORGETS, LATER_LOST = "a", "b"
#: Holds stripes only.
SPARE = "c"
#: Too few for anything to be packed into stripes, which an old copy lacks too.
BLOCKS = 16
VOLUME = BLOCKS * BLOCK_SIZE
#: One of them, and how many blocks the superblocks at each end of a device take.
BLOCK = 11
ROOT_BLOCKS = 32
#: The last of all operations of an opening comes before this.
OPERATIONS_MAX = 2000


def content(version: int) -> bytes:
    return b"".join(
        (version << 16 | block).to_bytes(8, "little") * (BLOCK_SIZE // 8) for block in range(BLOCKS)
    )


class Lives:
    """A pool on three devices, from one loss of power to the next."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        self.devices = self.world.create(dict.fromkeys(NAMES, 4 << 20))

    async def start(self) -> None:
        """Make the pool and an empty volume."""
        spec = PoolSpec("tank", 2, 1, 16 * KIB, 1024 * KIB)
        members = [MemberSpec(device) for device in self.devices.values()]
        await create_pool(spec, members, rng=Random(1))
        async with self.life() as pool:
            await pool.create_volume("v", VOLUME)
            assert [replica.member for replica in pool.engine.journal.replicas] == [0, 1]

    async def open(self, without: str = "", *, read_only: bool = False) -> Pool:
        devices = [device for name, device in self.devices.items() if name != without]
        return await self.world.run(
            Pool.open(
                devices, mover=InlineMover(), rng=Random(self.world.life), read_only=read_only
            )
        )

    @asynccontextmanager
    async def life(self, without: str = "") -> AsyncIterator[Pool]:
        """An open pool; the power fails at the end, or before with Crash."""
        try:
            yield await self.open(without)
        finally:
            self.end()

    def end(
        self, *, crash_at: int | None = None, power: bool = True, fate: str | None = None
    ) -> None:
        if power:
            self.world.crash(fate)
        else:
            self.world.kill()
        self.devices = self.world.reopen(crash_at=crash_at)


async def overwrite(pool: Pool, version: int) -> None:
    """Write and flush the whole volume in small pieces."""
    volume, data = pool.volume("v"), memoryview(content(version))
    for block in range(0, BLOCKS, 4):
        at = slice(block * BLOCK_SIZE, (block + 4) * BLOCK_SIZE)
        await volume.write(at.start, data[at])
    await volume.flush()


async def check(pool: Pool, version: int) -> None:
    found = bytearray(VOLUME)
    await pool.volume("v").read(0, memoryview(found))
    assert bytes(found) == content(version)
    assert await pool.check() == []
    assert "journal" not in pool.engine.state.problems


async def forget(lives: Lives, *, roots: int, checkpoint: bool = False) -> None:
    """Flush a volume, then put an old copy of a replica back; `roots` were committed between."""
    await lives.start()
    async with lives.life() as pool:
        await overwrite(pool, 1)
        old = lives.devices[FORGETS].snapshot()
        for _ in range(roots):
            await pool.engine.membership.commit(pool.engine.state.committed)
        await overwrite(pool, 2)
        if checkpoint:
            await pool.checkpoint()
        # A record behind it tells that it is durable.
        await pool.create_volume("late", VOLUME)
    lives.devices[FORGETS].restore(old)


@pytest.mark.parametrize("roots", [0, 1, 2, 3])
def test_a_replica_that_forgot_is_made_whole_before_it_counts(roots: int) -> None:
    async def scenario() -> None:
        lives = Lives(roots)
        await forget(lives, roots=roots)
        async with lives.life() as pool:
            assert pool.status()["state"] == "healthy"
            await check(pool, 2)
        async with lives.life(without=LATER_LOST) as pool:
            await check(pool, 2)

    run(scenario())


@pytest.mark.parametrize(("roots", "fate"), [(0, None), (1, "torn")])
def test_so_it_is_when_that_opening_dies_anywhere(roots: int, fate: str | None) -> None:
    """The power fails at each operation of it in turn."""

    async def dies(nth: int) -> bool:
        lives = Lives(nth)
        await forget(lives, roots=roots)
        lives.end(crash_at=nth)
        died = False
        try:
            await lives.open()
        except Crash:
            died = True
        lives.end(fate=fate)
        for without in ("", LATER_LOST):
            async with lives.life(without) as pool:
                await check(pool, 2)
        return died

    for nth in range(1, OPERATIONS_MAX):
        if not run(dies(nth)):
            assert nth > 20
            return
    pytest.fail(f"an opening takes more than {OPERATIONS_MAX} operations")


def test_an_answered_write_on_a_member_that_missed_the_last_root_is_kept() -> None:
    """P1: the process dies between the superblocks of one commit, a write is in the page cache of
    the member whose turn did not come."""

    async def scenario() -> None:
        lives = Lives(1)
        await lives.start()
        pool = await lives.open()
        await overwrite(pool, 1)
        journal = pool.engine.journal
        primary = lives.devices[NAMES[journal.replicas[0].member]]
        before = primary.snapshot()
        await pool.volume("v").write(0, memoryview(content(2))[: 2 * BLOCK_SIZE])
        await pool.engine.membership.commit(pool.engine.state.committed)
        assert journal.replicas[1].written < journal.head
        lives.end(power=False)
        primary = lives.devices[primary.name]
        put_superblocks_back(primary, before)
        for _ in range(2):
            pool = await lives.open()
            found = bytearray(2 * BLOCK_SIZE)
            await pool.volume("v").read(0, memoryview(found))
            assert found == content(2)[: len(found)]
            lives.end(power=False)

    run(scenario())


def put_superblocks_back(device: SimDevice, old: Image) -> None:
    now = device.snapshot()
    last = now.size // BLOCK_SIZE
    for number in (*range(ROOT_BLOCKS), *range(last - ROOT_BLOCKS, last)):
        for blocks, source in ((now.written, old.written), (now.synced, old.synced)):
            blocks[number] = source.get(number, bytes(BLOCK_SIZE))
    device.restore(now)


def test_live_blocks_that_nobody_has_are_errors_and_reported() -> None:
    """Beyond the budget: one replica forgot, the other has a bad block. No zeros (P4), and
    everything else is there."""

    async def scenario() -> None:
        lives = Lives(1)
        # What is behind the checkpoint is not read to follow the chain, only to be copied.
        await forget(lives, roots=0, checkpoint=True)
        pool = await lives.open(read_only=True)
        position = await position_of(pool, BLOCK)
        offset = pool.engine.state.members[1].layout.journal_offset
        offset += position % pool.engine.state.journal_blocks * BLOCK_SIZE
        lives.end()
        lives.devices[LATER_LOST].rot(offset, 1)
        async with lives.life() as pool:
            problem = pool.engine.state.problems["journal"]
            assert problem.startswith("1 blocks of the journal cannot be read from any device")
            for block in range(BLOCKS):
                found = bytearray(BLOCK_SIZE)
                read = pool.volume("v").read(block * BLOCK_SIZE, memoryview(found))
                if block == BLOCK:
                    with pytest.raises(OSError, match="unreadable on all replicas"):
                        await read
                else:
                    await read
                    at = block * BLOCK_SIZE
                    assert found == content(2)[at : at + BLOCK_SIZE]

    run(scenario())


def test_catching_up_goes_on_after_a_crash() -> None:
    """An old copy of a device lacks shards; the power fails before it has caught up. The next life
    must know of it: it is the redundancy with which another device may be lost (P2, R24)."""

    async def scenario() -> None:
        lives = Lives(1)
        await lives.start()
        old = lives.devices[SPARE].snapshot()
        async with lives.life() as pool:
            for version in (1, 2, 3):
                await overwrite(pool, version)
                await destage(pool.engine.moving, 8, force=True)
                await pool.checkpoint()
        lives.devices[SPARE].restore(old)
        async with lives.life() as pool:
            assert pool.engine.maintenance is not None
            assert pool.engine.maintenance.catch_up.left
        for _ in range(2):
            async with lives.life() as pool:
                await caught_up(pool)
                await check(pool, 3)
        async with lives.life(without=LATER_LOST) as pool:
            found = bytearray(VOLUME)
            await pool.volume("v").read(0, memoryview(found))
            assert bytes(found) == content(3)
        async with lives.life() as pool:
            await caught_up(pool)
            await pool.checkpoint()
            assert not any(member.missed for member in pool.engine.state.members.values())

    run(scenario())


async def caught_up(pool: Pool) -> None:
    assert pool.engine.maintenance is not None
    for _ in range(60):
        if not pool.engine.maintenance.catch_up.left:
            return
        await asyncio.sleep(1)
    pytest.fail("no end of catching up")


async def position_of(pool: Pool, block: int) -> int:
    """Where in the journal a block of the volume is."""
    await pool.volume("v").read(0, memoryview(bytearray(VOLUME)))
    state = pool.engine.state
    location = state.maps[state.catalog.volumes["v"].layer].leaves[0].get(block)[0]
    assert location >> TAG_SHIFT == TAG_JOURNAL
    return location & POSITION_MASK
