"""P2 and P3 on real files: fifty power failures under load, anywhere, also in recovery.

The engine runs in this process on devices that remember what was not synced (`power`). After each
failure the volume has to be some prefix of its acknowledged writes with everything flushed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from backends.file import open_file
from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.mover import InlineMover
from tests.crash.power import PowerDevice
from tests.sim.oracle import SECTOR, Oracle
from tests.sim.world import Client

#: For each of two seeds; more where something rare has not happened in them.
ROUNDS, ROUNDS_MAX = 25, 150
DEVICES = 5
DEVICE_SIZE = 1 << 20
VOLUME = 1 << 20
JOURNAL = 128 << 10
SLOT = 16 << 10
TASKS = 4
#: A volume's blocks that all tasks write most.
HOT = VOLUME // SECTOR // 8


@dataclass
class Rig:
    """The pool's files and what is known of its volume."""

    folder: Path
    rng: Random
    oracle: Oracle = field(default_factory=Oracle)
    events: Counter[str] = field(default_factory=Counter)
    devices: list[PowerDevice] = field(default_factory=list)

    async def create(self) -> None:
        devices = [
            open_file(path, url=path, size=DEVICE_SIZE, create=True) for path in self._paths()
        ]
        spec = PoolSpec("tank", 3, 2, SLOT, JOURNAL)
        await create_pool(spec, [MemberSpec(device) for device in devices], rng=self.rng)
        for device in devices:
            await device.close()
        client = await self.open()
        await client.create("vm1", VOLUME)
        await client.pool.close()

    def _paths(self) -> list[str]:
        return [str(self.folder / f"d{number}") for number in range(DEVICES)]

    async def open(self) -> Client:
        self.devices = [
            PowerDevice(open_file(path, url=path), path, self.rng) for path in self._paths()
        ]
        pool = await Pool.open(self.devices, mover=InlineMover(), rng=self.rng)
        return Client(pool, self.oracle, self.rng, self.events)

    async def fail_power(self) -> None:
        """Cut it off; what the process still does with its files reaches nobody."""
        for device in self.devices:
            device.cut()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        for device in self.devices:
            await device.close()
            self.events.update(device.lose())


async def use(client: Client, rng: Random) -> None:
    """Write, trim and flush until the power fails."""
    sectors = VOLUME // SECTOR
    while True:
        room = sectors if rng.random() < 0.3 else HOT
        count = 1 << rng.randrange(7)
        first = rng.randrange(room - count)
        kind = rng.random()
        if kind < 0.86:
            await client.write("vm1", first, count)
        elif kind < 0.96:
            no_hole = rng.choice((None, False, True))
            await client.zero("vm1", first - first % 8, -(-count // 8) * 8, no_hole=no_hole)
        else:
            await client.flush("vm1")
        if rng.random() < 0.2:
            await asyncio.sleep(0.001)


async def lives(rig: Rig) -> None:
    """Every round: recover (now and then the power fails in it, too), judge, load, fail."""
    rng = rig.rng
    for _ in range(ROUNDS):
        if rng.random() < 0.3:
            opening = asyncio.ensure_future(rig.open())
            await asyncio.wait([opening], timeout=rng.uniform(0, 0.05))
            rig.events["failed_in_recovery"] += not opening.done()
            await rig.fail_power()
            await asyncio.gather(opening, return_exceptions=True)
        client = await rig.open()
        await client.verify(power_lost=True)
        users = [asyncio.ensure_future(use(client, rng)) for _ in range(TASKS)]
        await asyncio.wait(users, timeout=rng.uniform(0.05, 0.6), return_when="FIRST_COMPLETED")
        for user in users:
            if user.done():
                user.result()
        await rig.fail_power()
        await asyncio.gather(*users, return_exceptions=True)
        rig.events.update(client.pool.engine.state.counters)
    client = await rig.open()
    await client.verify(power_lost=True)
    assert await client.pool.check() == []
    await client.pool.close()


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("seed", [1, 2])
def test_flushed_writes_survive_power_failures(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig = Rig(tmp_path, Random(seed))
    names = ["writes", "flushes", "kept", "lost", "torn", "lost_unflushed", "checkpoints"]
    names += ["collected_stripes", "failed_in_recovery"]

    async def run() -> int:
        await rig.create()
        rounds = 0
        while rounds < ROUNDS_MAX and not all(rig.events[name] for name in names):
            await lives(rig)
            rounds += ROUNDS
        return rounds

    rounds = asyncio.run(run())
    with capsys.disabled():
        print(f"\n{rounds} power failures:", {name: rig.events[name] for name in names})
    assert min(rig.events[name] for name in names) > 0
