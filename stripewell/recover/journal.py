"""The journal's chain, and what it changes ("Journal", "The chain" in `docs/format.md`).

A record counts if it continues the chain on some replica; replicas that may lack what was synced
are asked last. Batches count as a whole. The chain ends where no replica goes on; whether that is a
torn tail or damage, `durable` tells. Called by `remains`; `Ring` also by `content`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from stripewell.recover.catalog import Catalog, check_change
from stripewell.recover.damage import note
from stripewell.recover.overlay import CATALOG, DATA, TRIM, ZERO, Changes
from stripewell.recover.root import BLOCK, Replica, Stream
from stripewell.recover.sources import Source
from stripewell.recover.values import POSITIONS, Unusable, json_object

#: magic, crc, revision, flags, stream, extents, blocks, previous, version, position, tail, durable
_HEAD = struct.Struct("<8sIHHIIIIQQQQ")
_EXTENT = struct.Struct("<BBHIQQ")
_MORE = 1
_TERM_SHIFT = 40
#: Blocks read at a time while following the chain.
_AHEAD = 256
#: How far behind the end to look for records that prove that something is missing.
_BEYOND = 2048


@dataclass(frozen=True, slots=True)
class Record:
    """A header block that is whole. Extents are (kind, layer, block, count)."""

    crc: int
    more: bool
    previous: int
    version: int
    position: int
    durable: int
    extents: tuple[tuple[int, int, int, int], ...]
    crcs: npt.NDArray[np.uint32]

    @property
    def end(self) -> int:
        return self.position + 1 + len(self.crcs)


def parse_record(block: bytes) -> Record | None:
    """The record that begins with this block; None if none does."""
    (magic, crc, revision, flags, _, extents, blocks, previous, version, position, _,
     durable) = _HEAD.unpack_from(block)  # fmt: skip
    sums = _HEAD.size + extents * _EXTENT.size
    used = sums + 4 * blocks
    if magic != b"SWJOURNL" or revision != 1 or used > BLOCK:
        return None
    if crc32c(block[:8] + bytes(4) + block[12:used]) != crc:
        return None
    found = []
    for i in range(extents):
        kind, _, _, layer, first, count = _EXTENT.unpack_from(block, _HEAD.size + i * _EXTENT.size)
        found.append((kind, layer, first, count))
    if sum(count for kind, _, _, count in found if kind in (DATA, CATALOG)) != blocks:
        return None
    crcs = np.frombuffer(block, "<u4", blocks, sums)
    more = bool(flags & _MORE)
    # Nothing at or behind its own position can have been synced when it was written.
    durable = min(durable, position)
    return Record(crc, more, previous, version, position, durable, tuple(found), crcs)


class _Copy:
    """One replica, read ahead while the chain is followed."""

    def __init__(self, source: Source, replica: Replica, blocks: int) -> None:
        self.source = source
        self._offset = replica.offset
        self._blocks = blocks
        self._first = 0
        self._data = b""

    async def block(self, position: int) -> bytes | None:
        """The block at a position; None if it cannot be read."""
        at = (position - self._first) * BLOCK
        if not 0 <= at < len(self._data):
            count = min(_AHEAD, self._blocks - position % self._blocks)
            data = await self.read(position, count) or await self.read(position, 1)
            self._first, self._data, at = position, data or b"", 0
        return self._data[at : at + BLOCK] or None

    async def read(self, position: int, count: int) -> bytes | None:
        """Blocks that do not go round the end of the ring."""
        start = self._offset + position % self._blocks * BLOCK
        return await self.source.read(start, count * BLOCK)


class Ring:
    """All replicas that are there, those first that have all that was synced."""

    def __init__(self, stream: Stream, fresh: Sequence[int], sources: dict[int, Source]) -> None:
        self.blocks = stream.blocks
        there = [one for one in stream.replicas if one.member in sources]
        there = [one for one in there if not sources[one.member].is_store]
        there.sort(key=lambda one: one.member not in fresh)
        self.copies = [_Copy(sources[one.member], one, stream.blocks) for one in there]
        #: How many of them have all that was synced.
        self.fresh = sum(one.member in fresh for one in there)
        #: What lies before it is on all fresh ones; until it is known, everything is.
        self._durable = POSITIONS

    def settle(self, durable: int) -> None:
        """Tell up to where all was synced: behind it nothing that lacks is damage."""
        self._durable = durable
        for copy in self.copies:
            wrong = copy.source.damage.journal
            wrong -= {position for position in wrong if position >= durable}

    def blame(self, copy: _Copy, positions: Iterable[int]) -> None:
        """Hold it against a replica that blocks on it are not right, if they should be."""
        if copy in self.copies[: self.fresh]:
            wrong = (position for position in positions if position < self._durable)
            note(copy.source.damage.journal, wrong)

    async def payload(self, position: int, crc: int) -> bytes | None:
        """A payload block from whichever replica has it right."""
        for copy in self.copies:
            data = await copy.block(position)
            if data is not None and crc32c(data) == crc:
                return data
            self.blame(copy, [position])
        return None

    async def run(self, position: int, crcs: Sequence[int]) -> list[bytes | None]:
        """Neighbouring blocks, None for those that no replica has right."""
        found: list[bytes | None] = [None] * len(crcs)
        for copy in self.copies:
            lacking = [i for i, block in enumerate(found) if block is None]
            if not lacking:
                break
            for i, data in await self._from(copy, position, lacking):
                if crc32c(data) == crcs[i]:
                    found[i] = data
            self.blame(copy, (position + i for i in lacking if found[i] is None))
        return found

    async def _from(self, copy: _Copy, position: int, wanted: list[int]) -> list[tuple[int, bytes]]:
        """What one replica has at `position` + i, in as few reads as the ring allows."""
        first, last = wanted[0], wanted[-1]
        until_end = self.blocks - (position + first) % self.blocks
        cut = min(last + 1, first + until_end)
        found = []
        for start, stop in ((first, cut), (cut, last + 1)):
            data = await copy.read(position + start, stop - start) if start < stop else None
            if data is not None:
                pieces = {i: (i - start) * BLOCK for i in wanted if start <= i < stop}
                found += [(i, data[at : at + BLOCK]) for i, at in pieces.items()]
        return found


@dataclass(slots=True)
class Chain:
    """How far the journal could be followed. Positions are in blocks."""

    end: int
    version: int
    previous: int
    #: The highest position known to be synced on all replicas, by the chain and what is behind it.
    durable: int
    records: int = 0
    #: Records and blocks of them behind `durable`: acknowledged, maybe not flushed.
    loose: list[tuple[int, int]] = field(default_factory=list)
    #: Why it ends where it ends, if that is no torn tail.
    damage: str = ""


class Follower:
    """Follows the chain of a root and applies it to the map and the catalog."""

    def __init__(self, ring: Ring, stream: Stream, catalog: Catalog) -> None:
        self._ring = ring
        self._stream = stream
        self._catalog = catalog
        self._durable = stream.durable
        self.changes: dict[int, Changes] = {}
        self.chain = Chain(stream.replay, stream.version, stream.previous, stream.durable)

    async def follow(self) -> Chain:
        """Take every whole batch, then find out whether something must have come behind."""
        chain, stream = self.chain, self._stream
        position, version, previous = stream.replay, stream.version, stream.previous
        group: list[tuple[Record, list[dict[str, Any]]]] = []
        while True:
            record = await self._next(position, version, previous)
            if record is None:
                break
            try:
                group.append((record, await self._catalog_changes(record)))
            except Unusable as error:
                chain.damage = f"the record at {position} cannot be applied: {error}"
                break
            position, version, previous = record.end, record.version, record.crc
            self._durable = max(self._durable, record.durable)
            if not record.more:
                self._take(group)
                group = []
        await self._find_end()
        return chain

    async def _next(self, position: int, version: int, previous: int) -> Record | None:
        """The record that continues the chain, with all its payload if that may be torn."""
        copies, fresh = self._ring.copies, self._ring.fresh
        record = None
        for some in (copies[:fresh], copies[fresh:]):
            found = [await self._continued(copy, position, version, previous) for copy in some]
            fitting = [one for one in found if one is not None]
            for copy, one in zip(some, found, strict=True):
                self._ring.blame(copy, [position] if one is None else [])
            if record is None and fitting:
                record = max(fitting, key=lambda one: one.version)
        if record is not None and record.end > self._durable:
            for i, crc in enumerate(record.crcs.tolist()):
                if await self._ring.payload(position + 1 + i, crc) is None:
                    return None
        return record

    async def _continued(
        self, copy: _Copy, position: int, version: int, previous: int
    ) -> Record | None:
        """The record on one replica that continues the chain."""
        block = await copy.block(position)
        record = parse_record(block) if block is not None else None
        if record is None or (record.position, record.previous) != (position, previous):
            return None
        in_the_lap = record.end - self._stream.replay <= self._ring.blocks
        return record if record.version > version and in_the_lap else None

    async def _catalog_changes(self, record: Record) -> list[dict[str, Any]]:
        """The changes of the catalog that a record carries. Raises Unusable."""
        changes = []
        at = 0
        for kind, _, length, count in record.extents:
            if kind not in (DATA, TRIM, ZERO, CATALOG):
                raise Unusable(f"an extent of the unknown kind {kind}")
            if kind == CATALOG:
                parts = []
                for i in range(at, at + count):
                    data = await self._ring.payload(record.position + 1 + i, int(record.crcs[i]))
                    if data is None:
                        raise Unusable("a catalog change in it cannot be read")
                    parts.append(data)
                change = json_object(b"".join(parts)[:length], "a catalog change")
                check_change(change)
                changes.append(change)
            at += count if kind in (DATA, CATALOG) else 0
        return changes

    def _take(self, group: list[tuple[Record, list[dict[str, Any]]]]) -> None:
        for record, changes in group:
            self._apply(record, list(changes))
            self.chain.records += 1
            if record.end > self._stream.durable:
                self.chain.loose.append((record.end, len(record.crcs)))
        last = group[-1][0]
        self.chain.end, self.chain.version, self.chain.previous = last.end, last.version, last.crc

    def _apply(self, record: Record, changes: list[dict[str, Any]]) -> None:
        at = 0
        for kind, layer, block, count in record.extents:
            if kind == CATALOG:
                self._catalog.apply(changes.pop(0))
            elif layer in self._catalog.layers:
                crcs = record.crcs[at : at + count] if kind == DATA else record.crcs[:0]
                extents = self.changes.setdefault(layer, Changes())
                extents.add(kind, block, count, record.position + 1 + at, crcs)
            at += count if kind in (DATA, CATALOG) else 0

    async def _find_end(self) -> None:
        """Say what is known to be synced, and whether some of it is missing."""
        chain = self.chain
        chain.durable = max(self._durable, await self._proof(chain.end))
        chain.loose = [one for one in chain.loose if one[0] > chain.durable]
        self._ring.settle(chain.durable)
        if chain.damage:
            return
        if chain.end < min(chain.durable, self._stream.replay + self._ring.blocks):
            what = f"records from {chain.end} to {chain.durable}"
            chain.damage = f"{what} were synced and cannot be read"
        elif self._ring.fresh and not await self._readable(chain.end):
            chain.damage = f"the journal cannot be read from {chain.end} on"

    async def _readable(self, position: int) -> bool:
        """Whether a replica that has all that was synced can be read there."""
        for copy in self._ring.copies[: self._ring.fresh]:
            if await copy.block(position) is not None:
                return True
        return False

    async def _proof(self, start: int) -> int:
        """The highest `durable` that records of the root's term shortly behind the end claim; 0 if
        there are none. That root says what older ones prove."""
        best = 0
        for copy in self._ring.copies:
            for position in range(start, start + min(_BEYOND, self._ring.blocks)):
                block = await copy.block(position)
                record = parse_record(block) if block is not None else None
                if record is None or record.position != position:
                    continue
                if record.version >> _TERM_SHIFT >= self._stream.term:
                    best = max(best, record.durable)
        return best
