"""Opening a pool: committed checkpoint plus journal (R2, R16, R20).

Everything that is not in the committed checkpoint is in the journal behind its replay position,
because journal space and slots are released only by a committed root (R21). So recovery reads no
stripe headers at all: stripes written since the last root are simply not there, their blocks are
still where they were moved from. That is stronger than R16 and R20 ask, and is why opening does not
grow with the pool (`docs/decisions/0002-recovery.md`).

The chain is read from whichever replica continues it. What may not be on all replicas yet (behind
`durable`) is verified block by block over all of them, and written to all before the pool serves
(`pool.replicas`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from crc32c import crc32c

from backends.base import BLOCK_SIZE, Device, DeviceError
from pool.apply import apply
from pool.blockmap import LEAF_SHIFT, LayerMap
from pool.catalog import Catalog
from pool.checkpoint import DIRECTORY_MAX, decode_directory
from pool.engine import apply_change
from pool.errors import DataLost, FormatError, PoolError
from pool.format import page, record, top
from pool.format.fields import parse
from pool.format.page import Page, Pointer
from pool.format.record import KIND_CATALOG, Extent, Record
from pool.format.top import Top
from pool.journal import Committed as CommittedExtent
from pool.loader import Loader
from pool.reader import Reader
from pool.rows import all_rows, bad_rows, limits
from pool.state import Committed, State
from pool.table import META, StripeTable

#: A replica that takes longer to answer a read is left out.
OVERDUE_SECONDS = 10.0
#: Blocks read at a time while following the chain.
READ_AHEAD = 256
#: Records applied between loading leaves.
APPLY_BATCH = 512
#: How far behind a broken chain to look for records that prove that something is missing.
LOOK_BEHIND = 2048


@dataclass(frozen=True, slots=True)
class Source:
    """A journal replica to read from: `blocks` blocks at `offset` of a device."""

    member: int
    device: Device
    offset: int
    blocks: int

    def at(self, position: int) -> int:
        return self.offset + position % self.blocks * BLOCK_SIZE


@dataclass(slots=True)
class Chain:
    """What was found in the journal behind the replay position."""

    records: list[Record] = field(default_factory=list)
    end: int = 0
    version: int = 0
    previous: int = 0
    durable: int = 0
    #: Verified bytes from `durable` (or the replay position) to `end`, by position.
    tail: dict[int, bytes] = field(default_factory=dict)
    #: Payload of catalog extents, by position.
    catalog: dict[int, bytes] = field(default_factory=dict)


class Window:
    """Buffered reading of one replica."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._start = 0
        self._data = b""
        self._hangs = False

    async def block(self, position: int) -> bytes | None:
        """One block, or None if it cannot be read."""
        at = (position - self._start) * BLOCK_SIZE
        if not 0 <= at < len(self._data):
            source = self.source
            count = min(READ_AHEAD, source.blocks - position % source.blocks)
            data = await self._read(position, count) or await self._read(position, 1)
            self._data = data or b""
            if data is None:
                return None
            self._start, at = position, 0
        return self._data[at : at + BLOCK_SIZE]

    async def _read(self, position: int, count: int) -> bytes | None:
        """Blocks, or None. A replica that once did not answer is not asked again."""
        if self._hangs:
            return None
        source = self.source
        try:
            async with asyncio.timeout(OVERDUE_SECONDS):
                return await source.device.read(source.at(position), count * BLOCK_SIZE)
        except TimeoutError:
            self._hangs = True
        except DeviceError:
            pass
        return None


