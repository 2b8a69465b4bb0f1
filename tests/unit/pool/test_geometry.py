"""Geometry and layout: everything fits, nothing overlaps."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BLOCK_SIZE
from pool.format.geometry import (
    HEADER_FIXED,
    HEADER_PER_BLOCK,
    HEADER_PER_DATA_BLOCK,
    KIB,
    MAX_DATA,
    MAX_PARITY,
    MIB,
    default_journal_bytes,
    default_slot_bytes,
    geometry,
    layout,
)

codes = st.tuples(st.integers(1, MAX_DATA), st.integers(0, MAX_PARITY))


@given(codes, st.integers(1, 512))
def test_a_stripe_fills_its_slots_and_its_header_describes_all_of_it(
    code: tuple[int, int], slot_blocks: int
) -> None:
    try:
        shape = geometry(*code, slot_blocks)
    except ValueError:
        assert slot_blocks <= 2
        return
    assert (shape.data, shape.parity) == code
    assert shape.header_blocks + shape.shard_blocks == slot_blocks
    assert min(shape.header_blocks, shape.shard_blocks) >= 1

    def header(shard_blocks: int) -> int:
        data = shape.data * shard_blocks * HEADER_PER_DATA_BLOCK
        return HEADER_FIXED + data + shape.shards * shard_blocks * HEADER_PER_BLOCK

    assert header(shape.shard_blocks) <= shape.header_bytes
    # One header block less would not do.
    assert shape.header_blocks == 1 or (
        header(shape.shard_blocks + 1) > shape.header_bytes - BLOCK_SIZE
    )
    assert shape.blocks == shape.data * shape.shard_blocks
    assert shape.shard_bytes == shape.shard_blocks * BLOCK_SIZE


@given(
    st.integers(0, 4096 * MIB),
    st.integers(16, 4096).map(lambda blocks: blocks * BLOCK_SIZE),
    st.integers(2, 256),
)
def test_the_parts_of_a_device_do_not_overlap(
    size: int, journal_bytes: int, slot_blocks: int
) -> None:
    try:
        where = layout(size, journal_bytes, slot_blocks)
    except ValueError:
        fixed = 4 * (64 * KIB if size < 1024 * MIB else 256 * KIB) + journal_bytes
        assert size < fixed + 4 * slot_blocks * BLOCK_SIZE + BLOCK_SIZE
        return
    parts = [(offset, where.root_bytes) for slot in (0, 1) for offset in where.root_offsets(slot)]
    parts.append((where.journal_offset, where.journal_bytes))
    parts.append((where.slot_offset(0), where.slots * where.slot_bytes))
    parts.sort()
    assert parts[0][0] == 0
    assert parts[-1][0] + parts[-1][1] == where.size <= size < where.size + BLOCK_SIZE
    assert all(start + length <= parts[i + 1][0] for i, (start, length) in enumerate(parts[:-1]))
    assert all(start % BLOCK_SIZE == 0 for start, _ in parts)
    # No slot is wasted.
    end = where.slot_offset(where.slots)
    assert where.size - 2 * where.root_bytes - end < where.slot_bytes


@pytest.mark.parametrize("size", [MIB, 63 * MIB, 64 * MIB, 511 * MIB, 512 * MIB, 1 << 40, 1 << 44])
def test_the_defaults_fit_the_device(size: int) -> None:
    slot, journal = default_slot_bytes(size), default_journal_bytes(size)
    assert slot % BLOCK_SIZE == 0
    assert journal % (64 * KIB) == 0
    assert 64 * KIB <= journal <= 256 * MIB
    assert layout(size, journal, slot // BLOCK_SIZE).slots >= 16
