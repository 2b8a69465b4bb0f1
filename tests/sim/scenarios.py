"""What clients do in the simulation: fixed workloads, and the lives around a crash in them.

`brief` is as short as two laps of a 16-block journal allow, `eventful` goes through everything that
happens rarely: the collector racing overwrites, trims and deletes whose space is used again, a
device that dies. `crash_at` runs one up to the Nth device operation, and judges what is left.

`everything` comes by every failpoint of the engine, through a clean end and a second life.
`crash_at_failpoint` ends it at one of them, and power fails in the recoveries that follow.
"""

from __future__ import annotations

import asyncio
import errno
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random

from backends.fault_script import OPERATIONS, Delay, Fail, Hang, Rule, Vanish
from pool import failpoints

from .devices import Crash, SimDevice
from .loop import run
from .oracle import SECTOR, Violation
from .world import BLOCK_SECTORS, SMALL, WIDE, Client, Rig, Shape

Scenario = Callable[[Rig, Client], Awaitable[None]]
#: Crashes inside recovery before it is left alone.
RECOVERY_CRASHES = 2


async def brief(rig: Rig, client: Client) -> None:
    """Laps of the smallest journal, checkpoints, a trim, a deleted volume."""
    rng = rig.world.rng
    await client.create("a", 256 << 10)
    await client.create("b", 64 << 10)
    for i in range(8):
        await client.write("b", i * 16, 11)
    await client.flush("b")
    for i in range(24):
        await client.write("a", rng.randrange(48) * BLOCK_SECTORS, BLOCK_SECTORS)
        if i % 6 == 5:
            await client.flush("a")
    await client.zero("a", 64, 128)
    await client.delete("b")
    await client.pool.checkpoint()
    for i in range(16):
        await client.write("a", rng.randrange(480), rng.choice((3, 8, 24)))
        if i % 5 == 4:
            await client.flush("a")
        await client.read("a", rng.randrange(256), 100)
    # A checkpoint of what no flush has made durable yet.
    for i in range(5):
        await client.write("a", i * 48, BLOCK_SECTORS)
    await client.pool.checkpoint()
    for i in range(3):
        await client.write("a", i * 32, BLOCK_SECTORS)


async def eventful(rig: Rig, client: Client) -> None:
    """Everything that happens rarely; see `RARE`."""
    await client.create("a", 640 << 10)
    await client.create("b", 256 << 10)
    for first in range(0, 1280, 40):
        await client.write("a", first, 40)
    for first in range(0, 512, 32):
        await client.write("b", first, 32)
    await client.flush("a")
    await client.zero("a", 320, 160)
    await client.zero("b", 0, 128, no_hole=True)
    await together(rig, client, 30)
    await client.delete("b")
    await client.pool.checkpoint()
    await together(rig, client, 20)
    rig.unlucky = {"d1"}
    rig.devices["d1"].script.add(Rule(OPERATIONS, Vanish(), nth=5))
    await together(rig, client, 30)
    await client.flush("a")


async def together(rig: Rig, client: Client, count: int) -> None:
    """Three writers, a reader and a racer at the same time on volume `a`."""
    async with asyncio.TaskGroup() as group:
        for number in range(3):
            group.create_task(_write(rig, client, count, number))
        group.create_task(_read(rig, client, count))
        group.create_task(_race(rig, client, count))


async def _write(rig: Rig, client: Client, count: int, number: int) -> None:
    rng = Random(f"{rig.seed} {number} {count}")
    for i in range(count):
        block = rng.randrange(150)
        sectors = rng.choice((BLOCK_SECTORS, BLOCK_SECTORS, 2 * BLOCK_SECTORS, 5, 64))
        await client.write("a", block * BLOCK_SECTORS + (sectors == 5), sectors)
        await asyncio.sleep(rng.random() * rig.latency * 12)
        if i % 8 == 7:
            await client.flush("a")


async def _read(rig: Rig, client: Client, count: int) -> None:
    rng = Random(f"{rig.seed} reader {count}")
    for _ in range(count):
        await client.read("a", rng.randrange(1100), 64)
        await asyncio.sleep(rig.latency)


async def _race(rig: Rig, client: Client, count: int) -> None:
    """Overwrite what the collector is moving just now."""
    for _ in range(count * 8):
        await asyncio.sleep(rig.latency)
        for block in sorted(rig.mover.collecting)[:3]:
            if (block + 1) * BLOCK_SECTORS <= 1280:
                await client.write("a", block * BLOCK_SECTORS, BLOCK_SECTORS)
        rig.mover.collecting.clear()


