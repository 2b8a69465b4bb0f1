"""Devices that fail in every way, one kind at a time, while clients work.

Inside the budget (as many devices as parity can replace) a client may see no error at all. Outside
it an honest one is asked for (EIO or PoolError, never wrong bytes), and everything must be there
again when the devices are back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from backends.fault_script import READS, Action, FlipBits, Hang, Rule, Vanish
from pool.errors import PoolError

from .devices import SimDevice
from .faults import FAULTS
from .loop import run
from .world import BLOCK_SECTORS, SMALL, TIGHT, WIDE, Client, Rig, Shape

BLOCKS = 96


async def work(client: Client, rng: Random, count: int) -> None:
    """Writes, reads, zeroings and flushes, one after the other."""
    for i in range(count):
        block = rng.randrange(BLOCKS - 4)
        await client.write("a", block * BLOCK_SECTORS, rng.choice((3, 8, 32)))
        await client.read("a", rng.randrange(BLOCKS * BLOCK_SECTORS - 64), 64)
        if i % 7 == 6:
            await client.zero("a", block * BLOCK_SECTORS, 2 * BLOCK_SECTORS)
        if i % 5 == 4:
            await client.flush("a")


async def faulty_life(shape: Shape, ops: frozenset[str], action: Action) -> Counter[str]:
    """Work; let as many devices fail as may; work on; return them; judge."""
    rig = Rig(3, shape)
    rng = Random(5)
    await rig.create()
    client = await rig.open()
    await client.create("a", BLOCKS * 4096)
    await work(client, rng, 30)
    names = rng.sample(shape.names[: shape.parity + 1], shape.parity)
    rig.unlucky = set(names)
    for name in names:
        rig.world.scripts[name].add(Rule(ops, action, times=None))
    await work(client, rng, 40)
    await client.flush("a")
    await client.pool.checkpoint()
    await asyncio.sleep(60)
    await work(client, rng, 20)
    rig.end_life(power=True)
    await rig.verify(await rig.open())
    for name in names:
        rig.world.scripts[name].clear()
    rig.end_life(power=True)
    client = await rig.open()
    await rig.verify(client)
    await work(client, rng, 10)
    await client.pool.close()
    rig.end_life(power=False)
    return rig.events


@pytest.mark.parametrize("shape", [WIDE, SMALL, TIGHT], ids=["4+2 on 6", "2+1 on 4", "2+1 on 3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_no_client_sees_faults_within_the_budget(fault: str, shape: Shape) -> None:
    events = run(faulty_life(shape, *FAULTS[fault]))
    assert events["reads"] >= 100
    noticed = (
        "members_expelled",
        "read_errors",
        "bad_blocks",
        "reconstructed_blocks",
        "bad_headers",
    )
    if fault != "slow":
        assert any(events[name] for name in noticed), f"nobody noticed: {fault}"


@pytest.mark.parametrize("shape", [WIDE, SMALL, TIGHT], ids=["4+2 on 6", "2+1 on 4", "2+1 on 3"])
def test_reads_that_go_wrong_now_and_then_stop_no_mover(shape: Shape) -> None:
    """Each attempt at a stripe met other bad blocks, until the pool gave up."""

    async def flaky_life() -> Counter[str]:
        rig = Rig(4, shape)
        rng = Random(6)
        await rig.create()
        client = await rig.open()
        await client.create("a", BLOCKS * 4096)
        rig.unlucky = set(shape.names[: shape.parity])
        for name in sorted(rig.unlucky):
            rig.world.scripts[name].add(Rule(READS, FlipBits(), times=None, chance=0.25))
        await work(client, rng, 400)
        await client.flush("a")
        rig.note_counters()
        await client.pool.close()
        return rig.events

    events = run(flaky_life())
    assert events["bad_blocks"] > 10
    assert events["moved_blocks"] > 50


def test_a_repair_that_hangs_holds_up_nobody() -> None:
    """It pinned journal and slots for ever, until nothing could be written any more."""

    async def life() -> Counter[str]:
        rig = Rig(4, SMALL)
        rng = Random(6)
        await rig.create()
        client = await rig.open()
        await client.create("a", BLOCKS * 4096)
        await work(client, rng, 60)
        await client.pool.checkpoint()
        rig.unlucky = {"d1"}
        device = rig.devices["d1"]
        assert isinstance(device, SimDevice)
        rot_shards(device, rng)
        device.script.add(Rule(frozenset({"write"}), Hang(), times=None))
        for first in range(0, BLOCKS * BLOCK_SECTORS, 64):
            await client.read("a", first, 64)
        async with asyncio.timeout(900):
            await work(client, rng, 100)
        rig.note_counters()
        await client.pool.close()
        return rig.events

    events = run(life())
    assert events["bad_blocks"]
    assert events["members_expelled"] == 1


def rot_shards(device: SimDevice, rng: Random) -> None:
    """Flip a bit in every block behind the superblocks."""
    for offset in range(128 << 10, device.size - (128 << 10), 4096):
        device.rot(offset + rng.randrange(4096), 1 << rng.randrange(8))


async def rotting_life(shape: Shape, seed: int) -> Counter[str]:
    """Bits flip on the media of as many devices as parity can replace, everywhere but in the
    superblocks; nothing may be lost, and what is read must be repaired."""
    rig = Rig(seed, shape)
    rng = Random(seed)
    await rig.create()
    client = await rig.open()
    await client.create("a", BLOCKS * 4096)
    await work(client, rng, 40)
    await client.pool.checkpoint()
    rig.unlucky = set(rng.sample(shape.names, shape.parity))
    for name in sorted(rig.unlucky):
        device = rig.devices[name]
        assert isinstance(device, SimDevice)
        rot_shards(device, rng)
    for first in range(0, BLOCKS * BLOCK_SECTORS, 64):
        await client.read("a", first, 64)
    await work(client, rng, 10)
    await client.flush("a")
    rig.end_life(power=True)
    client = await rig.open()
    await rig.verify(client)
    rig.note_counters()
    return rig.events


@pytest.mark.parametrize("shape", [WIDE, SMALL, TIGHT], ids=["4+2 on 6", "2+1 on 4", "2+1 on 3"])
@pytest.mark.parametrize("seed", range(3))
def test_rot_is_found_and_repaired(shape: Shape, seed: int) -> None:
    events = run(rotting_life(shape, seed))
    assert events["bad_blocks"]
    assert events["repaired_blocks"]


async def outside_the_budget(shape: Shape, action: Action, ops: frozenset[str]) -> int:
    """One device more than parity fails. Returns how many honest errors clients saw."""
    rig = Rig(9, shape)
    rng = Random(9)
    await rig.create()
    client = await rig.open()
    await client.create("a", BLOCKS * 4096)
    await work(client, rng, 40)
    await client.flush("a")
    names = shape.names[: shape.parity + 1]
    for name in names:
        rig.world.scripts[name].add(Rule(ops, action, times=None))
    errors = 0
    for i in range(60):
        try:
            async with asyncio.timeout(600):
                if i % 3:
                    await client.read("a", rng.randrange(BLOCKS - 8) * BLOCK_SECTORS, 64)
                else:
                    await client.write("a", rng.randrange(BLOCKS) * BLOCK_SECTORS, BLOCK_SECTORS)
                    await client.flush("a")
        except (OSError, PoolError) as error:
            if isinstance(error, TimeoutError):
                raise
            errors += 1
    for name in names:
        rig.world.scripts[name].clear()
    rig.end_life(power=action != Vanish())
    await rig.verify(await rig.open())
    rig.end_life(power=True)
    return errors


@pytest.mark.parametrize("shape", [WIDE, SMALL, TIGHT], ids=["4+2 on 6", "2+1 on 4", "2+1 on 3"])
@pytest.mark.parametrize("fault", ["vanishes", "reads fail"])
def test_errors_outside_the_budget_are_honest(shape: Shape, fault: str) -> None:
    ops, action = FAULTS[fault]
    errors = run(outside_the_budget(shape, action, ops))
    assert errors or fault == "reads fail", "nothing failed: the faults were not outside the budget"
