"""Checksums: the published polynomial, block by block."""

from __future__ import annotations

import random
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pool.checksum import block_crcs, crc, verify

BLOCK = 4096


@pytest.mark.parametrize(
    ("data", "expected"),
    [  # RFC 3720, B.4, and the check value of every CRC catalogue
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_known_vectors_in_any_kind_of_buffer(data: bytes, expected: int) -> None:
    assert crc(data) == crc(bytearray(data)) == crc(memoryview(data)) == expected


def test_one_checksum_for_each_block() -> None:
    data = random.Random(1).randbytes(5 * BLOCK)
    blocks = [data[start : start + BLOCK] for start in range(0, len(data), BLOCK)]
    assert block_crcs(memoryview(data)) == [crc(block) for block in blocks]
    assert block_crcs(memoryview(b"")) == []


@given(st.integers(1, 6), st.data())
def test_any_flipped_bit_is_found_in_its_block(blocks: int, draw: st.DataObject) -> None:
    data = bytearray(random.Random(blocks).randbytes(blocks * BLOCK))
    crcs = block_crcs(memoryview(data))
    assert verify(memoryview(data), crcs) == -1
    bit = draw.draw(st.integers(0, len(data) * 8 - 1))
    data[bit // 8] ^= 1 << bit % 8
    assert verify(memoryview(data), crcs) == bit // 8 // BLOCK
    assert verify(memoryview(data), array("I", crcs)) == bit // 8 // BLOCK


def test_the_first_of_several_bad_blocks_is_named() -> None:
    data = bytearray(4 * BLOCK)
    crcs = array("I", block_crcs(memoryview(data)))
    assert verify(memoryview(data), crcs) == -1
    data[2 * BLOCK] = data[4 * BLOCK - 1] = 1
    assert verify(memoryview(data), crcs) == 2


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK + 512])
def test_parts_of_blocks_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="whole 4096 byte blocks"):
        block_crcs(memoryview(bytes(size)))


def test_wider_items_and_wrong_counts_are_refused() -> None:
    view = memoryview(bytes(2 * BLOCK))
    with pytest.raises(ValueError, match="whole 4096 byte blocks"):
        block_crcs(view.cast("I"))
    with pytest.raises(ValueError, match="1 checksums given for 2 blocks"):
        verify(view, [0])
