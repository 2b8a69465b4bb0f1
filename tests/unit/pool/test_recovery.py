"""Following the journal's chain after a crash: what counts, what is a torn tail, what is damage."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.base import BLOCK_SIZE
from backends.fault_script import READS, Fail, Rule
from pool.errors import PoolError
from pool.format import record
from pool.journal import Journal, Replica
from pool.recovery import Chain, Source, at_term, backlog, follow
from pool.replicas import Copy, forgetful
from pool.state import Committed
from tests.sim.loop import run
from tests.unit.pool.support import Disk, make_disks

SIZE = 64
START = 64
VERSION = 1 << 40


class Written:
    """A journal as a process left it: `batches` of payload blocks, each one commit."""

    def __init__(
        self, batches: list[int], *, disks: int = 3, flush_after: tuple[int, ...] = (),
        trims: int = 0,
    ) -> None:  # fmt: skip
        self.disks = make_disks(disks, SIZE * BLOCK_SIZE)
        self.ends: list[int] = []
        self.headers: list[record.Record] = []
        run(self._write(batches, flush_after, trims))
        self.clean = [bytes(disk.data) for disk in self.disks]

    async def _write(self, batches: list[int], flush_after: tuple[int, ...], trims: int) -> None:
        rng = random.Random(1)
        replicas = [
            Replica(i, disk.open(), 0, START, START, START) for i, disk in enumerate(self.disks)
        ]
        journal = Journal(
            stream=1, size=SIZE, replicas=replicas, head=START, tail=START, version=VERSION,
            previous=0, on_failure=lambda member, error: pytest.fail(str(error)),
        )  # fmt: skip
        for number, blocks in enumerate(batches):
            for trim in range(trims):
                journal.stage_range(record.KIND_TRIM, 1, trim, 1)
            journal.stage_data(1, 0, memoryview(rng.randbytes(blocks * BLOCK_SIZE)))
            journal.commit()
            self.ends.append(journal.head)
            if number in flush_after:
                await journal.flush()
        await journal.flush()
        await journal.close()
        position = START
        while position < journal.head:
            self.headers.append(record.decode(self.block(0, position)))
            position = self.headers[-1].end

    def block(self, disk: int, position: int) -> bytes:
        at = position % SIZE * BLOCK_SIZE
        return bytes(self.disks[disk].data[at : at + BLOCK_SIZE])

    def spoil(self, disk: int, position: int) -> None:
        self.disks[disk].flip(position % SIZE * BLOCK_SIZE + 40)

    def spoil_everywhere(self, position: int) -> None:
        for disk in range(len(self.disks)):
            self.spoil(disk, position)

    def sources(self) -> list[Source]:
        return [Source(i, disk.open(), 0, SIZE) for i, disk in enumerate(self.disks)]

    def follow(self, *, term: int = 1, durable: int = START) -> Chain:
        return run(follow(self.sources(), root(durable=durable), term))


def root(*, start: int = START, durable: int = START) -> Committed:
    return Committed(replay=start, tail=start, version=VERSION, durable=durable)


def assert_whole(chain: Chain, written: Written, records: int) -> None:
    """The chain has exactly the first `records` records, and all their bytes behind `durable`."""
    assert [header.position for header in chain.records] == [
        header.position for header in written.headers[:records]
    ]
    last = written.headers[records - 1] if records else None
    assert chain.end == (last.end if last else START)
    assert (chain.version, chain.previous) == ((last.version, last.crc) if last else (VERSION, 0))
    assert sorted(chain.tail) == list(range(chain.durable, chain.end))
    for position, data in chain.tail.items():
        at = position % SIZE * BLOCK_SIZE
        assert data == written.clean[0][at : at + BLOCK_SIZE]


def test_an_empty_journal_is_an_empty_chain() -> None:
    assert_whole(Written([]).follow(), Written([]), 0)


def test_everything_that_is_whole_counts() -> None:
    written = Written([1, 3, 2, 5], flush_after=(1,))
    chain = written.follow()
    assert_whole(chain, written, 4)
    assert chain.durable == written.ends[1]


@pytest.mark.parametrize("what", [0, 1, 3])
def test_a_torn_tail_is_cut_off(what: int) -> None:
    """Whether the header or any of its blocks is bad, on all replicas."""
    written = Written([1, 3, 3])
    written.spoil_everywhere(written.ends[1] + what)
    assert_whole(written.follow(), written, 2)


def test_what_lies_behind_a_torn_record_does_not_count() -> None:
    written = Written([1, 3, 3])
    written.spoil_everywhere(written.ends[0])
    assert_whole(written.follow(), written, 1)


def test_a_record_that_was_synced_and_is_missing_is_damage() -> None:
    """The record behind it says so."""
    written = Written([1, 3, 3], flush_after=(1,))
    written.spoil_everywhere(written.ends[0])
    with pytest.raises(
        PoolError, match=f"records from {written.ends[0]} to {written.ends[1]} were"
    ):
        written.follow()


def test_one_replica_is_witness_enough() -> None:
    written = Written([1, 3, 3], flush_after=(1,))
    written.spoil_everywhere(written.ends[0])
    for disk in (0, 1):
        written.spoil(disk, written.ends[1])
    with pytest.raises(PoolError, match="the journal is damaged.*bring back the missing devices"):
        written.follow()


def test_what_an_older_term_left_behind_the_end_proves_nothing() -> None:
    """A later term has given it up, and its own root says how far the journal was durable."""
    written = Written([1, 3, 3], flush_after=(1,))
    written.spoil_everywhere(written.ends[0])
    assert_whole(written.follow(term=2), written, 1)
    with pytest.raises(PoolError, match="the journal is damaged"):
        written.follow(term=2, durable=written.ends[1])


def test_the_root_of_a_term_says_how_far_the_journal_is_durable() -> None:
    written = Written([1, 3, 3, 2], flush_after=(1,))
    chain, committed = written.follow(), root()
    begun = at_term(committed, chain, None)
    assert begun == root(durable=written.ends[1])
    # A mark in the chain whose place is taken is no longer there; nor is one that ends where the
    # chain would begin, which then begins there.
    first = written.headers[0]
    assert at_term(committed, chain, first) == root(durable=START)
    later = replace(committed, replay=first.end, version=first.version, previous=first.crc)
    begun = at_term(later, chain, first)
    assert begun == replace(root(), version=first.version, previous=first.previous)


def test_a_batch_of_which_the_last_record_is_missing_is_dropped_as_a_whole() -> None:
    written = Written([2, 3], trims=300)
    groups = [bool(h.flags & record.FLAG_MORE) for h in written.headers]
    assert groups.count(False) == 2
    first = groups.index(False) + 1
    assert first < len(groups) - 1
    written.spoil_everywhere(written.headers[-1].position)
    assert_whole(written.follow(), written, first)


def test_replicas_with_different_holes_are_united() -> None:
    written = Written([4, 4, 4, 4])
    for position in range(START, written.ends[-1]):
        for disk in range(3):
            if disk != position % 3:
                written.spoil(disk, position)
    assert_whole(written.follow(), written, 4)


def test_a_replica_that_cannot_be_read_is_no_hindrance() -> None:
    written = Written([4, 4, 4, 4], flush_after=(2,))
    written.disks[0].script.add(Rule(READS, Fail(), times=None))
    written.disks[1].script.add(Rule(READS, Fail(), times=None, within=(5 * 4096, 6 * 4096)))
    assert_whole(written.follow(), written, 4)


def test_a_record_of_the_lap_before_is_not_taken_for_one_of_this() -> None:
    written = Written([4, 4])
    with_old = written.disks[0]
    # The same bytes, one lap further: the position inside gives them away.
    chain = run(follow([Source(0, with_old.open(), 0, SIZE)], root(start=START + SIZE), 1))
    assert (chain.records, chain.end) == ([], START + SIZE)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_holes(data: st.DataObject) -> None:
    """The chain is the longest prefix that the union of all replicas has, or damage is reported."""
    written = Written([3, 1, 5, 2, 4], flush_after=(1, 3))
    end = written.ends[-1]
    holes = data.draw(
        st.sets(st.tuples(st.integers(0, 2), st.integers(START, end - 1)), max_size=60)
    )
    for disk, position in holes:
        written.spoil(disk, position)
    lost = {p for p in range(START, end) if all((disk, p) in holes for disk in range(3))}
    whole = 0
    durable = START
    for header in written.headers:
        durable_now = max(durable, header.durable)
        payload = range(header.position + 1, header.end)
        if header.position in lost or (header.end > durable and lost & set(payload)):
            break
        durable = durable_now
        whole += 1
    at = written.headers[whole - 1].end if whole else START
    known = [h.durable for h in written.headers[whole:] if h.position not in lost]
    if max(known, default=0) > at:
        with pytest.raises(PoolError, match="the journal is damaged"):
            written.follow()
    else:
        assert_whole(written.follow(), written, whole)


# -- backlog and copying ---------------------------------------------------------------------


def test_the_backlog_is_read_from_whoever_has_it() -> None:
    written = Written([3, 1, 5])
    written.spoil(0, START)
    written.spoil(1, written.ends[0])
    found = run(backlog(written.sources(), START, written.ends[1]))
    assert found == written.headers[:2]
    written.spoil(1, START)
    written.spoil(2, START)
    with pytest.raises(PoolError, match=f"record at {START} cannot be read from any device"):
        run(backlog(written.sources(), START, written.ends[1]))


def copier(written: Written, chain: Chain) -> Copy:
    return Copy(written.sources(), chain, written.headers, START)


def test_copying_makes_every_replica_whole() -> None:
    written = Written([4, 4, 4], flush_after=(0,))
    for position in range(written.ends[0], written.ends[-1]):
        for disk in range(3):
            if disk != position % 3:
                written.spoil(disk, position)
    chain = written.follow()
    copy = copier(written, chain)
    blank = Disk("blank", SIZE * BLOCK_SIZE)
    for source in written.sources():
        run(copy.to(source, whole=True))
    run(copy.to(Source(3, blank.open(), 0, SIZE), whole=False))
    length = (chain.end - START) * BLOCK_SIZE
    for target in (*written.disks, blank):
        assert target.data[:length] == written.clean[0][:length]
        assert target.syncs
    assert not copy.lost


@pytest.mark.parametrize("bad", ["unreadable", "wrong"])
def test_copying_unites_what_no_replica_has_in_full(bad: str) -> None:
    """Disks with a bad sector each, below `durable`: a new replica still gets every block."""
    written = Written([4, 4, 4, 1], flush_after=(2,))
    chain = written.follow()
    for disk, block in ((0, 2), (1, 7), (2, 9)):
        within = (block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        if bad == "unreadable":
            written.disks[disk].script.add(Rule(READS, Fail(), times=None, within=within))
        else:
            written.spoil(disk, START + block)
    copy, blank = copier(written, chain), Disk("blank", SIZE * BLOCK_SIZE)
    run(copy.to(Source(3, blank.open(), 0, SIZE), whole=False))
    length = (chain.end - START) * BLOCK_SIZE
    assert blank.data[:length] == written.clean[0][:length]
    assert not copy.lost


def test_a_header_that_is_whole_but_another_is_not_copied() -> None:
    """An old copy has, at the same place, a record of the lap before."""
    written = Written([4, 4, 4], flush_after=(1,))
    chain = written.follow()
    at = written.ends[0] % SIZE * BLOCK_SIZE
    written.disks[0].data[at : at + BLOCK_SIZE] = written.block(0, START)
    copy, blank = copier(written, chain), Disk("blank", SIZE * BLOCK_SIZE)
    run(copy.to(Source(3, blank.open(), 0, SIZE), whole=False))
    assert blank.data[at : at + BLOCK_SIZE] == written.clean[0][at : at + BLOCK_SIZE]


def test_what_nobody_has_is_zeros_and_named() -> None:
    written = Written([4, 4, 4], flush_after=(1,))
    chain = written.follow()
    written.spoil_everywhere(START + 3)
    copy, blank = copier(written, chain), Disk("blank", SIZE * BLOCK_SIZE)
    run(copy.to(Source(3, blank.open(), 0, SIZE), whole=False))
    assert copy.lost == {START + 3}
    assert blank.data[3 * BLOCK_SIZE : 4 * BLOCK_SIZE] == bytes(BLOCK_SIZE)


def test_a_replica_without_the_last_synced_record_has_forgotten_it() -> None:
    written = Written([4, 4, 4], flush_after=(0, 1))
    written.spoil(0, written.ends[0])
    written.spoil(1, written.ends[1])
    sources, durable = written.sources(), written.ends[1]
    assert run(forgetful(sources, written.headers, durable)) == {0}
    assert run(forgetful(sources, written.headers, START)) == set()
