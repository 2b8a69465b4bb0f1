"""Free slots of one device. Pure; rebuilt from the stripe table when the pool opens."""

from __future__ import annotations

import heapq
from collections.abc import Iterable


class FreeSlots:
    """Which slots of a device may be written. Lowest number first, so that files stay short.

    A slot is free only when no committed root and no reader refers to it (R21); the caller
    decides."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._used: set[int] = set()
        self._returned: list[int] = []
        self._next = 0

    def occupy(self, taken: Iterable[int]) -> None:
        """Mark slots of existing stripes, once, before the first `take`."""
        assert not self._used
        assert not self._next
        self._used = set(taken)
        self._next = max(self._used, default=-1) + 1
        self._returned = [slot for slot in range(self._next) if slot not in self._used]

    def take(self) -> int:
        """A free slot, now in use. Raises IndexError if there is none."""
        if self._returned:
            slot = heapq.heappop(self._returned)
        elif self._next < self.slots:
            slot = self._next
            self._next += 1
        else:
            raise IndexError("no free slot")
        self._used.add(slot)
        return slot

    def give(self, slot: int) -> None:
        """Return a slot."""
        self._used.remove(slot)
        heapq.heappush(self._returned, slot)

    @property
    def free(self) -> int:
        return self.slots - len(self._used)

    @property
    def used(self) -> int:
        return len(self._used)
