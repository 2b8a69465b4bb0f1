"""A volume: a block device over one layer's map. Satisfies `nbd_server.export.Export` by shape.

Way of a read: map lookup, then per run of neighbouring locations one read into the reply, verified
by the map's checksums. Way of a write: the journal's ring, one append for the batch (`commit`), the
map.

The `try_` methods and `commit` are one synchronous step between two turns of the event loop.
Whatever would have to wait (a paged-out leaf, a cold block, a full journal) makes them say so; the
awaitable methods wait for exactly that and try again. So there are no locks: a read-modify-write
that waited for the old block looks again whether it still is the block's content.
"""

from __future__ import annotations

import asyncio
import errno
from array import array
from collections.abc import Callable, Iterator, Sequence

from crc32c import crc32c

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_BLOCKS, LEAF_MASK, LEAF_SHIFT, LayerMap
from pool.catalog import VolumeEntry
from pool.checksum import verify
from pool.engine import Engine
from pool.errors import DataLost, PoolStopped
from pool.failpoints import reached
from pool.format.location import (
    HOLE,
    POSITION_MASK,
    SHARD_SHIFT,
    TAG_JOURNAL,
    TAG_SHIFT,
    TAG_STRIPE,
    ZERO,
    stripe_of,
)
from pool.format.record import KIND_TRIM, KIND_ZERO

EXTENT_HOLE = 1
EXTENT_ZERO = 2

#: Leaves that one tombstone may cover beyond holes, so that no step is long.
PIECE_LEAVES = 256
#: How often a block that cannot be read is looked up again (R14).
LOOKUPS = 4
#: The most that is brought into memory for one request: it is a hint only.
CACHE_BYTES = 64 << 20
BLOCK_SHIFT = 12
_OFFSET = BLOCK_SIZE - 1

#: (location, first block index of the request, blocks, checksums)
Run = tuple[int, int, int, Sequence[int]]


