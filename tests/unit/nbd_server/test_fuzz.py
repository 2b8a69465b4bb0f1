"""Any bytes give valid replies or a protocol error, nothing else, and memory stays bounded."""

from __future__ import annotations

import asyncio
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_server.counters import Counters
from nbd_server.errors import ProtocolError
from nbd_server.handshake import Agreement, Handshake, Security
from nbd_server.limits import Limits
from nbd_server.replies import Framing
from nbd_server.requests import EXTENDED_HEADER, INLINE_PAYLOAD, Request, parse
from nbd_server.transmission import Transmission, buffer_pool, reply_buffer_size
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire
from tests.unit.nbd_server.test_handshake import exports

SIZE = 65536
LIMITS = Limits(payload_bytes=8192, batch_bytes=4096, batch_requests=8)

names = st.sampled_from(["vol", "", "ro", "no", "dead", "v\0l", "x" * 4097])
queries = st.lists(st.sampled_from(["base:allocation", "base:", "qemu:", ""]), max_size=3)
option_data = st.one_of(
    st.binary(max_size=40),
    st.builds(wire.info, names, st.integers(0, 65535)),
    st.builds(lambda name, asked: wire.meta(name, *asked), names, queries),
)
option = st.one_of(
    st.builds(wire.option, st.integers(0, 13), option_data),
    st.builds(
        lambda number, data, length: wire.option(number, data, length=length),
        st.integers(0, 13),
        option_data,
        st.one_of(st.integers(0, 99), st.integers(0, 2**32 - 1)),
    ),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(option, max_size=8), st.integers(0, 3), st.integers(1, 64), st.sampled_from(Security)
)
def test_negotiation(options: list[bytes], flags: int, step: int, security: Security) -> None:
    handshake = Handshake(exports(), Limits(option_bytes=4200), security)
    stream = wire.client_flags(flags) + b"".join(options)
    kept = replies = b""
    for at in range(0, len(stream), step):
        kept += stream[at : at + step]
        while kept and not (handshake.outcome or handshake.aborted or handshake.starttls):
            try:
                used = handshake.receive(memoryview(kept))
            except ProtocolError:
                return
            replies += handshake.replies()
            kept = kept[used:]
            if not used:
                assert len(kept) < 16 + 4200
                break
    assert security is not Security.REQUIRED or handshake.outcome is None
    if handshake.outcome is None:
        for number, kind, data in wire.option_replies(replies):
            assert 0 <= number < 2**32
            assert kind in range(1, 5) or kind >> 31
            assert kind != wire.ACK or not data


offsets = st.one_of(st.integers(0, SIZE + 1), st.integers(0, 2**64 - 1))
flags = st.one_of(st.just(0), st.sampled_from([wire.DF, wire.REQ_ONE, 32]), st.integers(0, 65535))


def requests(*, extended: bool) -> st.SearchStrategy[list[bytes]]:
    """Requests with any fields, writes, and noise."""
    encode = wire.extended if extended else wire.request
    longest = 2**64 - 1 if extended else 2**32 - 1
    lengths = st.one_of(st.integers(0, 5000), st.integers(0, longest))
    cookies = st.integers(0, 2**64 - 1)
    carries = st.integers(0, 7) if extended else st.just(wire.WRITE)

    def carried(kind: int, cookie: int, offset: int, payload: bytes) -> bytes:
        mark = wire.PAYLOAD if extended else 0
        return encode(kind, cookie, offset, len(payload), mark, payload)

    status = st.builds(lambda n, ids: struct.pack(f">Q{len(ids)}I", n, *ids), lengths, contexts)
    payloads = st.one_of(st.binary(max_size=300), status)
    one = st.one_of(
        st.builds(encode, st.integers(0, 9), cookies, offsets, lengths, flags),
        st.builds(carried, carries, cookies, offsets, payloads),
        st.binary(max_size=40),
    )
    return st.lists(one, max_size=30)


contexts = st.lists(st.integers(0, 3), max_size=4)
FRAMINGS = {
    "simple": Framing(structured=False),
    "structured": Framing(structured=True),
    "extended": Framing(structured=True, extended=True),
}


@pytest.mark.parametrize("name", FRAMINGS)
@settings(max_examples=200, deadline=None)
@given(st.data(), st.booleans(), st.sampled_from([1, 512]))
def test_requests(name: str, data: st.DataObject, read_only: bool, alignment: int) -> None:
    """Every request gets exactly one answer, at once or from its own task."""
    framing = FRAMINGS[name]
    export = MemoryExport("vol", SIZE, read_only=read_only)
    export.try_write(SIZE // 4, memoryview(b"x" * 5000))
    chosen = {1: "base:allocation", 2: "test:written"} if framing.structured else {}
    agreement = Agreement(export, framing, chosen, alignment)
    transmission = Transmission(agreement, LIMITS, Counters(), buffer_pool(LIMITS))
    out = memoryview(bytearray(reply_buffer_size(LIMITS)))
    stream = memoryview(b"".join(data.draw(requests(extended=framing.extended))))
    while True:
        batch = parse(stream, LIMITS, extended=framing.extended)
        assert len(batch.requests) <= LIMITS.batch_requests
        end, later = transmission.answer(batch.requests, stream, out)
        answers = wire.decode_any(bytes(out[:end]), batch.requests)
        waiting = sorted(r[2] for r in later)
        assert sorted([*answers, *waiting]) == sorted(r[2] for r in batch.requests)
        for one in later:
            asyncio.run(carried_out(transmission, one, stream))
        stream = stream[batch.consumed :]
        if not batch.bounded:
            break
        assert batch.consumed
    if batch.violation is None and batch.partial is None and not batch.disconnect:
        assert len(stream) < EXTENDED_HEADER.size + INLINE_PAYLOAD


async def carried_out(transmission: Transmission, request: Request, stream: memoryview) -> None:
    payload = stream[request[5] : request[5] + request[4]]
    reply, _ = await transmission.perform(request, payload)
    assert wire.decode_any(bytes(reply), [request]) == [request[2]]


def test_random_bytes_are_refused_at_the_first_header() -> None:
    noise = random.Random(7)
    for n in range(200):
        batch = parse(memoryview(noise.randbytes(64)), LIMITS, extended=bool(n % 2))
        assert batch.violation is not None
        assert not batch.requests
