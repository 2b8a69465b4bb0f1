"""The top page: where table pages and directories are, the catalog, and the count of blocks. Pure.

Decoded into values that the engine may rely on; the catalog is decoded by `pool.catalog`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pool.errors import FormatError
from pool.format.fields import Fields, numbers, parse
from pool.format.page import Pointer

#: Larger numbers are in no row of the top page.
NUMBER_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Top:
    """The top page, all parts joined."""

    width: int
    used: int
    #: Pages of the stripe table, by number: all from 0 on are there.
    table: dict[int, Pointer]
    #: (layer, number) of each directory.
    directories: dict[tuple[int, int], Pointer]
    catalog: dict[str, Any]


def decode(body: bytes, *, width: int, directory_max: int) -> Top:
    """Read the joined parts. `width` is what the root says. Raises FormatError."""
    fields = Fields(parse(body, "top page"), "top page")
    fields.number("width", width, width)
    table: dict[int, Pointer] = {}
    for at, row in enumerate(fields.items("table")):
        page, *where = numbers(row, 5, NUMBER_MAX, f"top page.table[{at}]")
        table[page] = Pointer(*where)
    if table.keys() != set(range(len(table))) or len(table) != len(fields.items("table")):
        raise FormatError("top page.table does not name each table page once")
    directories: dict[tuple[int, int], Pointer] = {}
    for at, row in enumerate(fields.items("directories")):
        layer, chunk, *where = numbers(row, 6, NUMBER_MAX, f"top page.directories[{at}]")
        if chunk > directory_max or (layer, chunk) in directories:
            raise FormatError(f"top page.directories[{at}] is beyond any volume, or there twice")
        directories[layer, chunk] = Pointer(*where)
    catalog = fields.below("catalog").value
    return Top(width, fields.number("used", 0, NUMBER_MAX), table, directories, catalog)
