"""Space that is on its way is waited for: a long read does not make a pool full (P5, R21)."""

from __future__ import annotations

import asyncio

from .loop import run
from .world import BLOCK_SECTORS, SMALL, Client, Rig


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
