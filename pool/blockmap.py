"""The map of a layer: block → location and checksum, in leaves that can be paged out.

A leaf covers 512 blocks (2 MiB of the volume) in one of two forms: dense, two typed arrays with an
entry per block, or sparse, sorted arrays with an entry per mapped block. No Python object exists
per block. `pointers` says where each leaf was last written by a checkpoint; a leaf that is neither
resident nor pointed to is a hole.

Invariants: a dirty leaf is resident, and so is one that a checkpoint is writing. A leaf is dirty if
it differs from what the checkpoint (written or being written) has of it. The first change to a
frozen leaf captures its bytes, so that a checkpoint shows the map at one position of the journal.

Pure: no I/O. Called by `pool.volume` (lookups, writes), the movers (compare-and-swap), recovery and
the checkpoint.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Container, Iterator

import numpy as np

from pool.errors import FormatError
from pool.format import page
from pool.format.location import HOLE
from pool.format.page import Pointer

LEAF_SHIFT = 9
LEAF_BLOCKS = 1 << LEAF_SHIFT
LEAF_MASK = LEAF_BLOCKS - 1
#: A sparse leaf with more entries becomes dense.
SPARSE_MAX = 340
DENSE_BYTES = LEAF_BLOCKS * 12
SPARSE_ENTRY_BYTES = 14
#: What a resident leaf costs beyond its entries (objects, array heads, dict slot).
LEAF_OVERHEAD_BYTES = 480

_ZEROS_Q = bytes(LEAF_BLOCKS * 8)
_ZEROS_I = bytes(LEAF_BLOCKS * 4)


class Leaf:
    """512 map entries. Dense when `index` is None, else `index` has the mapped block numbers."""

    __slots__ = ("count", "crcs", "dirty", "frozen", "index", "locations")

    def __init__(self) -> None:
        self.index: array[int] | None = array("H")
        self.locations: array[int] = array("Q")
        self.crcs: array[int] = array("I")
        self.count = 0
        self.dirty = False
        self.frozen = False

    def get(self, block: int) -> tuple[int, int]:
        """Location and checksum of block 0..511; location 0 is a hole."""
        index = self.index
        if index is None:
            return self.locations[block], self.crcs[block]
        at = bisect_left(index, block)
        if at < len(index) and index[at] == block:
            return self.locations[at], self.crcs[at]
        return HOLE, 0

    def holds(self, block: int, location: int) -> bool:
        """Whether a block is mapped to `location`."""
        if self.index is None:
            return self.locations[block] == location
        return self.get(block)[0] == location

    def maps_any(self, start: int, stop: int) -> bool:
        """Whether any of the blocks [start, stop) of the leaf is mapped."""
        index = self.index
        if index is None:
            return self.locations[start:stop].count(HOLE) < stop - start
        return bisect_left(index, start) < bisect_left(index, stop)

    def set(self, block: int, location: int, crc: int) -> int:
        """Map a block (or unmap it with HOLE); returns the old location. Does not mark dirty."""
        index = self.index
        if index is None:
            old = self.locations[block]
            self.locations[block] = location
            self.crcs[block] = crc
            self.count += (location != HOLE) - (old != HOLE)
            return old
        at = bisect_left(index, block)
        if at < len(index) and index[at] == block:
            old = self.locations[at]
            if location == HOLE:
                del index[at], self.locations[at], self.crcs[at]
                self.count -= 1
            else:
                self.locations[at] = location
                self.crcs[at] = crc
            return old
        if location != HOLE:
            index.insert(at, block)
            self.locations.insert(at, location)
            self.crcs.insert(at, crc)
            self.count += 1
            if self.count > SPARSE_MAX:
                self.make_dense()
        return HOLE

    def set_run(self, block: int, locations: array[int], crcs: array[int]) -> array[int]:
        """Map `len(locations)` blocks from `block`; returns the old locations, holes included."""
        count = len(locations)
        if self.index is not None:
            if count < 32 and self.count + count <= SPARSE_MAX:
                return array(
                    "Q", (self.set(block + i, locations[i], crcs[i]) for i in range(count))
                )
            self.make_dense()
        old = self.locations[block : block + count]
        self.locations[block : block + count] = locations
        self.crcs[block : block + count] = crcs
        self.count += old.count(HOLE) - locations.count(HOLE)
        return old

    def make_dense(self) -> None:
        """Switch to the form with an entry for every block."""
        index = self.index
        if index is None:
            return
        locations, crcs = array("Q", _ZEROS_Q), array("I", _ZEROS_I)
        for at, block in enumerate(index):
            locations[block] = self.locations[at]
            crcs[block] = self.crcs[at]
        self.index, self.locations, self.crcs = None, locations, crcs

    def mapped(self) -> Iterator[tuple[int, int, int]]:
        """(block, location, crc) of every mapped block, in order."""
        if self.index is None:
            for block, location in enumerate(self.locations):
                if location:
                    yield block, location, self.crcs[block]
        else:
            yield from zip(self.index, self.locations, self.crcs, strict=True)

    @property
    def memory(self) -> int:
        """Roughly the bytes that the leaf occupies."""
        entries = DENSE_BYTES if self.index is None else len(self.index) * SPARSE_ENTRY_BYTES
        return LEAF_OVERHEAD_BYTES + entries

    def encode(self) -> tuple[int, bytes]:
        """(form, body) of the leaf's page, in the smaller form."""
        if self.index is None and self.count > SPARSE_MAX:
            return page.FORM_DENSE, self.locations.tobytes() + self.crcs.tobytes()
        if self.index is not None:
            parts = (self.locations, self.crcs, self.index)
            return page.FORM_SPARSE, b"".join(part.tobytes() for part in parts)
        located = np.frombuffer(self.locations, np.uint64)
        index = np.flatnonzero(located)
        crcs = np.frombuffer(self.crcs, np.uint32)
        return page.FORM_SPARSE, (
            located[index].tobytes() + crcs[index].tobytes() + index.astype(np.uint16).tobytes()
        )

    @classmethod
    def decode(cls, form: int, body: memoryview) -> Leaf:
        """The leaf of a page. Raises FormatError."""
        leaf = cls()
        if form == page.FORM_DENSE:
            if len(body) != DENSE_BYTES:
                raise FormatError("dense leaf has the wrong size")
            leaf.index = None
            leaf.locations = array("Q", bytes(body[: LEAF_BLOCKS * 8]))
            leaf.crcs = array("I", bytes(body[LEAF_BLOCKS * 8 :]))
            leaf.count = LEAF_BLOCKS - leaf.locations.count(HOLE)
            return leaf
        entries, rest = divmod(len(body), SPARSE_ENTRY_BYTES)
        if form != page.FORM_SPARSE or rest or entries > LEAF_BLOCKS:
            raise FormatError("sparse leaf has the wrong size")
        leaf.locations = array("Q", bytes(body[: entries * 8]))
        leaf.crcs = array("I", bytes(body[entries * 8 : entries * 12]))
        leaf.index = array("H", bytes(body[entries * 12 :]))
        if any(a >= b for a, b in zip(leaf.index, leaf.index[1:], strict=False)):
            raise FormatError("sparse leaf is not sorted")
        if entries and leaf.index[-1] >= LEAF_BLOCKS:
            raise FormatError("sparse leaf names a block that it does not cover")
        leaf.count = entries
        return leaf


