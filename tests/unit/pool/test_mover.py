"""Stripe jobs in this loop and in the worker process, on real files; and how the worker ends."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import numpy as np
import pytest
from crc32c import crc32c

from backends.base import BLOCK_SIZE, Device, DeviceBusy
from backends.open import open_backend
from pool.erasure import codec
from pool.errors import PoolStopped
from pool.format import stripe as stripe_format
from pool.format.geometry import geometry, layout
from pool.mover import InlineMover, Mover, ProcessMover
from pool.stripe_writer import Job, JournalSource, Outcome, ShardSource, StripeJob
from pool.table import DATA, NOWHERE

KIB = 1024
SIZE = 1024 * KIB
WHERE = layout(SIZE, 64 * KIB, 4)
SHAPE = geometry(2, 1, 4)
MOVERS = [InlineMover, ProcessMover]


class Bench:
    """Files, and the journal content of the first one."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / f"disk{number}.img" for number in range(3)]
        self.devices: list[Device] = []
        self.data = random.Random(5).randbytes(SHAPE.blocks * BLOCK_SIZE)

    async def open(self) -> None:
        for path in self.paths:
            device = await open_backend(f"file://{path}?size={SIZE}", create=True)
            assert isinstance(device, Device)
            self.devices.append(device)
        await self.devices[0].write(WHERE.journal_offset, [self.data])

    async def join(self, mover: Mover) -> None:
        for index, device in enumerate(self.devices):
            await mover.add_member(index, device, WHERE)

    def job(self, number: int, places: tuple[tuple[int, int], ...]) -> StripeJob:
        """A stripe of blocks that lie in the journal of device 0."""
        room = SHAPE.blocks
        crcs = [crc32c(self.data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]) for i in range(room)]
        job = StripeJob(
            number, DATA, SHAPE, places, room, np.ones(room, np.uint32),
            np.arange(room, dtype=np.uint64), np.full(room, 7, np.uint64),
            np.array(crcs, np.uint32),
        )  # fmt: skip
        job.sources.append(JournalSource(0, WHERE.journal_offset, 0, room))
        return job

    def shard(self, device: int, slot: int) -> tuple[stripe_format.Header, bytes]:
        raw = self.paths[device].read_bytes()
        raw = raw[WHERE.slot_offset(slot) : WHERE.slot_offset(slot + 1)]
        return stripe_format.decode(raw), raw[SHAPE.header_bytes :]


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.open()
    yield bench
    for device in bench.devices:
        await device.close()


async def run_jobs(mover: Mover, *jobs: StripeJob) -> Outcome:
    return await mover.run(Job(b"p" * 16, list(jobs)))


@pytest.mark.parametrize("make", MOVERS)
async def test_a_stripe_is_written_and_moved_on(bench: Bench, make: Callable[[], Mover]) -> None:
    mover = make()
    try:
        await bench.join(mover)
        outcome = await run_jobs(mover, bench.job(1, ((0, 0), (1, 0), (2, 0))))
        assert (outcome.written, outcome.bad, outcome.failed) == ([1], [], {})
        assert outcome.bytes == dict.fromkeys(range(3), 4 * BLOCK_SIZE)
        # From there into a second stripe, by shards.
        second = bench.job(2, ((2, 1), (0, 1), (1, 1)))
        half, header = SHAPE.shard_blocks, SHAPE.header_bytes
        second.sources[:] = [
            ShardSource(0, 1, 0, 0, header, 0, half),
            ShardSource(1, 1, 1, 0, header, half, half),
        ]
        assert (await run_jobs(mover, second)).written == [2]
    finally:
        await mover.close()
    for number, devices, slot in ((1, (0, 1, 2), 0), (2, (2, 0, 1), 1)):
        found = [bench.shard(device, slot) for device in devices]
        assert [header.shard for header, _ in found] == [0, 1, 2]
        assert {header.stripe for header, _ in found} == {number}
        assert found[0][1] + found[1][1] == bench.data
        parity = bytearray(SHAPE.shard_bytes)
        codec(2, 1).encode([found[0][1], found[1][1]], [memoryview(parity)])
        assert found[2][1] == parity
        assert found[0][0].contents.versions.tolist() == [7] * SHAPE.blocks