async def follow(sources: Sequence[Source], committed: Committed, term: int) -> Chain:
    """Follow the chain of records from the replay position of a root of that term. Raises PoolError
    if a record is missing that was known to be synced on all replicas: that is damage, not a torn
    tail (R2)."""
    windows = [Window(source) for source in sources]
    replay, version, previous = committed.replay, committed.version, committed.previous
    chain = Chain(end=replay, version=version, previous=previous, durable=committed.durable)
    group: list[tuple[Record, dict[int, bytes]]] = []
    position = replay
    while windows and position - replay < sources[0].blocks:
        found = await _next(windows, position, chain.version, chain.previous, chain.durable)
        if found is None:
            break
        header, blocks = found
        group.append((header, blocks))
        chain.version, chain.previous = header.version, header.crc
        chain.durable = max(chain.durable, header.durable)
        position = header.end
        if not header.flags & record.FLAG_MORE:
            _accept(chain, group)
            group = []
    if group:
        # The end of a batch is missing: none of it counts.
        first = group[0][0]
        chain.version = chain.records[-1].version if chain.records else version
        chain.previous = first.previous
    known = max(chain.durable, await _proof(windows, chain.end, term))
    if chain.end < min(known, replay + sources[0].blocks if sources else known):
        raise PoolError(
            f"the journal is damaged: records from {chain.end} to {known} were synced and cannot "
            "be read from any device that is present: bring back the missing devices"
        )
    chain.tail = {at: data for at, data in chain.tail.items() if at >= chain.durable}
    return chain


def ending_mark(before: Sequence[Record], chain: Chain) -> Record | None:
    """A term start record that ends the journal; `before` are the records up to the replay
    position. It says nothing any more, and the next term's takes its place, so that opening again
    and again does not fill the journal."""
    records = chain.records or before
    last = records[-1] if records else None
    return last if last is not None and last.flags & record.FLAG_TERM_START else None


def at_term(committed: Committed, chain: Chain, mark: Record | None) -> Committed:
    """What the root that begins a term says of the journal. How far it is durable, because from now
    on records of older terms behind the end of the chain prove nothing: they were given up. And, if
    the mark whose place is taken ends where the chain would have begun, that it begins at the place
    of that mark, with a newer record."""
    end = chain.end if mark is None else mark.position
    committed = replace(committed, durable=min(chain.durable, end))
    if mark is None or mark.position >= committed.replay:
        return committed
    return replace(committed, replay=mark.position, version=mark.version, previous=mark.previous)


async def backlog(sources: Sequence[Source], tail: int, replay: int) -> list[Record]:
    """The records between the tail and the replay position: the checkpoint has their effect, but
    live blocks are still among them. Raises PoolError if one cannot be read."""
    windows = [Window(source) for source in sources]
    records: list[Record] = []
    position = tail
    while position < replay:
        for window in windows:
            block = await window.block(position)
            try:
                header = record.decode(block) if block is not None else None
            except FormatError:
                continue
            if header is not None and header.position == position:
                records.append(header)
                position = header.end
                break
        else:
            raise PoolError(
                f"the journal is damaged: the record at {position} cannot be read from any device "
                "that is present: bring back the missing devices"
            )
    return records


def _accept(chain: Chain, group: list[tuple[Record, dict[int, bytes]]]) -> None:
    for header, blocks in group:
        chain.records.append(header)
        chain.tail.update(blocks)
        position = header.position + 1
        for extent in header.extents:
            if extent.kind == KIND_CATALOG:
                parts = [blocks[position + i] for i in range(extent.count)]
                chain.catalog[position] = b"".join(parts)[: extent.block]
            position += extent.payload
    chain.end = group[-1][0].end


async def _next(
    windows: list[Window], position: int, version: int, previous: int, durable: int
) -> tuple[Record, dict[int, bytes]] | None:
    """The record at a position and its verified blocks, from whichever replicas have them; the
    newest, since a term may have put its start record in the place of an older one's."""
    best: tuple[Record, bytes] | None = None
    for window in windows:
        block = await window.block(position)
        if block is None:
            continue
        try:
            header = record.decode(block)
        except FormatError:
            continue
        continues = header.position == position and header.previous == previous
        if continues and header.version > (best[0].version if best else version):
            best = header, block
    if best is None:
        return None
    header, block = best
    blocks = {position: block}
    needs_all = header.end > durable
    for i, crc in enumerate(header.crcs):
        if needs_all or _is_catalog(header, i):
            data = await _verified(windows, position + 1 + i, crc)
            if data is None:
                return None
            blocks[position + 1 + i] = data
    return header, blocks


