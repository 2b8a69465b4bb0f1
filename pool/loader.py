"""Pages map leaves in and out. The only place that reads leaves."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable

from pool.blockmap import Leaf
from pool.entries import check_leaf
from pool.errors import DataLost, FormatError
from pool.format import page
from pool.reader import Reader
from pool.state import LEAF_BUDGET, State

#: Leaves read at the same time.
PARALLEL = 16


class Loader:
    """Brings leaves into memory and keeps them within the budget."""

    def __init__(self, state: State, reader: Reader, budget: int = LEAF_BUDGET) -> None:
        self._state = state
        self._reader = reader
        self._budget = budget
        #: Leaves that somebody waits for, or waits with for others: they stay.
        self._pinned: Counter[tuple[int, int]] = Counter()

    async def ensure(self, leaves: Iterable[tuple[int, int]]) -> bool:
        """Load those of the (layer, number) that are paged out. Returns whether any had to be: the
        caller, who has waited, must look again, and finds them all. Raises DataLost."""
        wanted = list(leaves)
        missing = sorted(
            (pointer, layer, number)
            for layer, number in wanted
            if (found := self._state.maps.get(layer)) is not None
            and number not in found.leaves
            and (pointer := found.pointers.get(number)) is not None
        )
        if not missing:
            return False
        self._pinned.update(wanted)
        try:
            for start in range(0, len(missing), PARALLEL):
                part = missing[start : start + PARALLEL]
                await asyncio.gather(*(self._load(layer, number) for _, layer, number in part))
        finally:
            self._pinned -= Counter(wanted)
        return True

    async def _load(self, layer: int, number: int) -> None:
        """Read one leaf from where it is now: since it was found missing, a checkpoint may have put
        it elsewhere, and may do so again while it is read."""
        layer_map = self._state.maps.get(layer)
        pointer = layer_map.pointers.get(number) if layer_map is not None else None
        if pointer is None:
            return
        found = await self._reader.page(pointer, page.KIND_LEAF)
        if (found.layer, found.number) != (layer, number):
            raise DataLost(f"page of layer {found.layer} found where {layer} was expected")
        layer_map = self._state.maps.get(layer)
        if layer_map is None or layer_map.pointers.get(number) != pointer:
            return
        try:
            leaf = Leaf.decode(found.form, found.body)
            check_leaf(leaf, self._state.table)
        except FormatError as error:
            raise DataLost(f"leaf {number} of layer {layer}: {error}") from None
        layer_map.install(number, leaf, pointer)
        self._state.counters["leaves_loaded"] += 1

    def trim_memory(self) -> None:
        """Page out clean leaves beyond the budget. Called between maintenance steps."""
        memory = sum(layer_map.memory for layer_map in self._state.maps.values())
        excess = memory - self._budget
        for layer_map in self._state.maps.values():
            if excess <= 0:
                return
            pinned = {number for layer, number in self._pinned if layer == layer_map.layer}
            excess -= layer_map.evict(excess + self._budget // 8, pinned)
