"""Free slots of one device. Pure; rebuilt from the stripe table when the pool opens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Slots = npt.NDArray[np.uint32]


class FreeSlots:
    """Which slots of a device may be written. Lowest number first, so that files stay short.

    A slot is free only when no committed root and no reader refers to it (R21); the caller
    decides."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._used: set[int] = set()
        #: Free slots below `_next`, a heap; from there on, those that are not in use are free.
        self._returned: list[int] = []
        self._next = 0

    def occupy(self, taken: Iterable[int]) -> None:
        """Mark slots of existing stripes, once, before the first `take`."""
        assert not self._used
        assert not self._next
        self._used = set(taken)

    def take(self) -> int:
        """A free slot, now in use. Raises IndexError if there is none."""
        if self._returned:
            slot = heapq.heappop(self._returned)
        else:
            while self._next in self._used:
                self._next += 1
            if self._next >= self.slots:
                raise IndexError("no free slot")
            slot = self._next
            self._next += 1
        self._used.add(slot)
        return slot

    def give(self, slot: int) -> None:
        """Return a slot."""
        self._used.remove(slot)
        if slot < self._next:
            heapq.heappush(self._returned, slot)

    def compare(self, claimed: Slots) -> tuple[Slots, Slots]:
        """Slots that are claimed and free here, and those in use here that nobody claims."""
        used = np.fromiter(self._used, np.uint32, len(self._used))
        return np.setdiff1d(claimed, used), np.setdiff1d(used, claimed)

    @property
    def free(self) -> int:
        return self.slots - len(self._used)

    @property
    def used(self) -> int:
        return len(self._used)
