"""Term start records: opening a pool over and over must not fill its journal (P5, R6)."""

from __future__ import annotations

import contextlib

import pytest

from backends.base import BLOCK_SIZE

from .devices import Crash
from .loop import run
from .test_old_copies import LATER_LOST, Lives, check, content, overwrite


@pytest.mark.parametrize("checkpoint", [False, True])
def test_openings_alone_do_not_fill_the_journal(checkpoint: bool) -> None:
    """Each life ends as soon as it has begun, by a crash; the journal has 256 blocks."""

    async def scenario() -> None:
        lives = Lives(3)
        await lives.start()
        async with lives.life() as pool:
            await overwrite(pool, 1)
            if checkpoint:
                await pool.checkpoint()
        heads = set()
        for _ in range(300):
            async with lives.life() as pool:
                heads.add(pool.engine.journal.head)
        # The first of them is behind what was written, the others take its place.
        assert len(heads) == 1
        async with lives.life() as pool:
            await check(pool, 1)
            await overwrite(pool, 2)
        async with lives.life() as pool:
            await check(pool, 2)

    run(scenario())


@pytest.mark.parametrize("seed", range(12))
def test_what_an_absent_replica_had_there_does_not_come_back(seed: int) -> None:
    """P3: a life without a replica puts its mark where that replica has a write that was lost; the
    marks that take its place later are torn."""

    async def scenario() -> None:
        lives = Lives(seed)
        await lives.start()
        pool = await lives.open()
        await overwrite(pool, 1)
        others = [name for name in lives.devices if name != LATER_LOST]
        before = {name: lives.devices[name].snapshot() for name in others}
        # On the replica that goes away this write is durable, on the other one it is lost.
        await pool.volume("v").write(0, memoryview(content(2))[: 2 * BLOCK_SIZE])
        await pool.engine.journal.flush()
        lives.end(fate="kept")
        for name in others:
            lives.devices[name].restore(before[name])
        async with lives.life(without=LATER_LOST) as pool:
            await check(pool, 1)
        for _ in range(5):
            lives.end(crash_at=20 + seed)
            with contextlib.suppress(Crash):
                await lives.open()
            lives.end(fate="torn")
            async with lives.life() as pool:
                await check(pool, 1)

    run(scenario())


@pytest.mark.parametrize("seed", range(12))
def test_what_was_given_up_before_the_mark_was_replaced_proves_nothing(seed: int) -> None:
    """R2: a write that nobody flushed is torn behind the mark that the next term replaces; power
    fails until a mark stays."""

    async def scenario() -> None:
        lives = Lives(seed)
        await lives.start()
        async with lives.life() as pool:
            await overwrite(pool, 1)
        pool = await lives.open()
        await pool.checkpoint()
        await pool.volume("v").write(0, memoryview(content(1))[: 8 * BLOCK_SIZE])
        lives.end(fate="torn")
        for operation in range(10, 60):
            lives.end(crash_at=operation, fate="lost")
            with contextlib.suppress(Crash):
                await check(await lives.open(), 1)
        lives.end()
        await check(await lives.open(), 1)

    run(scenario())
