"""Encoded replies, byte for byte, and the counters next to them."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_server import replies
from nbd_server.counters import Counters
from tests.unit.nbd_server import wire

COOKIE = 0x0102030405060708
SIMPLE = replies.Framing(structured=False)
STRUCTURED = replies.Framing(structured=True)
EXTENDED = replies.Framing(structured=True, extended=True)


def header(framing: replies.Framing, offset: int, length: int) -> bytes:
    """What precedes the data of a read."""
    out = bytearray(framing.read_size)
    framing.pack_data(memoryview(out), 0, COOKIE, offset, offset, length, done=True)
    return bytes(out)


def test_simple_replies() -> None:
    assert SIMPLE.done(COOKIE, 9) == bytes.fromhex("67446698 00000000 0102030405060708")
    failed = SIMPLE.failed(COOKIE, 9, 28, "full")
    assert failed == bytes.fromhex("67446698 0000001c 0102030405060708")
    assert header(SIMPLE, 9, 5) == SIMPLE.done(COOKIE, 9)


def test_structured_read_header() -> None:
    assert header(STRUCTURED, 0x55, 4096) == bytes.fromhex(
        "668e33ef 0001 0001 0102030405060708 00001008 0000000000000055"
    )


def test_structured_error() -> None:
    assert STRUCTURED.failed(COOKIE, 9, 28, "full") == (
        bytes.fromhex("668e33ef 0001 8001 0102030405060708 0000000a 0000001c 0004") + b"full"
    )


def test_long_texts_are_cut_between_characters() -> None:
    for pad in range(4):
        reply = EXTENDED.failed(1, 0, 5, "x" * pad + "\N{GRINNING FACE}" * 100, 7)
        assert len(reply) <= replies.MAX_SHORT_REPLY
        (answer,) = wire.decode(reply, {})
        assert answer.text.startswith("x" * pad + "\N{GRINNING FACE}" * 49)


def test_an_empty_read_has_no_data_chunk() -> None:
    assert STRUCTURED.empty(COOKIE, wire.READ, 9) == bytes.fromhex(
        "668e33ef 0001 0000 0102030405060708 00000000"
    )
    assert SIMPLE.empty(COOKIE, wire.READ, 9) == SIMPLE.done(COOKIE, 9)
    assert STRUCTURED.empty(COOKIE, wire.TRIM, 9) == SIMPLE.done(COOKIE, 9)


def test_block_status() -> None:
    assert STRUCTURED.status(COOKIE, 9, 1, [(4096, 0), (8192, 3)], done=True) == bytes.fromhex(
        "668e33ef 0001 0005 0102030405060708 00000014"
    ) + struct.pack(">5I", 1, 4096, 0, 8192, 3)


@pytest.mark.parametrize(
    ("nanoseconds", "bucket"),
    [(0, 0), (999, 0), (1000, 1), (1999, 1), (2000, 2), (1_000_000, 10), (10**18, 31)],
)
def test_latency_buckets(nanoseconds: int, bucket: int) -> None:
    counters = Counters()
    counters.observe(nanoseconds, 3)
    assert counters.latency == [3 if index == bucket else 0 for index in range(32)]


def test_extended_chunks_repeat_the_offset_of_the_request() -> None:
    head = "6e8a278c 0001 {} 0102030405060708 0000000000000055 "
    assert header(EXTENDED, 0x55, 4096) == bytes.fromhex(
        head.format("0001") + "0000000000001008 0000000000000055"
    )
    assert EXTENDED.done(COOKIE, 0x55) == bytes.fromhex(head.format("0000") + "0000000000000000")
    assert EXTENDED.empty(COOKIE, wire.READ, 0x55) == EXTENDED.done(COOKIE, 0x55)
    assert EXTENDED.hole(COOKIE, 0x55, 0x60, 512, done=True) == bytes.fromhex(
        head.format("0002") + "000000000000000c 0000000000000060 00000200"
    )
    assert EXTENDED.failed(COOKIE, 0x55, 5, "lost", 0x60) == (
        bytes.fromhex(head.format("8002") + "0000000000000012 00000005 0004")
        + b"lost"
        + bytes.fromhex("0000000000000060")
    )
    assert EXTENDED.status(COOKIE, 0x55, 2, [(1 << 40, 1)], done=True) == bytes.fromhex(
        head.format("0006") + "0000000000000018 00000002 00000001 0000010000000000 0000000000000001"
    )


@pytest.mark.parametrize("framing", [STRUCTURED, EXTENDED], ids=["structured", "extended"])
@given(st.data())
def test_holes_and_data_make_the_whole(framing: replies.Framing, data: st.DataObject) -> None:
    """Any holes, at the edges and beside each other, of any length that is allowed."""
    lengths = data.draw(st.lists(st.integers(replies.MIN_HOLE, 3000), min_size=1, max_size=7))
    hollow = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)))
    length, start = sum(lengths), data.draw(st.integers(0, 9))
    out = bytearray(start + framing.read_size + length)
    expected = bytearray()
    holes = []
    for size, empty in zip(lengths, hollow, strict=True):
        if empty:
            holes.append((len(expected), size))
        expected += bytes(size) if empty else bytes([1 + len(expected) % 255]) * size
    filled = bytearray(expected)
    for first, size in holes:
        filled[first : first + size] = b"?" * size
    out[start + framing.read_size :] = filled
    end = replies.pack_sparse(framing, memoryview(out), start, COOKIE, 4096, length, holes)
    answer, rest = wire.decode_one(bytes(out[start:end]), {})
    assert not rest
    assert answer.data == expected
    assert sorted(answer.holes) == [(4096 + first, size) for first, size in holes]
