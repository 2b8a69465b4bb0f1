"""The journal on disks that fail, hang and come late: room, laps, promotion, flushes, joining."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any

import pytest
from crc32c import crc32c
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import BLOCK_SIZE, DeviceError
from backends.fault_script import Delay, Fail, Hang, Rule
from pool import journal as journal_module
from pool.errors import PoolStopped
from pool.format import record
from pool.format.record import KIND_CATALOG, KIND_DATA, KIND_TRIM
from pool.journal import Committed, Journal, Replica
from pool.overdue import WRITE_SECONDS
from tests.sim.loop import run
from tests.unit.pool.support import Disk, make_disks

SIZE = 32
ZONE = 3 * BLOCK_SIZE
#: Long enough for replicas to be written without a flush: that then has to sync only.
IDLE = 4 * journal_module.IDLE_SECONDS


class Bench:
    """A journal on disks, its failures, and every block that was ever committed, by position."""

    def __init__(self, disks: int = 3, size: int = SIZE) -> None:
        self.size = size
        self.disks = make_disks(disks, ZONE + size * BLOCK_SIZE)
        self.failures: list[int] = []
        self.blocks: dict[int, bytes] = {}
        self.journal = Journal(
            stream=1, size=size, replicas=[self.replica(i, size) for i in range(disks)],
            head=size, tail=size, version=1 << 40, previous=0, on_failure=self._failed,
        )  # fmt: skip

    def replica(self, member: int, position: int) -> Replica:
        device = self.disks[member].open()
        return Replica(member, device, ZONE, position, position, position)

    def _failed(self, member: int, error: DeviceError) -> None:
        self.failures.append(member)

    def stage(self, blocks: int, *, seed: int = 0) -> bytes:
        data = random.Random(f"{seed} {self.journal.head}").randbytes(blocks * BLOCK_SIZE)
        self.journal.stage_data(1, 0, memoryview(data))
        return data

    def commit(self) -> list[Committed]:
        done = self.journal.commit()
        for extent in done:
            for i in range(len(extent.crcs)):
                found = self.journal.peek(extent.position + i)
                assert found is not None
                assert crc32c(found) == extent.crcs[i]
                self.blocks[extent.position + i] = bytes(found)
        return done

    async def write(self, blocks: int = 1) -> list[Committed]:
        while not self.journal.room(blocks):
            await self.journal.wait_room()
        self.stage(blocks)
        return self.commit()

    def verify(self, disk: Disk, start: int, end: int) -> None:
        """The disk holds every payload block from `start` to `end`."""
        for position in range(start, end):
            at = ZONE + position % self.size * BLOCK_SIZE
            if position in self.blocks:
                assert disk.data[at : at + BLOCK_SIZE] == self.blocks[position]
            else:
                header = record.decode(bytes(disk.data[at : at + BLOCK_SIZE]))
                assert header.position == position


def in_loop(scenario: Coroutine[Any, Any, None]) -> None:
    run(asyncio.wait_for(scenario, 3600))


# -- laps and room ---------------------------------------------------------------------------


def test_many_laps_leave_every_replica_with_the_live_part() -> None:
    async def scenario() -> None:
        bench = Bench()
        journal = bench.journal
        for number in range(60):
            if not journal.room(5):
                await journal.flush()
                for disk in bench.disks:
                    bench.verify(disk, journal.tail, journal.head)
                journal.release(journal.head - number % 3)
            await bench.write(1 + number % 5)
        assert journal.head > 5 * SIZE
        await journal.flush()
        assert journal.durable == journal.head
        await journal.close()

    in_loop(scenario())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.sampled_from([16, 17, 64]))
def test_staging_never_passes_the_live_part(steps: list[int], size: int) -> None:
    """0 commits and flushes, 1 releases everything that is flushed, others stage that many."""

    async def scenario() -> None:
        bench = Bench(2, size)
        journal = bench.journal
        for step in steps:
            if step == 0:
                bench.commit()
                await journal.flush()
            elif step == 1:
                journal.release(journal.durable)
            elif journal.room(step):
                bench.stage(step)
        bench.commit()
        assert journal.head - journal.tail <= size
        await journal.flush()
        for disk in bench.disks:
            bench.verify(disk, journal.tail, journal.head)
        # An empty journal always has room for the largest piece.
        journal.release(journal.head)
        assert journal.room(size // 8)
        await journal.close()

    in_loop(scenario())


def test_wait_room_returns_when_the_tail_moves() -> None:
    async def scenario() -> None:
        bench = Bench()
        journal = bench.journal
        while journal.room(4):
            await bench.write(4)
        await journal.flush()
        writer = asyncio.create_task(bench.write(4))
        await asyncio.sleep(1)
        assert not writer.done()
        journal.release(journal.head)
        assert len(await writer) == 1
        await journal.close()

    in_loop(scenario())


def test_start_of_finds_the_record_that_holds_a_position() -> None:
    async def scenario() -> None:
        bench = Bench()
        journal = bench.journal
        starts = [journal.head]
        for blocks in (3, 1, 2):
            await bench.write(blocks)
            starts.append(journal.head)
        for start, end in pairwise(starts):
            assert {journal.start_of(position) for position in range(start, end)} == {start}
        await journal.flush()
        journal.release(starts[1])
        assert journal.start_of(starts[1] + 1) == starts[1]
        await journal.close()

    in_loop(scenario())


# -- records ---------------------------------------------------------------------------------


def test_a_batch_larger_than_a_header_is_one_group_of_records() -> None:
    async def scenario() -> None:
        bench = Bench(1, 4096)
        for number in range(300):
            bench.journal.stage_range(KIND_TRIM, 1, number, 1)
        bench.stage(record.MAX_BLOCKS + 10)
        bench.journal.stage_catalog(b'{"do": "nothing"}')
        done = bench.commit()
        assert sum(extent.count for extent in done if extent.kind == KIND_DATA) == (
            record.MAX_BLOCKS + 10
        )
        assert done[-1].kind == KIND_CATALOG
        position, headers, previous = 4096, [], 0
        await bench.journal.flush()
        while position < bench.journal.head:
            at = ZONE + position % 4096 * BLOCK_SIZE
            headers.append(record.decode(bytes(bench.disks[0].data[at : at + BLOCK_SIZE])))
            assert headers[-1].previous == previous
            position, previous = headers[-1].end, headers[-1].crc
        assert len(headers) >= 3
        assert [bool(h.flags & record.FLAG_MORE) for h in headers] == (
            [True] * (len(headers) - 1) + [False]
        )
        versions = [header.version for header in headers]
        assert versions == list(range(versions[0], versions[0] + len(versions)))
        await bench.journal.close()

    in_loop(scenario())


def test_nothing_staged_is_nothing_committed() -> None:
    async def scenario() -> None:
        bench = Bench()
        assert bench.journal.commit() == []
        assert bench.journal.head == SIZE
        await bench.journal.flush()
        await bench.journal.close()

    in_loop(scenario())


# -- failures --------------------------------------------------------------------------------


def test_when_the_primary_fails_the_next_replica_takes_over_with_all_before() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.write(2)
        await bench.write(3)
        bench.disks[0].script.add(Rule(frozenset({"append"}), Fail()))
        await bench.write(1)
        journal = bench.journal
        assert bench.failures == [0]
        assert [replica.member for replica in journal.replicas] == [1, 0, 2]
        bench.verify(bench.disks[1], SIZE, journal.head)
        # A flush must not be answered before the failed replica is out of the root.
        flush = journal.flush()
        await asyncio.sleep(5)
        assert not flush.done()
        journal.replace({0}, [])
        await flush
        for disk in bench.disks[1:]:
            bench.verify(disk, SIZE, journal.head)
        await journal.close()

    in_loop(scenario())


def test_when_no_replica_takes_it_nothing_happened() -> None:
    async def scenario() -> None:
        bench = Bench()
        await bench.write(2)
        head = bench.journal.head
        for disk in bench.disks:
            disk.script.add(Rule(frozenset({"append"}), Fail()))
        bench.stage(1)
        with pytest.raises(PoolStopped, match="no journal device takes writes: bring"):
            bench.journal.commit()
        assert bench.journal.head == head
        assert not bench.journal.staged
        assert sorted(bench.failures) == [0, 1, 2]
        await bench.journal.close()

    in_loop(scenario())


@pytest.mark.parametrize("op", ["write", "sync"])
def test_a_replica_that_fails_holds_flushes_up_until_it_is_replaced(op: str) -> None:
    async def scenario() -> None:
        bench = Bench(4)
        journal = bench.journal
        journal.replace({3}, [])
        bench.disks[2].script.add(Rule(frozenset({op}), Fail(), times=None))
        await bench.write(3)
        await asyncio.sleep(IDLE)
        flush = journal.flush()
        await asyncio.sleep(1)
        assert bench.failures == [2]
        assert not flush.done()
        late = bench.replica(3, journal.tail)
        journal.add(late)
        assert await journal.joined(late)
        assert not flush.done()
        journal.replace({2}, [late])
        await flush
        assert [replica.member for replica in journal.replicas] == [0, 1, 3]
        bench.verify(bench.disks[3], SIZE, journal.head)
        await journal.close()

    in_loop(scenario())


def test_a_flush_waits_for_every_replica() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.disks[1].script.add(Rule(frozenset({"write", "sync"}), Hang(), times=None))
        await bench.write(2)
        flush = bench.journal.flush()
        await asyncio.sleep(WRITE_SECONDS / 3)
        assert not flush.done()
        bench.disks[1].script.clear()
        await flush
        bench.verify(bench.disks[1], SIZE, bench.journal.head)
        assert bench.failures == []
        await bench.journal.close()

    in_loop(scenario())


def test_a_flush_that_comes_while_replicas_are_written_waits_for_no_timer() -> None:
    async def scenario() -> None:
        bench = Bench()
        for disk in bench.disks[1:]:
            disk.script.add(Rule(frozenset({"write"}), Delay(0.01), times=None))
        await bench.write(2)
        await asyncio.sleep(journal_module.IDLE_SECONDS + 0.005)
        began = asyncio.get_running_loop().time()
        await bench.journal.flush()
        assert asyncio.get_running_loop().time() - began < 0.02
        await bench.journal.close()

    in_loop(scenario())


def test_a_replica_that_hangs_is_given_up_after_the_time_limit() -> None:
    async def scenario() -> None:
        bench = Bench()
        bench.disks[1].script.add(Rule(frozenset({"sync"}), Hang(), times=None))
        await bench.write(2)
        await asyncio.sleep(IDLE)
        flush = bench.journal.flush()
        await asyncio.sleep(WRITE_SECONDS + 1)
        assert bench.failures == [1]
        assert not flush.done()
        bench.journal.replace({1}, [])
        await flush
        await bench.journal.close()

    in_loop(scenario())


def test_a_replica_that_lags_keeps_writers_from_overrunning_the_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a following replica has not got is in memory, and stays there (R4)."""
    monkeypatch.setattr(journal_module, "RING_BYTES", 16 * BLOCK_SIZE)

    async def scenario() -> None:
        bench = Bench(3, 64)
        bench.disks[2].script.add(Rule(frozenset({"write"}), Hang(), times=None))
        journal = bench.journal
        while journal.room(2):
            await bench.write(2)
        assert journal.head - SIZE < 64
        assert journal.head - 64 <= 16
        bench.disks[2].script.clear()
        await bench.write(2)
        await journal.flush()
        for disk in bench.disks:
            bench.verify(disk, 64, journal.head)
        await journal.close()

    in_loop(scenario())


