"""Journal replicas at opening: whose word counts, and making all of them whole (R6, R24).

A replica is *behind* if it may lack what was synced: its device does not carry the chosen root, or
the root says so, or the device has forgotten the last record that was known to be synced on all.
It still helps to follow the chain (P1: an answered write may be in its page cache alone), but only
what the others don't have; it is written anew from the tail, and until that is synced every root
says that it is behind. Otherwise a crash would make its gaps look like the journal's.

All that is copied is verified by the records that describe it. Called by `pool.pool`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from crc32c import crc32c

from backends.base import BLOCK_SIZE
from pool.blockmap import LEAF_MASK, LEAF_SHIFT
from pool.errors import FormatError
from pool.format import record
from pool.format.location import JOURNAL
from pool.format.record import Record
from pool.loader import Loader
from pool.overdue import WRITE_SECONDS, answer
from pool.recovery import READ_AHEAD, Chain, Source, Window
from pool.state import State


class Contents:
    """What the blocks of the journal must be, by the headers of consecutive records."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self._starts = [header.position for header in records]

    def right(self, position: int, data: bytes) -> bool:
        """Whether these are the bytes of the block at a position that the records cover."""
        header = self._records[bisect_right(self._starts, position) - 1]
        if position > header.position:
            return bool(crc32c(data) == header.crcs[position - header.position - 1])
        try:
            return record.decode(data).crc == header.crc
        except FormatError:
            return False


async def forgetful(sources: Iterable[Source], records: Iterable[Record], durable: int) -> set[int]:
    """Members that lack the last record below `durable`, although they once had it synced: an old
    copy of a device may carry the newest root."""
    synced = [header for header in records if header.end <= durable]
    if not synced:
        return set()
    last = synced[-1]
    contents = Contents([last])
    found = set()
    for source in sources:
        data = await Window(source).block(last.position)
        if data is None or not contents.right(last.position, data):
            found.add(source.member)
    return found


class Copy:
    """Copies the recovered journal to replicas: each block from the first source that has it right.

    `records` are all from the tail on."""

    def __init__(
        self, sources: Sequence[Source], chain: Chain, records: Sequence[Record], tail: int
    ) -> None:
        self.members = {source.member for source in sources}
        self.end = chain.end
        #: Positions that no source has right. They are copied as zeros, which the map's checksums
        #: refuse.
        self.lost: set[int] = set()
        self._windows = [Window(source) for source in sources]
        self._chain = chain
        self._contents = Contents(records)
        self._tail = tail

    async def to(self, target: Source, *, whole: bool) -> None:
        """Make a replica hold the journal, synced (R6). One that is `whole` up to `durable` is
        written from there on, any other from the tail. Raises DeviceError."""
        device = target.device
        position = min(self._chain.durable, self.end) if whole else self._tail
        while position < self.end:
            count = min(READ_AHEAD, self.end - position, target.blocks - position % target.blocks)
            data = b"".join([await self._block(position + i) for i in range(count)])
            await answer(device.write(target.at(position), [data]), WRITE_SECONDS, device.url)
            position += count
        await answer(device.sync(), WRITE_SECONDS, device.url)

    async def _block(self, position: int) -> bytes:
        known = self._chain.tail.get(position)
        if known is not None:
            return known
        for window in self._windows:
            data = await window.block(position)
            if data is not None and self._contents.right(position, data):
                return data
        self.lost.add(position)
        return bytes(BLOCK_SIZE)


async def mapped(
    state: State, loader: Loader, records: Iterable[Record], positions: set[int]
) -> int:
    """How many of the journal blocks at `positions` hold data of a volume. Raises DataLost."""
    count = 0
    for header in records:
        position = header.position + 1
        for extent in header.extents:
            if extent.kind == record.KIND_DATA:
                for at in positions.intersection(range(position, position + extent.count)):
                    block = extent.block + at - position
                    count += await _maps(state, loader, extent.layer, block, JOURNAL | at)
            position += extent.payload
    return count


async def _maps(state: State, loader: Loader, layer: int, block: int, location: int) -> bool:
    number = block >> LEAF_SHIFT
    while await loader.ensure([(layer, number)]):
        pass
    found = state.maps.get(layer)
    leaf = None if found is None else found.leaves.get(number)
    return leaf is not None and leaf.get(block & LEAF_MASK)[0] == location
