"""Free slots of one device. Pure; rebuilt from the stripe table when the pool opens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.uint32]

#: Free slots that were written before, kept while others are left; the first so many are written
#: when the pool is made. A file on a file system that has run full has room in such slots only, and
#: checkpoint and collector need some to make more (P5).
SPARE = 16


class FreeSlots:
    """Which slots of a device may be written. Lowest number first, so that files stay short; but
    while no more than `SPARE` of the free ones were written before, the first of the others.

    A slot is free only when no committed root and no reader refers to it (R21); the caller
    decides."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._used: set[int] = set()
        #: Free slots below `_next`, a heap; from there on, those that are not in use are free.
        self._returned: list[int] = []
        self._next = 0
        #: No slot from here on was ever in use, nor written.
        self.reach = min(SPARE, slots)
        #: Free slots below that which could not be written.
        self._blank: set[int] = set()

    def occupy(self, taken: Iterable[int]) -> None:
        """Mark slots of existing stripes, once, before the first `take`."""
        assert not self._used
        assert not self._next
        self._used = set(taken)
        self.reach = max(self.reach, max(self._used, default=-1) + 1)

    def take(self, *, beyond: bool = True) -> int:
        """A free slot, now in use; without `beyond` it is one that was written before. Raises
        IndexError if there is none."""
        if beyond and self._blank and self.spare <= SPARE:
            slot = min(self._blank)
            self._blank.remove(slot)
        elif beyond and self.reach < self.slots and self.spare <= SPARE:
            slot = self.reach
            self.reach += 1
        elif self.spare:
            slot = self._lowest()
        else:
            raise IndexError("no free slot")
        self._used.add(slot)
        return slot

    def _lowest(self) -> int:
        if self._returned:
            return heapq.heappop(self._returned)
        while self._next in self._used or self._next in self._blank:
            self._next += 1
        self._next += 1
        return self._next - 1

    def give(self, slot: int, *, written: bool = True) -> None:
        """Return a slot, and whether it could be written."""
        self._used.remove(slot)
        if not written:
            self._blank.add(slot)
        elif slot < self._next:
            heapq.heappush(self._returned, slot)

    def compare(self, claimed: Slots) -> tuple[Slots, Slots]:
        """Slots that are claimed and free here, and those in use here that nobody claims."""
        used = np.fromiter(self._used, np.uint32, len(self._used))
        return np.setdiff1d(claimed, used), np.setdiff1d(used, claimed)

    @property
    def free(self) -> int:
        return self.slots - len(self._used)

    @property
    def spare(self) -> int:
        """Free slots that were written before."""
        return self.reach - len(self._used) - len(self._blank)

    @property
    def used(self) -> int:
        return len(self._used)
