"""The parser of the transmission phase, and what it is judged by."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from nbd_server.limits import Limits
from nbd_server.requests import INLINE_PAYLOAD, Batch, Request, Rules, parse, refusal
from tests.unit.nbd_server import wire

SIZE = 1 << 30
RULES = Rules(False, structured=True, extended=False, contexts=1, payload_bytes=32 << 20)
TAIL = wire.request(wire.READ, 99, length=1)[:27]


def whole(data: bytes, limits: Limits | None = None) -> Batch:
    return parse(memoryview(data), limits or Limits())


def bytewise(data: bytes) -> tuple[list[tuple[Request, bytes]], bytes]:
    """All requests with their payloads, and what was left, fed a byte at a time."""
    found, kept = [], b""
    for byte in data:
        kept += bytes([byte])
        batch = whole(kept)
        found += with_payloads(batch, kept)
        kept = kept[batch.consumed :]
    return found, kept


def with_payloads(batch: Batch, data: bytes) -> list[tuple[Request, bytes]]:
    return [
        ((*request[:5], 0), data[request[5] : request[5] + request[4]] * (request[1] == 1))
        for request in batch.requests
    ]


STREAMS = {
    "one read": wire.request(wire.READ, 1, 4096, 512),
    "reads": b"".join(wire.request(wire.READ, n, n * 512, 512) for n in range(5)),
    "a write between reads": wire.request(wire.READ, 1, 0, 1)
    + wire.write(2, 5, b"payload")
    + wire.request(wire.READ, 3, 0, 1),
    "a write of nothing": wire.write(1, 0, b"") + wire.request(wire.FLUSH, 2),
    "an unknown command": wire.request(42, 7, length=9)
    + wire.request(wire.TRIM, 8, length=1 << 31),
    "a payload that looks like a request": wire.write(1, 0, wire.request(wire.DISC)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_same_requests_whole_bytewise_and_with_more_behind(name: str) -> None:
    stream = STREAMS[name]
    batch = whole(stream)
    assert batch.consumed == len(stream)
    assert (batch.violation, batch.partial, batch.disconnect, batch.bounded) == (
        None,
        None,
        False,
        False,
    )
    followed = whole(stream + TAIL)
    assert followed == batch
    assert bytewise(stream + TAIL) == (with_payloads(batch, stream), TAIL)


def test_fields() -> None:
    batch = whole(wire.request(wire.READ, 2**64 - 1, 2**63, 2**32 - 1, flags=0xFFFF))
    assert batch.requests == [(0xFFFF, wire.READ, 2**64 - 1, 2**63, 2**32 - 1, 28)]


def test_nothing_behind_disc_is_looked_at() -> None:
    batch = whole(wire.request(wire.READ, 1, length=1) + wire.request(wire.DISC) + b"garbage" * 9)
    assert batch.disconnect
    assert batch.violation is None
    assert len(batch.requests) == 1


@pytest.mark.parametrize("magic", [0x12560953, 0x96744668, 0x25609514, 0x21E41C71, 0])
def test_other_magics_end_the_connection_behind_what_came_before(magic: int) -> None:
    bad = magic.to_bytes(4, "big") + bytes(24)
    batch = whole(wire.request(wire.READ, 1, length=1) + bad)
    assert len(batch.requests) == 1
    assert batch.violation is not None


def test_a_payload_above_the_limit_is_a_violation() -> None:
    limit = Limits().payload_bytes
    assert whole(wire.request(wire.WRITE, length=limit + 1)).violation is not None
    assert whole(wire.request(wire.WRITE, length=limit)).violation is None
    assert whole(wire.write(1, 0, b"12345"), Limits(payload_bytes=4)).violation is not None


def test_a_short_payload_is_waited_for_and_a_long_one_gets_a_buffer() -> None:
    short = wire.request(wire.WRITE, 1, 0, INLINE_PAYLOAD) + b"x"
    assert whole(short).consumed == 0
    assert whole(short).partial is None
    long = wire.request(wire.WRITE, 1, 0, INLINE_PAYLOAD + 1) + b"x"
    assert whole(long).consumed == 28
    assert whole(long).partial == (0, wire.WRITE, 1, 0, INLINE_PAYLOAD + 1, 0)


def test_batches_are_bounded_by_requests() -> None:
    stream = b"".join(wire.request(wire.READ, n, length=1) for n in range(10))
    batch = whole(stream, Limits(batch_requests=4))
    assert (len(batch.requests), batch.consumed, batch.bounded) == (4, 4 * 28, True)
    assert not whole(stream[: 4 * 28], Limits(batch_requests=4)).bounded


@pytest.mark.parametrize(
    ("lengths", "taken"), [([600, 400, 1], 2), ([1001, 1], 1), ([1, 1001], 1), ([500, 501], 1)]
)
def test_batches_are_bounded_by_bytes_read(lengths: list[int], taken: int) -> None:
    stream = b"".join(wire.request(wire.READ, n, length=n) for n in lengths)
    batch = whole(stream, Limits(batch_bytes=1000))
    assert (len(batch.requests), batch.bounded) == (taken, True)


ACCEPTED = [
    (wire.READ, 0, 0, 4096),
    (wire.READ, wire.FUA | wire.DF, SIZE - 1, 1),
    (wire.READ, 0, SIZE, 0),
    (wire.READ, 0, 0, 32 << 20),
    (wire.WRITE, wire.FUA, 511, 3),
    (wire.FLUSH, wire.FUA, 0, 0),
    (wire.FLUSH, 0, SIZE + 1, 7),
    (wire.TRIM, wire.FUA, 0, SIZE),
    (wire.ZEROES, wire.FUA | wire.NO_HOLE, 0, SIZE),
    (wire.STATUS, wire.FUA | wire.REQ_ONE, 0, SIZE),
    (wire.CACHE, wire.FUA, 0, SIZE),
    (wire.ZEROES, wire.FAST_ZERO, 0, SIZE),
]


@pytest.mark.parametrize("fields", ACCEPTED)
def test_accepted(fields: tuple[int, int, int, int]) -> None:
    kind, flags, offset, length = fields
    assert refusal((flags, kind, 1, offset, length, 0), SIZE, RULES) is None


PLAIN = Rules(False, structured=False, extended=False, contexts=0, payload_bytes=32 << 20)
LONG = Rules(False, structured=True, extended=True, contexts=1, payload_bytes=32 << 20)
COARSE = replace(RULES, alignment=512)
FROZEN = Rules(True, structured=True, extended=False, contexts=1, payload_bytes=32 << 20)
REFUSED = [
    (RULES, wire.READ, 0, SIZE - 1, 2, errno.EINVAL),
    (RULES, wire.READ, 0, 2**64 - 1, 1, errno.EINVAL),
    (RULES, wire.READ, 0, 0, (32 << 20) + 1, errno.EINVAL),
    (RULES, wire.READ, wire.NO_HOLE, 0, 1, errno.EINVAL),
    (RULES, wire.WRITE, 0, SIZE, 1, errno.ENOSPC),
    (RULES, wire.WRITE, wire.DF, 0, 1, errno.EINVAL),
    (RULES, wire.WRITE, 32, 0, 1, errno.EINVAL),
    (RULES, wire.FLUSH, wire.NO_HOLE, 0, 0, errno.EINVAL),
    (RULES, wire.TRIM, 0, SIZE, 1, errno.EINVAL),
    (RULES, wire.TRIM, wire.NO_HOLE, 0, 1, errno.EINVAL),
    (RULES, wire.CACHE, wire.DF, 0, 1, errno.EINVAL),
    (RULES, wire.CACHE, 0, SIZE, 1, errno.EINVAL),
    (RULES, wire.READ, wire.DF, 0, (32 << 20) + 1, errno.EOVERFLOW),
    (RULES, wire.ZEROES, 0, SIZE, 1, errno.ENOSPC),
    (RULES, wire.ZEROES, wire.DF, 0, 1, errno.EINVAL),
    (RULES, wire.STATUS, 0, SIZE, 1, errno.EINVAL),
    (RULES, wire.STATUS, 0, 0, 0, errno.EINVAL),
    (RULES, wire.STATUS, wire.DF, 0, 1, errno.EINVAL),
    (RULES, 8, 0, 0, 1, errno.EINVAL),
    (RULES, 65535, 0, 0, 0, errno.EINVAL),
    (PLAIN, wire.READ, wire.DF, 0, 1, errno.EINVAL),
    (RULES, wire.STATUS, wire.PAYLOAD, 0, 12, errno.EINVAL),
    (LONG, wire.READ, wire.PAYLOAD, 0, 1, errno.EINVAL),
    (LONG, wire.READ, 0, 0, 1 << 40, errno.EINVAL),
    (LONG, wire.STATUS, wire.PAYLOAD, 0, 7, errno.EINVAL),
    (LONG, wire.STATUS, wire.PAYLOAD, 0, 14, errno.EINVAL),
    (LONG, wire.STATUS, wire.PAYLOAD, 0, 20, errno.EINVAL),
    (COARSE, wire.READ, 0, 1, 512, errno.EINVAL),
    (COARSE, wire.WRITE, 0, 512, 1, errno.EINVAL),
    (COARSE, wire.ZEROES, 0, SIZE - 1, 512, errno.ENOSPC),
    (PLAIN, wire.STATUS, 0, 0, 1, errno.EINVAL),
    (FROZEN, wire.WRITE, 0, 0, 1, errno.EPERM),
    (FROZEN, wire.WRITE, 0, SIZE, 1, errno.EPERM),
    (FROZEN, wire.TRIM, 0, 0, 1, errno.EPERM),
    (FROZEN, wire.ZEROES, 0, 0, 1, errno.EPERM),
]


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: tuple[Rules, int, int, int, int, int]) -> None:
    rules, kind, flags, offset, length, code = case
    refused = refusal((flags, kind, 1, offset, length, 0), SIZE, rules)
    assert refused is not None
    assert refused[0] == code
    assert refused[1]


@pytest.mark.parametrize(
    ("kind", "flags", "length"),
    [
        (wire.WRITE, wire.PAYLOAD | wire.FUA, 4096),
        (wire.WRITE, 0, 4096),
        (wire.STATUS, wire.PAYLOAD, 8),
        (wire.STATUS, wire.PAYLOAD | wire.REQ_ONE, 12),
        (wire.TRIM, 0, SIZE),
    ],
)
def test_accepted_with_extended_headers(kind: int, flags: int, length: int) -> None:
    assert refusal((flags, kind, 1, 0, length, 0), SIZE, LONG) is None


def test_extended_requests_whole_and_bytewise() -> None:
    """Any of them may have a payload, which is never taken for requests."""
    payload = wire.extended(wire.DISC)
    stream = (
        wire.extended(wire.READ, 1, 5, 1 << 40)
        + wire.extended(wire.WRITE, 2, 0, len(payload), wire.PAYLOAD, payload)
        + wire.extended(wire.READ, 3, 0, len(payload), wire.PAYLOAD, payload)
        + wire.extended(wire.FLUSH, 4)
    )
    limits = Limits(batch_bytes=1 << 50)
    batch = parse(memoryview(stream), limits, extended=True)
    assert [request[2] for request in batch.requests] == [1, 2, 3, 4]
    assert batch.consumed == len(stream)
    kept, found = b"", []
    for byte in stream:
        kept += bytes([byte])
        part = parse(memoryview(kept), limits, extended=True)
        assert part.violation is None
        found += [request[:5] for request in part.requests]
        kept = kept[part.consumed :]
    assert found == [request[:5] for request in batch.requests]


def test_headers_of_the_other_kind_are_no_headers() -> None:
    assert parse(memoryview(wire.request(wire.FLUSH) + bytes(4)), Limits(), extended=True).violation
    assert parse(memoryview(wire.extended(wire.FLUSH)), Limits()).violation


def test_long_payloads_of_any_command_are_taken_off_the_stream() -> None:
    length = INLINE_PAYLOAD + 1
    head = wire.extended(wire.READ, 7, 0, length, wire.PAYLOAD)
    batch = parse(memoryview(head + b"x"), Limits(), extended=True)
    assert batch.partial is not None
    assert batch.partial[2] == 7
    assert batch.consumed == len(head)
    huge = wire.extended(wire.READ, 7, 0, (32 << 20) + 1, wire.PAYLOAD)
    assert parse(memoryview(huge), Limits(), extended=True).violation
