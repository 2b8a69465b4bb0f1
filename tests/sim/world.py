"""A small pool over simulated devices, and clients that tell the oracle what they do.

rig = Rig(seed, SMALL)
await rig.create()
client = await rig.open()          # a Client of the open pool
...
rig.world.crash(); rig.world.reopen(...)
client = await rig.open(); await rig.verify(client)
"""

from __future__ import annotations

import asyncio
import errno
import re
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from pool import MemberSpec, Pool, PoolSpec, create_pool
from pool.format.location import TAG_SHIFT, TAG_STRIPE, stripe_of
from pool.mover import InlineMover
from pool.stripe_writer import Job, Outcome, ShardSource

from .devices import SimDevice, World
from .oracle import SECTOR, Op, Oracle, Violation, stamp

KIB = 1024
BLOCK_SECTORS = 8
#: So little that map leaves are paged out and in.
LEAF_BUDGET = 64 * KIB


@dataclass(frozen=True, slots=True)
class Shape:
    """What the pool is made of; sizes in KiB."""

    data: int
    parity: int
    devices: int
    device_kib: int = 1152
    journal_kib: int = 256
    slot_kib: int = 16

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
    mover: WatchedMover = field(init=False)
    devices: dict[str, SimDevice] = field(init=False, default_factory=dict)
    #: Names of devices that a committed root had given up.
    expelled: set[str] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.world = World(self.seed, latency=self.latency)

    async def create(self) -> None:
        """Make the pool, undisturbed."""
        shape = self.shape
        self.devices = self.world.create(dict.fromkeys(shape.names, shape.device_kib * KIB))
        spec = PoolSpec(
            "tank", shape.data, shape.parity, shape.slot_kib * KIB, shape.journal_kib * KIB
        )
        members = [MemberSpec(device) for device in self.devices.values()]
        await create_pool(spec, members, rng=Random(self.seed))

    async def open(self) -> Client:
        """Open the pool on all devices at hand but the missing ones."""
        devices = [device for name, device in self.devices.items() if name not in self.missing]
        self.mover = WatchedMover()
        clock = asyncio.get_running_loop().time
        pool = await Pool.open(
            devices, mover=self.mover, rng=Random(self.seed), now=clock,
            leaf_budget=LEAF_BUDGET,
        )  # fmt: skip
        self.events["returned_stale"] += len(self.expelled & (self.devices.keys() - self.missing))
        self.expelled &= self.missing | (set(self.shape.names) - self.devices.keys())
        self.client = Client(pool, self.oracle, self.world.rng, self.events)
        return self.client

    def end_life(
        self, *, power: bool, fate: str | None = None, crash_at: int | None = None
    ) -> None:
        """The process dies, with or without the power; the next life begins."""
        self.note_counters()
        # What was not flushed is perhaps only on a device that is missing (P1 needs them all).
        self.power_lost = self.power_lost or power or bool(self.missing)
        if power:
            self.world.crash(fate)
            self.events["power_losses"] += 1
        else:
            self.world.kill()
            self.events["kills"] += 1
        self.devices = self.world.reopen(crash_at=crash_at)

    def note_counters(self) -> None:
        """Add what the ending pool counted to the events."""
        client, self.client = self.client, None
        if client is None:
            return
        state = client.pool.engine.state
        self.events.update(state.counters)
        self.expelled |= {f"d{m.index}" for m in state.members.values() if m.state == "gone"}
        client.note_reuse()

    async def verify(self, client: Client) -> None:
        """Judge everything after a crash: P1 to P4, the pool's own check, the accounts."""
        await client.verify(power_lost=self.power_lost)
        self.power_lost = False
        faults = [line for line in await client.pool.check() if not self._excused(line)]
        if faults:
            raise Violation(f"the pool's own check found {len(faults)} faults: {faults[:3]}")
        check_accounts(client.pool)

    def _excused(self, fault: str) -> bool:
        """Whether a fault is no more than what an unlucky device did."""
        found = re.search(r"\bdevice (\d+)", fault)
        return found is not None and f"d{found[1]}" in self.unlucky


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


def check_accounts(pool: Pool) -> None:
    """Every slot of a stripe is used, and by that stripe alone (P8, R21)."""
    state = pool.engine.state
    rows = [*state.table.stripes(), *state.committed.anchors.values()]
    places = [place for row in rows for place in row.places]
    if len(set(places)) != len(places):
        raise Violation("two stripes claim the same slot")
    for index, member in state.members.items():
        claimed = {slot for device, slot in places if device == index}
        if not claimed <= member.slots._used:
            raise Violation(f"device {index}: slots of live stripes are free")


