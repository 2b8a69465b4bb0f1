"""`pool check` beside guests: no false alarm, at any moment of a busy life (R14, R21).

Checks run one after the other for as long as the workload does, over slow simulated devices, so
that checkpoints, moves, trims and deletes happen inside of each. Anything found is a false alarm,
but for what an unlucky device did. The count of events shows that each check met them.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from backends.fault_script import OPERATIONS, Rule, Vanish

from .loop import run
from .scenarios import together
from .world import BLOCK_SECTORS, SMALL, WIDE, Client, Rig, Shape

#: Counters of the engine that must grow while checks run, or the test proves nothing.
MUST_HAPPEN = ("checkpoints", "moved_blocks", "overtaken_blocks", "stripes_released")

#: A journal that holds enough for something to be overtaken on its way out.
FOUR = Shape(2, 1, 4, device_kib=1024, journal_kib=192)


async def busy(rig: Rig, client: Client, rounds: int) -> None:
    """Writers, trims, zeroes, a volume that comes and goes, checkpoints asked for."""
    await client.create("a", 640 << 10)
    for number in range(rounds):
        name = f"t{number}"
        await client.create(name, 128 << 10)
        for block in range(0, 16, 2):
            await client.write(name, block * BLOCK_SECTORS, 2 * BLOCK_SECTORS)
        await together(rig, client, 8)
        await client.zero("a", 32 * number % 512, 64, no_hole=number % 2 == 0)
        await client.zero("a", 48 * number % 512, 96)
        await client.pool.checkpoint()
        await client.delete(name)


async def checked_beside(rig: Rig, client: Client, work: asyncio.Task[None]) -> Counter[str]:
    """Check until the work is done; returns what happened inside of checks."""
    inside: Counter[str] = Counter()
    while not work.done():
        before = Counter(client.pool.engine.state.counters)
        report = await client.pool.check_report()
        after = Counter(client.pool.engine.state.counters)
        inside.update(after - before)
        inside["checks"] += 1
        inside.update({f"remark {remark[:40]}": 1 for remark in report.remarks})
        faults = [line for line in report.lines() if not rig._excused(line)]
        assert not faults, faults
    await work
    return inside


@pytest.mark.parametrize(
    ("shape", "seed", "latency"),
    [(WIDE, 1, 0.001), (WIDE, 2, 0.02), (FOUR, 3, 0.001), (FOUR, 4, 0.005)],
)
def test_no_false_alarm_beside_a_busy_workload(shape: Shape, seed: int, latency: float) -> None:
    async def scenario() -> Counter[str]:
        rig = Rig(seed, shape, latency)
        await rig.create()
        client = await rig.open()
        work = asyncio.ensure_future(busy(rig, client, 6))
        inside = await checked_beside(rig, client, work)
        assert await client.pool.check() == []
        await client.pool.close()
        return inside

    inside = run(scenario())
    assert inside["checks"] > 3
    assert all(inside[name] for name in MUST_HAPPEN), inside
    # All comparisons were made.
    assert not [name for name in inside if name.startswith("remark")]


def test_no_false_alarm_while_a_device_dies() -> None:
    async def scenario() -> Counter[str]:
        rig = Rig(7, WIDE, 0.002)
        await rig.create()
        client = await rig.open()
        rig.unlucky = {"d1"}

        async def work() -> None:
            await busy(rig, client, 2)
            rig.devices["d1"].script.add(Rule(OPERATIONS, Vanish(), nth=5))
            await together(rig, client, 40)
            await client.flush("a")

        inside = await checked_beside(rig, client, asyncio.ensure_future(work()))
        # Nothing is wrong in the end but for what is still on the dead device, if anything is.
        lines = await client.pool.check()
        assert len(lines) == bool(client.pool.engine.state.table.on_device(1))
        await client.pool.close()
        return inside

    inside = run(scenario())
    assert inside["members_expelled"] == 1
    assert inside["checkpoints"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 40))
def test_no_false_alarm_in_many_lives(seed: int) -> None:
    async def scenario() -> None:
        rng = Random(seed)
        rig = Rig(seed, rng.choice((WIDE, SMALL)), rng.choice((0.0005, 0.002, 0.01)))
        await rig.create()
        client = await rig.open()
        work = asyncio.ensure_future(busy(rig, client, 8))
        await checked_beside(rig, client, work)
        await client.pool.close()

    run(scenario())