def _is_catalog(header: Record, index: int) -> bool:
    at = 0
    for extent in header.extents:
        if at <= index < at + extent.payload:
            return extent.kind == KIND_CATALOG
        at += extent.payload
    return False


async def _verified(windows: list[Window], position: int, crc: int) -> bytes | None:
    for window in windows:
        data = await window.block(position)
        if data is not None and crc32c(data) == crc:
            return data
    return None


async def _proof(windows: list[Window], end: int, term: int) -> int:
    """The highest `durable` claimed by records of this term shortly behind a broken chain; 0 if
    there are none. What older ones prove was in the root that began the term."""
    best = 0
    for window in windows:
        for position in range(end, end + min(LOOK_BEHIND, window.source.blocks)):
            block = await window.block(position)
            if block is None or block[:8] != record.MAGIC:
                continue
            try:
                header = record.decode(block)
            except FormatError:
                continue
            if header.position == position and header.version >> record.TERM_SHIFT >= term:
                best = max(best, header.durable)
    return best


async def load_checkpoint(state: State, reader: Reader, root: dict[str, Any]) -> None:
    """Fill the state from the committed checkpoint. Raises DataLost, PoolError."""
    if not state.committed.top:
        return
    try:
        parts = [
            (await _page(reader, pointer, page.KIND_TOP, 0, number)).body
            for number, pointer in enumerate(state.committed.top)
        ]
        found = top.decode(b"".join(parts), width=state.table.width, directory_max=DIRECTORY_MAX)
        bodies = {
            number: (await _page(reader, pointer, page.KIND_TABLE, 0, number)).body
            for number, pointer in found.table.items()
        }
        _take_table(state, found, StripeTable.restore(found.width, bodies))
        state.catalog = Catalog.from_json(found.catalog)
        state.maps = {layer: LayerMap(layer) for layer in state.catalog.layers}
        state.used = found.used
        for (layer, chunk), pointer in found.directories.items():
            if layer not in state.maps:
                raise FormatError(f"there is a directory of layer {layer}, and no such layer")
            directory = await _page(reader, pointer, page.KIND_DIRECTORY, layer, chunk)
            leaves = decode_directory(chunk, directory.body)
            _check_pointers(state, [pointer, *leaves.values()])
            state.maps[layer].pointers.update(leaves)
            state.directories[layer, chunk] = pointer
    except FormatError as error:
        raise DataLost(
            f"the checkpoint is damaged: {error}; bring back missing devices, or restore a backup"
        ) from None


async def _page(reader: Reader, pointer: Pointer, kind: int, layer: int, number: int) -> Page:
    """The page that is meant. Raises DataLost, FormatError."""
    found = await reader.page(pointer, kind)
    if (found.layer, found.number) != (layer, number):
        raise FormatError(f"a page in stripe {pointer.stripe} is not the one meant")
    return found


def _take_table(state: State, found: Top, table: StripeTable) -> None:
    """Use the table, if there can be such rows. Raises FormatError."""
    state.table, state.table_pages = table, found.table
    for stripe, text in bad_rows(all_rows(state), limits(state, stored=True)):
        raise FormatError(f"stripe {stripe} {text}")
    state.forget_places()


def _check_pointers(state: State, pointers: Iterable[Pointer]) -> None:
    """Pages below the top page are in meta stripes of the table. Raises FormatError."""
    for pointer in pointers:
        at = state.table.rows.get(pointer.stripe)
        if at is None or state.table.raw(at)["kind"] != META:
            raise FormatError(f"a page is said to be in stripe {pointer.stripe}, which has none")


