"""A pool against a model: volumes are byte arrays, devices come and go within the budget.

Every step runs in a loop with a virtual clock, on disks in memory whose writes are durable at once
(what an unsynced write may become is the business of `tests/sim`). Devices that are absent count
against the budget of `m` only while they are; one that returned with an old content counts for
ever, because what it forgot is not all written to it again.

`HYPOTHESIS_PROFILE=large` does twenty-five times as much.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Coroutine
from itertools import pairwise
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from backends.base import BLOCK_SIZE
from backends.fault_script import OPERATIONS, Rule, Vanish
from pool import Pool, PoolError
from pool.errors import PoolFull
from pool.volume import EXTENT_HOLE, EXTENT_ZERO
from tests.sim.loop import VirtualLoop
from tests.unit.pool.support import KIB, Disk, make_disks, make_pool, open_pool

T = TypeVar("T")

DATA, PARITY, DISKS = 2, 2, 5
DISK_SIZE = 1792 * KIB
JOURNAL = 128 * KIB
VOLUME_SIZES = [256 * KIB, 768 * KIB + BLOCK_SIZE, 3 << 20]

LARGE = os.environ.get("HYPOTHESIS_PROFILE") == "large"
EXAMPLES, STEPS = (500, 90) if LARGE else (40, 45)
#: Also long enough for a failure to be made small.
pytestmark = pytest.mark.timeout(7200 if LARGE else 600)

offsets = st.integers(0, 3 << 20)
lengths = st.one_of(
    st.integers(1, 3 * BLOCK_SIZE),
    st.integers(1, 24).map(lambda blocks: blocks * BLOCK_SIZE),
    st.integers(1, 600 * KIB),
)
aligned = st.booleans()


class PoolModel(RuleBasedStateMachine):
    """See the module. `contents` is what every volume must read as."""

    volumes: Bundle[str] = Bundle("volumes")

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.disks = make_disks(DISKS, DISK_SIZE)
        self.contents: dict[str, bytearray] = {}
        self.missing: set[int] = set()
        self.tainted: set[int] = set()
        self.old: dict[int, bytes] = {}
        self.pool: Pool | None = None
        self.number = 0
        self.seed = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @property
    def open(self) -> Pool:
        assert self.pool is not None
        return self.pool

    @initialize()
    def create(self) -> None:
        self.run(make_pool(self.disks, DATA, PARITY, journal=JOURNAL))
        self._open()

    def _open(self) -> None:
        present = [d for number, d in enumerate(self.disks) if number not in self.missing]
        for disk in present:
            disk.script.clear()
        self.seed += 1
        self.pool = self.run(open_pool(present, seed=self.seed, leaf_budget=4 * KIB))
        assert {info.name for info in self.pool.volumes()} == set(self.contents)

    # -- volumes -----------------------------------------------------------------------------

    @rule(target=volumes, size=st.sampled_from(VOLUME_SIZES))
    def create_volume(self, size: int) -> str:
        assume(len(self.contents) < 4)
        self.number += 1
        name = f"v{self.number}"
        self.run(self.open.create_volume(name, size))
        self.contents[name] = bytearray(size)
        return name

    @rule(name=consumes(volumes))
    def delete_volume(self, name: str) -> None:
        volume = self.open.volume(name)
        self.run(self.open.delete_volume(name))
        del self.contents[name]
        with pytest.raises(OSError, match="was deleted"):
            self.run(volume.write(0, memoryview(b"late")))

    # -- input and output --------------------------------------------------------------------

    def _range(self, name: str, offset: int, length: int, whole: bool) -> tuple[int, int]:
        size = len(self.contents[name])
        if whole:
            offset -= offset % BLOCK_SIZE
            length += -length % BLOCK_SIZE
        offset %= size
        return offset, min(length, size - offset)

    @rule(name=volumes, offset=offsets, length=lengths, whole=aligned, fill=st.integers(1, 255))
    def write(self, name: str, offset: int, length: int, whole: bool, fill: int) -> None:
        offset, length = self._range(name, offset, length, whole)
        # No two blocks alike: a block in the wrong place must not pass for the right one.
        data = b"".join((fill + at // 7).to_bytes(4, "little") for at in range(length // 4 + 1))
        self._change(name, offset, data[:length], self.open.volume(name).write)

    @rule(name=volumes, seed=st.integers(0, 1000), count=st.integers(5, 40))
    def churn(self, name: str, seed: int, count: int) -> None:
        """Laps of the journal, full pools and stripes that are worth collecting."""
        rng = random.Random(seed)
        for _ in range(count):
            at = rng.randrange(len(self.contents[name]) // BLOCK_SIZE) * BLOCK_SIZE
            length = rng.randrange(1, 16) * BLOCK_SIZE
            data = rng.randbytes(min(length, len(self.contents[name]) - at))
            if not self._change(name, at, data, self.open.volume(name).write):
                break

    @rule(name=volumes, offset=offsets, blocks=st.lists(st.integers(0, 12), min_size=2, max_size=9))
    def write_batch(self, name: str, offset: int, blocks: list[int]) -> None:
        """Several small writes that one commit makes visible, as from one connection."""
        self.run(self._write_batch(name, offset, blocks))

    async def _write_batch(self, name: str, offset: int, blocks: list[int]) -> None:
        volume = self.open.volume(name)
        for number, block in enumerate(blocks):
            at, length = self._range(name, offset + block * 1000, 700 + 900 * number, False)
            data = bytes([number + 1]) * length
            try:
                staged = volume.try_write(at, memoryview(data))
            except PoolFull:
                break
            if not staged:
                break
            self.contents[name][at : at + length] = data
        volume.commit()

    @rule(name=volumes, offset=offsets, length=lengths, whole=aligned)
    def trim(self, name: str, offset: int, length: int, whole: bool) -> None:
        offset, length = self._range(name, offset, length, whole)
        self.run(self.open.volume(name).trim(offset, length))
        first = -(-offset // BLOCK_SIZE) * BLOCK_SIZE
        end = (offset + length) // BLOCK_SIZE * BLOCK_SIZE
        if first < end:
            self.contents[name][first:end] = bytes(end - first)
            found = self.run(self.open.volume(name).extents(first, end - first, 10))
            assert found == [(end - first, EXTENT_HOLE | EXTENT_ZERO)]

    @rule(name=volumes, offset=offsets, length=lengths, whole=aligned, no_hole=st.booleans())
    def write_zeroes(self, name: str, offset: int, length: int, whole: bool, no_hole: bool) -> None:
        offset, length = self._range(name, offset, length, whole)
        volume = self.open.volume(name)

        async def zero(at: int, data: memoryview) -> None:
            await volume.write_zeroes(at, len(data), no_hole=no_hole)

        if self._change(name, offset, bytes(length), zero) and no_hole:
            for _, flags in self.run(volume.extents(offset, length, 1000)):
                assert not flags & EXTENT_HOLE

    def _change(self, name: str, offset: int, data: bytes, operation: Any) -> bool:
        """Do it; a full pool may refuse if there is a hole to fill. Returns whether it was done."""
        before = self._holes(name, offset, len(data))
        try:
            self.run(operation(offset, memoryview(data)))
        except PoolFull:
            assert before, "an overwrite of allocated blocks was refused (P5)"
            self._settle_refused(name, offset, data)
            return False
        self.contents[name][offset : offset + len(data)] = data
        assert not any(data) or not self._holes(name, offset, len(data))
        return True

    def _holes(self, name: str, offset: int, length: int) -> bool:
        found = self.run(self.open.volume(name).extents(offset, length, 10_000))
        assert sum(size for size, _ in found) == length
        return any(flags & EXTENT_HOLE for _, flags in found)

    def _settle_refused(self, name: str, offset: int, data: bytes) -> None:
        """Pieces of a refused write may have happened: every block is the old or the new one."""
        content = self.contents[name]
        now = self._read(name, offset, len(data))
        at = 0
        while at < len(data):
            stop = min(len(data), at + BLOCK_SIZE - (offset + at) % BLOCK_SIZE)
            old = bytes(content[offset + at : offset + stop])
            assert now[at:stop] in (old, data[at:stop])
            at = stop
        content[offset : offset + len(data)] = now

    def _read(self, name: str, offset: int, length: int) -> bytes:
        into = bytearray(length)
        self.run(self.open.volume(name).read(offset, memoryview(into)))
        return bytes(into)

    @rule(name=volumes, offset=offsets, length=lengths, whole=aligned)
    def read(self, name: str, offset: int, length: int, whole: bool) -> None:
        offset, length = self._range(name, offset, length, whole)
        expected = self.contents[name][offset : offset + length]
        assert self._read(name, offset, length) == expected
        into = bytearray(length)
        if self.open.volume(name).try_read(offset, memoryview(into)):
            assert into == expected

    @rule(name=volumes)
    def flush(self, name: str) -> None:
        self.run(self.open.volume(name).flush())

    @rule(name=volumes, offset=offsets, length=lengths, limit=st.integers(1, 5))
    def extents(self, name: str, offset: int, length: int, limit: int) -> None:
        offset, length = self._range(name, offset, length, False)
        found = self.run(self.open.volume(name).extents(offset, length, limit))
        assert 1 <= len(found) <= limit
        assert sum(size for size, _ in found) <= length
        at = offset
        for size, flags in found:
            assert size > 0
            if flags & EXTENT_ZERO:
                assert not any(self.contents[name][at : at + size])
            at += size
        assert all(a[1] != b[1] for a, b in pairwise(found))

    # -- time and devices --------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.01, 1.0, 70.0]))
    def wait(self, seconds: float) -> None:
        self.run(asyncio.sleep(seconds))

    @rule()
    def checkpoint(self) -> None:
        self.run(self.open.checkpoint())

    @precondition(lambda self: len(self.missing | self.tainted) < PARITY)
    @rule(device=st.integers(0, DISKS - 1))
    def lose_device(self, device: int) -> None:
        """A disk is pulled out while the pool runs.

        A write that nobody flushed may be on one replica only for a moment (R3): losing just that
        one *and* the process within it is not what is tested here."""
        self.run(asyncio.sleep(1))
        self.disks[device].script.add(Rule(OPERATIONS, Vanish(), times=None))
        self.missing.add(device)

    @rule()
    def remember(self) -> None:
        """Keep what the disks hold now: they may return like this."""
        self.old = {number: bytes(disk.data) for number, disk in enumerate(self.disks)}

    @rule(clean=st.booleans())
    def reopen(self, clean: bool) -> None:
        """End the process, by `close` or by a kill, and open again without the missing disks."""
        self._leave(clean)
        self._open()

    @rule(clean=st.booleans(), leave_out=st.sets(st.integers(0, DISKS - 1), max_size=PARITY))
    def reopen_without(self, clean: bool, leave_out: set[int]) -> None:
        """Other disks are missing than before: those return as they were."""
        assume(len(leave_out | self.tainted) <= PARITY)
        # A root needs a quorum of those that the last one counts (R19): returning ones are not.
        assume(DISKS - len(self.missing | leave_out) > PARITY)
        # One that was pulled out is expelled before others go, or nobody knows what it lacks.
        self._leave(clean)
        self._open()
        self._leave(clean)
        self.missing = leave_out
        self._open()

    @precondition(lambda self: self.old)
    @rule(device=st.integers(0, DISKS - 1), clean=st.booleans())
    def return_stale(self, device: int, clean: bool) -> None:
        """A disk returns from the shelf with what it held when last remembered."""
        assume(len(self.missing | self.tainted | {device}) <= PARITY)
        self._leave(clean)
        self.disks[device].data[:] = self.old[device]
        self.tainted.add(device)
        self.missing.discard(device)
        self._open()

    def _leave(self, clean: bool) -> None:
        if clean:
            self.run(self.open.close())
        self._kill()

    def _kill(self) -> None:
        """End every task of the process, at once."""
        self.pool = None

        async def cancel() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.run(cancel())

    # -- always ------------------------------------------------------------------------------

    @invariant()
    def is_in_good_order(self) -> None:
        if self.pool is None:
            return
        status = self.pool.status()
        assert self.pool.engine.state.stopped == ""
        assert "lost" not in self.pool.engine.state.problems
        assert status["used_bytes"] <= status["capacity_bytes"] or self.missing or self.tainted

    def teardown(self) -> None:
        try:
            if self.pool is not None:
                self._verify()
        finally:
            self._kill()
            self.runner.close()

    def _verify(self) -> None:
        """Everything reads back, now and after a clean close; whole pools check clean."""
        for _ in range(2):
            for name, content in self.contents.items():
                for at in range(0, len(content), 512 * KIB):
                    part = content[at : at + 512 * KIB]
                    assert self._read(name, at, len(part)) == part
            self.run(self.open.close())
            self._open()
        faults = self.run(self.open.check())
        if not self.tainted:
            assert [fault for fault in faults if "is missing" not in fault] == []


def _disks_differ(disks: list[Disk]) -> bool:
    return len({bytes(disk.data[:4096]) for disk in disks}) == len(disks)


TestPoolModel = PoolModel.TestCase
TestPoolModel.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


def test_a_pool_refuses_to_open_beyond_its_budget() -> None:
    """One device more than `m` away: an honest error that names the missing ones, no guess."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        disks = make_disks(DISKS, DISK_SIZE)
        runner.run(make_pool(disks, DATA, PARITY, journal=JOURNAL))
        assert _disks_differ(disks)
        with pytest.raises(PoolError, match="2 of 5 devices found, 3 are needed.*memory:c"):
            runner.run(open_pool(disks[:2]))
