"""A small pool over simulated devices, through all its lives.

rig = Rig(seed, SMALL)
await rig.create()
client = await rig.open()          # a Client of the open pool
...
rig.end_life(power=True)
client = await rig.open(); await rig.verify(client)
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from random import Random

from nbd_server.export import Export
from nbd_server.server import Server
from pool import MemberSpec, Pool, PoolSpec, blockmap, create_pool, failpoints
from pool.mover import InlineMover
from pool.stripe_writer import Job, Outcome, ShardSource

from .audit import Tap, check_accounts
from .clients import BLOCK_SECTORS, Client
from .devices import Crash, SimDevice, World
from .network import hung_up
from .oracle import Oracle, Violation
from .ports import NbdPort
from .stores import SimStore

__all__ = ["BLOCK_SECTORS", "Client", "Rig"]

KIB = 1024
#: So little that map leaves are paged out and in.
LEAF_BUDGET = 64 * KIB


@dataclass(frozen=True, slots=True)
class Shape:
    """What the pool is made of; sizes in KiB. The last `stores` of its devices are object
    stores."""

    data: int
    parity: int
    devices: int
    device_kib: int = 1152
    journal_kib: int = 256
    slot_kib: int = 16
    stores: int = 0

    @property
    def names(self) -> list[str]:
        return [f"d{number}" for number in range(self.devices)]


#: Six devices, nearly full with little, and a journal that laps often.
WIDE = Shape(4, 2, 6)
#: As few and small as they get: a journal of 16 blocks.
SMALL = Shape(2, 1, 4, device_kib=1024, journal_kib=64)
#: No spare device: losing one narrows the stripe.
TIGHT = Shape(2, 1, 3, device_kib=1024, journal_kib=64)


@dataclass(slots=True)
class Rig:
    """One simulated pool through all its lives."""

    seed: int
    shape: Shape
    latency: float = 0.001
    leaf_budget: int = LEAF_BUDGET
    #: Entries from which on a map leaf is dense; the engine's own number needs larger volumes.
    sparse_max: int = blockmap.SPARSE_MAX
    #: Chance that the pool's own check is run when a crash is judged.
    checks: float = 1.0
    world: World = field(init=False)
    oracle: Oracle = field(init=False, default_factory=Oracle)
    #: What happened, over all lives: the engine's counters and the tests' own.
    events: Counter[str] = field(init=False, default_factory=Counter)
    #: Devices that faults may touch: as many as parity can replace.
    unlucky: set[str] = field(init=False, default_factory=set)
    #: Devices that are not at hand when the pool is opened.
    missing: set[str] = field(init=False, default_factory=set)
    power_lost: bool = False
    client: Client | None = field(init=False, default=None)
    server: Server | None = field(init=False, default=None)
    mover: WatchedMover = field(init=False)
    devices: dict[str, SimDevice | SimStore] = field(init=False, default_factory=dict)
    #: Names of devices that a committed root had given up.
    expelled: set[str] = field(init=False, default_factory=set)
    tap: Tap = field(init=False, default_factory=Tap)
    #: The failpoint at which this life ends, and at which time it is reached, over all lives.
    dies_at: tuple[str, int] | None = field(init=False, default=None)
    #: How often each failpoint was reached, over all lives.
    reached: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self.world = World(self.seed, latency=self.latency)

    async def create(self) -> None:
        """Make the pool, undisturbed."""
        shape = self.shape
        disks = shape.names[: shape.devices - shape.stores]
        size = shape.device_kib * KIB
        self.devices |= self.world.create(dict.fromkeys(disks, size))
        self.devices |= self.world.create_stores(dict.fromkeys(shape.names[len(disks) :], size))
        spec = PoolSpec(
            "tank", shape.data, shape.parity, shape.slot_kib * KIB, shape.journal_kib * KIB
        )
        members = [MemberSpec(device) for device in self.devices.values()]
        await create_pool(spec, members, rng=Random(self.seed))

    async def open(self, *, read_only: bool = False) -> Client:
        """Open the pool on all devices at hand but the missing ones."""
        devices = [device for name, device in self.devices.items() if name not in self.missing]
        self.mover = WatchedMover()
        self.world.tap = self.tap if self.tap.layouts else None
        clock = asyncio.get_running_loop().time
        pool = await Pool.open(
            devices, mover=self.mover, rng=Random(self.seed), now=clock, read_only=read_only,
            leaf_budget=self.leaf_budget,
        )  # fmt: skip
        self._watch(pool)
        self.events["returned_stale"] += len(self.expelled & (self.devices.keys() - self.missing))
        self.expelled &= self.missing | (set(self.shape.names) - self.devices.keys())
        self.client = Client(pool, self.oracle, self.world.rng, self.events)
        return self.client

    def _watch(self, pool: Pool) -> None:
        state, checkpoint = pool.engine.state, pool.engine.checkpoint
        self.tap.layouts = {f"d{m.index}": (m.index, m.layout) for m in state.members.values()}
        self.tap.state = state
        self.tap.committed_rows = lambda: checkpoint.written
        self.world.tap = self.tap

    def serve(self) -> Server:
        """An NBD server for the open pool, as the daemon makes it."""
        assert self.client is not None
        pool = self.client.pool

        def exports() -> list[Export]:
            return [pool.volume(info.name) for info in pool.volumes()]

        loop = asyncio.get_running_loop()
        self.server = Server(
            partial(_lookup, pool), exports, clock=lambda: int(loop.time() * 1e9), hung_up=hung_up
        )
        return self.server

    def nbd_port(self, rng: Random, *, latency: float, buffer: int, connections: int) -> NbdPort:
        """A way to the volumes through the server."""
        assert self.server is not None
        return NbdPort(
            self.server, rng, latency=latency, buffer=buffer, alive=self.alive,
            events=self.events, connections=connections,
        )  # fmt: skip

    def alive(self) -> None:
        """Raise Crash once this life has ended."""
        if self.world.dead:
            raise Crash(self.world.epitaph)

    def end_life(
        self, *, power: bool, fate: str | None = None, crash_at: int | None = None
    ) -> None:
        """The process dies, with or without the power; the next life begins. Raises Violation."""
        self.tap.judge()
        self.note_counters()
        # What was not flushed is perhaps only on a device that is missing (P1 needs them all).
        self.power_lost = self.power_lost or power or bool(self.missing)
        if power:
            self.world.crash(fate)
            self.events["power_losses"] += 1
        else:
            self.world.kill()
            self.events["kills"] += 1
        self.tap.state = None
        self.server = None
        self.devices = self.world.reopen(crash_at=crash_at)

    def note_counters(self) -> None:
        """Add what the ending pool counted to the events."""
        client, self.client = self.client, None
        if client is None or client.pool.engine.read_only:
            return
        state = client.pool.engine.state
        self.events.update(state.counters)
        self.expelled |= {f"d{m.index}" for m in state.members.values() if m.state == "gone"}
        client.note_reuse()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this lasts, failpoints count and may end the world, and what the server logs as a
        bug is a violation."""
        handler = _Bugs()
        logger = logging.getLogger("nbd_server")
        logger.addHandler(handler)
        # What clients do wrong is noted there as it should be; here nobody reads it.
        propagate, logger.propagate = logger.propagate, False
        sparse_max, blockmap.SPARSE_MAX = blockmap.SPARSE_MAX, self.sparse_max
        failpoints.install(self._failpoint)
        try:
            yield
        finally:
            failpoints.install(None)
            blockmap.SPARSE_MAX = sparse_max
            logger.propagate = propagate
            logger.removeHandler(handler)
            self.events.update({f"at {name}": count for name, count in self.reached.items()})
        if handler.bugs:
            raise Violation(f"the NBD server met a bug: {handler.bugs[0]}")

    def die_at(self, name: str, passes: int) -> None:
        """End this life when that failpoint is reached for the so-manieth time from now."""
        self.dies_at = (name, self.reached[name] + passes)

    def _failpoint(self, name: str) -> None:
        self.reached[name] += 1
        if self.dies_at == (name, self.reached[name]):
            self.events["deaths_at_failpoints"] += 1
            self.world.die(f"at failpoint {name}")
        self.alive()

    async def verify(self, client: Client) -> None:
        """Judge everything after a crash: P1 to P4, the accounts, mostly the pool's own check."""
        await client.verify(power_lost=self.power_lost)
        self.power_lost = False
        await check_accounts(client.pool)
        if self.world.rng.random() >= self.checks:
            return
        faults = [line for line in await client.pool.check() if not self._excused(line)]
        if faults:
            raise Violation(f"the pool's own check found {len(faults)} faults: {faults[:3]}")

    def _excused(self, fault: str) -> bool:
        """Whether a fault is no more than what an unlucky device did."""
        found = re.search(r"\bdevice (\d+)", fault)
        return found is not None and f"d{found[1]}" in self.unlucky


def _lookup(pool: Pool, name: str) -> Export | None:
    try:
        return pool.volume(name)
    except KeyError:
        return None


class _Bugs(logging.Handler):
    """Keeps what is logged as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.bugs: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self.bugs.append(f"{record.getMessage()} {error!r}")


class WatchedMover(InlineMover):
    """Says which blocks are being moved from stripe to stripe, so that a client can race it."""

    def __init__(self) -> None:
        super().__init__()
        #: Block numbers, of any volume.
        self.collecting: set[int] = set()

    async def run(self, job: Job) -> Outcome:
        for stripe in job.stripes:
            if any(isinstance(source, ShardSource) for source in stripe.sources):
                self.collecting.update(stripe.blocks[: stripe.used].tolist())
        try:
            return await super().run(job)
        finally:
            self.collecting.clear()
