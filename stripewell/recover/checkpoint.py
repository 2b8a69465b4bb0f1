"""The checkpoint: pages from the root down ("Checkpoint" in `docs/format.md`).

A page is believed if its pointer's checksum, its envelope and its body's length agree; so no page
can stand for another one, or for itself a second time, and what is read is bounded by what the
devices hold. What is lost is named and left out: rows of the table, a directory (then all its
blocks are lost), a leaf (the same). Called by `remains` (table, catalog, directories) and `content`
(the map).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stripewell.recover.catalog import Catalog
from stripewell.recover.problems import Problems
from stripewell.recover.root import MAX_DATA, MAX_PARITY, Pointer, Root, parse_pointer
from stripewell.recover.stripes import Rows, Stripes, row_dtype
from stripewell.recover.values import U32, U64, Unusable, integer, json_object, sequence

LEAF, DIRECTORY, TABLE, TOP = 1, 2, 3, 4
LEAF_BLOCKS = 512
DIRECTORY_LEAVES = 256
#: magic, crc, revision, kind, form, layer, number, generation, bytes of body
_ENVELOPE = struct.Struct("<4sIHBBIQQI")
_ENVELOPE_BYTES = 40
_DENSE, _SPARSE = 0, 1
_TABLE_ROWS = 128
_MOST_BODY = {
    LEAF: 14 * LEAF_BLOCKS,
    DIRECTORY: 24 * DIRECTORY_LEAVES,
    TABLE: _TABLE_ROWS * (24 + 6 * (MAX_DATA + MAX_PARITY)),
    TOP: 256 << 10,
}
#: What is taken of the top page, all parts together.
_MOST_TOP = 64 << 20
_POINTER = [("stripe", "<u8"), ("offset", "<u4"), ("length", "<u4"), ("crc", "<u4")]
_DIRECTORY_ROW = np.dtype(
    [("leaf", "<u4"), ("length", "<u4"), ("stripe", "<u8"), ("offset", "<u4"), ("crc", "<u4")]
)
_DIRECTORY_AT = np.dtype([("number", "<u8"), *_POINTER])
#: An entry that no location can be: the tag of a hole, with bits that a hole does not have.
LOST = np.uint64(1)

Entries = tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]


class Checkpoint:
    """Where the map's directories are. `load` fills in stripes and catalog, too."""

    def __init__(self, stripes: Stripes, catalog: Catalog, problems: Problems) -> None:
        self._stripes = stripes
        self._catalog = catalog
        self._problems = problems
        self._directories: dict[int, npt.NDArray[np.void]] = {}

    async def load(self, root: Root) -> None:
        """Read the top page and the stripe table. Raises Unusable if there is nothing to go on."""
        if not root.top:
            return
        top = await self._top(root.top)
        width = integer(top.get("width"), "width", MAX_DATA + MAX_PARITY, 1)
        self._catalog.load(top.get("catalog"))
        seen: set[int] = set()
        rows = [await self._table(row, width, seen) for row in sequence(top.get("table"), "table")]
        known = [page for page in rows if page is not None]
        if known and (wrong := self._stripes.load(np.concatenate(known))):
            self._problems.add(f"{wrong} rows of the stripe table make no sense")
        self._load_directories(sequence(top.get("directories"), "directories"))

    async def _top(self, pointers: Sequence[Pointer]) -> dict[str, Any]:
        body = bytearray()
        for number, pointer in enumerate(pointers):
            part = await self._page(pointer, TOP, 0, number)
            if part is None:
                raise Unusable(f"part {number} of the top page is lost")
            body += part[1]
            if len(body) > _MOST_TOP:
                raise Unusable(f"the top page is larger than {_MOST_TOP >> 20} MiB")
        return json_object(bytes(body), "the top page")

    async def _table(self, value: object, width: int, seen: set[int]) -> Rows | None:
        """The rows of one page; None, and a problem, if it is lost or was `seen` already."""
        try:
            number, *pointer = sequence(value, "a table page", 5)
            number = integer(number, "a table page's number", U64)
            if number in seen:
                raise Unusable(f"page {number} is there twice")
            seen.add(number)
            found = await self._page(parse_pointer(pointer), TABLE, 0, number)
            if found is None:
                raise Unusable(f"page {number} is lost")
            return np.frombuffer(found[1], row_dtype(width))
        except (Unusable, ValueError) as error:
            self._problems.add(f"a page of the stripe table cannot be used: {error}")
            return None

    def _load_directories(self, rows: list[Any]) -> None:
        found: dict[int, list[tuple[int, ...]]] = {}
        for row in rows:
            try:
                layer, number, *pointer = sequence(row, "a directory", 6)
                layer = integer(layer, "a directory's layer", U32)
                number = integer(number, "a directory's number", U32)
                found.setdefault(layer, []).append((number, *parse_pointer(pointer)))
            except Unusable as error:
                self._problems.add(f"a directory of the map cannot be used: {error}")
        for layer, places in found.items():
            self._directories[layer] = np.unique(np.array(places, _DIRECTORY_AT))

    # -- the map -------------------------------------------------------------------------------

    def directories(self, layer: int) -> dict[int, Pointer]:
        """The directories of a layer by number, ascending."""
        rows = self._directories.get(layer)
        if rows is None:
            return {}
        return {number: Pointer(*pointer) for number, *pointer in rows.tolist()}

    async def directory(self, layer: int, number: int, pointer: Pointer) -> Leaves | None:
        """Pointers to the leaves of a directory, by their place in it; None if it is lost."""
        page = await self._page(pointer, DIRECTORY, layer, number)
        if page is None or len(page[1]) % _DIRECTORY_ROW.itemsize:
            return None
        rows = np.frombuffer(page[1], _DIRECTORY_ROW).tolist()
        leaves = {leaf: Pointer(stripe, at, length, crc) for leaf, length, stripe, at, crc in rows}
        ordered = list(leaves) == sorted(leaves) and len(leaves) == len(rows)
        return leaves if ordered and all(leaf < DIRECTORY_LEAVES for leaf in leaves) else None

    async def leaf(self, layer: int, number: int, pointer: Pointer) -> Entries | None:
        """Locations and checksums of a leaf's 512 blocks; None if it is lost."""
        page = await self._page(pointer, LEAF, layer, number)
        return None if page is None else _entries(*page)

    async def _page(
        self, pointer: Pointer, kind: int, layer: int, number: int
    ) -> tuple[int, bytes] | None:
        """(form, body) of the page that is meant; None if it is lost, or another one."""
        if not _ENVELOPE_BYTES <= pointer.length <= _ENVELOPE_BYTES + _MOST_BODY[kind] + 8:
            return None
        data = await self._stripes.page(pointer)
        if data is None:
            return None
        magic, _, revision, found, form, *where, _, length = _ENVELOPE.unpack_from(data)
        if (magic, revision, found) != (b"SWPG", 1, kind) or where != [layer, number]:
            return None
        body = data[_ENVELOPE_BYTES : _ENVELOPE_BYTES + length]
        return (form, body) if len(body) == length <= _MOST_BODY[kind] else None


Leaves = dict[int, Pointer]


def _entries(form: int, body: bytes) -> Entries | None:
    """What the body of a leaf says."""
    count = LEAF_BLOCKS if form == _DENSE else len(body) // 14
    if form not in (_DENSE, _SPARSE) or len(body) != count * (12 if form == _DENSE else 14):
        return None
    found, sums = np.frombuffer(body, "<u8", count), np.frombuffer(body, "<u4", count, 8 * count)
    if form == _DENSE:
        return found.astype(np.uint64), sums.astype(np.uint32)
    index = np.frombuffer(body, "<u2", count, 12 * count).astype(np.int64)
    if count and (index[-1] >= LEAF_BLOCKS or (np.diff(index) <= 0).any()):
        return None
    locations, crcs = np.zeros(LEAF_BLOCKS, np.uint64), np.zeros(LEAF_BLOCKS, np.uint32)
    locations[index], crcs[index] = found, sums
    return locations, crcs
