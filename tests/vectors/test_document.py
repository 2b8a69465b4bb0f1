"""`docs/format.md` is the format: its tables equal the code, its examples the golden image."""

from __future__ import annotations

import re
import struct
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import zfec

from backends.base import BLOCK_SIZE
from pool import checkpoint, table
from pool.format import location, page, record, stripe, superblock
from pool.format.geometry import MAX_DATA, MAX_PARITY, geometry, layout
from tests.vectors.test_vectors import images

TEXT = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
CODES = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}


def rows(name: str) -> list[tuple[str, str, str]]:
    """(offset, type, field) of the table behind a marker."""
    part = TEXT.split(f"<!-- {name} -->", 1)[1].lstrip().split("\n\n", 1)[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
    assert cells[0] == ["offset", "type", "field"]
    return [(offset, kind, field) for offset, kind, field in cells[2:]]


@pytest.mark.parametrize(
    "name",
    [
        "pool.format.superblock.HEAD",
        "pool.format.stripe.HEAD",
        "pool.format.page.ENVELOPE",
        "pool.format.record.HEAD",
        "pool.format.record.EXTENT",
    ],
)
def test_tables_of_structures_equal_the_code(name: str) -> None:
    """Offsets are contiguous and the types spell the very struct that the code uses."""
    module, _, constant = name.rpartition(".")
    packed: struct.Struct = getattr(import_module(module), constant)
    codes = "<"
    for offset, kind, _ in rows(name):
        assert struct.calcsize(codes) == int(offset)
        codes += f"{kind.split()[0]}s" if kind.endswith("bytes") else CODES[kind]
    assert codes == packed.format


@pytest.mark.parametrize("width", [3, 12, 40])
@pytest.mark.parametrize("name", ["pool.table.row_dtype", "pool.checkpoint.DIRECTORY_DTYPE"])
def test_tables_of_arrays_equal_the_code(name: str, width: int) -> None:
    """The same for rows that the code reads with numpy; `w` is the table's width."""
    dtype = table.row_dtype(width) if "row" in name else checkpoint.DIRECTORY_DTYPE
    assert dtype.names is not None
    assert dtype.fields is not None
    documented = rows(name)
    assert len(documented) == len(dtype.names)
    for field, (offset, kind, text) in zip(dtype.names, documented, strict=True):
        found, at = dtype.fields[field][:2]
        base, _, times = kind.partition(" \N{MULTIPLICATION SIGN} ")
        before, _, factor = offset.partition("+")
        assert at == int(before) + (2 * width if factor == "2*w" else 0)
        assert found.base == np.dtype(f"<u{int(base[1:]) // 8}")
        assert found.shape == ((width,) if times == "w" else ())
        assert re.match(field, text)


def test_the_worked_example_has_the_bytes_of_the_golden_image() -> None:
    """Every line of every dump."""
    found = images("small")
    lines = 0
    for part in TEXT.split("<!-- bytes ")[1:]:
        image = found[part.split(" ", 1)[0]]
        assert isinstance(image, bytes)
        for line in part.split("```")[1].strip().splitlines():
            offset, expected = int(line[:6], 16), bytes.fromhex(line[8:55])
            assert image[offset : offset + 16] == expected, line
            lines += 1
    assert lines == 22


def test_numbers_in_the_text_are_those_of_the_code() -> None:
    """Magics, revisions, kinds, limits and formulas that are not in tables."""
    assert (superblock.MAGIC, superblock.HEAD_BYTES) == (b"STRIPEWL", 256)
    assert (stripe.MAGIC, page.MAGIC, record.MAGIC) == (b"SWSTRIPE", b"SWPG", b"SWJOURNL")
    assert {m.REVISION for m in (superblock, stripe, page, record)} == {1}
    assert superblock.INCOMPATIBLE == 0
    assert (stripe.KIND_DATA, stripe.KIND_META) == (1, 2)
    assert (stripe.CODEC_RS_ZFEC, stripe.CRYPTO_NONE) == (1, 0)
    kinds = (page.KIND_LEAF, page.KIND_DIRECTORY, page.KIND_TABLE, page.KIND_TOP)
    assert kinds == (1, 2, 3, 4)
    extents = (record.KIND_DATA, record.KIND_TRIM, record.KIND_ZERO, record.KIND_CATALOG)
    assert extents == (1, 2, 3, 4)
    assert (record.FLAG_MORE, record.FLAG_TERM_START) == (1, 2)
    assert (MAX_DATA, MAX_PARITY, table.PAGE_ROWS, table.NOWHERE) == (32, 8, 128, 65535)
    assert location.in_stripe(12, 0, 0) == 0x8000000003000000
    assert (location.TAG_JOURNAL, location.TAG_STRIPE, location.TAG_ZERO) == (1, 2, 3)
    assert {layout(size, 1 << 20, 16).root_bytes for size in (32 << 20, 1 << 30)} == {65536, 262144}
    where = layout((3 << 20) + 5, 65536, 4)
    assert (where.size, where.journal_offset, where.slots_offset) == (3 << 20, 0x20000, 0x30000)


@pytest.mark.parametrize(("k", "m", "slot"), [(2, 1, 4), (4, 2, 64), (8, 3, 64), (32, 8, 256)])
def test_the_formula_for_header_blocks(k: int, m: int, slot: int) -> None:
    """The smallest number of blocks that holds the header of the rest."""
    fitting = [
        h for h in range(1, slot) if 128 + (slot - h) * (20 * k + 4 * (k + m)) <= BLOCK_SIZE * h
    ]
    shape = geometry(k, m, slot)
    assert (shape.header_blocks, shape.shard_blocks) == (fitting[0], slot - fitting[0])


def _times(a: int, b: int) -> int:
    """Product in GF(2^8) with polynomial 0x11d."""
    product = 0
    while b:
        product ^= a if b & 1 else 0
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return product


def _power(a: int, exponent: int) -> int:
    result = 1
    for _ in range(exponent):
        result = _times(result, a)
    return result


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_the_generator_matrix_of_the_text_is_that_of_zfec(k: int, m: int) -> None:
    """V·T⁻¹: zfec's shares of unit vectors are its columns, so shares times T must be V."""
    v = [[1] + [0] * (k - 1)] + [
        [_power(_power(2, r - 1), c) for c in range(k)] for r in range(1, k + m)
    ]
    units = [[bytes([row == column]) for row in range(k)] for column in range(k)]
    columns = [zfec.Encoder(k, k + m).encode(unit) for unit in units]
    for row in range(k + m):
        for c in range(k):
            total = 0
            for j in range(k):
                total ^= _times(columns[j][row][0], v[j][c])
            assert total == v[row][c]
