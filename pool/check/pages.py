"""Checks the checkpoint pages: top, table, directories, leaves.

Each page is read from the devices, whether the engine has it in memory or not, and compared with
what the engine made of it. Pointers change with every checkpoint: a page that cannot be read is a
fault only if its pointer is still in use afterwards (R21).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from pool.blockmap import LEAF_BLOCKS, LayerMap, Leaf
from pool.check.report import Report
from pool.checkpoint import DIRECTORY_MAX, DIRECTORY_SHIFT, decode_directory
from pool.errors import DataLost, FormatError
from pool.format import page, top
from pool.format.page import Page, Pointer
from pool.reader import Reader
from pool.state import State
from pool.table import PAGE_ROWS, row_dtype

#: Looks at a page whose pointer changes under them.
LOOKS = 8
#: What every row of a page must have in common with the row in memory.
FIXED = ("kind", "data", "parity", "header", "shard", "device", "slot")


class Pages:
    """Reads pages for the check and reports those that are bad."""

    def __init__(self, state: State, reader: Reader, report: Report) -> None:
        self._state = state
        self._reader = reader
        self._report = report
        #: Leaves that could not be read: what is counted from the map is not complete.
        self.unreadable = 0

    async def check_top(self) -> None:
        """The top page: its parts, and that it says what is in use."""
        state = self._state
        for _ in range(LOOKS):
            pointers = state.committed.top
            parts = [
                await self._read(partial(_part, state, n), page.KIND_TOP, "top page", n)
                for n in range(len(pointers))
            ]
            if state.committed.top != pointers:
                continue
            found = [part for part in parts if part is not None]
            if pointers and len(found) == len(pointers):
                self._compare_top(b"".join(part.body for part in found))
            return

    def _compare_top(self, body: bytes) -> None:
        state = self._state
        try:
            said = top.decode(body, width=state.table.width, directory_max=DIRECTORY_MAX)
        except FormatError as error:
            self._wrong("top", f"the top page is damaged: {error}")
            return
        if said.table != state.table_pages:
            self._wrong("top", "the top page names other table pages than those in use")
        if said.directories != state.directories:
            self._wrong("top", "the top page names other directories than those in use")

    async def check_table(self) -> None:
        """Every page of the stripe table."""
        state = self._state
        for number in list(state.table_pages):
            found = await self._read(
                partial(_table_page, state, number), page.KIND_TABLE, "table page", number
            )
            if found is not None:
                self._compare_rows(number, found)

    def _compare_rows(self, number: int, found: Page) -> None:
        state = self._state
        dtype = row_dtype(state.table.width)
        if len(found.body) != PAGE_ROWS * dtype.itemsize:
            self._wrong("table", f"table page {number} has the wrong size")
            return
        for row in np.frombuffer(found.body, dtype):
            stripe = int(row["id"])
            at = state.table.rows.get(stripe) if stripe else None
            if at is None:
                continue
            known = state.table.raw(at)
            if any((row[name] != known[name]).any() for name in FIXED):
                self._wrong(
                    "table", f"table page {number} has stripe {stripe} elsewhere than in use",
                    stripe=stripe,
                )  # fmt: skip

    async def check_directory(self, layer: int, chunk: int) -> None:
        """A directory page, and that it names the leaves that are in use."""
        state = self._state
        found = await self._read(
            lambda: state.directories.get((layer, chunk)), page.KIND_DIRECTORY, "directory", chunk,
            layer,
        )  # fmt: skip
        layer_map = state.maps.get(layer)
        if found is None or layer_map is None:
            return
        where = f"directory {chunk} of layer {layer}"
        try:
            said = decode_directory(chunk, found.body)
        except FormatError as error:
            self._wrong("directory", f"{where} is damaged: {error}", layer=layer)
            return
        first = chunk << DIRECTORY_SHIFT
        for number in range(first, first + (1 << DIRECTORY_SHIFT)):
            known = layer_map.pointers.get(number)
            if known is not None and said.get(number) != known:
                self._wrong(
                    "directory", f"{where} names another page of leaf {number} than that in use",
                    layer=layer, block=number * LEAF_BLOCKS,
                )  # fmt: skip

    async def leaf(self, layer: int, number: int) -> Leaf | None:
        """A leaf as it is now: the one in memory, or else what its page says; None if there is
        none. What it returns is true until the next await."""
        for _ in range(LOOKS):
            layer_map = self._state.maps.get(layer)
            if layer_map is None:
                return None
            pointer = layer_map.pointers.get(number)
            stored = None
            if pointer is not None:
                stored = await self._stored_leaf(layer_map, layer, number)
            resident = layer_map.leaves.get(number)
            if resident is not None:
                if stored is not None and layer_map.pointers.get(number) == pointer:
                    self._compare_leaf(layer_map, number, resident, stored)
                return resident
            if layer_map.pointers.get(number) == pointer:
                return stored
        return None

    async def _stored_leaf(self, layer_map: LayerMap, layer: int, number: int) -> Leaf | None:
        before = self._report.checked.pages
        found = await self._read(
            lambda: layer_map.pointers.get(number), page.KIND_LEAF, "leaf", number, layer
        )
        if found is not None:
            try:
                return Leaf.decode(found.form, found.body)
            except FormatError as error:
                self._wrong(
                    "leaf", f"leaf {number} of layer {layer} is damaged: {error}",
                    layer=layer, block=number * LEAF_BLOCKS,
                )  # fmt: skip
        if self._report.checked.pages > before and number not in layer_map.leaves:
            self.unreadable += 1
        return None

    def _compare_leaf(self, layer_map: LayerMap, number: int, resident: Leaf, stored: Leaf) -> None:
        """A leaf that nothing changed since must be what its page says."""
        if resident.dirty or number in layer_map.writing:
            return
        if resident.encode() != stored.encode():
            self._wrong(
                "leaf", f"leaf {number} of layer {layer_map.layer} is not what its page says",
                layer=layer_map.layer, block=number * LEAF_BLOCKS,
            )  # fmt: skip

    # -- reading -----------------------------------------------------------------------------

    async def _read(
        self,
        where: Callable[[], Pointer | None],
        kind: int,
        what: str,
        number: int,
        layer: int = 0,
    ) -> Page | None:
        """The page that a pointer names now; a bad one is reported. None if there is none."""
        for _ in range(LOOKS):
            pointer = where()
            if pointer is None:
                return None
            name = f"{what} {number}" + (f" of layer {layer}" if layer else "")
            try:
                found = await self._reader.page(pointer, kind)
            except DataLost as error:
                if where() == pointer:
                    self._report.checked.pages += 1
                    self._lost(kind, name, error, pointer, layer, number)
                    return None
                continue
            if where() != pointer:
                continue
            self._report.checked.pages += 1
            if (found.layer, found.number) != (layer, number):
                self._wrong(
                    what.split(maxsplit=1)[0],
                    f"{name}: its pointer names page {found.number} of layer {found.layer}",
                    stripe=pointer.stripe,
                )
                return None
            return found
        return None

    def _lost(
        self, kind: int, name: str, error: DataLost, pointer: Pointer, layer: int, number: int
    ) -> None:
        meaning = "it is needed to open the pool"
        if kind == page.KIND_LEAF:
            first = number * LEAF_BLOCKS
            meaning = f"blocks {first} to {first + LEAF_BLOCKS - 1} of {self.owner(layer)} are lost"
        elif kind == page.KIND_DIRECTORY:
            first = number << DIRECTORY_SHIFT
            last = first + (1 << DIRECTORY_SHIFT) - 1
            meaning += f", for leaves {first} to {last} of {self.owner(layer)}"
        self._report.lost(
            "page",
            f"{name} cannot be read: {error.strerror}; {meaning}",
            stripe=pointer.stripe,
            layer=layer or None,
        )

    def _wrong(
        self,
        kind: str,
        text: str,
        *,
        stripe: int | None = None,
        layer: int | None = None,
        block: int | None = None,
    ) -> None:
        self._report.wrong(kind, text, stripe=stripe, layer=layer, block=block)

    def owner(self, layer: int) -> str:
        """A layer as people know it."""
        return owner(self._state, layer)


def owner(state: State, layer: int) -> str:
    """A layer as people know it: by its volume."""
    volume = state.catalog.top_of(layer)
    return f"layer {layer}" if volume is None else f"volume {volume.name} (layer {layer})"


def _table_page(state: State, number: int) -> Pointer | None:
    return state.table_pages.get(number)


def _part(state: State, number: int) -> Pointer | None:
    pointers = state.committed.top
    return pointers[number] if number < len(pointers) else None