# -- joining ---------------------------------------------------------------------------------


def test_a_late_replica_copies_from_others_what_the_ring_has_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(journal_module, "RING_BYTES", 16 * BLOCK_SIZE)

    async def scenario() -> None:
        bench = Bench(4, 64)
        journal = bench.journal
        journal.replace({3}, [])
        for _ in range(12):
            await bench.write(3)
        late = bench.replica(3, journal.tail)
        journal.add(late)
        assert not late.follows
        writers = asyncio.create_task(_write_slowly(bench, 4))
        assert await journal.joined(late)
        await writers
        journal.replace({0}, [late])
        await journal.flush()
        bench.verify(bench.disks[3], journal.tail, journal.head)
        await journal.close()

    in_loop(scenario())


async def _write_slowly(bench: Bench, count: int) -> None:
    for _ in range(count):
        await bench.write(2)
        await asyncio.sleep(0.02)


def test_a_late_replica_that_fails_did_not_join() -> None:
    async def scenario() -> None:
        bench = Bench(4)
        journal = bench.journal
        journal.replace({3}, [])
        await bench.write(3)
        bench.disks[3].script.add(Rule(frozenset({"write"}), Fail(), times=None))
        late = bench.replica(3, journal.tail)
        journal.add(late)
        assert not await journal.joined(late)
        assert bench.failures == [3]
        journal.replace({3}, [])
        await journal.flush()
        assert journal.joining == []
        await journal.close()

    in_loop(scenario())


