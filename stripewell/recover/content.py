"""A volume's map and bytes: checkpoint plus journal, leaf by leaf.

Called by `remains` and `restore`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stripewell.recover.checkpoint import DIRECTORY_LEAVES, LEAF_BLOCKS, LOST, Checkpoint, Leaves
from stripewell.recover.journal import Ring
from stripewell.recover.overlay import Changes, I64s, U32s, U64s
from stripewell.recover.root import BLOCK, Pointer
from stripewell.recover.stripes import Stripes

#: Blocks read at once from one place.
_RUN = 64
_JOURNAL, _STRIPE, _ZEROS = 1, 2, 3
_WINDOW = DIRECTORY_LEAVES * LEAF_BLOCKS


@dataclass(frozen=True, slots=True)
class Part:
    """Map entries of the blocks from `first`. Without entries all `count` of them are lost."""

    first: int
    count: int
    locations: U64s | None
    crcs: U32s | None

    @property
    def tags(self) -> npt.NDArray[np.uint64]:
        assert self.locations is not None
        return self.locations >> np.uint64(62)


@dataclass(frozen=True, slots=True)
class Content:
    """All that belongs to one layer."""

    layer: int
    blocks: int
    checkpoint: Checkpoint
    changes: Changes
    stripes: Stripes
    ring: Ring

    async def parts(self) -> AsyncIterator[Part]:
        """The map where it is not empty, in the order of the blocks."""
        directories = self.checkpoint.directories(self.layer)
        written = frozenset(self.changes.leaves())
        windows = sorted(directories.keys() | {leaf // DIRECTORY_LEAVES for leaf in written})
        for number in windows:
            if number * _WINDOW < self.blocks:
                pointer = directories.get(number)
                leaves: Leaves | None = {}
                if pointer is not None:
                    leaves = await self.checkpoint.directory(self.layer, number, pointer)
                async for part in self._window(number, leaves, written):
                    yield part

    async def _window(
        self, number: int, leaves: Leaves | None, written: frozenset[int]
    ) -> AsyncIterator[Part]:
        """The parts under one directory; a lost one leaves what the journal says."""
        start, end = number * _WINDOW, (number + 1) * _WINDOW
        chosen = self.changes.touching(start, end)
        if leaves is None and not len(chosen):
            yield Part(start, min(_WINDOW, self.blocks - start), None, None)
            return
        for place in range(DIRECTORY_LEAVES):
            first = start + place * LEAF_BLOCKS
            pointer = leaves.get(place) if leaves is not None else None
            there = leaves is None or pointer is not None or first // LEAF_BLOCKS in written
            if there and first < self.blocks:
                mine = self.changes.touching(first, first + LEAF_BLOCKS, chosen)
                yield await self._leaf(first, pointer, mine, lost=leaves is None)

    async def _leaf(self, first: int, pointer: Pointer | None, mine: I64s, *, lost: bool) -> Part:
        found = None
        if pointer is not None and not self.changes.covers(mine, first, first + LEAF_BLOCKS):
            found = await self.checkpoint.leaf(self.layer, first // LEAF_BLOCKS, pointer)
            lost = found is None
        if found is None:
            locations = np.full(LEAF_BLOCKS, LOST if lost else 0, np.uint64)
            found = locations, np.zeros(LEAF_BLOCKS, np.uint32)
        locations, crcs = found
        self.changes.apply(mine, first, locations, crcs)
        count = min(LEAF_BLOCKS, self.blocks - first)
        return Part(first, count, locations[:count], crcs[:count])

    def lost(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which blocks of a part are lost for want of devices; others may prove damaged."""
        if part.locations is None:
            return np.ones(part.count, bool)
        tags = part.tags
        lost: npt.NDArray[np.bool_] = (tags == 0) & (part.locations != 0)
        stored = tags == _STRIPE
        lost[stored] = ~self.stripes.reachable(part.locations[stored])
        if all(copy.source.hangs for copy in self.ring.copies):
            lost |= tags == _JOURNAL
        return lost

    async def read(self, part: Part) -> tuple[memoryview, npt.NDArray[np.bool_]]:
        """The verified bytes of a part that has entries, and which blocks of it are lost."""
        assert part.locations is not None
        data = memoryview(bytearray(part.count * BLOCK))
        lost = self.lost(part)
        runs = _runs(part.locations, lost)
        await asyncio.gather(*(self._fill(part, run, data, lost) for run in runs))
        return data, lost

    async def _fill(
        self, part: Part, run: range, data: memoryview, lost: npt.NDArray[np.bool_]
    ) -> None:
        assert part.locations is not None
        assert part.crcs is not None
        location = int(part.locations[run.start])
        crcs = part.crcs[run.start : run.stop].tolist()
        if location >> 62 == _JOURNAL:
            found = await self.ring.run(location & (1 << 62) - 1, crcs)
        else:
            stripe, shard = location >> 22 & (1 << 40) - 1, location >> 16 & 63
            found = await self.stripes.blocks(stripe, shard, location & 0xFFFF, crcs)
        for i, block in zip(run, found, strict=True):
            if block is None:
                lost[i] = True
            else:
                data[i * BLOCK : (i + 1) * BLOCK] = block


def _runs(locations: U64s, lost: npt.NDArray[np.bool_]) -> list[range]:
    """Entries that lie one behind the other, as ranges of indices."""
    tags = locations >> np.uint64(62)
    wanted = np.flatnonzero(((tags == _JOURNAL) | (tags == _STRIPE)) & ~lost)
    runs: list[range] = []
    for i in wanted.tolist():
        last = runs[-1] if runs else range(0)
        neighbour = last.stop == i and len(last) < _RUN
        if neighbour and len(last) and int(locations[i]) == int(locations[i - 1]) + 1:
            runs[-1] = range(last.start, i + 1)
        else:
            runs.append(range(i, i + 1))
    return runs
