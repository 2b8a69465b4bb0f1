"""Reads blocks and pages by location: verified, reconstructed, repaired (P4, R13, R14).

`try_run` is the fast path: no wait, no repair. `run` is the slow path that always gives right bytes
or raises DataLost. A caller that gets DataLost looks the map up again before it believes it, since
the block may have moved meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from crc32c import crc32c

from backends.base import BLOCK_SIZE, Device, DeviceError
from pool.checksum import block_crcs, verify
from pool.erasure import codec
from pool.errors import DataLost, FormatError
from pool.failpoints import reached
from pool.format import stripe as stripe_format
from pool.format.location import (
    BLOCK_MASK,
    POSITION_MASK,
    SHARD_MASK,
    SHARD_SHIFT,
    STRIPE_MASK,
    STRIPE_SHIFT,
    TAG_JOURNAL,
    TAG_SHIFT,
    stripe_of,
)
from pool.format.page import Page, Pointer, checksum, decode
from pool.format.stripe import Header
from pool.member import Member
from pool.overdue import WRITE_SECONDS, answer
from pool.state import State
from pool.table import NOWHERE, Stripe

HEADER_CACHE = 128
#: A read that takes longer is given up, and parity is asked instead.
OVERDUE_SECONDS = 10.0


class Reader:
    """Reads what `State` locates."""

    def __init__(self, state: State, *, repair: bool = True) -> None:
        self._state = state
        #: Whether right bytes are written over wrong ones; not by who only looks.
        self._repairs = repair
        self._headers: OrderedDict[int, Header] = OrderedDict()
        #: Told of members that do not answer a repair.
        self.on_failure: Callable[[int, DeviceError], None] = lambda index, error: None

    @property
    def _may_repair(self) -> bool:
        return self._repairs and self._state.writable

    # -- fast path ---------------------------------------------------------------------------

    def try_run(self, location: int, into: memoryview) -> bool:
        """Fill `into` with consecutive blocks from `location` without waiting. Not verified."""
        state = self._state
        if location >> TAG_SHIFT == TAG_JOURNAL:
            journal = state.journal
            position = location & POSITION_MASK
            found = journal.peek(position, len(into) // BLOCK_SIZE)
            if found is not None:
                into[:] = found
                return True
            for replica in journal.sources(position):
                return self._try_journal(replica.offset, position, replica.device, into)
            return False
        stripe = location >> STRIPE_SHIFT & STRIPE_MASK
        places = state.located.get(stripe) or state.locate(stripe)
        fast = places[location >> SHARD_SHIFT & SHARD_MASK]
        if fast is None:
            return False
        try:
            return fast[0](fast[1] + (location & BLOCK_MASK) * BLOCK_SIZE, into)
        except DeviceError:
            return False

    def _try_journal(self, zone: int, position: int, device: object, into: memoryview) -> bool:
        size = self._state.journal_blocks
        at = position % size
        if at + len(into) // BLOCK_SIZE > size:
            return False
        try:
            return device.try_read(zone + at * BLOCK_SIZE, into)  # type: ignore[attr-defined,no-any-return]
        except DeviceError:
            return False

    # -- slow path ---------------------------------------------------------------------------

    async def run(self, location: int, crcs: Sequence[int]) -> bytes:
        """Consecutive blocks from `location`, verified against `crcs`. Raises DataLost, KeyError
        (the stripe is gone: look up again)."""
        with self._state.gate.inside():
            if location >> TAG_SHIFT == TAG_JOURNAL:
                return await self._journal_run(location & POSITION_MASK, crcs)
            row = self._state.row(stripe_of(location))
            shard, block = location >> SHARD_SHIFT & SHARD_MASK, location & BLOCK_MASK
            data = await self._shard_blocks(row, shard, block, len(crcs))
            bad = -2 if data is None else verify(memoryview(data), crcs)
            if data is not None and bad == -1:
                return data
            return await self._reconstruct(row, shard, block, crcs)

    async def _journal_run(self, position: int, crcs: Sequence[int]) -> bytes:
        """Each block from whichever replica has it right."""
        journal = self._state.journal
        out = bytearray(len(crcs) * BLOCK_SIZE)
        for i, crc in enumerate(crcs):
            found = journal.peek(position + i)
            if found is not None and crc32c(found) == crc:
                data = bytes(found)
            else:
                data = await self._journal_block(position + i, crc)
            out[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] = data
        return bytes(out)

    async def _journal_block(self, position: int, crc: int) -> bytes:
        journal = self._state.journal
        bad: list[tuple[Member, int]] = []
        for replica in journal.sources(position):
            offset = journal.offset(replica, position)
            member = self._state.members[replica.member]
            try:
                async with asyncio.timeout(OVERDUE_SECONDS):
                    data = await replica.device.read(offset, BLOCK_SIZE)
            except (DeviceError, TimeoutError):
                self._accuse(member, "read_errors")
                continue
            if crc32c(data) == crc:
                for guilty, where in bad:
                    await self._repair_journal(guilty, where, position, data)
                return data
            bad.append((member, offset))
        raise DataLost(f"journal block {position} is unreadable on all replicas")

    async def _repair_journal(
        self, member: Member, offset: int, position: int, data: bytes
    ) -> None:
        """Rewrite a bad journal block; the pin keeps its position from being reused (R14)."""
        self._accuse(member, "bad_blocks")
        if position < self._state.journal.tail or not member.present or not self._may_repair:
            return
        assert isinstance(member.backend, Device)
        if not await self.put_right(member, member.backend.write(offset, [data])):
            return
        member.repaired += 1
        self._state.counters["repaired_blocks"] += 1

    async def _shard_blocks(self, row: Stripe, shard: int, block: int, count: int) -> bytes | None:
        """Blocks of one shard as they are, or None if its member cannot give them."""
        device, slot = row.places[shard]
        member = self._state.members.get(device) if device != NOWHERE else None
        if member is None or not member.present or member.shards is None:
            return None
        offset = row.shape.header_bytes + block * BLOCK_SIZE
        try:
            async with asyncio.timeout(OVERDUE_SECONDS):
                return await member.shards.read(row.id, shard, slot, offset, count * BLOCK_SIZE)
        except (DeviceError, TimeoutError):
            self._accuse(member, "read_errors")
            return None

    async def _reconstruct(self, row: Stripe, shard: int, block: int, crcs: Sequence[int]) -> bytes:
        """Blocks of a shard from k others, each verified by the stripe header's checksums."""
        header = await self.header(row)
        expected = self._shard_crcs(header, shard, block, len(crcs))
        if list(crcs) != expected:
            raise DataLost(f"stripe {row.id} is not the one that the map means")
        good, bad = await self._collect(row, header, shard, block, len(crcs))
        if shard not in good and len(good) < row.shape.data:
            if len(crcs) > 1:
                # The others may be bad in different places: go block by block.
                parts = [
                    await self._reconstruct(row, shard, block + i, [crc])
                    for i, crc in enumerate(crcs)
                ]
                return b"".join(parts)
            raise DataLost(
                f"stripe {row.id}: {len(good)} of {row.shape.data} needed shards are readable"
            )
        for number in dict.fromkeys((shard, *bad)):
            if number not in good:
                good[number] = self._decode(row, good, number)
        if verify(memoryview(good[shard]), crcs) != -1:
            raise DataLost(f"stripe {row.id}: reconstructed data fails its checksum")
        self._state.counters["reconstructed_blocks"] += len(crcs)
        for number in bad:
            await self._repair(row, number, block, good[number])
        return good[shard]

    async def _collect(
        self, row: Stripe, header: Header, shard: int, block: int, count: int
    ) -> tuple[dict[int, bytes], list[int]]:
        """The same blocks of as many shards as decoding needs (only `shard` itself if that is
        right), and the numbers of those found wrong on the way."""
        good: dict[int, bytes] = {}
        bad: list[int] = []
        for number in [shard, *(n for n in range(row.shape.shards) if n != shard)]:
            data = await self._shard_blocks(row, number, block, count)
            if data is None:
                continue
            if block_crcs(memoryview(data)) == self._shard_crcs(header, number, block, count):
                good[number] = data
                if len(good) == row.shape.data or number == shard:
                    break
            else:
                bad.append(number)
        return good, bad

    def _decode(self, row: Stripe, good: dict[int, bytes], number: int) -> bytes:
        out = bytearray(len(next(iter(good.values()))))
        shape = row.shape
        codec(shape.data, shape.parity).reconstruct(good, [number], [memoryview(out)])
        return bytes(out)

    async def _repair(self, row: Stripe, shard: int, block: int, data: bytes) -> None:
        """Write right bytes over wrong ones. The caller is inside the gate and the row is still
        this stripe's, so the slot cannot have been given to another (R14)."""
        device, slot = row.places[shard]
        member = self._state.members[device]
        self._accuse(member, "bad_blocks")
        if not member.present or member.shards is None or not self._may_repair:
            return
        try:
            if self._state.row(row.id).places[shard] != (device, slot):
                return
        except KeyError:
            return
        offset = row.shape.header_bytes + block * BLOCK_SIZE
        reached("repair_after_decode_before_write")
        repair = member.shards.repair(row.id, shard, slot, offset, data)
        if not await self.put_right(member, repair):
            return
        reached("repair_after_write_before_count")
        member.repaired += 1
        self._state.counters["repaired_blocks"] += len(data) // BLOCK_SIZE

    async def put_right(self, member: Member, write: Coroutine[Any, Any, None]) -> bool:
        """Wait for a repair; whether it was done. A member that does not answer is reported: it
        must not hold the pin, and what it may still write must not meet a new owner (R14)."""
        try:
            await answer(write, WRITE_SECONDS, member.url)
        except DeviceError as error:
            if error.errno == errno.ETIMEDOUT:
                self.on_failure(member.index, error)
            return False
        return True

    def _accuse(self, member: Member, what: str) -> None:
        member.errors += 1
        self._state.counters[what] += 1

    @staticmethod
    def _shard_crcs(header: Header, shard: int, block: int, count: int) -> list[int]:
        start = shard * header.shape.shard_blocks + block
        crcs: list[int] = header.contents.crcs[start : start + count].tolist()
        return crcs

    # -- headers and pages -------------------------------------------------------------------

    async def header(self, row: Stripe) -> Header:
        """The header of a stripe from any of its shards. Raises DataLost."""
        cached = self._headers.get(row.id)
        if cached is not None:
            self._headers.move_to_end(row.id)
            return cached
        for shard, (device, slot) in enumerate(row.places):
            member = self._state.members.get(device) if device != NOWHERE else None
            if member is None or not member.present or member.shards is None:
                continue
            try:
                async with asyncio.timeout(OVERDUE_SECONDS):
                    data = await member.shards.read(row.id, shard, slot, 0, row.shape.header_bytes)
                header = stripe_format.decode(data)
            except (DeviceError, TimeoutError):
                self._accuse(member, "read_errors")
                continue
            except FormatError:
                self._accuse(member, "bad_headers")
                continue
            if header.belongs(self._state.uuid, row.id, shard, row.shape):
                self._headers[row.id] = header
                if len(self._headers) > HEADER_CACHE:
                    self._headers.popitem(last=False)
                return header
            self._accuse(member, "bad_headers")
        raise DataLost(f"stripe {row.id} has no readable header")

    async def shard(self, row: Stripe, shard: int) -> tuple[bytes, bytes]:
        """The header and the blocks that a shard must have, from the other shards. Raises
        DataLost."""
        header = await self.header(row)
        count = row.shape.shard_blocks
        data = await self._reconstruct(row, shard, 0, self._shard_crcs(header, shard, 0, count))
        headers = stripe_format.encode(
            pool=header.pool, stripe=row.id, kind=header.kind, shape=row.shape, used=header.used,
            contents=header.contents,
        )  # fmt: skip
        return headers[shard], data

    async def page(self, pointer: Pointer, kind: int) -> Page:
        """A checkpoint page. Raises DataLost when it cannot be had: never a hole (R21)."""
        with self._state.gate.inside():
            try:
                row = self._state.row(pointer.stripe)
            except KeyError:
                raise DataLost(f"page of unknown stripe {pointer.stripe}") from None
            if not pointer.inside(row.shape.blocks * BLOCK_SIZE):
                raise DataLost(f"a page is said to be where stripe {pointer.stripe} has none")
            data = await self._stripe_bytes(row, pointer.offset, pointer.length, trusted=True)
            if data is None or checksum(data) != pointer.crc:
                data = await self._stripe_bytes(row, pointer.offset, pointer.length, trusted=False)
        assert data is not None
        if checksum(data) != pointer.crc:
            raise DataLost(f"a page in stripe {pointer.stripe} fails its checksum")
        try:
            return decode(data, kind)
        except FormatError as error:
            raise DataLost(f"a page in stripe {pointer.stripe}: {error}") from None

    async def _stripe_bytes(
        self, row: Stripe, offset: int, length: int, *, trusted: bool
    ) -> bytes | None:
        """Bytes of a stripe's data; if not `trusted`, every block is verified by the header."""
        first, last = offset // BLOCK_SIZE, (offset + length - 1) // BLOCK_SIZE
        parts = []
        per_shard = row.shape.shard_blocks
        block = first
        while block <= last:
            shard, within = divmod(block, per_shard)
            count = min(last - block + 1, per_shard - within)
            if trusted:
                data = await self._quick(row, shard, within, count)
                if data is None:
                    return None
            else:
                header = await self.header(row)
                crcs = self._shard_crcs(header, shard, within, count)
                data = await self._reconstruct(row, shard, within, crcs)
            parts.append(data)
            block += count
        start = offset - first * BLOCK_SIZE
        return b"".join(parts)[start : start + length]

    async def _quick(self, row: Stripe, shard: int, block: int, count: int) -> bytes | None:
        """Blocks of a shard from the page cache if possible. The table may have let go of the
        stripe since its row was looked up; the pin keeps what is there."""
        try:
            fast = self._state.locate(row.id)[shard]
        except KeyError:
            fast = None
        if fast is not None:
            into = bytearray(count * BLOCK_SIZE)
            with suppress(DeviceError):
                if fast[0](fast[1] + block * BLOCK_SIZE, memoryview(into)):
                    return bytes(into)
        return await self._shard_blocks(row, shard, block, count)
