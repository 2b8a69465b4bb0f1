"""Live blocks as columns: what movers pick, sort, cut into stripes and switch.

Typed arrays instead of an object per block. Runs of neighbouring blocks are handled by numpy,
single blocks by plain indexing, because numpy's call overhead is worth about eight blocks.

Pure: no I/O. Called by `destage`, `collector` and `moving`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from pool.blockmap import LEAF_MASK, LEAF_SHIFT, Leaf

#: From how many blocks on numpy is faster than a loop.
WORTHWHILE = 8

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


class Columns:
    """Mapped blocks: owner layer, block number, location, checksum, version."""

    __slots__ = ("blocks", "crcs", "layers", "locations", "versions")

    def __init__(self, layers: U32, blocks: U64, locations: U64, crcs: U32, versions: U64) -> None:
        self.layers = layers
        self.blocks = blocks
        self.locations = locations
        self.crcs = crcs
        self.versions = versions

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, part: slice | npt.NDArray[np.intp]) -> Columns:
        return Columns(
            self.layers[part],
            self.blocks[part],
            self.locations[part],
            self.crcs[part],
            self.versions[part],
        )

    @classmethod
    def join(cls, parts: list[Columns]) -> Columns:
        """All of them, one behind the other."""
        return cls(
            np.concatenate([part.layers for part in parts]),
            np.concatenate([part.blocks for part in parts]),
            np.concatenate([part.locations for part in parts]),
            np.concatenate([part.crcs for part in parts]),
            np.concatenate([part.versions for part in parts]),
        )

    def by_address(self) -> Columns:
        """Sorted by layer and block, so that a stripe holds neighbours."""
        return self[np.lexsort((self.blocks, self.layers))]

    def leaves(self) -> Iterator[tuple[int, int, int, int]]:
        """(layer, leaf number, start, stop) of the stretches that lie in one leaf."""
        if not len(self):
            return
        numbers = self.blocks >> np.uint64(LEAF_SHIFT)
        changes = (numbers[1:] != numbers[:-1]) | (self.layers[1:] != self.layers[:-1])
        starts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(self)]
        for start, stop in pairwise(starts):
            yield int(self.layers[start]), int(numbers[start]), start, stop

    def runs(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of the stretches whose locations follow each other."""
        follows = self.locations[1:] == self.locations[:-1] + np.uint64(1)
        breaks = (np.flatnonzero(~follows) + 1).tolist()
        yield from zip([0, *breaks], [*breaks, len(self)], strict=True)


class Builder:
    """Collects columns, block by block and run by run."""

    def __init__(self) -> None:
        self._layers = array("I")
        self._blocks = array("Q")
        self._locations = array("Q")
        self._crcs = array("I")
        self._versions = array("Q")

    def __len__(self) -> int:
        return len(self._blocks)

    def add(self, layer: int, block: int, location: int, crc: int, version: int) -> None:
        """Add one block."""
        self._layers.append(layer)
        self._blocks.append(block)
        self._locations.append(location)
        self._crcs.append(crc)
        self._versions.append(version)

    def add_live_run(
        self, leaf: Leaf, layer: int, block: int, count: int, location: int, version: int
    ) -> None:
        """Add those of `count` blocks of one leaf that are mapped from `location` on."""
        start = block & LEAF_MASK
        if leaf.index is not None or count < WORTHWHILE:
            for i in range(count):
                found, crc = leaf.get(start + i)
                if found == location + i:
                    self.add(layer, block + i, found, crc, version)
            return
        expected = np.arange(location, location + count, dtype=np.uint64)
        same = np.frombuffer(leaf.locations, np.uint64)[start : start + count] == expected
        live = np.flatnonzero(same)
        if not len(live):
            return
        self._layers.extend(array("I", [layer]) * len(live))
        self._versions.extend(array("Q", [version]) * len(live))
        self._blocks.frombytes((live + block).astype(np.uint64).tobytes())
        self._locations.frombytes(expected[live].tobytes())
        crcs = np.frombuffer(leaf.crcs, np.uint32)[start : start + count]
        self._crcs.frombytes(crcs[live].tobytes())

    def build(self) -> Columns:
        """What was collected, in the order in which it came."""
        return Columns(
            np.array(self._layers, np.uint32),
            np.array(self._blocks, np.uint64),
            np.array(self._locations, np.uint64),
            np.array(self._crcs, np.uint32),
            np.array(self._versions, np.uint64),
        )


def find(leaf: Leaf, blocks: U64) -> tuple[U64, U32]:
    """Locations and checksums of some blocks of one leaf."""
    index = (blocks & np.uint64(LEAF_MASK)).astype(np.intp)
    if leaf.index is None and len(index) >= WORTHWHILE:
        locations = np.frombuffer(leaf.locations, np.uint64)[index]
        return locations, np.frombuffer(leaf.crcs, np.uint32)[index]
    pairs = [leaf.get(block) for block in index.tolist()]
    return np.array([p[0] for p in pairs], np.uint64), np.array([p[1] for p in pairs], np.uint32)


def switch(leaf: Leaf, blocks: U64, old: U64, new: U64, crcs: U32) -> npt.NDArray[np.bool_]:
    """Compare-and-swap some blocks of a touched leaf from `old` to `new`; says which were (R11)."""
    index = (blocks & np.uint64(LEAF_MASK)).astype(np.intp)
    if leaf.index is None and len(index) >= WORTHWHILE:
        locations = np.frombuffer(leaf.locations, np.uint64)
        same: npt.NDArray[np.bool_] = locations[index] == old
        locations[index[same]] = new[same]
        return same
    same = np.zeros(len(index), np.bool_)
    rows = zip(index.tolist(), old.tolist(), new.tolist(), crcs.tolist(), strict=True)
    for i, (block, before, after, crc) in enumerate(rows):
        if leaf.holds(block, before):
            leaf.set(block, after, crc)
            same[i] = True
    return same
