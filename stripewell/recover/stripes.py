"""The stripe table, and blocks out of stripes ("Stripe", "Table page" in `docs/format.md`).

A block is believed if it has the checksum that the map gives for it. If it has not, the same block
of k other shards is read, each verified by the checksums of one stripe header, and decoded; what
comes out has to have the map's checksum again. Shards that belong to different headers are never
mixed. Called by `checkpoint` (pages) and `content` (blocks).
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from pool.erasure import codec
from stripewell.recover.damage import note
from stripewell.recover.root import BLOCK, Pointer, Root, Row, fits
from stripewell.recover.sources import Source

U32s = npt.NDArray[np.uint32]
U64s = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.void]
#: Of every block of a stripe, shard by shard.
Checksums = npt.NDArray[np.uint32]
#: Blocks of a stripe as a table has them, None for wrong ones: shard, first block, blocks.
Judged = list[tuple[int, int, list[bytes | None]]]

#: magic, crc, revision, kind, codec, pool, stripe, shard, k, m, crypto, header, shard blocks, used,
#: digest
_HEAD = struct.Struct("<8sIHBB16sQBBBBHHI16s")
_HEAD_FIXED = 128
_PER_BLOCK = 20
#: What the headers kept for reconstruction may take, in bytes.
_KEPT = 32 << 20
_STRIPE_IDS = np.uint64((1 << 40) - 1)


def row_dtype(width: int) -> np.dtype[np.void]:
    """One row on a table page."""
    return np.dtype(
        [
            ("id", "<u8"),
            ("live", "<u4"),
            ("placement", "<u4"),
            ("kind", "u1"),
            ("data", "u1"),
            ("parity", "u1"),
            ("class", "u1"),
            ("header", "<u2"),
            ("shard", "<u2"),
            ("device", "<u2", (width,)),
            ("slot", "<u4", (width,)),
        ]
    )


@dataclass(slots=True)
class _Headers:
    """What the headers of one stripe say: as a rule the same. `tried` shards were asked."""

    found: list[Checksums] = field(default_factory=list)
    tried: int = 0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def kept(self) -> int:
        return sum(table.nbytes for table in self.found)


class Stripes:
    """All stripes of one root, over the members that are there."""

    def __init__(self, root: Root, pool: str, sources: dict[int, Source]) -> None:
        self._slot_blocks = root.slot_blocks
        self._offsets = {index: member.slots_offset for index, member in root.members.items()}
        self._pool = bytes.fromhex(pool)
        self._sources = sources
        self._anchors = {row.stripe: row for row in root.anchors}
        self._rows: Rows = np.zeros(0, row_dtype(1))
        self._headers: dict[int, _Headers] = {}
        #: How many slots each member has: none if it is not there, or does not answer.
        self._slots = np.zeros(1 << 16, np.int64)
        for index, source in sources.items():
            self.adopt(index, source)

    def load(self, rows: Rows) -> int:
        """Take the table's rows; returns how many of them make no sense and were left out."""
        rows = rows[rows["id"] != 0]
        width = rows["device"].shape[1]
        shapes = np.stack([rows[key] for key in ("data", "parity", "header", "shard")], axis=1)
        good = np.zeros(len(rows), bool)
        for shape in np.unique(shapes, axis=0):
            k, m, header, shard = (int(number) for number in shape)
            if k + m <= width and fits(k, m, header, shard, self._slot_blocks):
                good |= (shapes == shape).all(axis=1)
        kept = rows[good]
        ids, first = np.unique(kept["id"], return_index=True)
        self._rows = kept[first]
        return len(rows) - len(ids)

    def row(self, stripe: int) -> Row | None:
        """Where a stripe is; None if no table names it."""
        if stripe in self._anchors:
            return self._anchors[stripe]
        at = int(np.searchsorted(self._rows["id"], np.uint64(stripe)))
        if at == len(self._rows) or int(self._rows["id"][at]) != stripe:
            return None
        row = self._rows[at]
        k, m = int(row["data"]), int(row["parity"])
        places = zip(row["device"].tolist(), row["slot"].tolist(), strict=True)
        shape = int(row["header"]), int(row["shard"])
        return Row(stripe, k, m, *shape, tuple(places)[: k + m])

    def reachable(self, locations: U64s) -> npt.NDArray[np.bool_]:
        """Which blocks of stripes could be read, by what devices are there: from their own shard,
        or from k others. Whether the bytes are right only reading tells."""
        if not len(self._rows):
            return np.zeros(len(locations), bool)
        for index, source in self._sources.items():
            if source.hangs:
                self._slots[index] = 0
        ids = locations >> np.uint64(22) & _STRIPE_IDS
        at = np.minimum(np.searchsorted(self._rows["id"], ids), len(self._rows) - 1)
        rows = self._rows[at]
        shard = (locations >> np.uint64(16) & np.uint64(63)).astype(np.int64)
        block = locations & np.uint64(0xFFFF)
        valid = (rows["id"] == ids) & (shard < rows["data"]) & (block < rows["shard"])
        numbers = np.arange(rows["device"].shape[1])
        stored = numbers < (rows["data"] + rows["parity"])[:, None]
        there = stored & (rows["slot"] < self._slots[rows["device"]])
        own = there[np.arange(len(rows)), np.minimum(shard, len(numbers) - 1)]
        enough: npt.NDArray[np.bool_] = valid & (own | (there.sum(axis=1) >= rows["data"]))
        return enough

    def adopt(self, index: int, source: Source) -> None:
        """From now on that source is that member."""
        self._sources[index] = source
        room = source.size - self._offsets[index]
        slots = 1 << 32 if source.is_store else room // (self._slot_blocks * BLOCK)
        self._slots[index] = max(slots, 0)

    def some_on(self, index: int, most: int) -> list[tuple[Row, int]]:
        """Stripes that have a shard on a member, and its number: so many of them at most."""
        ids = self._rows["id"][(self._rows["device"] == index).any(axis=1)][:most]
        rows = [*self._anchors.values(), *(self.row(int(number)) for number in ids)]
        found = [
            (row, number)
            for row in rows
            if row is not None
            for number, (device, _) in enumerate(row.places)
            if device == index
        ]
        return found[:most]

    async def has(self, source: Source, row: Row, number: int) -> bool:
        """Whether a source has that shard in the place where the member's is."""
        data = await self._read_from(source, row, number, 0, 1)
        if data is None:
            return False
        magic, *_, pool, stripe, shard, _, _, _, _, _, _, _ = _HEAD.unpack_from(data)
        return (magic, pool, stripe, shard) == (b"SWSTRIPE", self._pool, row.stripe, number)

    async def blocks(
        self, stripe: int, shard: int, first: int, crcs: Sequence[int]
    ) -> list[bytes | None]:
        """Blocks of a data shard, one for each checksum; None for those that are lost."""
        row = self.row(stripe)
        if row is None or shard >= row.data or first + len(crcs) > row.shard_blocks:
            return [None] * len(crcs)
        data = await self._read(row, shard, row.header_blocks + first, len(crcs))
        found = _right_ones(data, crcs)
        self._blame(row, [(shard, first, found)])
        if None in found:
            await self._reconstruct(row, shard, first, crcs, found)
        return found

    async def page(self, pointer: Pointer) -> bytes | None:
        """The bytes that a pointer means; None if they are lost, or cannot be."""
        row = self.row(pointer.stripe)
        if row is None or not pointer.length:
            return None
        start, end = pointer.offset, pointer.offset + pointer.length
        if end > row.data * row.shard_blocks * BLOCK:
            return None
        numbers = range(start // BLOCK, (end - 1) // BLOCK + 1)

        def cut(blocks: Sequence[bytes | None]) -> bytes | None:
            whole = b"".join(block for block in blocks if block is not None)
            data = whole[start % BLOCK : start % BLOCK + pointer.length]
            right = None not in blocks and crc32c(data) == pointer.crc
            return data if right else None

        data = cut(await self._as_they_are(row, numbers))
        if data is not None:
            return data
        judged: Judged = []
        async for table in self._tables(row):
            judged = []
            data = cut([await self._by_header(row, number, table, judged) for number in numbers])
            if data is not None:
                break
        # A table is right if it leads to the page, and plausible if no header says otherwise.
        if data is not None or len(self._kept(row.stripe).found) == 1:
            self._blame(row, judged)
        return data

    async def _as_they_are(self, row: Row, numbers: range) -> list[bytes | None]:
        """Data blocks of a stripe, unverified: read shard by shard."""
        found: list[bytes | None] = []
        at = numbers.start
        while at < numbers.stop:
            shard, first = divmod(at, row.shard_blocks)
            count = min(numbers.stop - at, row.shard_blocks - first)
            data = await self._read(row, shard, row.header_blocks + first, count)
            found += _split(data, count)
            at += count
        return found

    async def _by_header(
        self, row: Row, number: int, table: Checksums, judged: Judged
    ) -> bytes | None:
        """One data block that has the checksum of a stripe header, decoded if need be."""
        shard, block = divmod(number, row.shard_blocks)
        crcs = [int(table[shard, block])]
        found = _right_ones(await self._read(row, shard, row.header_blocks + block, 1), crcs)
        judged.append((shard, block, list(found)))
        if found[0] is None:
            judged += await self._decode(row, shard, block, crcs, found, table)
        return found[0]

    async def _reconstruct(
        self, row: Row, shard: int, first: int, crcs: Sequence[int], found: list[bytes | None]
    ) -> None:
        """Fill in what is missing, with whichever header leads to it."""
        async for table in self._tables(row):
            judged = await self._decode(row, shard, first, crcs, found, table)
            if table[shard, first : first + len(crcs)].tolist() == list(crcs):
                self._blame(row, judged)
            if None not in found:
                return

    async def _decode(
        self,
        row: Row,
        shard: int,
        first: int,
        crcs: Sequence[int],
        found: list[bytes | None],
        table: Checksums,
    ) -> Judged:
        """Fill in what k other shards give that a header vouches for and `crcs` confirm; returns
        what was read of them."""
        judged: Judged = []
        wanted = [i for i, data in enumerate(found) if data is None]
        shares: dict[int, dict[int, bytes]] = {i: {} for i in wanted}
        others = [number for number in range(len(row.places)) if number != shard]
        while others and (lack := row.data - min(map(len, shares.values()))) > 0:
            asked, others = others[:lack], others[lack:]
            start, count = row.header_blocks + first, len(crcs)
            reads = [self._read(row, number, start, count) for number in asked]
            for number, data in zip(asked, await asyncio.gather(*reads), strict=True):
                expected = table[number, first : first + count].tolist()
                right = _right_ones(data, expected)
                judged.append((number, first, right))
                for i, block in enumerate(right):
                    if i in shares and block is not None:
                        shares[i][number] = block
        code = codec(row.data, row.parity)
        for i in wanted:
            if len(shares[i]) >= row.data:
                out = bytearray(BLOCK)
                code.reconstruct(shares[i], [shard], [out])
                if crc32c(out) == crcs[i]:
                    found[i] = bytes(out)
        return judged

    async def _tables(self, row: Row) -> AsyncIterator[Checksums]:
        """The different tables of checksums that a stripe's headers hold, read as needed."""
        headers = self._kept(row.stripe)
        at = 0
        while True:
            async with headers.lock:
                while at == len(headers.found) and headers.tried < len(row.places):
                    table = await self._header(row, headers.tried)
                    headers.tried += 1
                    if table is not None and not any(
                        np.array_equal(table, one) for one in headers.found
                    ):
                        headers.found.append(table)
            if at == len(headers.found):
                return
            yield headers.found[at]
            at += 1

    def _kept(self, stripe: int) -> _Headers:
        if stripe not in self._headers:
            if sum(headers.kept for headers in self._headers.values()) > _KEPT:
                self._headers.clear()
            self._headers[stripe] = _Headers()
        return self._headers[stripe]

    async def _header(self, row: Row, number: int) -> Checksums | None:
        """The checksums in one shard's header, if that is whole and the one that is meant."""
        data = await self._read(row, number, 0, row.header_blocks)
        table = self._header_table(row, number, data) if data is not None else None
        source = self._sources.get(row.places[number][0])
        if table is None and source is not None:
            note(source.damage.headers, [_location(row, number)])
        return table

    def _header_table(self, row: Row, number: int, data: bytes) -> Checksums | None:
        (magic, crc, revision, _, code, pool, stripe, shard, k, m, crypto, header, blocks, _,
         digest) = _HEAD.unpack_from(data)  # fmt: skip
        meant = (row.stripe, number, row.data, row.parity, row.header_blocks, row.shard_blocks)
        if (magic, revision, code, pool, crypto) != (b"SWSTRIPE", 1, 1, self._pool, 0):
            return None
        if (stripe, shard, k, m, header, blocks) != meant:
            return None
        if crc32c(data[:8] + bytes(4) + data[12:]) != crc:
            return None
        at = _HEAD_FIXED + _PER_BLOCK * k * blocks
        end = at + 4 * (k + m) * blocks
        identity = self._pool + stripe.to_bytes(8, "little") + data[_HEAD_FIXED:end]
        if hashlib.blake2b(identity, digest_size=16).digest() != digest:
            return None
        return np.frombuffer(data[at:end], "<u4").reshape(k + m, blocks)

    def _blame(self, row: Row, judged: Judged) -> None:
        """Hold it against the devices that are there that blocks on them are not right."""
        for number, first, found in judged:
            source = self._sources.get(row.places[number][0])
            if source is not None:
                at = _location(row, number) + first
                note(source.damage.blocks, (at + i for i, b in enumerate(found) if b is None))

    async def _read(self, row: Row, number: int, first: int, count: int) -> bytes | None:
        """Blocks of the slot of a shard, header included; None if they cannot be read."""
        source = self._sources.get(row.places[number][0])
        return None if source is None else await self._read_from(source, row, number, first, count)

    async def _read_from(
        self, source: Source, row: Row, number: int, first: int, count: int
    ) -> bytes | None:
        index, slot = row.places[number]
        if source.is_store:
            name = f"shard-{row.stripe:010x}-{number:02x}"
            return await source.get(name, first * BLOCK, count * BLOCK)
        start = self._offsets[index] + (slot * self._slot_blocks + first) * BLOCK
        return await source.read(start, count * BLOCK)


def _location(row: Row, number: int) -> int:
    """A number for a shard, to which the block in it may be added."""
    return row.stripe << 22 | number << 16


def _split(data: bytes | None, count: int) -> list[bytes | None]:
    if data is None:
        return [None] * count
    return [data[i * BLOCK : (i + 1) * BLOCK] for i in range(count)]


def _right_ones(data: bytes | None, crcs: Sequence[int]) -> list[bytes | None]:
    """Blocks with the right checksum, None for the others."""
    blocks = _split(data, len(crcs))
    return [
        block if block is not None and crc32c(block) == crc else None
        for block, crc in zip(blocks, crcs, strict=True)
    ]