class LayerMap:
    """All leaves of one layer. Keys are leaf numbers (block >> LEAF_SHIFT)."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.leaves: dict[int, Leaf] = {}
        self.pointers: dict[int, Pointer] = {}
        #: Numbers of leaves changed or removed since the last checkpoint began.
        self.dirty: set[int] = set()
        #: Numbers of the leaves that the checkpoint being written covers; they stay resident.
        self.writing: set[int] = set()
        #: Directories to be written anew although no leaf under them changed.
        self.redirect: set[int] = set()
        #: Bytes of frozen leaves that changed before they were written: number → (form, body).
        self.captured: dict[int, tuple[int, bytes]] = {}

    def missing(self, block: int, count: int) -> list[int]:
        """Numbers of the leaves under a block range that must be loaded before it can be used."""
        first, last = block >> LEAF_SHIFT, (block + count - 1) >> LEAF_SHIFT
        leaves, pointers = self.leaves, self.pointers
        if last - first > len(pointers):
            return sorted(n for n in pointers if first <= n <= last and n not in leaves)
        return [n for n in range(first, last + 1) if n not in leaves and n in pointers]

    def present(self, block: int, count: int) -> list[int]:
        """Numbers of the leaves under a block range that map anything, resident or not, in order.

        Costs what the map holds, not what the range spans."""
        first, last = block >> LEAF_SHIFT, (block + count - 1) >> LEAF_SHIFT
        leaves, pointers = self.leaves, self.pointers
        if last - first > len(pointers) + len(leaves):
            return sorted({n for d in (leaves, pointers) for n in d if first <= n <= last})
        return [n for n in range(first, last + 1) if n in leaves or n in pointers]

    def maps_any(self, block: int, count: int) -> bool:
        """Whether any block of a range is mapped. Its leaves are resident."""
        for number in self.present(block, count):
            start = max(block - (number << LEAF_SHIFT), 0)
            stop = min(block + count - (number << LEAF_SHIFT), LEAF_BLOCKS)
            if self.leaves[number].maps_any(start, stop):
                return True
        return False

    def touch(self, number: int) -> Leaf:
        """The leaf to change, marked dirty and captured if a checkpoint still needs it as it is.

        The leaf must not be paged out (see `missing`)."""
        leaf = self.leaves.get(number)
        if leaf is None:
            assert number not in self.pointers, "leaf is paged out"
            leaf = self.leaves[number] = Leaf()
        if not leaf.dirty:
            leaf.dirty = True
            self.dirty.add(number)
            if leaf.frozen:
                self._capture(number, leaf)
        return leaf

    def _capture(self, number: int, leaf: Leaf) -> None:
        leaf.frozen = False
        self.captured[number] = leaf.encode()

    def remove(self, number: int) -> tuple[Leaf | None, Pointer | None]:
        """Take a whole leaf out of the map (trim, delete). Returns it and the page it had."""
        leaf = self.leaves.pop(number, None)
        if leaf is not None and leaf.frozen:
            self._capture(number, leaf)
        self.dirty.add(number)
        return leaf, self.pointers.pop(number, None)

    def freeze(self) -> set[int]:
        """Start a checkpoint: returns the leaf numbers whose pages it must write or drop."""
        assert not self.writing, "a checkpoint is already being written"
        self.writing, self.dirty = self.dirty, set()
        for number in self.writing:
            leaf = self.leaves.get(number)
            if leaf is not None:
                leaf.dirty = False
                leaf.frozen = True
        return self.writing

    def frozen_page(self, number: int) -> tuple[int, bytes] | None:
        """The page form and body of a leaf as it was at `freeze`; None if it mapped nothing."""
        captured = self.captured.pop(number, None)
        if captured is None:
            leaf = self.leaves.get(number)
            if leaf is None or not leaf.frozen:
                return None
            leaf.frozen = False
            captured = leaf.encode()
        return captured if captured[1] else None

    def thaw(self, fresh: dict[int, Pointer] | None) -> list[Pointer]:
        """End a checkpoint. With `fresh` it was committed: its pages are where the leaves are now.

        Returns the pages that died: those replaced, and fresh ones whose leaf was removed
        meanwhile. Without `fresh` it was given up, and everything it covered is dirty again."""
        died = []
        for number in self.writing:
            leaf = self.leaves.get(number)
            if leaf is not None:
                leaf.frozen = False
            if fresh is None:
                self.dirty.add(number)
                if leaf is not None:
                    leaf.dirty = True
                continue
            old = self.pointers.get(number)
            new = fresh.get(number)
            if leaf is None and number in self.dirty:
                # Removed since the freeze; `remove` has accounted for the old page.
                if new is not None:
                    died.append(new)
                continue
            if old is not None:
                died.append(old)
            if new is None:
                self.pointers.pop(number, None)
            else:
                self.pointers[number] = new
        self.writing = set()
        self.captured.clear()
        return died

    def install(self, number: int, leaf: Leaf, pointer: Pointer) -> None:
        """Add a leaf that was paged in, unless the map has moved on meanwhile."""
        if number not in self.leaves and self.pointers.get(number) == pointer:
            self.leaves[number] = leaf

    def evict(self, budget: int, pinned: Container[int] = ()) -> int:
        """Drop clean leaves but `pinned` ones, oldest first, until `budget` bytes are freed.
        Returns the bytes freed."""
        freed = 0
        victims = []
        for number, leaf in self.leaves.items():
            if freed >= budget:
                break
            if not leaf.dirty and number not in self.writing and number not in pinned:
                victims.append(number)
                freed += leaf.memory
        for number in victims:
            del self.leaves[number]
        return freed

    @property
    def memory(self) -> int:
        """Roughly the bytes that resident leaves occupy."""
        return sum(leaf.memory for leaf in self.leaves.values())
