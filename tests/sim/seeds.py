"""One random life of a pool per seed: everything at once, drawn from the seed.

Several clients write, flush, trim, zero and read; volumes come and go; up to as many devices as
parity can replace err, hang, rot, vanish, fail to sync or return old; the process dies and power
fails at random operations, also during recovery. In the end the faults stop, and the pool must
work, close and open clean.

`run_seed` is deterministic: the same seed gives the same digest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from backends.fault_script import (
    OPERATIONS,
    READS,
    WRITES,
    Action,
    ApplyThenFail,
    Delay,
    Fail,
    FlipBits,
    Hang,
    Rule,
    ShortRead,
    Vanish,
)
from pool.errors import PoolError, PoolStopped

from .devices import Crash
from .loop import run
from .oracle import Violation
from .scenarios import die_and_recover
from .world import BLOCK_SECTORS, SMALL, TIGHT, WIDE, Client, Rig, Shape

SHAPES = (WIDE, SMALL, TIGHT, Shape(4, 2, 8), Shape(2, 2, 5), Shape(1, 1, 3, journal_kib=64))
LIVES = 3
VOLUME_BLOCKS = 80
SYNC = frozenset({"sync"})
SLOW = READS | {"write", "sync"}


@dataclass(frozen=True, slots=True)
class Result:
    """What a seed did: its digest, and how often what happened."""

    digest: str
    events: Counter[str] = field(compare=False)


def run_seed(seed: int) -> Result:
    """Live through one seed. Raises Violation (or whatever else broke), naming the seed."""
    try:
        return run(_Life(seed).live())
    except BaseException as error:
        error.add_note(f"to repeat: make sim SEED={seed}")
        raise


class _Life:
    """The actors and their mischief."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"life {seed}")
        self.rig = Rig(
            seed, self.rng.choice(SHAPES), latency=self.rng.choice((0.0005, 0.002, 0.02))
        )
        self.serial = 0

    async def live(self) -> Result:
        rig, rng = self.rig, self.rng
        await rig.create()
        names = rng.sample(rig.shape.names, rng.randint(0, rig.shape.parity))
        rig.unlucky = set(names)
        await rig.world.run(rig.open())
        for _ in range(LIVES):
            rig.world.crash_at = rig.world.operations + rng.randrange(20, 1500)
            rig.world.crash_after = rng.random() < 0.5
            try:
                await rig.world.run(self.work())
            except Crash:
                rig.events["crashes"] += 1
            self.heal()
            # What an unlucky replica has lost, only the lucky ones can vouch for.
            await die_and_recover(rig, power=rng.random() < 0.6 or bool(rig.unlucky))
        rig.world.crash_at = None
        await rig.world.run(self.end())
        return Result(rig.world.digest(), rig.events)

    def heal(self) -> None:
        """Devices come back, as they are or as an old copy of themselves; or stay away."""
        for name in sorted(self.rig.unlucky):
            if self.rng.random() < 0.7:
                self.rig.world.scripts[name].clear()

    # -- one life ----------------------------------------------------------------------------

    async def work(self) -> None:
        """All actors at once, until they are done or the world ends."""
        client = self.rig.client
        assert client is not None
        names = [info.name for info in client.pool.volumes()]
        while len(names) < 2:
            names.append(await self.new_volume(client))
        async with asyncio.TaskGroup() as group:
            for number in range(self.rng.randint(2, 4)):
                group.create_task(self.user(client, Random(self.rng.random()), names, number))
            group.create_task(self.manager(client, Random(self.rng.random()), names))
            group.create_task(self.mischief(Random(self.rng.random())))

    async def new_volume(self, client: Client) -> str:
        self.serial += 1
        name = f"v{self.serial}"
        await client.create(name, VOLUME_BLOCKS * 4096)
        return name

    async def user(self, client: Client, rng: Random, names: list[str], number: int) -> None:
        """Random requests on random volumes; volumes may be deleted under it."""
        for _ in range(rng.randrange(30, 90)):
            name = rng.choice(names)
            try:
                await self.request(client, rng, name)
            except (KeyError, OSError) as error:
                if name in client.deleted and not isinstance(error, PoolStopped):
                    continue
                raise Violation(
                    f"a client saw {error!r} with at most {self.rig.shape.parity} devices at fault"
                ) from error
            if rng.random() < 0.6:
                await asyncio.sleep(rng.random() * self.rig.latency * 4)

    async def request(self, client: Client, rng: Random, name: str) -> None:
        sectors = VOLUME_BLOCKS * BLOCK_SECTORS
        block = rng.randrange(VOLUME_BLOCKS) * BLOCK_SECTORS
        whole = min(rng.choice((1, 1, 2, 5, 20)) * BLOCK_SECTORS, sectors - block)
        odd = rng.randrange(sectors - 30)
        match rng.choices(range(7), (40, 15, 12, 6, 4, 20, 3))[0]:
            case 0:
                await client.write(name, block, whole)
            case 1:
                await client.write(name, odd, rng.randrange(1, 30))
            case 2:
                await client.flush(name)
            case 3:
                await client.zero(name, block, whole)
            case 4:
                await client.zero(name, block, whole, no_hole=rng.random() < 0.5)
            case 5:
                await client.read(name, odd, rng.randrange(1, 30))
            case _:
                await client.write(name, block, whole)
                await client.flush(name)

    async def manager(self, client: Client, rng: Random, names: list[str]) -> None:
        """Creates and deletes volumes, asks for checkpoints."""
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(rng.random() * self.rig.latency * 100)
            if rng.random() < 0.4:
                await client.pool.checkpoint()
                continue
            victim = rng.choice(names)
            names.append(await self.new_volume(client))
            names.remove(victim)
            await client.delete(victim)

    async def mischief(self, rng: Random) -> None:
        """Faults on unlucky devices."""
        for name in sorted(self.rig.unlucky):
            await asyncio.sleep(rng.random() * self.rig.latency * 60)
            self.rig.world.scripts[name].add(self.fault(rng))
            self.rig.events["faults"] += 1

    @staticmethod
    def fault(rng: Random) -> Rule:
        times, chance = rng.choice((1, 3, None)), rng.choice((1.0, 0.3))
        kinds: tuple[tuple[frozenset[str], Action], ...] = (
            (READS, Fail()),
            (WRITES, Fail()),
            (SYNC, Fail()),
            (SYNC | WRITES, ApplyThenFail()),
            (READS, FlipBits(3)),
            (READS, ShortRead()),
            (SLOW, Delay(rng.choice((0.1, 5.0, 40.0)))),
            (SLOW, Hang()),
            (OPERATIONS, Vanish()),
        )
        ops, action = rng.choice(kinds)
        return Rule(ops, action, times=times, chance=chance)

    # -- the end -----------------------------------------------------------------------------

    async def end(self) -> None:
        """Without faults the pool must serve, close, and open as it was closed."""
        rig = self.rig
        for script in rig.world.scripts.values():
            script.clear()
        rig.end_life(power=True)
        client = await rig.open()
        await rig.verify(client)
        for name in [info.name for info in client.pool.volumes()]:
            for _ in range(10):
                await client.write(name, self.rng.randrange(VOLUME_BLOCKS) * BLOCK_SECTORS, 8)
            await client.flush(name)
        try:
            await client.pool.close()
        except PoolError as error:
            raise Violation(f"the pool did not close: {error}") from error
        rig.end_life(power=True)
        client = await rig.open()
        await rig.verify(client)
        await client.pool.close()