class Volume:
    """See the module. Offsets and lengths in bytes."""

    def __init__(self, engine: Engine, entry: VolumeEntry) -> None:
        self._engine = engine
        self._state = engine.state
        self._entry = entry
        self._layer = entry.layer
        self._map: LayerMap = engine.state.maps[entry.layer]
        self._piece = engine.piece_bytes
        self.closed = False
        self._contexts: dict[str, Callable[[int], int]] = {
            "base:allocation": _allocation,
            "qemu:allocation-depth": _depth,
            "stripewell:redundancy": self._redundancy,
        }

    @property
    def name(self) -> str:
        return self._entry.name

    @property
    def description(self) -> str:
        return f"stripewell volume {self._state.name}/{self._entry.name}"

    @property
    def size(self) -> int:
        return self._entry.size

    @property
    def read_only(self) -> bool:
        return self._engine.read_only

    # -- reading -----------------------------------------------------------------------------

    def try_read(self, offset: int, into: memoryview) -> bool:
        """Fill `into` without waiting and return True if every block was at hand and right."""
        found = self.try_read_sparse(offset, into)
        if found is True or found is False:
            return found
        for at, count in found:
            into[at : at + count] = bytes(count)
        return True

    def try_read_sparse(self, offset: int, into: memoryview) -> bool | Sequence[tuple[int, int]]:
        """As `try_read`, but blocks that read as zeros may be left as they are: then where in
        `into` they are, as (first byte, bytes)."""
        length = len(into)
        if offset & _OFFSET or length & _OFFSET:
            return self._try_read_unaligned(offset, into)
        block = offset >> BLOCK_SHIFT
        if length == BLOCK_SIZE:
            leaf = self._map.leaves.get(block >> LEAF_SHIFT)
            if leaf is None:
                if block >> LEAF_SHIFT in self._map.pointers:
                    return False
                return _ONE_BLOCK
            location, crc = leaf.get(block & LEAF_MASK)
            if location in _ZERO_LOCATIONS:
                return _ONE_BLOCK
            return self._engine.reader.try_run(location, into) and crc32c(into) == crc
        if self._map.missing(block, length >> BLOCK_SHIFT):
            return False
        try_run = self._engine.reader.try_run
        zeros: list[tuple[int, int]] = []
        for location, at, count, crcs in self._runs(block, length >> BLOCK_SHIFT):
            if location in _ZERO_LOCATIONS:
                zeros.append((at << BLOCK_SHIFT, count << BLOCK_SHIFT))
                continue
            part = into[at << BLOCK_SHIFT : (at + count) << BLOCK_SHIFT]
            if not try_run(location, part) or verify(part, crcs) != -1:
                return False
        return zeros or True

    def _try_read_unaligned(self, offset: int, into: memoryview) -> bool:
        start = offset & ~_OFFSET
        end = (offset + len(into) + _OFFSET) & ~_OFFSET
        whole = memoryview(bytearray(end - start))
        if not self.try_read(start, whole):
            return False
        into[:] = whole[offset - start : offset - start + len(into)]
        return True

    def _runs(self, block: int, count: int) -> Iterator[Run]:
        """Runs of neighbouring locations under a block range. Its leaves are resident."""
        at = 0
        while at < count:
            start = (block + at) & LEAF_MASK
            now = min(count - at, LEAF_BLOCKS - start)
            leaf = self._map.leaves.get((block + at) >> LEAF_SHIFT)
            if leaf is None:
                yield HOLE, at, now, ()
            elif leaf.index is None:
                locations, crcs = (
                    leaf.locations[start : start + now],
                    leaf.crcs[start : start + now],
                )
                yield from _split(locations, crcs, at)
            else:
                pairs = [leaf.get(start + i) for i in range(now)]
                yield from _split(
                    array("Q", [p[0] for p in pairs]), array("I", [p[1] for p in pairs]), at
                )
            at += now

    async def read(self, offset: int, into: memoryview) -> None:
        """Fill `into`. Raises OSError EIO if a block is lost."""
        start = offset & ~_OFFSET
        end = (offset + len(into) + _OFFSET) & ~_OFFSET
        if (start, end - start) != (offset, len(into)):
            whole = memoryview(bytearray(end - start))
            await self._read_blocks(start >> BLOCK_SHIFT, whole)
            into[:] = whole[offset - start : offset - start + len(into)]
        else:
            await self._read_blocks(start >> BLOCK_SHIFT, into)

    async def _read_blocks(self, block: int, into: memoryview) -> None:
        count = len(into) >> BLOCK_SHIFT
        for first in range(0, count, LEAF_BLOCKS):
            now = min(LEAF_BLOCKS, count - first)
            part = into[first << BLOCK_SHIFT : (first + now) << BLOCK_SHIFT]
            if not self.try_read((block + first) << BLOCK_SHIFT, part):
                await self._read_part(block + first, part)

    async def _read_part(self, block: int, into: memoryview) -> None:
        count = len(into) >> BLOCK_SHIFT
        await self._resident(block, count)
        for location, at, now, crcs in list(self._runs(block, count)):
            part = into[at << BLOCK_SHIFT : (at + now) << BLOCK_SHIFT]
            if location in _ZERO_LOCATIONS:
                part[:] = bytes(len(part))
            elif not self._at_hand(location, part, crcs):
                await self._read_run(block + at, location, part, crcs)

    def _at_hand(self, location: int, part: memoryview, crcs: Sequence[int]) -> bool:
        """Read a run without waiting. Its stripe may have gone since the map was looked up."""
        try:
            return self._engine.reader.try_run(location, part) and verify(part, crcs) == -1
        except KeyError:
            return False

    async def _read_run(
        self, block: int, location: int, part: memoryview, crcs: Sequence[int]
    ) -> None:
        """Read a run the slow way; if that fails, believe it only if the map has not moved
        (R14)."""
        for _ in range(LOOKUPS):
            try:
                part[:] = await self._engine.reader.run(location, crcs)
                return
            except (DataLost, KeyError) as error:
                await self._resident(block, len(crcs))
                runs = list(self._runs(block, len(crcs)))
                if len(runs) == 1 and runs[0][0] == location and isinstance(error, DataLost):
                    if len(crcs) > 1:
                        # So that the error says which block it is.
                        for i, crc in enumerate(crcs):
                            one = part[i << BLOCK_SHIFT : (i + 1) << BLOCK_SHIFT]
                            await self._read_run(block + i, location + i, one, [crc])
                        return
                    self._state.counters["lost_reads"] += 1
                    error.offset = block << BLOCK_SHIFT
                    raise
                if len(runs) != 1 or runs[0][0] in (HOLE, ZERO):
                    await self._read_part(block, part)
                    return
                location, crcs = runs[0][0], runs[0][3]
        raise DataLost(f"volume {self.name}: block {block} cannot be read")

    async def _resident(self, block: int, count: int) -> None:
        """Bring in the leaves under a range; they stay at least until the next await."""
        while missing := self._map.missing(block, count):
            await self._engine.loader.ensure((self._layer, number) for number in missing)
            if self.closed:
                self._check_open()

    # -- writing -----------------------------------------------------------------------------

    def try_write(self, offset: int, data: memoryview) -> bool:
        """Stage a write, or return False if it would have to wait. Raises PoolFull, PoolStopped."""
        self._check_open()
        length = len(data)
        if offset & _OFFSET or length & _OFFSET or length > self._piece:
            return length <= self._piece and self._try_write_unaligned(offset, data)
        return self._stage(offset >> BLOCK_SHIFT, data)

    def _stage(self, block: int, data: memoryview) -> bool:
        """Stage whole blocks."""
        state, journal = self._state, self._engine.journal
        count = len(data) >> BLOCK_SHIFT
        leaf_map = self._map
        if count == 1:
            number = block >> LEAF_SHIFT
            if number not in leaf_map.leaves and number in leaf_map.pointers:
                return False
        elif leaf_map.missing(block, count):
            return False
        if not journal.room(count + self._engine.headroom):
            self._engine.journal_full()
            return False
        if state.used + state.reserved + count > state.limit:
            holes = self._holes(block, count)
            if holes:
                state.reserve(holes)
        else:
            # More than may be needed; `commit` returns it all and the map counts what was.
            state.reserved += count
        journal.stage_data(self._layer, block, data)
        return True

    def _holes(self, block: int, count: int) -> int:
        """Blocks of a range that are not mapped. Its leaves are resident."""
        return sum(now for location, _, now, _ in self._runs(block, count) if location == HOLE)

    def _try_write_unaligned(self, offset: int, data: memoryview) -> bool:
        """Complete the first and last block from what is there, if that is at hand."""
        start = offset & ~_OFFSET
        end = (offset + len(data) + _OFFSET) & ~_OFFSET
        whole = memoryview(bytearray(end - start))
        edges = {start, end - BLOCK_SIZE}
        for edge in edges:
            inside = offset <= edge and edge + BLOCK_SIZE <= offset + len(data)
            if not inside and not self._peek(edge, whole[edge - start : edge - start + BLOCK_SIZE]):
                return False
        whole[offset - start : offset - start + len(data)] = data
        return self._stage(start >> BLOCK_SHIFT, whole)

    def _peek(self, offset: int, into: memoryview) -> bool:
        """A block as the next write will find it. What is staged and not committed is not in the
        map: commit it first, or two writes to one block in a batch would undo each other."""
        if self._engine.staged:
            self._engine.commit()
        return self.try_read(offset, into)

    def commit(self) -> None:
        """Append what is staged and make it visible. Raises PoolStopped."""
        self._engine.commit()

    async def write(self, offset: int, data: memoryview) -> None:
        """Stage and commit, piece by piece, waiting for whatever each piece needs."""
        while data:
            # Pieces end at block boundaries, or every one of them would need a merge.
            now = self._piece - (offset & _OFFSET)
            await self._write_piece(offset, data[:now])
            offset += now
            data = data[now:]

    async def _write_piece(self, offset: int, data: memoryview) -> None:
        first = offset >> BLOCK_SHIFT
        last = (offset + len(data) - 1) >> BLOCK_SHIFT
        while True:
            await self._resident(first, last - first + 1)
            if self.try_write(offset, data):
                self._engine.commit()
                return
            needed = last - first + 1 + self._engine.headroom
            if not self._engine.journal.room(needed):
                await self._engine.wait_room(needed)
                continue
            # The edges are cold: once read, they are in the page cache.
            for edge in {first, last}:
                await self._warm(edge)
            if not self.try_write(offset, data):
                await self._write_merged(offset, data)
                return
            self._engine.commit()
            return

    async def _warm(self, block: int) -> bytes:
        into = bytearray(BLOCK_SIZE)
        await self._read_blocks(block, memoryview(into))
        return bytes(into)

    async def _write_merged(self, offset: int, data: memoryview) -> None:
        """Read-modify-write where no read is ever at hand without waiting: read the edges, then
        stage if they are still what they were."""
        start = offset & ~_OFFSET
        end = (offset + len(data) + _OFFSET) & ~_OFFSET
        first, last = start >> BLOCK_SHIFT, (end - 1) >> BLOCK_SHIFT
        while True:
            await self._resident(first, last - first + 1)
            before = self._locations(first, last)
            whole = memoryview(bytearray(end - start))
            whole[:BLOCK_SIZE] = await self._warm(first)
            whole[-BLOCK_SIZE:] = await self._warm(last)
            await self._resident(first, last - first + 1)
            self._check_open()
            if self._engine.staged:
                self._engine.commit()
            if self._locations(first, last) != before:
                self._state.counters["merge_retries"] += 1
                continue
            whole[offset - start : offset - start + len(data)] = data
            if self._stage(first, whole):
                self._engine.commit()
                return
            await self._engine.wait_room(last - first + 1 + self._engine.headroom)

    def _locations(self, first: int, last: int) -> list[int]:
        runs = [next(self._runs(block, 1)) for block in (first, last)]
        return [run[0] for run in runs]

    # -- trimming and zeroing ----------------------------------------------------------------

    async def trim(self, offset: int, length: int) -> None:
        """Unmap the whole blocks inside the range."""
        first = (offset + _OFFSET) >> BLOCK_SHIFT
        end = (offset + length) >> BLOCK_SHIFT
        await self._range(KIND_TRIM, first, end)

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool, fast: bool = False
    ) -> None:
        """Make the range read as zeros; with `no_hole` it keeps (or gets) space. Raises ENOTSUP if
        it was to be `fast` and has no whole block: that takes a write like any other."""
        first = (offset + _OFFSET) >> BLOCK_SHIFT
        end = (offset + length) >> BLOCK_SHIFT
        if fast and first >= end:
            raise OSError(errno.ENOTSUP, "less than a block cannot be zeroed faster than written")
        if first > end:
            await self.write(offset, memoryview(bytes(length)))
            return
        head = (first << BLOCK_SHIFT) - offset
        tail = offset + length - (end << BLOCK_SHIFT)
        if head:
            await self.write(offset, memoryview(bytes(head)))
        if tail:
            await self.write(end << BLOCK_SHIFT, memoryview(bytes(tail)))
        await self._range(KIND_ZERO if no_hole else KIND_TRIM, first, end)

    async def _range(self, kind: int, first: int, end: int) -> None:
        """Journal a tombstone or zeros over blocks [first, end), in pieces of bounded cost."""
        while first < end:
            present = self._map.present(first, end - first)
            stop = end
            if kind == KIND_ZERO:
                stop = min(end, first + PIECE_LEAVES * LEAF_BLOCKS)
            elif len(present) > PIECE_LEAVES:
                stop = min(end, present[PIECE_LEAVES] << LEAF_SHIFT)
            await self._range_piece(kind, first, stop)
            reached("range_after_piece_before_next")
            first = stop

    async def _range_piece(self, kind: int, first: int, stop: int) -> None:
        count = stop - first
        while True:
            await self._resident(first, count)
            self._check_open()
            if self._engine.staged:
                self._engine.commit()
            if kind == KIND_TRIM and not self._map.maps_any(first, count):
                # Nothing to remember: a full journal has no room for what changes nothing (P5).
                return
            if not self._engine.journal.room(self._engine.last_room):
                await self._engine.wait_room(self._engine.last_room)
                continue
            if kind == KIND_ZERO:
                state = self._state
                if state.used + state.reserved + count > state.limit:
                    holes = self._holes(first, count)
                    if holes:
                        state.reserve(holes)
            self._engine.journal.stage_range(kind, self._layer, first, count)
            reached("range_after_stage_before_commit")
            self._engine.commit()
            return

    # -- the rest ----------------------------------------------------------------------------

    async def flush(self) -> None:
        """Return when all that was committed before is durable. Raises PoolStopped."""
        if not self._engine.read_only:
            await self._engine.flush()

    async def cache(self, offset: int, length: int) -> None:
        """Bring the range into memory: map leaves, and what the page cache lacks."""
        scratch = memoryview(bytearray(min(length, self._piece)))
        start, end = offset & ~_OFFSET, min(offset + length, offset + CACHE_BYTES)
        while start < end:
            now = min(len(scratch), end - start)
            if not self.try_read(start, scratch[:now]):
                await self.read(start, scratch[:now])
            start += now
            await asyncio.sleep(0)

    @property
    def contexts(self) -> Sequence[str]:
        """What `extents` can tell besides base:allocation."""
        return tuple(self._contexts)[1:]

    def _redundancy(self, location: int) -> int:
        """How many more devices may be lost before what is there is."""
        state, tag = self._state, location >> TAG_SHIFT
        if tag == TAG_JOURNAL:
            return max(0, len(state.journal.sources(location & POSITION_MASK)) - 1)
        if tag != TAG_STRIPE:
            return state.parity
        row = state.row(stripe_of(location))
        there = [d for d, _ in row.places if d in state.members and state.members[d].present]
        return max(0, len(there) - row.shape.data)

    async def extents(
        self, offset: int, length: int, limit: int, context: str = "base:allocation"
    ) -> list[tuple[int, int]]:
        """(bytes, flags) from `offset`: at most `limit` of them, and never beyond the range."""
        describe = self._contexts[context]
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end:
            block = at >> BLOCK_SHIFT
            count = self._span(block, ((end - 1) >> BLOCK_SHIFT) + 1)
            await self._resident(block, count)
            for location, first, now, _ in self._runs(block, count):
                stop = min((block + first + now) << BLOCK_SHIFT, end)
                flags = describe(location)
                if found and found[-1][1] == flags:
                    found[-1] = (found[-1][0] + stop - at, flags)
                elif len(found) == limit:
                    return found
                else:
                    found.append((stop - at, flags))
                at = stop
        return found

    def _span(self, block: int, end: int) -> int:
        """Blocks from `block` to look at next: a stretch without any leaf, or the rest of one
        leaf."""
        present = self._map.present(block, end - block)
        if not present:
            return end - block
        first = present[0] << LEAF_SHIFT
        if first > block:
            return min(first, end) - block
        return min(end, first + LEAF_BLOCKS) - block

    def _check_open(self) -> None:
        if self.closed:
            raise OSError(errno.ESHUTDOWN, f"volume {self.name} was deleted")
        if self._state.stopped:
            raise PoolStopped(self._state.stopped)


def _split(locations: array[int], crcs: array[int], at: int) -> Iterator[Run]:
    """Cut a leaf's entries into runs of neighbouring locations."""
    start, count = 0, len(locations)
    while start < count:
        location = locations[start]
        stop = start + 1
        tag = location >> TAG_SHIFT
        if tag in (TAG_JOURNAL, TAG_STRIPE):
            expected = location + 1
            shard = location >> SHARD_SHIFT
            while stop < count and locations[stop] == expected and (
                tag == TAG_JOURNAL or expected >> SHARD_SHIFT == shard
            ):  # fmt: skip
                expected += 1
                stop += 1
        else:
            while stop < count and locations[stop] == location:
                stop += 1
        yield location, at + start, stop - start, crcs[start:stop]
        start = stop


def _allocation(location: int) -> int:
    return {HOLE: EXTENT_HOLE | EXTENT_ZERO, ZERO: EXTENT_ZERO}.get(location, 0)


def _depth(location: int) -> int:
    """As QEMU counts: 0 where nothing is, 1 in the volume itself."""
    return int(location != HOLE)


#: A read of one block that reads as zeros.
_ONE_BLOCK = ((0, BLOCK_SIZE),)
_ZERO_LOCATIONS = (HOLE, ZERO)
