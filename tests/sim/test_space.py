"""Space that is on its way is waited for: a long read does not make a pool full (P5, R21)."""

from __future__ import annotations

import asyncio

import pytest

from backends.fault_script import OPERATIONS, Rule, Vanish

from .loop import run
from .scenarios import delete_under_reads
from .world import BLOCK_SECTORS, SMALL, WIDE, Client, Rig


def test_writers_wait_for_space_that_a_read_still_pins() -> None:
    async def scenario() -> None:
        rig = Rig(1, SMALL)
        await rig.create()
        client = await rig.open()
        await client.create("a", 256 << 10)
        state, maintenance = client.pool.engine.state, client.pool.engine.maintenance
        assert maintenance is not None
        with state.gate.inside():
            writes = asyncio.ensure_future(overwrite(client, 400))
            for _ in range(60):
                # Each takes slots and gives back none.
                maintenance.request_checkpoint().add_done_callback(lambda done: done.exception())
                await asyncio.sleep(1)
            # Everything that was let go of is held up by that one read.
            assert state.gate.waiting
            assert not writes.done()
        await writes
        assert not client.events["refused_full"]
        assert client.events["writes"] == 400
        await client.pool.close()

    run(scenario())


async def overwrite(client: Client, count: int) -> None:
    for i in range(count):
        await client.write("a", i % 60 * BLOCK_SECTORS, BLOCK_SECTORS)


def test_a_delete_finds_room_where_nothing_else_does() -> None:
    """P5: the journal is full of what cannot be packed; deleting a volume must go on."""

    async def scenario() -> None:
        rig = Rig(2, SMALL)
        await rig.create()
        client = await rig.open()
        await client.create("a", 256 << 10)
        await client.create("b", 256 << 10)
        journal = client.pool.engine.journal
        with client.pool.engine.state.gate.inside():
            # Nothing in the journal can be released, and everything else uses it up.
            users = [asyncio.ensure_future(overwrite(client, 100))]
            for i in range(20):
                trim = client.zero("a", i * BLOCK_SECTORS, BLOCK_SECTORS)
                users.append(asyncio.ensure_future(trim))
                create = client.pool.create_volume(f"v{i}", 4096)
                users.append(asyncio.ensure_future(create))
                await asyncio.sleep(0.01)
            assert not journal.room(2)
            async with asyncio.timeout(60):
                await client.delete("b")
        await asyncio.gather(*users)
        await client.pool.close()

    run(scenario())


def test_a_pool_that_lost_devices_when_full_does_not_collect_for_ever() -> None:
    """What is mapped is more than the narrower stripes can hold: nothing is gained by moving it,
    and pages of the checkpoint that fill one stripe are not written anew time after time."""

    async def scenario() -> None:
        rig = Rig(3, WIDE)
        await rig.create()
        client = await rig.open()
        await client.create("a", 1 << 20)
        state = client.pool.engine.state
        for first in range(0, 2048, 64):
            await client.write("a", first, 64)
        rig.unlucky = {"d4", "d5"}
        for name in sorted(rig.unlucky):
            rig.world.scripts[name].add(Rule(OPERATIONS, Vanish()))
        await overwrite(client, 60)
        await client.flush("a")
        await asyncio.sleep(60)
        before = client.pool.engine.state.counters["steps_collect"]
        await asyncio.sleep(600)
        assert state.used > state.limit
        assert state.counters["steps_collect"] - before < 100
        await client.pool.close()

    run(scenario())


@pytest.mark.parametrize("seed", range(6))
def test_a_deleted_volume_is_whole_until_that_is_durable(seed: int) -> None:
    """R23."""
    delete_under_reads(seed)


def test_a_delete_that_is_given_up_has_not_happened() -> None:
    """R23: while it waits for room nothing is journaled, so the volume is there again."""

    async def scenario() -> None:
        rig = Rig(5, SMALL)
        await rig.create()
        client = await rig.open()
        await client.create("a", 256 << 10)
        await client.create("b", 256 << 10)
        pool, journal = client.pool, client.pool.engine.journal
        with pool.engine.state.gate.inside():
            users = [asyncio.ensure_future(overwrite(client, 60))]
            for i in range(12):
                users.append(asyncio.ensure_future(pool.create_volume(f"v{i}", 4096)))
                await asyncio.sleep(0.01)
            while journal.room(1):
                journal.stage_range(2, 0, 0, 1)
                pool.engine.commit()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await pool.delete_volume("b")
            assert pool.volume("b").size == 256 << 10
        await asyncio.gather(*users)
        await client.delete("b")
        await pool.close()

    run(scenario())