def flush_and_lose(seed: int) -> None:
    """Small writes are flushed, the power fails at once, and the device that took them first is
    lost with it (P2): what a flush was answered for is on the others. Raises Violation."""
    run(_flush_and_lose(seed))


async def _flush_and_lose(seed: int) -> None:
    rig = Rig(seed, SMALL)
    await rig.create()
    client = await rig.open()
    await client.create("a", 256 << 10)
    for block in range(seed % 7 + 1):
        await client.write("a", block * BLOCK_SECTORS, BLOCK_SECTORS)
    await client.flush("a")
    primary = client.pool.engine.journal.replicas[0].member
    rig.end_life(power=True, fate="lost")
    rig.missing = rig.unlucky = {f"d{primary}"}
    await rig.verify(await rig.open())


def delete_under_reads(seed: int) -> None:
    """A volume is deleted while the journal's devices are slow; until that is durable, whoever
    reads it finds it whole (R23). Raises Violation."""
    run(_delete_under_reads(seed))


async def _delete_under_reads(seed: int) -> None:
    rig = Rig(seed, SMALL)
    await rig.create()
    client = await rig.open()
    await client.create("a", 256 << 10)
    for block in range(seed % 7 + 4):
        await client.write("a", block * BLOCK_SECTORS, BLOCK_SECTORS)
    await client.flush("a")
    volume = client.pool.volume("a")
    for name in rig.shape.names:
        rig.world.scripts[name].add(Rule(frozenset({"sync"}), Delay(5.0), times=None))
        rig.world.scripts[name].add(Rule(frozenset({"write"}), Delay(5.0), times=None))
    deletion = asyncio.ensure_future(client.delete("a"))
    for block in range(4):
        await asyncio.sleep(0.5)
        begun = rig.oracle.tick()
        data = bytearray(BLOCK_SECTORS * SECTOR)
        await volume.read(block * len(data), memoryview(data))
        assert not deletion.done()
        rig.oracle.check_read("a", block * BLOCK_SECTORS, data, begun)
    await deletion
    rig.end_life(power=False)


def overfill(seed: int) -> None:
    """A pool is written until it refuses; what it has taken can be overwritten for ever (P5)."""
    run(_overfill(seed))


async def _overfill(seed: int) -> None:
    rig = Rig(seed, FOUR)
    rng = Random(seed)
    await rig.create()
    client = await rig.open()
    await client.create("a", 4 << 20)
    taken = 0
    while not client.events["refused_full"]:
        await client.write("a", taken * BLOCK_SECTORS, BLOCK_SECTORS)
        taken += 1
    taken -= 1
    for _ in range(4 * taken):
        await client.write("a", rng.randrange(taken) * BLOCK_SECTORS, BLOCK_SECTORS)
        if client.events["refused_full"] > 1:
            raise Violation("P5: a block that had been taken could not be overwritten")
    await client.flush("a")
    rig.end_life(power=True)
    await rig.world.run(recovered(rig))


def fork(seed: int) -> None:
    """A root reaches one device only, then the power fails; a life without that device commits
    another root of the same generation and goes on; the device returns (R19). Raises Violation."""
    run(_fork(seed))


async def _fork(seed: int) -> None:
    rig = Rig(seed, SMALL)
    odd = rig.shape.names[-1]
    with rig.watching():
        await rig.create()
        client = await rig.open()
        await client.create("a", 256 << 10)
        for block in range(seed % 3 + 1):
            await client.write("a", block * BLOCK_SECTORS, BLOCK_SECTORS)
        await client.flush("a")
        rig.unlucky = {odd}
        for name in rig.shape.names:
            if name != odd:
                root = Rule(frozenset({"write"}), Hang(), within=(0, 128 << 10))
                rig.world.scripts[name].add(root)
        rig.die_at("root_after_member_before_next", 1)
        try:
            await rig.world.run(client.pool.checkpoint())
        except Crash:
            rig.events["crashes"] += 1
        rig.end_life(power=True, fate="lost")
        for script in rig.world.scripts.values():
            script.clear()
        rig.missing, rig.dies_at = {odd}, None
        client = await rig.open()
        await client.verify(power_lost=True)
        # So little that no other root is committed.
        await client.write("a", 0, BLOCK_SECTORS)
        await client.flush("a")
        rig.end_life(power=True)
        rig.missing = set()
        client = await rig.open()
        await client.verify(power_lost=True)
        await client.write("a", 0, BLOCK_SECTORS)
        await client.flush("a")
        rig.events["forks"] += 1
        rig.end_life(power=True)


