"""Who acts in a random life: users with requests, an operator, bad luck with devices and cables.

An actor is a coroutine that ends by itself. It draws from a generator of its own, so that what one
does is not changed by how often another acts.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from backends.fault_script import Fail, Rule
from pool.errors import PoolError, PoolFull, PoolStopped
from pool.slots import SPARE

from .clients import BLOCK_SECTORS, Client
from .devices import SimDevice
from .faults import drawn
from .options import REQUESTS, Options
from .oracle import Violation
from .ports import NbdPort
from .stores import SimStore
from .world import Rig

BLOCK = 4096
#: Bytes at either end of a device that hold superblocks.
SUPERBLOCKS = 128 << 10


@dataclass(slots=True)
class Stage:
    """What the actors of one run share."""

    rig: Rig
    options: Options
    #: Names of the volumes that users know of.
    names: list[str] = field(default_factory=list)
    serial: int = 0
    #: Requests that got an answer, of all users in all lives.
    answered: int = 0
    #: More devices fail than parity can replace: errors are right as long as they are honest.
    beyond: bool = False

    @property
    def last_name(self) -> str:
        """The volume that was created last, or was to be."""
        return f"v{self.serial}"

    async def new_volume(self, client: Client) -> str:
        """Create a volume under a name that was never used. Raises PoolFull."""
        self.serial += 1
        name = self.last_name
        blocks = self.options.first_block + self.options.volume_blocks
        await client.create(name, blocks * BLOCK)
        return name


async def user(stage: Stage, client: Client, rng: Random, requests: int) -> None:
    """Random requests on random volumes, which may be deleted meanwhile. Raises Violation."""
    for _ in range(requests):
        name = rng.choice(stage.names)
        try:
            await _request(stage.options, client, rng, name)
            stage.answered += 1
        except (KeyError, OSError) as error:
            stage.answered += 1
            if stage.beyond and isinstance(error, OSError):
                stage.rig.events["honest_errors"] += 1
                continue
            if name in client.deleted and not isinstance(error, PoolStopped):
                stage.rig.events["shut_down"] += 1
                continue
            parity = stage.options.shape.parity
            raise Violation(
                f"a client saw {error!r} with at most {parity} devices at fault"
            ) from error
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * stage.options.latency * 4)


async def _request(options: Options, client: Client, rng: Random, name: str) -> None:
    blocks = options.volume_blocks
    room = blocks if rng.random() < 0.3 else max(4, int(blocks * options.hot))
    first, sectors = options.first_block * BLOCK_SECTORS, blocks * BLOCK_SECTORS
    block = rng.randrange(room) * BLOCK_SECTORS
    whole = min(rng.choice((1, 1, 2, 5, 20)) * BLOCK_SECTORS, sectors - block)
    odd = rng.randrange(room * BLOCK_SECTORS)
    few = min(rng.randrange(1, 30), sectors - odd)
    block, odd = first + block, first + odd
    match rng.choices(REQUESTS, options.weights)[0]:
        case "write":
            await client.write(name, block, whole)
        case "odd write":
            await client.write(name, odd, few)
        case "fua":
            await client.write(name, block, whole, fua=True)
        case "flush":
            await client.flush(name)
        case "trim":
            await client.zero(name, *rng.choice(((block, whole), (block, whole), (odd, few))))
        case "zero":
            where = rng.choice(((block, whole), (odd, few)))
            await client.zero(name, *where, no_hole=rng.random() < 0.5)
        case "read":
            await client.read(name, odd, few)
        case "status":
            await client.status(name, block, whole)
        case "sync write":
            await client.write(name, block, whole)
            await client.flush(name)


async def operator(stage: Stage, client: Client, rng: Random) -> None:
    """Creates and deletes volumes, looks at the pool, has it write checkpoints and scrub."""
    rig = stage.rig
    for _ in range(stage.options.operator):
        await asyncio.sleep(rng.random() * stage.options.latency * 100)
        try:
            match rng.choice(("checkpoint", "status", "scrub", "replace", "replace")):
                case "checkpoint":
                    await client.pool.checkpoint()
                case "status":
                    client.pool.status()
                case "scrub":
                    await client.pool.scrub()
                    rig.events["scrubs"] += 1
                case _:
                    await _replace(stage, client, rng)
        except (PoolError, OSError):
            if not stage.beyond:
                raise


async def _replace(stage: Stage, client: Client, rng: Random) -> None:
    """A new volume for an old one, which is deleted under its users."""
    victim = rng.choice(stage.names)
    try:
        stage.names.append(await stage.new_volume(client))
    except PoolFull:
        # Right for a pool that is full, if only since it has lost devices; deletes must go on (P5).
        stage.rig.events["creates_refused"] += 1
        stage.rig.oracle.forget(stage.last_name)
        if len(stage.names) == 1:
            return
    stage.names.remove(victim)
    await client.delete(victim)
    if stage.rig.server is not None:
        stage.rig.server.drop_export(victim)


async def cable(stage: Stage, port: NbdPort, rng: Random) -> None:
    """Connections are lost, and strangers talk nonsense."""
    options = stage.options
    for _ in range(options.cuts):
        await asyncio.sleep(rng.random() * (options.latency + options.network) * 30)
        port.cut(rng)
        if options.babble and rng.random() < 0.5:
            port.babble(rng)


async def upgrade(stage: Stage, port: NbdPort, rng: Random) -> None:
    """Servers follow each other, with the connections they have."""
    for _ in range(stage.options.upgrades):
        await asyncio.sleep(rng.random() * stage.options.latency * 60)
        await port.succeed(stage.rig.serve)


async def mischief(stage: Stage, rng: Random, names: Sequence[str]) -> None:
    """Faults on these devices."""
    for _ in range(stage.options.faults_per_life if names else 0):
        await asyncio.sleep(rng.random() * stage.options.latency * 60)
        _harm(stage, rng, rng.choice(names))


def _harm(stage: Stage, rng: Random, name: str) -> None:
    kind = rng.choice(stage.options.faults)
    stage.rig.events["faults"] += 1
    device = stage.rig.devices.get(name)
    if kind == "rot" and device is not None:
        rot(device, rng, rng.choice((1, 20, 200)))
        stage.rig.events["rotten"] += 1
    elif kind == "no room":
        stage.rig.world.scripts[name].add(_no_room(stage.rig, name, rng))
    elif kind not in ("rot", "returns old"):
        stage.rig.world.scripts[name].add(drawn(kind, rng))


def rot(device: SimDevice | SimStore, rng: Random, count: int) -> None:
    """Flip a bit in each of so many places of what a device holds. One without a whole superblock
    belongs to no pool any more and would never heal: where much rots, superblocks don't."""
    spared = SUPERBLOCKS if count > 1 else 0
    for _ in range(count):
        if isinstance(device, SimDevice):
            device.rot(rng.randrange(spared, device.size - spared), 1 << rng.randrange(8))
        elif shards := [name for name in device.snapshot().objects if name.startswith("shard")]:
            device.spoil(rng.choice(sorted(shards)), rng.randrange(BLOCK), 1 << rng.randrange(8))


def _no_room(rig: Rig, name: str, rng: Random) -> Rule:
    """The storage under a device is full from some slot on, of those not written from the start."""
    where = rig.tap.layouts[name][1]
    start = where.slot_offset(rng.randrange(min(SPARE, where.slots), where.slots + 1))
    within = (start, where.slot_offset(where.slots)) if where.addressable else None
    ops = frozenset({"write", "put"})
    return Rule(ops, Fail(errno.ENOSPC), times=rng.choice((3, None)), within=within)
