"""The counters of the observing decorators."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from backends.base import BLOCK_SIZE, DeviceError
from backends.fault_script import Delay, Fail, Rule, Script
from backends.faults import FaultyDevice
from backends.memory import MemoryDevice, MemoryStore
from backends.observe import BUCKETS, ObservedDevice, ObservedStore, OperationStats
from tests.sim.loop import run

SIZE = 16 * BLOCK_SIZE
A = b"a" * BLOCK_SIZE


def observed(*rules: Rule) -> ObservedDevice:
    inner = FaultyDevice(MemoryDevice(SIZE), Script(Random(1), rules))
    return ObservedDevice(inner, asyncio.get_running_loop().time)


def test_time_bytes_and_errors_are_counted() -> None:
    async def main() -> None:
        reads = frozenset({"read"})
        device = observed(Rule(reads, Delay(0.5)), Rule(reads, Fail(), nth=2))
        await device.read(0, 2 * BLOCK_SIZE)
        with pytest.raises(DeviceError):
            await device.read(0, BLOCK_SIZE)
        stats = device.stats["read"]
        assert (stats.ops, stats.bytes, stats.errors) == (2, 2 * BLOCK_SIZE, 1)
        assert stats.busy_seconds == pytest.approx(0.5)
        assert stats.latency[0] == 1
        assert stats.latency[(500_000).bit_length()] == 1

    run(main())


def test_each_kind_of_operation_has_its_own_counters() -> None:
    async def main() -> None:
        device = observed(Rule(frozenset({"try_read"}), Delay(1), within=(0, 1), times=None))
        await device.write(0, [A, A])
        await device.write(0, [A], sync=True)
        await device.sync()
        device.append(0, [A])
        with pytest.raises(DeviceError):
            device.append(SIZE, [A])
        into = memoryview(bytearray(BLOCK_SIZE))
        assert not device.try_read(0, into)
        assert device.try_read(BLOCK_SIZE, into)
        counted = {op: (s.ops, s.bytes, s.errors) for op, s in device.stats.items()}
        assert counted == {
            "write": (1, 2 * BLOCK_SIZE, 0),
            "write_sync": (1, BLOCK_SIZE, 0),
            "sync": (1, 0, 0),
            "append": (2, BLOCK_SIZE, 1),
            "try_read_hit": (1, BLOCK_SIZE, 0),
            "try_read_miss": (1, 0, 0),
        }

    run(main())


def test_stores_are_counted() -> None:
    async def main() -> None:
        store = ObservedStore(MemoryStore(SIZE), asyncio.get_running_loop().time)
        await store.put("a", [A])
        await store.get("a", 0, 10)
        await store.list()
        await store.delete("a")
        with pytest.raises(DeviceError):
            await store.get("a", 0, 10)
        counted = {op: (s.ops, s.bytes, s.errors) for op, s in store.stats.items()}
        assert counted == {
            "put": (1, BLOCK_SIZE, 0),
            "get": (2, 10, 1),
            "list": (1, 0, 0),
            "delete": (1, 0, 0),
        }

    run(main())


def test_the_last_bucket_takes_everything_slower() -> None:
    stats = OperationStats()
    stats.record(86_400.0, 0, failed=False)
    assert stats.latency[BUCKETS - 1] == 1