# -- reading and closing ---------------------------------------------------------------------


def test_peek_gives_what_is_in_the_ring_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "RING_BYTES", 16 * BLOCK_SIZE)

    async def scenario() -> None:
        bench = Bench(2, 64)
        journal = bench.journal
        for _ in range(14):
            await bench.write(2)
            await journal.flush()
        for position, block in bench.blocks.items():
            found = journal.peek(position)
            assert (found is not None) == (position >= journal.head - 16)
            assert found is None or found == block
            assert [r.member for r in journal.sources(position)] == [0, 1]
        assert journal.peek(journal.head) is None
        assert journal.peek(journal.head - 1, 2) is None
        assert journal.sources(journal.head) == []
        await journal.close()

    in_loop(scenario())


def test_close_ends_everybody_who_waits() -> None:
    async def scenario() -> None:
        bench = Bench()
        journal = bench.journal
        bench.disks[1].script.add(Rule(frozenset({"write", "sync"}), Hang(), times=None))
        await bench.write(2)
        flush = journal.flush()
        room = asyncio.create_task(journal.wait_room())
        await asyncio.sleep(0)
        await journal.close()
        with pytest.raises(PoolStopped, match="the pool is closed"):
            await flush
        with pytest.raises(PoolStopped, match="the pool is closed"):
            await room
        with pytest.raises(PoolStopped, match="the pool is closed"):
            await journal.flush()
        await journal.flush(SIZE)
        assert all(task.done() for replica in journal.replicas for task in replica.tasks)

    in_loop(scenario())


def test_everything_is_synced_soon_without_a_flush() -> None:
    """Unsynced bytes are bounded, and what is idle reaches every replica (R7)."""

    async def scenario() -> None:
        bench = Bench(3, 8192)
        journal = bench.journal
        for _ in range(60):
            await bench.write(100)
            await asyncio.sleep(0.001)
        await asyncio.sleep(1)
        assert journal.head - journal.durable <= journal_module.UNSYNCED_BLOCKS + 200
        for disk in bench.disks:
            assert disk.syncs >= 2
            bench.verify(disk, 8192, journal.head)
        await journal.close()

    in_loop(scenario())