#: A pool in which all of it can happen: one device is a store, one may fail.
MIXED = Shape(2, 1, 5, device_kib=832, journal_kib=64, stores=1)
FAILS = "d1"
#: One that is soon full.
FOUR = Shape(2, 1, 4, device_kib=1024, journal_kib=192)


async def everything(rig: Rig) -> None:
    """Come by every failpoint: a life, its clean end, and another in which a device returns."""
    await rig.world.run(_all_that_fails(rig))
    rig.end_life(power=True)
    await rig.world.run(_the_return(rig))


async def _all_that_fails(rig: Rig) -> None:
    rng = Random(5)
    client = await rig.open()
    await client.create("a", 640 << 10)
    await client.create("b", 128 << 10)
    # What is in it stays where it is: a device that returns has missed it.
    await client.create("c", 160 << 10)
    for first in range(0, 320, 40):
        await client.write("c", first, 40)
    await _fill(client, rng)
    await client.zero("a", 80, 160)
    await client.delete("b")
    await client.pool.checkpoint()
    await together(rig, client, 20)
    rig.unlucky = {FAILS}
    device = rig.devices[FAILS]
    assert isinstance(device, SimDevice)
    for offset in range(rig.tap.layouts[FAILS][1].slots_offset, device.size - (128 << 10), 4096):
        device.rot(offset + rng.randrange(4096))
    for first in range(0, 1280, 64):
        await client.read("a", first, 64)
    device.script.add(Rule(frozenset({"sync"}), Fail()))
    await together(rig, client, 20)
    await client.flush("a")
    await client.pool.close()


async def _the_return(rig: Rig) -> None:
    client = await rig.open()
    maintenance = client.pool.engine.maintenance
    assert maintenance is not None
    await together(rig, client, 10)
    for _ in range(100):
        if not maintenance.catch_up.left:
            break
        await asyncio.sleep(1)
    rig.devices[FAILS].script.add(Rule(frozenset({"write"}), Fail(errno.ENOSPC), times=None))
    await together(rig, client, 10)
    rig.devices[FAILS].script.clear()
    await client.pool.checkpoint()
    await client.pool.close()


async def _fill(client: Client, rng: Random) -> None:
    for first in range(0, 1280, 40):
        await client.write("a", first, 40)
    for first in range(0, 256, 32):
        await client.write("b", first, 32)
    for _ in range(40):
        await client.write("a", rng.randrange(159) * BLOCK_SECTORS, BLOCK_SECTORS)
    await client.flush("a")


def passes() -> Counter[str]:
    """How often `everything` comes by each failpoint."""

    async def live() -> Counter[str]:
        rig = Rig(11, MIXED)
        with rig.watching():
            await rig.create()
            before = rig.reached.copy()
            await everything(rig)
            rig.end_life(power=False)
        return rig.reached - before

    return run(live())


