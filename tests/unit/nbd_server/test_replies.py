"""Encoded replies, byte for byte, and the counters next to them."""

from __future__ import annotations

import struct

import pytest

from nbd_server import replies
from nbd_server.counters import Counters
from tests.unit.nbd_server import wire

COOKIE = 0x0102030405060708


def test_simple_replies() -> None:
    assert replies.done(COOKIE) == bytes.fromhex("67446698 00000000 0102030405060708")
    failed = replies.failed(COOKIE, 28, "full", structured=False)
    assert failed == bytes.fromhex("67446698 0000001c 0102030405060708")
    assert replies.read_header(COOKIE, 9, 5, structured=False) == replies.done(COOKIE)


def test_structured_read_header() -> None:
    assert replies.read_header(COOKIE, 0x55, 4096, structured=True) == bytes.fromhex(
        "668e33ef 0001 0001 0102030405060708 00001008 0000000000000055"
    )


def test_structured_error() -> None:
    assert replies.failed(COOKIE, 28, "full", structured=True) == (
        bytes.fromhex("668e33ef 0001 8001 0102030405060708 0000000a 0000001c 0004") + b"full"
    )


def test_long_texts_are_cut_between_characters() -> None:
    for pad in range(4):
        reply = replies.failed(1, 5, "x" * pad + "\N{GRINNING FACE}" * 100, structured=True)
        assert len(reply) <= replies.MAX_SHORT_REPLY
        (answer,) = wire.decode(reply, {})
        assert answer.text.startswith("x" * pad + "\N{GRINNING FACE}" * 49)


def test_an_empty_read_has_no_data_chunk() -> None:
    assert replies.empty(COOKIE, wire.READ, structured=True) == bytes.fromhex(
        "668e33ef 0001 0000 0102030405060708 00000000"
    )
    assert replies.empty(COOKIE, wire.READ, structured=False) == replies.done(COOKIE)
    assert replies.empty(COOKIE, wire.TRIM, structured=True) == replies.done(COOKIE)


def test_block_status() -> None:
    assert replies.block_status(COOKIE, 1, [(4096, 0), (8192, 3)]) == bytes.fromhex(
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
