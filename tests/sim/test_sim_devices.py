"""The simulated media: durability, the crash model, dead handles, one digest everywhere."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from backends.base import BLOCK_SIZE, DeviceError, DeviceGone
from backends.fault_script import ApplyThenFail, Fail, FlipBits, Hang, Rule, Vanish

from .devices import Crash, SimDevice, World
from .image import SECTOR
from .loop import Deadlock, run

SIZE = 64 * BLOCK_SIZE
OLD = b"o" * BLOCK_SIZE
NEW = b"n" * BLOCK_SIZE


def in_world(
    body: Callable[[World, SimDevice], Awaitable[None]], seed: int = 1, **options: object
) -> None:
    """Run `body` with a world of one device `a`."""

    async def main() -> None:
        world = World(seed, **options)  # type: ignore[arg-type]
        await body(world, world.create({"a": SIZE})["a"])

    run(main())


def survivors(write: Callable[[SimDevice], Awaitable[None]], seeds: int = 60) -> set[bytes]:
    """Return what block 0, durably OLD, holds after `write` and power loss, over many seeds."""
    found: set[bytes] = set()

    async def body(world: World, device: SimDevice) -> None:
        await device.write(0, [OLD], sync=True)
        await write(device)
        world.crash()
        found.add(await world.reopen()["a"].read(0, BLOCK_SIZE))

    for seed in range(seeds):
        in_world(body, seed)
    return found


def test_reads_see_writes_at_once() -> None:
    async def body(world: World, device: SimDevice) -> None:
        await device.write(0, [OLD, NEW])
        device.append(2 * BLOCK_SIZE, [bytearray(OLD)])
        assert await device.read(0, 4 * BLOCK_SIZE) == OLD + NEW + OLD + bytes(BLOCK_SIZE)

    in_world(body)


def test_unsynced_writes_are_kept_lost_or_torn() -> None:
    async def write(device: SimDevice) -> None:
        device.append(0, [NEW])

    found = survivors(write)
    assert {OLD, NEW} < found
    torn = found - {OLD, NEW}
    sectors = {data[i : i + SECTOR] for data in torn for i in range(0, BLOCK_SIZE, SECTOR)}
    assert sectors == {OLD[:SECTOR], NEW[:SECTOR]}


def test_synced_writes_survive() -> None:
    async def flush(device: SimDevice) -> None:
        await device.write(0, [NEW])
        await device.sync()

    async def durable(device: SimDevice) -> None:
        await device.write(0, [b"x" * BLOCK_SIZE])
        await device.write(0, [NEW], sync=True)

    assert survivors(flush) == {NEW}
    assert survivors(durable) == {NEW}


def test_a_durable_write_takes_no_other_write_with_it() -> None:
    async def write(device: SimDevice) -> None:
        await device.write(0, [NEW])
        await device.write(BLOCK_SIZE, [NEW], sync=True)

    assert OLD in survivors(write)


def test_a_failed_sync_may_drop_writes_for_good() -> None:
    seen: set[bytes] = set()

    async def write(device: SimDevice) -> None:
        await device.write(0, [NEW])
        device.script.add(Rule(frozenset({"sync"}), Fail()))
        with pytest.raises(DeviceError):
            await device.sync()
        seen.add(await device.read(0, BLOCK_SIZE))
        await device.sync()

    assert survivors(write) == {OLD, NEW}
    assert seen == {OLD, NEW}


def test_writes_survive_the_death_of_the_process_but_not_yet_power_loss() -> None:
    found: set[bytes] = set()

    async def body(world: World, device: SimDevice) -> None:
        await device.write(0, [NEW])
        world.kill()
        device = world.reopen()["a"]
        assert await device.read(0, BLOCK_SIZE) == NEW
        world.crash(fate="lost")
        found.add(await world.reopen()["a"].read(0, BLOCK_SIZE))

    in_world(body)
    assert found == {bytes(BLOCK_SIZE)}


@pytest.mark.parametrize("after", [False, True])
def test_crash_at_every_operation(after: bool) -> None:
    async def work(device: SimDevice) -> None:
        await device.write(0, [NEW])
        device.append(BLOCK_SIZE, [NEW])
        await device.sync()
        await device.read(0, BLOCK_SIZE)

    async def life(number: int) -> tuple[bool, bytes]:
        world = World(3, crash_at=number, crash_after=after)
        device = world.create({"a": SIZE})["a"]
        try:
            await world.run(work(device))
            died = False
        except Crash:
            died = True
        world.crash(fate="lost")
        return died, await world.reopen()["a"].read(0, 2 * BLOCK_SIZE)

    results = [run(life(number)) for number in range(1, 6)]
    assert [died for died, _ in results] == [True] * 4 + [False]
    synced_from = 3 if after else 4  # the crash of operation 3 comes after or before its effect
    for number, (_, data) in enumerate(results, start=1):
        assert data == (NEW + NEW if number >= synced_from else bytes(2 * BLOCK_SIZE))


def test_a_dead_handle_changes_nothing() -> None:
    async def body(world: World, device: SimDevice) -> None:
        pending = asyncio.create_task(device.write(0, [NEW]))
        await asyncio.sleep(0)
        world.crash(fate="lost")
        before = world.digest()
        fresh = world.reopen()["a"]
        assert isinstance((await asyncio.gather(pending, return_exceptions=True))[0], Crash)
        with pytest.raises(Crash):
            await device.write(0, [NEW])
        with pytest.raises(Crash):
            device.append(0, [NEW])
        with pytest.raises(Crash):
            await device.sync()
        with pytest.raises(Crash):
            device.try_read(0, memoryview(bytearray(BLOCK_SIZE)))
        await device.close()
        assert world.digest() == before
        assert await fresh.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)

    in_world(body)


def test_the_end_of_the_world_ends_its_tasks() -> None:
    async def body(world: World, device: SimDevice) -> None:
        ended: list[str] = []

        async def background() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append("background")

        async def work() -> None:
            task = asyncio.create_task(background())
            await asyncio.sleep(1)
            world.die()
            await task

        with pytest.raises(Crash):
            await world.run(work())
        assert ended == ["background"]

    in_world(body)


def test_overlapping_writes_take_effect_in_any_order() -> None:
    found: set[bytes] = set()

    async def body(world: World, device: SimDevice) -> None:
        await asyncio.gather(device.write(0, [OLD]), device.write(0, [NEW]))
        found.add(await device.read(0, BLOCK_SIZE))

    for seed in range(20):
        in_world(body, seed)
    assert found == {OLD, NEW}


def test_faults() -> None:
    async def body(world: World, device: SimDevice) -> None:
        reads, writes = frozenset({"read"}), frozenset({"write"})
        await device.write(0, [OLD], sync=True)
        device.script.add(Rule(reads, FlipBits()))
        assert await device.read(0, BLOCK_SIZE) != OLD
        assert await device.read(0, BLOCK_SIZE) == OLD
        device.script.add(Rule(writes, ApplyThenFail()))
        with pytest.raises(DeviceError):
            await device.write(0, [NEW])
        assert await device.read(0, BLOCK_SIZE) == NEW
        device.script.add(Rule(reads, Hang()))
        hanging = asyncio.create_task(device.read(0, BLOCK_SIZE))
        await asyncio.sleep(60)
        assert not hanging.done()
        device.script.release()
        assert await hanging == NEW
        device.script.add(Rule(reads, Vanish()))
        for _ in range(2):
            with pytest.raises(DeviceGone):
                await device.read(0, BLOCK_SIZE)
        world.kill()
        assert world.reopen() == {}
        device.script.clear()
        world.kill()
        assert await world.reopen()["a"].read(0, BLOCK_SIZE) == NEW

    in_world(body)


def test_a_hang_that_nobody_ends_is_a_deadlock() -> None:
    async def body(world: World, device: SimDevice) -> None:
        device.script.add(Rule(frozenset({"read"}), Hang()))
        await device.read(0, BLOCK_SIZE)

    with pytest.raises(Deadlock):
        in_world(body)


def test_an_old_copy_can_be_put_back_and_media_rot() -> None:
    async def body(world: World, device: SimDevice) -> None:
        await device.write(0, [OLD], sync=True)
        old = device.snapshot()
        await device.write(0, [NEW], sync=True)
        device.restore(old)
        assert await device.read(0, BLOCK_SIZE) == OLD
        device.rot(5, mask=0x80)
        world.crash()
        data = await world.reopen()["a"].read(0, BLOCK_SIZE)
        assert [i for i in range(BLOCK_SIZE) if data[i] != OLD[i]] == [5]

    in_world(body)


def test_huge_devices_cost_nothing() -> None:
    async def body(world: World, device: SimDevice) -> None:
        huge = world.create({"huge": 1 << 45})["huge"]
        await huge.write((1 << 45) - BLOCK_SIZE, [NEW], sync=True)
        assert await huge.read((1 << 45) - BLOCK_SIZE, BLOCK_SIZE) == NEW

    in_world(body)


async def any_operation(device: SimDevice, world: World) -> None:
    """Do one operation that the seed chooses."""
    offset = world.rng.randrange(16) * BLOCK_SIZE
    data = world.rng.randbytes(BLOCK_SIZE)
    match world.rng.randrange(5):
        case 0:
            await device.sync()
        case 1:
            await device.write(offset, [data, data], sync=True)
        case 2:
            await device.write(offset, [data])
        case 3:
            device.append(offset, [data])
        case _:
            device.try_read(offset, memoryview(bytearray(BLOCK_SIZE)))
            await device.read(offset, BLOCK_SIZE)


async def four_workers(devices: list[SimDevice], world: World) -> None:
    """Work until the world dies."""

    async def worker() -> None:
        while True:
            await any_operation(world.rng.choice(devices), world)

    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(worker())


def life_and_death(seed: int) -> str:
    """Return the digest of a world in which several tasks work until it dies, twice."""

    async def main() -> str:
        world = World(seed, crash_at=400)
        devices = world.create({name: SIZE for name in ("b", "a", "c")})
        for ending in (world.crash, world.kill):
            with pytest.raises(Crash):
                await world.run(four_workers(list(devices.values()), world))
            ending()
            devices = world.reopen(crash_at=300)
        return world.digest()

    return run(main())


def test_same_seed_same_digest_in_every_process() -> None:
    here = life_and_death(5)
    assert here != life_and_death(6)
    root = Path(__file__).parents[2]
    code = "from tests.sim.test_sim_devices import life_and_death as f; print(f(5))"
    for hash_seed in ("0", "7"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert result.stdout.strip() == here
