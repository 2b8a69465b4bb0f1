"""Clients of a simulated pool, which tell the oracle what they do and what they were told.

A client uses a port (`tests.sim.ports`), so that the same workloads go through the volume's own
methods or through NBD. Whatever answer it gets, the oracle hears of exactly what a real client
would know: issued, acknowledged, refused, or never answered.
"""

from __future__ import annotations

import errno
from collections import Counter
from random import Random

from pool import Pool
from pool.format.location import TAG_SHIFT, TAG_STRIPE, stripe_of

from .oracle import SECTOR, Op, Oracle, Violation, stamp
from .ports import DirectPort, Port, Refused

BLOCK_SECTORS = 8
_ZERO_FLAG = 2


class Client:
    """Uses volumes of an open pool and tells the oracle. Sectors of 512 bytes."""

    def __init__(
        self,
        pool: Pool,
        oracle: Oracle,
        rng: Random,
        events: Counter[str],
        port: Port | None = None,
    ) -> None:
        self.pool = pool
        self.port = port or DirectPort(pool, rng)
        self._oracle = oracle
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

    # -- the operator's part ---------------------------------------------------------------------

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

    # -- a guest's part --------------------------------------------------------------------------

    async def write(self, name: str, first: int, count: int, *, fua: bool = False) -> None:
        """Write `count` sectors. A full pool refuses whole pieces. Raises OSError."""
        ops = self._pieces(name, first, count)
        data = b"".join([stamp(op.id, op.first, op.end) for op in ops])
        try:
            await self.port.write(name, first * SECTOR, data, fua=fua, resent=lambda: _unchain(ops))
        except OSError as error:
            self._refused(name, ops, error)
            return
        self._oracle.acknowledge(ops)
        if fua:
            for op in ops:
                op.flushed = True
            self.events["fua_writes"] += 1
        self.events["writes"] += 1

    def _refused(self, name: str, ops: list[Op], error: OSError) -> None:
        """ENOSPC before anything happened is an answer; all else is for the caller."""
        if error.errno != errno.ENOSPC:
            raise error
        self.events["refused_full"] += 1
        if len(ops) == 1 and not (isinstance(error, Refused) and error.resent):
            self._oracle.refuse(name, ops)

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
        """Trim, which spares blocks that are not wholly in the range, or with `no_hole` given write
        zeros. Raises OSError."""
        ops = self._zeroings(name, first, first + count, trim=no_hole is None)
        try:
            await self.port.zero(
                name, first * SECTOR, count * SECTOR, no_hole, resent=lambda: _unchain(ops)
            )
        except OSError as error:
            self._refused(name, ops, error)
            return
        self._oracle.acknowledge(ops)
        self._trims.append(self.pool.engine.journal.head)
        self.events["trims" if no_hole is None else "zeroings"] += 1

    async def flush(self, name: str) -> None:
        """Flush; what was answered before is durable then. Raises OSError."""
        begun = self._oracle.tick()
        await self.port.flush(name)
        self._check_replicas()
        self._oracle.flushed(begun)
        self.events["flushes"] += 1

    def _zeroings(self, name: str, first: int, end: int, *, trim: bool) -> list[Op]:
        """The operations that it consists of, in order: what is left of the first and of the last
        block is written, the blocks between are unmapped (`Volume.write_zeroes`)."""
        inner = -(-first // BLOCK_SECTORS) * BLOCK_SECTORS
        outer = end // BLOCK_SECTORS * BLOCK_SECTORS
        parts = [(inner, outer)]
        if not trim and inner > outer:
            parts = [(first, end)]
        elif not trim:
            parts = [(first, inner), (outer, end), (inner, outer)]
        ops: list[Op] = []
        for start, stop in parts:
            if start < stop:
                after = ops[-1] if ops else None
                ops.append(self._oracle.begin(name, start, stop, zero=True, after=after))
        return ops

    def _check_replicas(self) -> None:
        """A replica whose sync failed must not have counted for a flush (R4). Raises Violation."""
        journal = self.pool.engine.journal
        for replica in journal.replicas:
            if getattr(replica.device, "distrusted", False) and not replica.failed:
                raise Violation(f"R4: {replica.device.url} is trusted after a failed sync")

    async def read(self, name: str, first: int, count: int) -> None:
        """Read and have it judged. Raises OSError, Violation."""
        begun = self._oracle.tick()
        data = await self.port.read(name, first * SECTOR, count * SECTOR)
        if name in self._oracle.volumes:
            self._oracle.check_read(name, first, data, begun)
        self.events["reads"] += 1

    async def status(self, name: str, first: int, count: int) -> None:
        """Ask what is allocated; what is said to be zero must read so."""
        begun = self._oracle.tick()
        for length, flags in await self.port.status(name, first * SECTOR, count * SECTOR):
            sectors = min(length // SECTOR, count)
            if flags & _ZERO_FLAG and sectors and name in self._oracle.volumes:
                self._oracle.check_read(name, first, bytes(sectors * SECTOR), begun)
            first += sectors
            count -= sectors
        self.events["statuses"] += 1

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


def _unchain(ops: list[Op]) -> None:
    """A request that is sent again may have been carried out in part before: its pieces are not
    seen in order any more."""
    for op in ops:
        op.after = None
