"""What the journal changed in the map since the checkpoint, as extents in typed arrays. Pure.

Nothing is kept per block but the checksums that the records carry, so its size is about that of the
headers. Trims and zeroes may span any range and cost the same. Filled by `journal`, applied leaf by
leaf by `content`.
"""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from stripewell.recover.catalog import MAX_BLOCKS

U32s = npt.NDArray[np.uint32]
U64s = npt.NDArray[np.uint64]
I64s = npt.NDArray[np.int64]

DATA, TRIM, ZERO, CATALOG = 1, 2, 3, 4
LEAF_BLOCKS = 512
HOLE = np.uint64(0)
JOURNAL = np.uint64(1 << 62)
ZEROS = np.uint64(3 << 62)


class Changes:
    """The extents of one layer, in the order of the journal."""

    def __init__(self) -> None:
        self._columns = [array("q") for _ in range(5)]
        self._crcs = array("I")
        self._built: npt.NDArray[np.int64] | None = None

    def add(self, kind: int, block: int, count: int, position: int, crcs: U32s) -> None:
        """Append an extent. Blocks that no volume can have are left out."""
        first, end = min(block, MAX_BLOCKS), min(block + count, MAX_BLOCKS)
        if first < end:
            row = (kind, first, end, position, len(self._crcs))
            for column, value in zip(self._columns, row, strict=True):
                column.append(value)
            self._crcs.extend(crcs.tolist())
            self._built = None

    def _rows(self) -> tuple[I64s, ...]:
        """The columns: kind, first, end, position, index of the first checksum."""
        if self._built is None:
            self._built = np.stack([np.array(column, np.int64) for column in self._columns])
        return tuple(self._built)

    def leaves(self) -> list[int]:
        """Numbers of the leaves into which blocks were written, ascending."""
        kind, first, end, _, _ = self._rows()
        written = kind == DATA
        starts = first[written] // LEAF_BLOCKS
        stops = (end[written] - 1) // LEAF_BLOCKS
        steps = range(int((stops - starts).max(initial=0)) + 1)
        numbers = [starts[:0], *(np.minimum(starts + step, stops) for step in steps)]
        return [int(number) for number in np.unique(np.concatenate(numbers))]

    def touching(self, first: int, end: int, among: I64s | None = None) -> I64s:
        """Which extents matter for a range, in order: nothing before the last that covers it."""
        _, starts, ends, _, _ = self._rows()
        chosen = np.arange(len(starts)) if among is None else among
        starts, ends = starts[chosen], ends[chosen]
        inside = (starts < end) & (ends > first)
        covering = np.flatnonzero(inside & (starts <= first) & (ends >= end))
        if len(covering):
            inside[: covering[-1]] = False
        return chosen[inside]

    def covers(self, chosen: I64s, first: int, end: int) -> bool:
        """Whether the first of those extents leaves nothing of what was in a range before."""
        _, starts, ends, _, _ = self._rows()
        return bool(len(chosen)) and starts[chosen[0]] <= first and end <= ends[chosen[0]]

    def apply(self, chosen: I64s, first: int, locations: U64s, crcs: U32s) -> None:
        """Change the map entries of the blocks from `first`."""
        kinds, starts, ends, positions, sums = self._rows()
        for i in chosen.tolist():
            start, end = max(int(starts[i]), first), min(int(ends[i]), first + len(locations))
            here = slice(start - first, end - first)
            skipped = start - int(starts[i])
            if kinds[i] == DATA:
                position = int(positions[i]) + skipped
                locations[here] = np.arange(position, position + end - start, dtype=np.uint64)
                locations[here] |= JOURNAL
                at = int(sums[i]) + skipped
                crcs[here] = self._crcs[at : at + end - start]
            else:
                locations[here] = HOLE if kinds[i] == TRIM else ZEROS
                crcs[here] = 0