@pytest.mark.parametrize("make", MOVERS)
async def test_bad_sources_are_named_and_nothing_is_written(
    bench: Bench, make: Callable[[], Mover]
) -> None:
    mover = make()
    try:
        await bench.join(mover)
        job = bench.job(1, ((0, 0), (1, 0), (2, 0)))
        job.crcs[3] ^= 1
        gone = bench.job(2, ((0, 1), (1, 1), (2, 1)))
        gone.sources[:] = [ShardSource(NOWHERE, 9, 0, 0, 0, 0, SHAPE.blocks)]
        good = bench.job(3, ((0, 2), (1, 2), (NOWHERE, 0)))
        outcome = await run_jobs(mover, job, gone, good)
        assert outcome.written == [3]
        assert outcome.bad == [(1, 3), *((2, at) for at in range(SHAPE.blocks))]
        # The engine supplies the block from elsewhere.
        job.crcs[3] ^= 1
        job.sources[:] = [
            JournalSource(0, WHERE.journal_offset, 0, 3),
            JournalSource(0, WHERE.journal_offset + 4 * BLOCK_SIZE, 4, SHAPE.blocks - 4),
        ]
        job.inline.append((3, bench.data[3 * BLOCK_SIZE : 4 * BLOCK_SIZE]))
        assert (await run_jobs(mover, job)).written == [1]
    finally:
        await mover.close()
    assert bench.shard(0, 0)[1] + bench.shard(1, 0)[1] == bench.data


async def test_the_worker_has_the_descriptors_and_with_them_the_locks(bench: Bench) -> None:
    """As long as it lives nobody else can take the devices (R22)."""
    mover = ProcessMover()
    url = f"file://{bench.paths[1]}"
    try:
        await bench.join(mover)
        folder = Path(f"/proc/{mover.pid}/fd")
        targets = {os.readlink(entry) for entry in folder.iterdir()}
        assert {str(path) for path in bench.paths} <= targets
        for device in bench.devices:
            await device.close()
        with pytest.raises(DeviceBusy):
            await open_backend(url)
        # A member that was removed is let go of.
        await mover.remove_member(1)
        await (await open_backend(url)).close()
        with pytest.raises(DeviceBusy):
            await open_backend(f"file://{bench.paths[2]}")
    finally:
        await mover.close()
    await (await open_backend(f"file://{bench.paths[2]}")).close()


async def test_close_ends_the_worker_and_can_be_repeated(bench: Bench) -> None:
    mover = ProcessMover()
    await bench.join(mover)
    pid = mover.pid
    await mover.close()
    assert not Path(f"/proc/{pid}").exists()
    await mover.close()


async def test_a_worker_that_died_stops_the_pool_and_not_the_daemon(bench: Bench) -> None:
    mover = ProcessMover()
    try:
        await bench.join(mover)
        os.kill(mover.pid, signal.SIGKILL)
        with pytest.raises(PoolStopped, match="the worker process died.*restart the daemon"):
            await run_jobs(mover, bench.job(1, ((0, 0), (1, 0), (2, 0))))
    finally:
        await mover.close()


async def test_requests_at_the_same_time_are_answered_one_by_one(bench: Bench) -> None:
    mover = ProcessMover()
    try:
        await bench.join(mover)
        jobs = [bench.job(n, ((0, n), (1, n), (2, n))) for n in range(1, 7)]
        outcomes = await asyncio.gather(*(run_jobs(mover, job) for job in jobs))
        assert [outcome.written for outcome in outcomes] == [[n] for n in range(1, 7)]
    finally:
        await mover.close()


_DAEMON = """
import asyncio, sys
from backends.open import open_backend
from pool.format.geometry import layout
from pool.mover import ProcessMover

async def main():
    mover = ProcessMover()
    device = await open_backend("file://" + sys.argv[1])
    await mover.add_member(0, device, layout(1 << 20, 64 << 10, 4))
    print(mover.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_worker_dies_with_its_parent_and_lets_go_of_the_devices(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    await (await open_backend(f"file://{path}?size={SIZE}", create=True)).close()
    daemon = subprocess.Popen(
        [sys.executable, "-c", _DAEMON, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert daemon.stdout is not None
        worker = int(await asyncio.to_thread(daemon.stdout.readline))
        os.kill(worker, 0)
        with pytest.raises(DeviceBusy):
            await open_backend(f"file://{path}")
        # While the worker lives, the lock is held, whatever became of the daemon.
        os.kill(worker, signal.SIGSTOP)
    finally:
        daemon.kill()
        daemon.wait()
        assert daemon.stdout is not None
        daemon.stdout.close()
    async with asyncio.timeout(20):
        await _until_free(path)
    assert not _alive(worker)


async def _until_free(path: Path) -> None:
    for _ in range(2000):
        try:
            await (await open_backend(f"file://{path}")).close()
        except DeviceBusy:
            await asyncio.sleep(0.01)
        else:
            return


def _alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and was not waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
