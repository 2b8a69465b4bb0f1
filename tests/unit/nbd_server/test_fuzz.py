"""Any bytes give valid replies or a protocol error, nothing else, and memory stays bounded."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_server.counters import Counters
from nbd_server.errors import ProtocolError
from nbd_server.handshake import Agreement, Handshake
from nbd_server.limits import Limits
from nbd_server.requests import HEADER, INLINE_PAYLOAD, parse
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
@given(st.lists(option, max_size=8), st.integers(0, 3), st.integers(1, 64))
def test_negotiation(options: list[bytes], flags: int, step: int) -> None:
    handshake = Handshake(exports(), Limits(option_bytes=4200))
    stream = wire.client_flags(flags) + b"".join(options)
    kept = replies = b""
    for at in range(0, len(stream), step):
        kept += stream[at : at + step]
        while kept and handshake.outcome is None and not handshake.aborted:
            try:
                used = handshake.receive(memoryview(kept))
            except ProtocolError:
                return
            replies += handshake.replies()
            kept = kept[used:]
            if not used:
                assert len(kept) < 16 + 4200
                break
    if handshake.outcome is None:
        for number, kind, data in wire.option_replies(replies):
            assert 0 <= number < 2**32
            assert kind in range(1, 5) or kind >> 31
            assert kind != wire.ACK or not data


request = st.one_of(
    st.builds(
        wire.request,
        st.integers(0, 9),
        st.integers(0, 2**64 - 1),
        st.one_of(st.integers(0, SIZE + 1), st.integers(0, 2**64 - 1)),
        st.one_of(st.integers(0, 5000), st.integers(0, 2**32 - 1)),
        st.one_of(st.just(0), st.integers(0, 65535)),
    ),
    st.builds(wire.write, st.integers(0, 9), st.integers(0, SIZE + 1), st.binary(max_size=300)),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(request, max_size=30), st.booleans(), st.booleans())
def test_requests(parts: list[bytes], structured: bool, read_only: bool) -> None:
    export = MemoryExport("vol", SIZE, read_only=read_only)
    agreement = Agreement(export, structured=structured, allocation=structured)
    transmission = Transmission(agreement, LIMITS, Counters(), buffer_pool(LIMITS))
    out = memoryview(bytearray(reply_buffer_size(LIMITS)))
    data = memoryview(b"".join(parts))
    while True:
        batch = parse(data, LIMITS)
        assert len(batch.requests) <= LIMITS.batch_requests
        end, later = transmission.answer(batch.requests, data, out)
        answers = wire.decode_any(bytes(out[:end]), batch.requests)
        waiting = sorted(r[2] for r in later)
        assert sorted([*answers, *waiting]) == sorted(r[2] for r in batch.requests)
        data = data[batch.consumed :]
        if not batch.bounded:
            break
        assert batch.consumed
    if batch.violation is None and batch.partial is None and not batch.disconnect:
        assert len(data) < HEADER.size + INLINE_PAYLOAD


def test_random_bytes_are_refused_at_the_first_header() -> None:
    noise = random.Random(7)
    for _ in range(200):
        batch = parse(memoryview(noise.randbytes(64)), LIMITS)
        assert batch.violation is not None
        assert not batch.requests