def which(count: int) -> list[int]:
    """At which passes of so many to end: the first three, some between, the last."""
    return sorted({1, 2, 3, count // 3, 2 * count // 3, count} & set(range(1, count + 1)))


def crash_at_failpoint(name: str, nth: int, *, power: bool) -> Counter[str]:
    """Run `everything` until it comes by a failpoint for the `nth` time, and judge what is left:
    after two more crashes inside recovery, the first of them at the same place if it is in the way.
    Returns the events. Raises Violation, naming the case."""
    try:
        return run(_crash_at_failpoint(name, nth, power=power))
    except BaseException as error:
        error.add_note(f"to repeat: make sim FAILPOINT={name}:{nth}:{'power' if power else 'kill'}")
        raise


async def _crash_at_failpoint(name: str, nth: int, *, power: bool) -> Counter[str]:
    rig = Rig(11, MIXED)
    with rig.watching():
        await rig.create()
        rig.die_at(name, nth)
        try:
            await everything(rig)
        except Crash:
            rig.events[f"died at {name}"] += 1
        rng = rig.world.rng
        rng.seed(nth)
        for again in (name, rng.choice(RECOVERY)):
            rig.end_life(power=power)
            rig.die_at(again, 1)
            try:
                await rig.world.run(recovered(rig))
            except Crash:
                rig.events["crashes_in_recovery"] += 1
        rig.dies_at = None
        rig.end_life(power=power)
        await rig.world.run(recovered(rig))
        await aftermath(rig)
    return rig.events


#: Failpoints on the way of a recovery.
RECOVERY = [name for name in failpoints.FAILPOINTS if name.startswith(("recovery", "term", "root"))]

#: Names of the fixed workloads, for commands.
SCENARIOS: dict[str, tuple[Scenario, Shape]] = {
    "brief": (brief, SMALL),
    "eventful": (eventful, WIDE),
}


def operations(name: str) -> int:
    """How many device operations a workload takes, with the opening before it."""

    async def live() -> int:
        scenario, shape = SCENARIOS[name]
        rig = Rig(7, shape)
        await rig.create()
        before = rig.world.operations
        await scenario(rig, await rig.open())
        taken = rig.world.operations - before
        rig.end_life(power=False)
        return taken

    return run(live())


def crash_at(name: str, nth: int) -> tuple[Counter[str], bool]:
    """Run a workload up to its `nth` device operation, crash, and judge. Returns the events, and
    whether the workload ended before. Raises Violation, naming the case."""
    try:
        return run(_crash_at(name, nth))
    except BaseException as error:
        error.add_note(f"to repeat: make sim CRASH={name}:{nth}")
        raise


async def _crash_at(name: str, nth: int) -> tuple[Counter[str], bool]:
    scenario, shape = SCENARIOS[name]
    rig = Rig(7, shape)
    await rig.create()
    rig.world.crash_at = rig.world.operations + nth
    rig.world.crash_after = nth % 2 == 1
    completed = True

    async def life() -> None:
        await scenario(rig, await rig.open())

    try:
        await rig.world.run(life())
    except Crash:
        completed = False
    # The workload is the same up to the crash; what follows is drawn anew for each.
    rig.world.rng.seed(nth)
    if nth % 4 in (1, 2):
        # A device stays away, most likely one with a journal replica, perhaps beside the one that
        # failed: no more than parity in all.
        lost = rig.world.rng.choice(shape.names[: shape.parity + 2])
        if len(rig.unlucky | {lost}) <= shape.parity:
            rig.unlucky |= {lost}
            rig.missing = {lost}
    await die_and_recover(rig, power=nth % 3 != 0)
    await aftermath(rig)
    return rig.events, completed


async def die_and_recover(rig: Rig, *, power: bool) -> None:
    """End this life; recover, crashing inside recovery some times first; judge."""
    rng = rig.world.rng
    rig.dies_at = None
    fate = rng.choice((None, None, None, "lost", "torn", "kept"))
    for _ in range(RECOVERY_CRASHES):
        rig.end_life(power=power, fate=fate, crash_at=rng.randrange(1, 160))
        try:
            await rig.world.run(recovered(rig))
            rig.world.crash_at = None
            return
        except Crash:
            rig.events["crashes_in_recovery"] += 1
    rig.end_life(power=power, fate=fate)
    await rig.world.run(recovered(rig))


async def recovered(rig: Rig) -> None:
    """Open after a crash, and judge."""
    client = await rig.open()
    rig.events["recoveries"] += 1
    # From here on the crash of this life may come while the result is being judged.
    await rig.verify(client)


async def aftermath(rig: Rig) -> None:
    """Devices that vanished return; work goes on; power fails once more; the end is clean."""
    for name in rig.world.images:
        rig.world.scripts[name].clear()
    rig.missing = set()
    await die_and_recover(rig, power=True)
    client = rig.client
    assert client is not None
    await rig.world.run(_work_on(rig, client))
    await die_and_recover(rig, power=True)
    assert rig.client is not None
    await rig.world.run(rig.client.pool.close())
    rig.end_life(power=False)
    await rig.world.run(recovered(rig))


async def _work_on(rig: Rig, client: Client) -> None:
    rng = rig.world.rng
    names = [info.name for info in client.pool.volumes()]
    for name in names:
        for _ in range(rng.choice((1, 2, 12))):
            block = rng.randrange(client.pool.volume(name).size >> 12)
            await client.write(name, block * BLOCK_SECTORS, BLOCK_SECTORS)
        await client.flush(name)
