"""Finds out where map and stripe headers disagree, once the sums have shown that they do.

A second look at the map collects all entries in the stripes under suspicion; each is compared with
the header. Entries that have moved on meanwhile are not seen again, and are no fault.
"""

from __future__ import annotations

from collections import Counter

from pool.blockmap import LEAF_MASK, LEAF_SHIFT
from pool.check.claims import U32, U64
from pool.check.maps import MapCheck
from pool.check.pages import Pages, owner
from pool.check.report import Report
from pool.entries import split
from pool.errors import DataLost
from pool.format.location import BLOCK_MASK, SHARD_MASK, SHARD_SHIFT
from pool.reader import Reader
from pool.state import State

#: Stripes that are looked into; more would only say the same.
STRIPES_MAX = 64

#: Place in the stripe → (layer, block, crc) of each entry that maps to it.
Entries = dict[int, list[tuple[int, int, int]]]


class Suspects:
    """Compares all entries in some stripes with their headers."""

    def __init__(self, state: State, reader: Reader, pages: Pages, report: Report) -> None:
        self._state = state
        self._reader = reader
        self._pages = pages
        self._report = report
        self._entries: dict[int, Entries] = {}
        self._width: dict[int, int] = {}

    async def check(self, maps: MapCheck, stripes: set[int]) -> None:
        """Name what is wrong with these stripes."""
        for stripe in sorted(stripes)[:STRIPES_MAX]:
            if stripe in self._state.table:
                self._entries[stripe] = {}
                self._width[stripe] = self._state.row(stripe).shape.shard_blocks
        await maps.owners(set(self._entries), self._note)
        for stripe, found in self._entries.items():
            await self._compare(stripe, found)

    def _note(self, layer: int, stripe: int, blocks: U64, locations: U64, crcs: U32) -> None:
        _, shards, within = split(locations)
        places = shards * self._width[stripe] + within
        entries = self._entries[stripe]
        for place, block, crc in zip(places.tolist(), blocks.tolist(), crcs.tolist(), strict=True):
            entries.setdefault(place, []).append((layer, block, crc))

    async def _compare(self, stripe: int, entries: Entries) -> None:
        try:
            header = await self._reader.header(self._state.row(stripe))
        except (KeyError, DataLost):
            return
        used, contents = header.used, header.contents
        kinds = Counter[str]()
        for place, owners in sorted(entries.items()):
            said = (0, 0, 0)
            if place < used:
                said = (
                    int(contents.layers[place]), int(contents.blocks[place]),
                    int(contents.crcs[place]),
                )  # fmt: skip
            for entry in owners:
                if entry != said and await self._still(entry, stripe, place):
                    kinds["entry"] += 1
                    self._blame(stripe, place, entry, said, used)
            if not kinds and len(owners) > 1:
                self._blame(stripe, place, owners[-1], said, used)

    async def _still(self, entry: tuple[int, int, int], stripe: int, place: int) -> bool:
        """Whether the map still says so."""
        layer, block, crc = entry
        leaf = await self._pages.leaf(layer, block >> LEAF_SHIFT)
        if leaf is None:
            return False
        location, now = leaf.get(block & LEAF_MASK)
        shard, within = divmod(place, self._width[stripe])
        same = (location >> SHARD_SHIFT & SHARD_MASK, location & BLOCK_MASK) == (shard, within)
        return same and now == crc

    def _blame(
        self, stripe: int, place: int, entry: tuple[int, int, int], said: tuple[int, int, int],
        used: int,
    ) -> None:  # fmt: skip
        layer, block, _ = entry
        shard, within = divmod(place, self._width[stripe])
        if place >= used:
            what = f"beyond its {used} used blocks"
        elif entry[:2] == said[:2]:
            what = "with another checksum than the stripe has"
        else:
            what = f"which is block {said[1]} of {owner(self._state, said[0])}"
        self._report.wrong(
            "owner",
            f"{owner(self._state, layer)}: block {block} is mapped to stripe {stripe}, shard "
            f"{shard}, block {within}, {what}; it reads as an error",
            stripe=stripe,
            shard=shard,
            layer=layer,
            block=block,
        )
