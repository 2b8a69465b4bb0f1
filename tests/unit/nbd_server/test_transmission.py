"""Batches answered from an export: the fast path, what it hands back, and errors."""

from __future__ import annotations

import asyncio
import errno

import pytest

from nbd_server.counters import Counters
from nbd_server.handshake import Agreement
from nbd_server.limits import Limits
from nbd_server.requests import parse
from nbd_server.transmission import Transmission, buffer_pool, reply_buffer_size
from tests.memory_export import MemoryExport
from tests.unit.nbd_server import wire

MIB = 1 << 20
LIMITS = Limits()
BOTH = pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])


class Bench:
    """A transmission with its export, fed with bytes."""

    def __init__(self, export: MemoryExport, *, structured: bool) -> None:
        self.export = export
        self.counters = Counters()
        agreement = Agreement(export, structured=structured, allocation=structured)
        self.transmission = Transmission(agreement, LIMITS, self.counters, buffer_pool(LIMITS))

    def now(self, stream: bytes) -> tuple[list[wire.Answer], int]:
        """Answers that need no waiting, and how many requests do."""
        batch = parse(memoryview(stream), LIMITS)
        out = memoryview(bytearray(reply_buffer_size(LIMITS)))
        end, later = self.transmission.answer(batch.requests, memoryview(stream), out)
        reads = {request[2]: request[4] for request in batch.requests if request[1] == wire.READ}
        return wire.decode(bytes(out[:end]), reads), len(later)

    async def later(self, stream: bytes) -> wire.Answer:
        """The answer to one request, carried out as one that has to wait."""
        (request,) = parse(memoryview(stream), Limits(batch_requests=1)).requests
        payload = memoryview(stream)[28:] if request[1] == wire.WRITE else None
        reply, _ = await self.transmission.perform(request, payload)
        reads = {request[2]: request[4]} if request[1] == wire.READ else {}
        (answer,) = wire.decode(bytes(reply), reads)
        return answer


def bench(*, structured: bool = True, size: int = 4 * MIB, read_only: bool = False) -> Bench:
    return Bench(MemoryExport("vol", size, read_only=read_only), structured=structured)


@BOTH
def test_a_batch_of_writes_and_reads_is_one_commit(structured: bool) -> None:
    b = bench(structured=structured)
    stream = b"".join(wire.write(n, n * 10, bytes([n]) * 10) for n in range(1, 5))
    assert b.now(stream) == ([wire.Answer(n) for n in range(1, 5)], 0)
    assert b.export.commits == 1
    reads = b"".join(wire.request(wire.READ, n, n * 10, 10) for n in range(5))
    answers, later = b.now(reads)
    assert [(a.cookie, a.data) for a in answers] == [(n, bytes([n]) * 10) for n in range(5)]
    assert later == 0
    assert b.export.commits == 1
    c = b.counters
    assert (c.writes, c.written_bytes, c.reads, c.read_bytes) == (4, 40, 5, 50)


@BOTH
def test_the_longest_batch_fits_the_reply_buffer(structured: bool) -> None:
    b = bench(structured=structured)
    stream = b"".join(wire.request(wire.READ, n, 0, MIB // 64) for n in range(64))
    answers, later = b.now(stream)
    assert len(answers) == 64
    assert later == 0
    refused = b"".join(wire.request(60000, 2**64 - 1, 2**64 - 1, 0) for _ in range(64))
    answers, _ = b.now(refused)
    assert [a.error for a in answers] == [errno.EINVAL] * 64


@BOTH
def test_zero_lengths_are_harmless(structured: bool) -> None:
    b = bench(structured=structured)
    kinds = (wire.READ, wire.WRITE, wire.TRIM, wire.ZEROES)
    answers, later = b.now(b"".join(wire.request(kind, kind, 0, 0) for kind in kinds))
    assert answers == [wire.Answer(kind) for kind in kinds]
    assert later == 0


@BOTH
def test_refusals_have_a_text_where_there_is_room_for_one(structured: bool) -> None:
    b = bench(structured=structured)
    (answer,), _ = b.now(wire.write(5, 4 * MIB, b"x"))
    assert (answer.cookie, answer.error) == (5, errno.ENOSPC)
    assert bool(answer.text) is structured
    assert b.counters.errors == 1


@BOTH
def test_what_would_wait_is_handed_back(structured: bool) -> None:
    b = bench(structured=structured)
    b.export.slow = True
    stream = wire.request(wire.READ, 1, 0, 10) + wire.write(2, 0, b"x") + wire.request(wire.FLUSH)
    assert b.now(stream) == ([], 3)
    b.export.slow = False
    assert b.now(wire.write(1, 0, b"x", wire.FUA)) == ([], 1)
    assert b.now(wire.request(wire.READ, 2, 0, MIB + 1)) == ([], 1)


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

    b = Bench(Full("vol", MIB), structured=True)
    stream = wire.write(1, 0, b"a") + wire.request(wire.READ, 2, 9, 9) + wire.write(3, 0, b"b")
    answers, _ = b.now(stream)
    assert {a.cookie: a.error for a in answers} == {1: errno.ENOSPC, 2: 0, 3: errno.ENOSPC}
    assert b.counters.writes == 0


@BOTH
async def test_slow_requests(structured: bool) -> None:
    b = bench(structured=structured)
    b.export.slow = True
    assert await b.later(wire.write(1, 4095, b"abc", wire.FUA)) == wire.Answer(1)
    assert b.export.flushes == 1
    assert (await b.later(wire.request(wire.READ, 2, 4094, 5))).data == b"\0abc\0"
    assert await b.later(wire.request(wire.ZEROES, 3, 4096, 1)) == wire.Answer(3)
    assert (await b.later(wire.request(wire.READ, 4, 4094, 5))).data == b"\0a\0c\0"
    assert await b.later(wire.request(wire.TRIM, 5, 0, MIB, wire.FUA)) == wire.Answer(5)
    assert b.export.flushes == 2
    assert await b.later(wire.request(wire.FLUSH, 6)) == wire.Answer(6)
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