class Client:
    """Uses volumes of an open pool and tells the oracle. Sectors of 512 bytes."""

    def __init__(self, pool: Pool, oracle: Oracle, rng: Random, events: Counter[str]) -> None:
        self.pool = pool
        self._oracle = oracle
        self._rng = rng
        self.events = events
        self.deleted: set[str] = set()
        self._began = pool.engine.journal.head
        #: Journal positions behind trims, and what deleted volumes occupied: what reuse is seen by.
        self._trims: list[int] = []
        self._deleted: list[tuple[int, set[tuple[int, int]]]] = []

    def count(self, name: str) -> int:
        """One of the engine's counters."""
        counters: dict[str, int] = self.pool.status()["counters"]
        return counters.get(name, 0)

    def note_reuse(self) -> None:
        """Count laps of the journal, trims whose journal space was overwritten, and deleted volumes
        whose slots hold newer stripes."""
        state = self.pool.engine.state
        journal = state.journal
        self.events["journal_laps"] += (journal.head - self._began) // journal.size
        overwritten = journal.head - journal.size
        self.events["trims_overwritten"] += sum(at <= overwritten for at in self._trims)
        for newest, slots in self._deleted:
            newer = (row.places for row in state.table.stripes() if row.id > newest)
            self.events["slots_reused"] += any(slots.intersection(places) for places in newer)

    async def create(self, name: str, size: int) -> None:
        self._oracle.add_volume(name, size)
        self._oracle.uncertain.add(name)
        await self.pool.create_volume(name, size)
        self._oracle.uncertain.discard(name)

    async def delete(self, name: str) -> None:
        self._oracle.uncertain.add(name)
        self.deleted.add(name)
        self._deleted.append((self.pool.engine.state.next_stripe - 1, self._slots_of(name)))
        await self.pool.delete_volume(name)
        self._oracle.uncertain.discard(name)
        del self._oracle.volumes[name]
        self.events["deletes"] += 1

    def _slots_of(self, name: str) -> set[tuple[int, int]]:
        """The slots of stripes that hold blocks of a volume, as far as its map is in memory."""
        state = self.pool.engine.state
        leaves = state.maps[state.catalog.volumes[name].layer].leaves.values()
        found = (location for leaf in leaves for _, location, _ in leaf.mapped())
        stripes = {stripe_of(at) for at in found if at >> TAG_SHIFT == TAG_STRIPE}
        return {place for stripe in stripes for place in state.row(stripe).places}

    async def write(self, name: str, first: int, count: int) -> None:
        """Write `count` sectors, by the fast path if it goes. A full pool refuses whole pieces."""
        volume = self.pool.volume(name)
        ops = self._pieces(name, first, count)
        data = memoryview(b"".join([stamp(op.id, op.first, op.end) for op in ops]))
        try:
            if self._rng.random() < 0.5 and volume.try_write(first * SECTOR, data):
                volume.commit()
            else:
                await volume.write(first * SECTOR, data)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.events["refused_full"] += 1
            if len(ops) == 1:
                self._oracle.refuse(name, ops)
            return
        self._oracle.acknowledge(ops)
        self.events["writes"] += 1

    def _pieces(self, name: str, first: int, count: int) -> list[Op]:
        """The operations that a write consists of, in order (`Volume.write` cuts the same way)."""
        piece = self.pool.engine.piece_bytes // SECTOR
        ops: list[Op] = []
        end = first + count
        while first < end:
            stop = min(end, first + piece - first % BLOCK_SECTORS)
            ops.append(self._oracle.begin(name, first, stop, after=ops[-1] if ops else None))
            first = stop
        return ops

    async def zero(self, name: str, first: int, count: int, *, no_hole: bool | None = None) -> None:
        """Trim whole blocks, or with `no_hole` given write zeros there."""
        assert not first % BLOCK_SECTORS
        assert not count % BLOCK_SECTORS
        volume = self.pool.volume(name)
        op = self._oracle.begin(name, first, first + count, zero=True)
        try:
            if no_hole is None:
                await volume.trim(first * SECTOR, count * SECTOR)
            else:
                await volume.write_zeroes(first * SECTOR, count * SECTOR, no_hole=no_hole)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            self.events["refused_full"] += 1
            self._oracle.refuse(name, [op])
            return
        self._oracle.acknowledge([op])
        self._trims.append(self.pool.engine.journal.head)
        self.events["trims" if no_hole is None else "zeroings"] += 1

    async def flush(self, name: str) -> None:
        begun = self._oracle.tick()
        await self.pool.volume(name).flush()
        self._oracle.flushed(begun)
        self.events["flushes"] += 1

    async def read(self, name: str, first: int, count: int) -> None:
        """Read and have it judged."""
        begun = self._oracle.tick()
        data = memoryview(bytearray(count * SECTOR))
        volume = self.pool.volume(name)
        if not (self._rng.random() < 0.5 and volume.try_read(first * SECTOR, data)):
            await volume.read(first * SECTOR, data)
        if name in self._oracle.volumes:
            self._oracle.check_read(name, first, data, begun)
        self.events["reads"] += 1

    async def verify(self, *, power_lost: bool) -> None:
        """Judge and pin all volumes after a crash. Raises Violation."""
        there = {info.name for info in self.pool.volumes()}
        for name in sorted(self._oracle.uncertain - there):
            self._oracle.volumes.pop(name, None)
        self._oracle.uncertain.clear()
        if there != self._oracle.volumes.keys():
            raise Violation(f"volumes are {sorted(there)}, not {sorted(self._oracle.volumes)}")
        for name in sorted(there):
            volume = self.pool.volume(name)
            data = bytearray(volume.size)
            await volume.read(0, memoryview(data))
            lost = self._oracle.check_recovered(name, bytes(data), power_lost=power_lost)
            self.events["lost_unflushed"] += lost
