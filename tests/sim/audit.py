"""What must hold of a pool whatever its clients did: watched as it writes, counted as it rests.

`Tap` sees every write to a device and judges it by the published format alone: no version, stripe
id or position is used twice for different things (R1, R15), movers copy what was journaled and
nothing else (R12, R13), and no byte that the last committed root needs is overwritten (R21).

`check_accounts` compares every count that the engine keeps with a full scan of map and table.
`contents` is the digest of what an opened pool means, for comparing two openings.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable

from backends.base import BLOCK_SIZE
from pool import Pool
from pool.blockmap import LEAF_SHIFT
from pool.errors import FormatError
from pool.format import record
from pool.format import stripe as stripe_format
from pool.format.geometry import Layout
from pool.format.location import TAG_SHIFT, TAG_STRIPE, stripe_of
from pool.format.record import KIND_DATA, Record
from pool.shards import OBJECT
from pool.state import State
from pool.table import DATA, NOWHERE

from .oracle import Violation

#: (device, slot) of a shard.
Place = tuple[int, int]
#: How often it is tried to have all of the map in memory between two steps of maintenance.
LOOKS = 20


class Tap:
    """Judges the writes to all devices of one pool, over all its lives."""

    def __init__(self) -> None:
        self.layouts: dict[str, tuple[int, Layout]] = {}
        #: The state of the open pool, as far as the last committed root goes; None while opening.
        self.state: State | None = None
        self._versions: dict[int, tuple[int, int]] = {}
        #: Position → checksums of the records that end there.
        self._ends: dict[int, set[int]] = {}
        self._written: dict[tuple[int, int, int], int] = {}
        self._stripes: dict[int, bytes] = {}
        self._needed: tuple[object, dict[Place, int]] = (None, {})
        #: Rows of the last committed table, to see when there is a new one.
        self.committed_rows: Callable[[], object] = lambda: None
        self._found: list[str] = []

    def judge(self) -> None:
        """Raise Violation if a write so far was wrong. (The engine must not catch it.)"""
        if self._found:
            raise Violation(self._found[0])

    def _blame(self, text: str) -> None:
        self._found.append(text)

    def write(self, name: str, offset: int, data: bytes) -> None:
        """A device is about to be written."""
        index, layout = self.layouts[name]
        if layout.journal_offset <= offset < layout.slots_offset:
            self._journal(layout, offset, data)
        elif layout.slots_offset <= offset < layout.slots_offset + layout.slots * layout.slot_bytes:
            slot, within = divmod(offset - layout.slots_offset, layout.slot_bytes)
            if within == 0:
                self._shard((index, slot), data)

    def put(self, name: str, object_name: str, data: bytes) -> None:
        """An object is about to be stored."""
        if OBJECT.fullmatch(object_name):
            self._header(data)

    # -- the journal -----------------------------------------------------------------------------

    def _journal(self, layout: Layout, offset: int, data: bytes) -> None:
        first = (offset - layout.journal_offset) // BLOCK_SIZE
        blocks = layout.journal_bytes // BLOCK_SIZE
        for at in range(0, len(data), BLOCK_SIZE):
            if data[at : at + 8] != record.MAGIC:
                continue
            try:
                found = record.decode(data[at : at + BLOCK_SIZE])
            except FormatError:
                continue
            if found.position % blocks == first + at // BLOCK_SIZE:
                self._record(found, blocks)

    def _record(self, found: Record, blocks: int) -> None:
        known = self._versions.setdefault(found.version, (found.crc, found.position))
        if known != (found.crc, found.position):
            self._blame(f"R1: version {found.version:#x} was used for two records")
        if self.state is not None and found.end - self.state.committed.tail > blocks:
            self._blame(
                f"R21: the record at {found.position} overwrites journal that the committed root "
                f"needs from {self.state.committed.tail} on"
            )
        self._chain(found)
        at = 0
        for extent in found.extents:
            if extent.kind == KIND_DATA:
                for i in range(extent.count):
                    key = extent.layer, extent.block + i, found.version
                    self._written[key] = found.crcs[at + i]
            at += extent.payload

    def _chain(self, found: Record) -> None:
        """The record before this one must be the one that it names (R2)."""
        self._ends.setdefault(found.end, set()).add(found.crc)
        before = self._ends.get(found.position)
        if before is not None and found.previous not in before:
            self._blame(f"R2: the record at {found.position} does not name the one before it")

    # -- stripes ---------------------------------------------------------------------------------

    def _shard(self, place: Place, data: bytes) -> None:
        stripe = self._header(data)
        owner = self._places().get(place)
        if stripe is not None and owner is not None and owner != stripe:
            self._blame(
                f"R21: stripe {stripe} overwrites device {place[0]}, slot {place[1]}, where the "
                f"committed root has stripe {owner}"
            )

    def _header(self, data: bytes) -> int | None:
        """Judge the header of a shard by what was journaled; its stripe id, or None for one that is
        not whole: a repair may put back what rots beside the block that it mends."""
        if data[:8] != stripe_format.MAGIC:
            return None
        stripe, digest = int.from_bytes(data[32:40], "little"), data[52:68]
        known = self._stripes.get(stripe)
        if known == digest:
            return stripe
        try:
            header = stripe_format.decode(data)
        except FormatError:
            return None
        if known is None:
            self._stripes[stripe] = digest
            self._blocks(header)
        else:
            self._blame(f"R1: stripe id {stripe} was used for two stripes")
        return stripe

    def _blocks(self, header: stripe_format.Header) -> None:
        if header.kind != stripe_format.KIND_DATA:
            return
        table = header.contents
        rows = zip(
            table.layers.tolist(), table.blocks.tolist(), table.versions.tolist(),
            table.crcs[: header.used].tolist(), strict=False,
        )  # fmt: skip
        for layer, block, version, crc in list(rows)[: header.used]:
            if self._written.get((layer, block, version)) != crc:
                self._blame(
                    f"R12, R13: stripe {header.stripe} has block {block} of layer {layer} with "
                    f"version {version:#x} and checksum {crc:#x}, which no record has"
                )

    def _places(self) -> dict[Place, int]:
        """Place → stripe, as the last committed root and its table have it."""
        state = self.state
        if state is None:
            return {}
        rows = self.committed_rows()
        if self._needed[0] is not rows or rows is None:
            needed = {} if rows is None else _places_of_rows(rows)
            for anchor in state.committed.anchors.values():
                needed.update(dict.fromkeys(anchor.places, anchor.id))
            self._needed = (rows, needed)
        return self._needed[1]


def _places_of_rows(rows: object) -> dict[Place, int]:
    places: dict[Place, int] = {}
    for row in rows[rows["id"] != 0]:  # type: ignore[index]
        for device, slot in zip(row["device"].tolist(), row["slot"].tolist(), strict=True):
            if device != NOWHERE:
                places[device, slot] = int(row["id"])
    return places


async def check_accounts(pool: Pool, *, at_rest: bool = False) -> None:
    """Every slot of a stripe is used, and by that stripe alone (R21); every count equals a scan.

    `at_rest`: nothing is under way and a checkpoint was just written, so that nothing may be held
    that is not needed. Raises Violation."""
    state = pool.engine.state
    if not at_rest:
        await _load_all(pool)
        _count(state, at_rest=False)
        return
    for _ in range(LOOKS):
        await _load_all(pool)
        if await pool.engine.at_rest(lambda: _resident(state) and _count(state, at_rest=True)):
            return
    raise Violation(f"leaves are paged out again and again, {LOOKS} times")


def _count(state: State, *, at_rest: bool) -> bool:
    """Compare all counts with a scan. No await: atomic."""
    _check_slots(state, at_rest=at_rest)
    state.settle()
    counts, mapped = _scan(state)
    if mapped != state.used:
        raise Violation(f"the pool counts {state.used} mapped blocks, a scan finds {mapped}")
    for row in state.table.stripes():
        # Pages of a checkpoint under way are counted before anything points to them.
        settled = at_rest or row.kind == DATA
        if settled and counts[row.id] != state.table.live_of(row.id):
            raise Violation(
                f"stripe {row.id} counts {state.table.live_of(row.id)} live, a scan finds "
                f"{counts[row.id]}"
            )
    if at_rest:
        _check_rest(state)
    return True


def _resident(state: State) -> bool:
    return all(number in found.leaves for found in state.maps.values() for number in found.pointers)


async def _load_all(pool: Pool) -> None:
    """Bring all of the map into memory; it stays there until the next await."""
    state, ensure = pool.engine.state, pool.engine.loader.ensure
    while await ensure([(layer, n) for layer, found in state.maps.items() for n in found.pointers]):
        pass


def _check_slots(state: State, *, at_rest: bool) -> None:
    rows = [*state.table.stripes(), *state.committed.anchors.values()]
    places = [place for row in rows for place in row.places if place[0] != NOWHERE]
    if len(set(places)) != len(places):
        raise Violation("two stripes claim the same slot")
    for index, member in state.members.items():
        claimed = {slot for device, slot in places if device == index}
        if not claimed <= member.slots._used:
            raise Violation(f"device {index}: slots of live stripes are free")
        if at_rest and claimed != member.slots._used:
            leaked = sorted(member.slots._used - claimed)
            raise Violation(f"device {index}: slots {leaked[:5]} are used by nothing")


def _scan(state: State) -> tuple[Counter[int], int]:
    """Live blocks (or pages) of every stripe, and mapped blocks in all, counted from the map."""
    counts = Counter[int]()
    mapped = 0
    owners: set[int] = set()
    for layer_map in state.maps.values():
        counts.update(pointer.stripe for pointer in layer_map.pointers.values())
        for leaf in layer_map.leaves.values():
            mapped += leaf.count
            for _, location, _ in leaf.mapped():
                if location >> TAG_SHIFT in (1, TAG_STRIPE):
                    if location in owners:
                        raise Violation(f"R17: two map entries own location {location:#x}")
                    owners.add(location)
                if location >> TAG_SHIFT == TAG_STRIPE:
                    counts[stripe_of(location)] += 1
    counts.update(pointer.stripe for pointer in state.directories.values())
    return counts, mapped


def _check_rest(state: State) -> None:
    if dead := state.table.dead():
        raise Violation(f"stripes {dead[:5]} hold nothing and were not released")
    if state.gate.waiting or state.trash:
        raise Violation("something waits to be released though nobody reads")
    dropped = [layer.id for layer in state.catalog.layers.values() if layer.dropped]
    if dropped or state.maps.keys() != state.catalog.layers.keys():
        raise Violation(f"layers {dropped} of deleted volumes are still there")


async def check_stores(pool: Pool) -> None:
    """Every object on a store belongs to a stripe, once orphans and trash are gone."""
    state = pool.engine.state
    rows = [*state.table.stripes(), *state.committed.anchors.values()]
    for member in state.active():
        if member.shards is not None and member.shards.must_delete:
            needed = {
                (row.id, shard)
                for row in rows
                for shard, (device, _) in enumerate(row.places)
                if device == member.index
            }
            extra = set(await member.shards.stored()) - needed
            if extra:
                raise Violation(f"device {member.index}: objects {sorted(extra)[:5]} are garbage")


async def contents(pool: Pool) -> str:
    """A digest of what the pool means: catalog, and which block is mapped with which checksum."""
    state = pool.engine.state
    digest = hashlib.sha256(json.dumps(state.catalog.to_json(), sort_keys=True).encode())
    await _load_all(pool)
    for layer in sorted(state.maps):
        layer_map = state.maps[layer]
        for number in sorted(layer_map.leaves):
            for block, location, crc in layer_map.leaves[number].mapped():
                at = (number << LEAF_SHIFT) + block
                digest.update(f"{layer} {at} {location >> TAG_SHIFT == 3} {crc}\n".encode())
    return digest.hexdigest()
