"""Batches answered from an export: the fast path, what it hands back, and errors."""

from __future__ import annotations

import asyncio
import errno
import struct

import pytest

from nbd_server.counters import Counters
from nbd_server.handshake import Agreement
from nbd_server.limits import Limits
from nbd_server.replies import Framing
from nbd_server.requests import parse
from nbd_server.transmission import Transmission, buffer_pool, reply_buffer_size
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire

MIB = 1 << 20
LIMITS = Limits()
FRAMINGS = {
    "simple": Framing(structured=False),
    "structured": Framing(structured=True),
    "extended": Framing(structured=True, extended=True),
}
ALL = pytest.mark.parametrize("framing", FRAMINGS)
CHUNKED = pytest.mark.parametrize("framing", ["structured", "extended"])
CONTEXTS = {1: "base:allocation", 2: "test:written"}


class Bench:
    """A transmission with its export, fed with bytes."""

    def __init__(
        self,
        export: MemoryExport,
        framing: str = "structured",
        contexts: tuple[int, ...] = (1,),
        alignment: int = 1,
    ) -> None:
        self.export = export
        self.counters = Counters()
        self.extended = framing == "extended"
        chosen = {n: CONTEXTS[n] for n in contexts if framing != "simple"}
        agreement = Agreement(export, FRAMINGS[framing], chosen, alignment)
        self.transmission = Transmission(agreement, LIMITS, self.counters, buffer_pool(LIMITS))

    def now(self, stream: bytes) -> tuple[list[wire.Answer], int]:
        """Answers that need no waiting, and how many requests do."""
        batch = parse(memoryview(stream), LIMITS, extended=self.extended)
        out = memoryview(bytearray(reply_buffer_size(LIMITS)))
        end, later = self.transmission.answer(batch.requests, memoryview(stream), out)
        reads = {request[2]: request[4] for request in batch.requests if request[1] == wire.READ}
        return wire.decode(bytes(out[:end]), reads), len(later)

    async def later(self, stream: bytes) -> wire.Answer:
        """The answer to one request, carried out as one that has to wait."""
        limits = Limits(batch_requests=1)
        (request,) = parse(memoryview(stream), limits, extended=self.extended).requests
        payload = memoryview(stream)[request[5] :]
        reply, _ = await self.transmission.perform(request, payload)
        reads = {request[2]: request[4]} if request[1] == wire.READ else {}
        (answer,) = wire.decode(bytes(reply), reads)
        return answer

    def request(self, kind: int, cookie: int = 1, *args: int, payload: bytes = b"") -> bytes:
        """A request as this client's framing has it: offset, length, flags."""
        encode = wire.extended if self.extended else wire.request
        return encode(kind, cookie, *args, payload=payload)

    def write(self, cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
        flags |= wire.PAYLOAD if self.extended else 0
        return self.request(wire.WRITE, cookie, offset, len(payload), flags, payload=payload)


def bench(framing: str = "structured", *, size: int = 4 * MIB, read_only: bool = False) -> Bench:
    return Bench(MemoryExport("vol", size, read_only=read_only), framing)


@ALL
def test_a_batch_of_writes_and_reads_is_one_commit(framing: str) -> None:
    b = bench(framing)
    stream = b"".join(b.write(n, n * 10, bytes([n]) * 10) for n in range(1, 5))
    assert b.now(stream) == ([wire.Answer(n) for n in range(1, 5)], 0)
    assert b.export.commits == 1
    reads = b"".join(b.request(wire.READ, n, n * 10, 10) for n in range(5))
    answers, later = b.now(reads)
    assert [(a.cookie, a.data) for a in answers] == [(n, bytes([n]) * 10) for n in range(5)]
    assert later == 0
    assert b.export.commits == 1
    c = b.counters
    assert (c.writes, c.written_bytes, c.reads, c.read_bytes) == (4, 40, 5, 50)


@ALL
def test_the_longest_batch_fits_the_reply_buffer(framing: str) -> None:
    b = bench(framing)
    stream = b"".join(b.request(wire.READ, n, 0, MIB // 64) for n in range(64))
    answers, later = b.now(stream)
    assert len(answers) == 64
    assert later == 0
    refused = b"".join(b.request(60000, 2**64 - 1, 2**64 - 1, 0) for _ in range(64))
    answers, _ = b.now(refused)
    assert [a.error for a in answers] == [errno.EINVAL] * 64


@ALL
def test_zero_lengths_are_harmless(framing: str) -> None:
    b = bench(framing)
    kinds = (wire.READ, wire.WRITE, wire.TRIM, wire.ZEROES)
    answers, later = b.now(b"".join(b.request(kind, kind, 0, 0) for kind in kinds))
    assert answers == [wire.Answer(kind) for kind in kinds]
    assert later == 0


@ALL
def test_refusals_have_a_text_where_there_is_room_for_one(framing: str) -> None:
    b = bench(framing)
    (answer,), _ = b.now(b.write(5, 4 * MIB, b"x"))
    assert (answer.cookie, answer.error) == (5, errno.ENOSPC)
    assert bool(answer.text) is (framing != "simple")
    assert b.counters.errors == 1


@ALL
def test_what_would_wait_is_handed_back(framing: str) -> None:
    b = bench(framing)
    b.export.slow = True
    stream = b.request(wire.READ, 1, 0, 10) + b.write(2, 0, b"x") + b.request(wire.FLUSH)
    assert b.now(stream) == ([], 3)
    b.export.slow = False
    assert b.now(b.write(1, 0, b"x", wire.FUA)) == ([], 1)
    assert b.now(b.request(wire.READ, 2, 0, MIB + 1)) == ([], 1)


def test_failing_reads_leave_the_other_answers_alone() -> None:
    b = bench()
    good = wire.request(wire.READ, 1, 0, 4096)
    b.export.failure = OSError(errno.EIO, "three devices are missing")
    (answer,), _ = b.now(good)
    assert (answer.error, answer.text) == (errno.EIO, "[Errno 5] three devices are missing")
    b.export.failure = None
    (answer,), _ = b.now(good)
    assert answer.data == bytes(4096)


@pytest.mark.parametrize(
    ("raised", "answered"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (OSError(errno.EDQUOT, "quota"), errno.ENOSPC),
        (OSError(errno.EFBIG, "big"), errno.ENOSPC),
        (OSError(errno.EROFS, "ro"), errno.EPERM),
        (OSError(errno.EINVAL, "bad"), errno.EINVAL),
        (OSError(errno.ENODEV, "gone"), errno.EIO),
        (OSError(errno.ESHUTDOWN, "stopping"), errno.EIO),
        (TimeoutError("slow"), errno.EIO),
        (ZeroDivisionError("a mistake"), errno.EIO),
    ],
)
async def test_errors_of_the_export(raised: Exception, answered: int) -> None:
    b = bench()
    b.export.failure = raised
    (answer,), _ = b.now(wire.write(1, 0, b"x"))
    assert answer.error == answered
    assert (await b.later(wire.write(1, 0, b"x"))).error == answered
    b.export.closed = True
    assert (await b.later(wire.request(wire.FLUSH))).error == errno.ESHUTDOWN


def test_a_failed_commit_fails_every_write_of_the_batch_and_no_read() -> None:
    class Full(MemoryExport):
        def commit(self) -> None:
            raise OSError(errno.ENOSPC, "the pool is full")

    b = Bench(Full("vol", MIB))
    stream = wire.write(1, 0, b"a") + wire.request(wire.READ, 2, 9, 9) + wire.write(3, 0, b"b")
    answers, _ = b.now(stream)
    assert {a.cookie: a.error for a in answers} == {1: errno.ENOSPC, 2: 0, 3: errno.ENOSPC}
    assert b.counters.writes == 0


@ALL
async def test_slow_requests(framing: str) -> None:
    b = bench(framing)
    b.export.slow = True
    assert await b.later(b.write(1, 4095, b"abc", wire.FUA)) == wire.Answer(1)
    assert b.export.flushes == 1
    assert (await b.later(b.request(wire.READ, 2, 4094, 5))).data == b"\0abc\0"
    assert await b.later(b.request(wire.ZEROES, 3, 4096, 1)) == wire.Answer(3)
    assert (await b.later(b.request(wire.READ, 4, 4094, 5))).data == b"\0a\0c\0"
    assert await b.later(b.request(wire.TRIM, 5, 0, MIB, wire.FUA)) == wire.Answer(5)
    assert b.export.flushes == 2
    assert await b.later(b.request(wire.FLUSH, 6)) == wire.Answer(6)
    assert b.export.flushes == 3
    assert bytes(b.export.data[:8192]) == bytes(8192)
    c = b.counters
    assert (c.reads, c.writes, c.zeroes, c.trims, c.flushes) == (2, 1, 1, 1, 1)


@pytest.mark.parametrize("slow", [False, True])
async def test_long_transfers_let_others_have_their_turn(slow: bool) -> None:
    b = bench()
    b.export.slow = slow
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(other())
    payload = bytes(range(256)) * (3 * MIB // 256)
    assert await b.later(wire.write(1, 0, payload)) == wire.Answer(1)
    assert (await b.later(wire.request(wire.READ, 2, 0, 3 * MIB))).data == payload
    task.cancel()
    assert slow or turns >= 4


async def test_block_status() -> None:
    b = bench()
    assert b.now(wire.write(1, 4096, bytes(8192)))[0] == [wire.Answer(1)]
    every = await b.later(wire.request(wire.STATUS, 2, 0, 4 * MIB))
    assert every.extents == ((4096, 3), (8192, 0), (4 * MIB - 12288, 3))
    first = await b.later(wire.request(wire.STATUS, 3, 5000, MIB, wire.REQ_ONE))
    assert first.extents == ((7288, 0),)
    provisioned = wire.request(wire.ZEROES, 4, 0, 4096, wire.NO_HOLE)
    assert await b.later(provisioned) == wire.Answer(4)
    assert (await b.later(wire.request(wire.STATUS, 5, 0, 8192))).extents == ((8192, 0),)


def test_the_size_is_that_of_now() -> None:
    b = bench(size=MIB)
    (answer,), _ = b.now(wire.request(wire.READ, 1, MIB, 1))
    assert answer.error == errno.EINVAL
    b.export.size = MIB // 2
    (answer,), _ = b.now(wire.request(wire.READ, 1, MIB // 2, 1))
    assert answer.error == errno.EINVAL


@CHUNKED
@pytest.mark.parametrize("slow", [False, True])
async def test_what_was_never_written_is_read_as_holes(framing: str, slow: bool) -> None:
    b = bench(framing)
    assert b.now(b.write(1, 8192, b"x" * 4096))[0] == [wire.Answer(1)]
    length = 3 * MIB if slow else 65536
    stream = b.request(wire.READ, 2, 0, length)
    if slow:
        answer = await b.later(stream)
    else:
        (answer,), _ = b.now(stream)
    assert answer.data == bytes(8192) + b"x" * 4096 + bytes(length - 12288)
    assert answer.holes == ((0, 8192), (12288, length - 12288))
    whole = b.request(wire.READ, 3, 8192, 4096) + b.request(wire.READ, 4, 0, 4096)
    (data, hole), _ = b.now(whole)
    assert (data.data, data.holes) == (b"x" * 4096, ())
    assert (hole.data, hole.holes) == (bytes(4096), ((0, 4096),))
    # A hole that is shorter than its chunk, and a client that wants one piece.
    (short,), _ = b.now(b.request(wire.READ, 5, 8092, 200))
    assert (short.data, short.holes) == (bytes(100) + b"x" * 100, ())
    (one,), _ = b.now(b.request(wire.READ, 6, 0, 65536, wire.DF))
    assert (one.data[8000:13000], one.holes) == (bytes(192) + b"x" * 4096 + bytes(712), ())


async def test_simple_reads_have_zeros_for_holes() -> None:
    b = bench("simple")
    (answer,), _ = b.now(b.request(wire.READ, 1, 0, 65536))
    assert answer.data == bytes(65536)


async def test_lengths_of_64_bits() -> None:
    size = 1 << 45
    b = bench("extended")
    b.export.size = size
    trims: list[tuple[int, int]] = []

    async def trim(offset: int, length: int) -> None:
        trims.append((offset, length))

    b.export.trim = trim  # type: ignore[method-assign]
    assert await b.later(b.request(wire.TRIM, 1, 4096, size - 4096)) == wire.Answer(1)
    assert trims == [(4096, size - 4096)]
    answers, _ = b.now(b.request(wire.READ, 2, 0, 1 << 40))
    assert [a.error for a in answers] == [errno.EINVAL]


@CHUNKED
async def test_several_contexts_are_a_chunk_each(framing: str) -> None:
    b = Bench(MemoryExport("vol", MIB), framing, contexts=(1, 2))
    b.now(b.write(1, 0, bytes(4096)))
    answer = await b.later(b.request(wire.STATUS, 2, 0, MIB))
    assert answer.statuses == {
        1: ((4096, 0), (MIB - 4096, 3)),
        2: ((4096, 1), (MIB - 4096, 0)),
    }


def chosen(length: int, *ids: int) -> bytes:
    return struct.pack(f">Q{len(ids)}I", length, *ids)


async def test_a_status_payload_chooses_contexts_and_length() -> None:
    b = Bench(MemoryExport("vol", MIB), "extended", contexts=(1, 2))
    b.now(b.write(1, 0, bytes(4096)))

    async def ask(offset: int, payload: bytes, flags: int = 0) -> wire.Answer:
        stream = b.request(
            wire.STATUS, 9, offset, len(payload), wire.PAYLOAD | flags, payload=payload
        )
        return await b.later(stream)

    assert (await ask(0, chosen(8192, 2))).statuses == {2: ((4096, 1), (4096, 0))}
    assert (await ask(0, chosen(8192, 2, 1), wire.REQ_ONE)).statuses == {
        1: ((4096, 0),),
        2: ((4096, 1),),
    }
    for offset, payload in (
        (0, chosen(8192, 3)),
        (0, chosen(8192, 1, 1)),
        (0, chosen(0, 1)),
        (MIB - 4096, chosen(8192, 1)),
    ):
        assert (await ask(offset, payload)).error == errno.EINVAL


@CHUNKED
async def test_cache_and_fast_zero(framing: str) -> None:
    b = bench(framing)
    assert await b.later(b.request(wire.CACHE, 1, 5, 100)) == wire.Answer(1)
    assert b.export.cached == [(5, 100)]
    assert b.counters.caches == 1
    fast = b.request(wire.ZEROES, 2, 0, MIB, wire.FAST_ZERO)
    assert await b.later(fast) == wire.Answer(2)
    slow = await b.later(b.request(wire.ZEROES, 3, 0, 10, wire.FAST_ZERO))
    assert slow.error == errno.ENOTSUP
    # Nobody else is told that.
    b.export.failure = OSError(errno.ENOTSUP, "no")
    assert (await b.later(b.request(wire.ZEROES, 4, 0, 10))).error == errno.EINVAL


@CHUNKED
async def test_errors_of_reads_say_where(framing: str) -> None:
    b = bench(framing)
    b.export.failure = OSError(errno.EIO, "lost")
    b.export.failure.offset = 8192  # type: ignore[attr-defined]
    answers, _ = b.now(b.request(wire.READ, 1, 4096, 8192) + b.request(wire.READ, 2, 0, 4096))
    assert [(a.error, a.where) for a in answers] == [(errno.EIO, 8192), (errno.EIO, None)]
    assert (await b.later(b.request(wire.READ, 3, 0, 3 * MIB))).where == 8192


@CHUNKED
def test_whoever_promised_alignment_is_kept_to_it(framing: str) -> None:
    b = Bench(MemoryExport("vol", MIB), framing, alignment=512)
    stream = (
        b.request(wire.READ, 1, 512, 512)
        + b.request(wire.READ, 2, 1, 512)
        + b.write(3, 0, b"x")
        + b.write(4, 512, b"x" * 512)
    )
    answers, _ = b.now(stream)
    assert {a.cookie: a.error for a in answers} == {1: 0, 2: errno.EINVAL, 3: errno.EINVAL, 4: 0}
