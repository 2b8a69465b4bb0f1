"""Checks the map: each entry by itself, one owner per block (R17), and what all of them add up to.

One pass over the leaves, layer by layer. Entries are judged in the same step in which they are
looked at, so that the engine's state is theirs; what they say of stripes and the journal is
gathered in claims that stay true. `used` is compared at one moment in the end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from pool.blockmap import LEAF_BLOCKS, LEAF_MASK, LEAF_SHIFT, LayerMap, Leaf
from pool.check.claims import U32, U64, JournalClaims, StripeClaims
from pool.check.pages import Pages, owner
from pool.check.report import Report
from pool.entries import split
from pool.format.location import (
    JOURNAL,
    POSITION_MASK,
    TAG_JOURNAL,
    TAG_SHIFT,
    TAG_STRIPE,
    TAG_ZERO,
    ZERO,
)
from pool.format.page import ENVELOPE, Pointer
from pool.state import State
from pool.table import DATA

#: Leaves looked at between two turns of the event loop.
SLICE = 16
#: A page longer than this is that of a dense leaf, which does not say how many blocks it maps.
SPARSE_BYTES = 6000
SPARSE_ENTRY_BYTES = 14
#: Times that leaves are looked for whose size is not known, before `used` is compared.
LOOKS = 8

Mask = npt.NDArray[np.bool_]


def entries(leaf: Leaf) -> tuple[U64, U64, U32]:
    """Block numbers within the leaf, locations and checksums of what it maps. Copies: the leaf
    may change afterwards."""
    locations, crcs = np.array(leaf.locations, np.uint64), np.array(leaf.crcs, np.uint32)
    if leaf.index is not None:
        return np.array(leaf.index, np.uint64), locations, crcs
    mapped = np.flatnonzero(locations)
    return mapped.astype(np.uint64), locations[mapped], crcs[mapped]


class MapCheck:
    """The pass over the map; then `stripes` and `journal` have what it claims."""

    def __init__(self, state: State, pages: Pages, report: Report) -> None:
        self._state = state
        self._pages = pages
        self._report = report
        self.stripes = StripeClaims()
        self.journal = JournalClaims()
        #: Live blocks per stripe when the pass began: no stripe of then can gain any.
        self.live_before = live_counts(state)
        #: How many blocks the dense leaves map that are not in memory.
        self._dense: dict[Pointer, int] = {}
        #: (position, layer, block, layer, block) of journal blocks that have two owners.
        self._shared: list[tuple[int, int, int, int, int]] = []

    def leaves(self) -> list[tuple[int, list[int]]]:
        """What there is to look at: leaf numbers by layer."""
        maps = self._state.maps
        return [(layer, sorted({*m.leaves, *m.pointers})) for layer, m in maps.items()]

    async def check_leaf(self, layer: int, number: int) -> None:
        """Look at all entries of one leaf."""
        leaf = await self._pages.leaf(layer, number)
        if leaf is None:
            return
        # No await from here on: what the entries say is compared with the state they belong to.
        found, locations, crcs = entries(leaf)
        self._report.checked.entries += len(found)
        layer_map = self._state.maps[layer]
        pointer = layer_map.pointers.get(number)
        if number not in layer_map.leaves and pointer and pointer.length > SPARSE_BYTES:
            self._dense[pointer] = leaf.count
        blocks = found + np.uint64(number << LEAF_SHIFT)
        self._check_range(layer, blocks)
        tags = locations >> np.uint64(TAG_SHIFT)
        self._check_zeros(layer, blocks, locations, crcs, tags)
        here = tags == TAG_JOURNAL
        if here.any():
            self._claim_journal(layer, blocks[here], locations[here], crcs[here])
        here = tags == TAG_STRIPE
        if here.any():
            self._claim_stripes(layer, blocks[here], locations[here], crcs[here])

    # -- single entries ----------------------------------------------------------------------

    def _check_range(self, layer: int, blocks: U64) -> None:
        """Nothing is mapped behind the end of the volume."""
        end = self._state.catalog.blocks(layer)
        if end is not None:
            behind = blocks >= np.uint64(end)
            self._blame(layer, blocks, behind, "behind the end of the volume")

    def _check_zeros(self, layer: int, blocks: U64, locations: U64, crcs: U32, tags: U64) -> None:
        wrong = (tags == 0) | ((tags == TAG_ZERO) & ((locations != ZERO) | (crcs != 0)))
        self._blame(layer, blocks, wrong, "mapped to a place that there cannot be")

    def _claim_journal(self, layer: int, blocks: U64, locations: U64, crcs: U32) -> None:
        journal = self._state.journal
        positions = locations & np.uint64(POSITION_MASK)
        outside = (positions < journal.tail) | (positions >= journal.head)
        self._blame(
            layer, blocks, outside,
            f"mapped to the journal outside of {journal.tail} to {journal.head - 1}",
        )  # fmt: skip
        inside = ~outside
        self.journal.forget(journal.tail)
        for position, other, block, again in self.journal.add(
            positions[inside], layer, blocks[inside], crcs[inside]
        ):
            if len(self._shared) < 100:
                self._shared.append((position, other, block, layer, again))

    def _claim_stripes(self, layer: int, blocks: U64, locations: U64, crcs: U32) -> None:
        stripes, shards, within = split(locations)
        table = self._state.table
        for stripe in np.unique(stripes).tolist():
            here = stripes == stripe
            if stripe not in table:
                self._blame(layer, blocks, here, f"in a stripe that does not exist, {stripe}")
                continue
            row = table.raw(table.rows[stripe])
            k, size = int(row["data"]), int(row["shard"])
            if row["kind"] != DATA:
                self._blame(layer, blocks, here, f"in stripe {stripe}, which has pages")
                continue
            outside = here & ((shards >= k) | (within >= size))
            self._blame(layer, blocks, outside, f"in stripe {stripe} where it has no block")
            here &= ~outside
            places = shards[here] * size + within[here]
            self.stripes.add(stripe, k * size, places, layer, blocks[here], crcs[here])

    def _blame(self, layer: int, blocks: U64, wrong: Mask, what: str) -> None:
        """One line for all entries of a leaf that are wrong in the same way."""
        if not wrong.any():
            return
        first, count = int(blocks[wrong][0]), int(np.count_nonzero(wrong))
        more = f" and {count - 1} more" if count > 1 else ""
        self._report.wrong(
            "entry",
            f"{owner(self._state, layer)}: block {first}{more}: {what}",
            layer=layer,
            block=first,
        )

    # -- what they add up to -----------------------------------------------------------------

    async def check_shared(self) -> None:
        """Journal blocks with two owners, if both still are."""
        for position, layer, block, other, again in self._shared:
            location = JOURNAL | position
            if await self._maps(layer, block, location) and await self._maps(
                other, again, location
            ):
                self._report.wrong(
                    "owner",
                    f"journal position {position} has two owners: block {block} of "
                    f"{owner(self._state, layer)} and block {again} of "
                    f"{owner(self._state, other)}; one of them reads as an error",
                    position=position,
                    layer=other,
                    block=again,
                )

    async def _maps(self, layer: int, block: int, location: int) -> bool:
        leaf = await self._pages.leaf(layer, block >> LEAF_SHIFT)
        return leaf is not None and leaf.get(block & LEAF_MASK)[0] == location

    def check_live(self) -> None:
        """A stripe's live count is what the map has in it. It can only have fallen since the pass
        began, and so can what the map has: any count between then and now is right."""
        if self._pages.unreadable:
            self._report.remark("live counts were not compared: not all leaves can be read")
            return
        now = live_counts(self._state)
        for stripe, before in self.live_before.items():
            if stripe in now:
                mapped = self.stripes.count(stripe)
                if not now[stripe] <= mapped <= before:
                    self._report.wrong(
                        "live",
                        f"stripe {stripe} counts {now[stripe]} live blocks, the map has {mapped}",
                        stripe=stripe,
                    )

    async def check_used(self) -> None:
        """The pool's count of mapped blocks, at one moment."""
        if self._pages.unreadable:
            return
        for _ in range(LOOKS):
            unknown = list(self._unknown())
            if not unknown:
                mapped = self._mapped()
                if mapped != self._state.used:
                    self._report.wrong(
                        "used",
                        f"the pool counts {self._state.used} mapped blocks, the map has {mapped}",
                    )
                return
            for layer, number in unknown:
                leaf = await self._pages.leaf(layer, number)
                layer_map = self._state.maps.get(layer)
                pointer = layer_map.pointers.get(number) if layer_map is not None else None
                if leaf is not None and pointer is not None:
                    self._dense[pointer] = leaf.count
        self._report.remark("the count of mapped blocks was not compared: leaves come and go")

    def _paged(self, layer_map: LayerMap) -> Iterator[tuple[int, Pointer]]:
        leaves = layer_map.leaves
        return ((n, p) for n, p in layer_map.pointers.items() if n not in leaves)

    def _unknown(self) -> Iterator[tuple[int, int]]:
        for layer, layer_map in self._state.maps.items():
            for number, pointer in self._paged(layer_map):
                if pointer.length > SPARSE_BYTES and pointer not in self._dense:
                    yield layer, number

    def _mapped(self) -> int:
        """Mapped blocks of all layers. No await: at one moment."""
        total = 0
        for layer_map in self._state.maps.values():
            total += sum(leaf.count for leaf in layer_map.leaves.values())
            for _, pointer in self._paged(layer_map):
                sparse = (pointer.length - ENVELOPE.size) // SPARSE_ENTRY_BYTES
                total += self._dense.get(pointer, sparse)
        return total

    # -- suspects ----------------------------------------------------------------------------

    async def owners(
        self, suspects: set[int], visit: Callable[[int, int, U64, U64, U32], None]
    ) -> None:
        """Look at the map again and give `visit` all entries in some stripes, as (layer, stripe,
        blocks, places by shard and block, checksums)."""
        done = 0
        for layer, numbers in self.leaves():
            for number in numbers:
                done += 1
                if done % SLICE == 0:
                    await asyncio.sleep(0)
                leaf = await self._pages.leaf(layer, number)
                if leaf is None:
                    continue
                found, locations, crcs = entries(leaf)
                tagged = locations >> np.uint64(TAG_SHIFT) == TAG_STRIPE
                stripes, _, _ = split(locations)
                for stripe in suspects.intersection(stripes[tagged].tolist()):
                    here = tagged & (stripes == stripe)
                    blocks = found[here] + np.uint64(number * LEAF_BLOCKS)
                    visit(layer, stripe, blocks, locations[here], crcs[here])


def live_counts(state: State) -> dict[int, int]:
    """Live blocks of the data stripes, with those taken off that died and are not yet counted.

    Nothing is settled here: a checkpoint may be between its freeze and its copy of the table."""
    dead = Counter(state.killed)
    return {
        stripe: int(state.table.live[at]) - dead[stripe]
        for stripe, at in state.table.rows.items()
        if state.table.raw(at)["kind"] == DATA
    }