async def replay(state: State, loader: Loader, chain: Chain) -> None:
    """Apply the chain's records to the map, loading leaves as they are needed. Raises DataLost."""
    for start in range(0, len(chain.records), APPLY_BATCH):
        batch = chain.records[start : start + APPLY_BATCH]
        for header in batch:
            # A record is applied as a whole, after everything before it.
            _check_record(state, header)
            while await loader.ensure(_leaves(state, header)):
                pass
            apply(state, _committed(header, state.catalog), _Changes(state, chain))
        state.settle()


def refill(state: State, records: Sequence[Record]) -> None:
    """Queue the extents of backlog records for destage, before the replay adds its own."""
    for header in records:
        position = header.position + 1
        for extent in header.extents:
            if extent.kind == record.KIND_DATA:
                state.fifo.append(
                    (position, extent.layer, extent.block, extent.count, header.version)
                )
            position += extent.payload


def _leaves(state: State, header: Record) -> set[tuple[int, int]]:
    needed: set[tuple[int, int]] = set()
    for extent in header.extents:
        layer_map = state.maps.get(extent.layer)
        if layer_map is not None and extent.count:
            numbers = layer_map.missing(extent.block, extent.count)
            needed.update((extent.layer, number) for number in numbers)
    return needed


def _committed(header: Record, catalog: Catalog) -> Iterator[CommittedExtent]:
    """The extents of a record as they are applied, one by one: the catalog changes under them. Not
    those of layers without a volume, which are being taken apart or gone. Raises PoolError."""
    position, used = header.position + 1, 0
    for extent in header.extents:
        blocks = catalog.blocks(extent.layer)
        problem = _problem(extent, blocks)
        if problem:
            raise _hostile(header, problem)
        crcs = list(header.crcs[used : used + extent.payload])
        if extent.kind == KIND_CATALOG or blocks is not None:
            yield CommittedExtent(
                extent.kind, extent.layer, extent.block, extent.count, position, header.version,
                crcs,
            )  # fmt: skip
        position += extent.payload
        used += extent.payload


def _problem(extent: Extent, blocks: int | None) -> str:
    """Why an extent of a layer with so many blocks cannot be; empty if it can."""
    if extent.kind not in record.KINDS:
        return f"has an extent of an unknown kind, {extent.kind}"
    if extent.kind == KIND_CATALOG:
        fits = 0 < extent.block <= extent.count * BLOCK_SIZE
        return "" if fits else f"has a catalog change of {extent.block} bytes"
    if not extent.count or (blocks is not None and extent.block + extent.count > blocks):
        return f"changes blocks that layer {extent.layer} does not have"
    return ""


def _check_record(state: State, header: Record) -> None:
    """Raise PoolError for a record that no writer of this pool has made."""
    if header.version >> record.TERM_SHIFT > state.term:
        raise _hostile(header, "is of a term that never began")
    if header.end - state.committed.tail > state.journal_blocks:
        raise _hostile(header, "ends in the next lap")


def _hostile(header: Record, problem: str) -> PoolError:
    return PoolError(
        f"the journal is damaged: the record at {header.position} {problem}: leave out the devices "
        "that have it, or restore a backup"
    )


class _Changes:
    """Applies catalog extents from the bytes that the chain kept."""

    def __init__(self, state: State, chain: Chain) -> None:
        self._state = state
        self._chain = chain

    def __call__(self, extent: CommittedExtent) -> None:
        try:
            change = parse(self._chain.catalog[extent.position], "catalog change")
            apply_change(self._state, change)
        except FormatError as error:
            raise PoolError(
                f"the journal is damaged: at {extent.position} it holds a change that does not fit "
                f"({error}): leave out the devices that have it, or restore a backup"
            ) from None


async def preload(state: State, loader: Loader, chain: Chain) -> None:
    """Load every leaf that the replay will need, in the order of their places on the devices."""
    needed: set[tuple[int, int]] = set()
    for header in chain.records:
        for extent in header.extents:
            if extent.kind == record.KIND_DATA:
                first = extent.block >> LEAF_SHIFT
                last = (extent.block + extent.count - 1) >> LEAF_SHIFT
                needed.update((extent.layer, number) for number in range(first, last + 1))
    await loader.ensure(needed)
