"""Decorators that count what a backend does: operations, bytes, errors, time, latencies.

Same interface as what they wrap. The clock is passed in. The synchronous fast calls are counted but
not timed: they never wait for the medium, and reading the clock twice would cost more than they do.
The counters are plain integers changed in the event loop; `stripewell` exports them as metrics.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from .base import Buffer, Device, DeviceError, ObjectStore, WorkerSpec

T = TypeVar("T")

Clock = Callable[[], float]

#: Latency bucket i counts operations of less than 2**i microseconds; the last one all others.
BUCKETS = 26


@dataclass(slots=True)
class OperationStats:
    """Counters of one kind of operation. `bytes` counts those of successful operations."""

    ops: int = 0
    bytes: int = 0
    errors: int = 0
    busy_seconds: float = 0.0
    latency: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def record(self, seconds: float, transferred: int, *, failed: bool) -> None:
        """Count one finished operation."""
        self.ops += 1
        self.errors += failed
        self.bytes += 0 if failed else transferred
        self.busy_seconds += seconds
        self.latency[min(int(seconds * 1e6).bit_length(), BUCKETS - 1)] += 1


class Stats(dict[str, OperationStats]):
    """Counters by operation name; an operation appears with its first use."""

    def __missing__(self, op: str) -> OperationStats:
        self[op] = stats = OperationStats()
        return stats

    async def timed(self, clock: Clock, op: str, call: Awaitable[T], transferred: int = 0) -> T:
        """Return what `call` returns and count it; cancelled operations count as failed."""
        began = clock()
        failed = True
        try:
            result = await call
            failed = False
            return result
        finally:
            self[op].record(clock() - began, transferred, failed=failed)


class ObservedDevice:
    """A `Device` with counters in `stats`, where `try_read` hits and misses are two operations."""

    def __init__(self, inner: Device, clock: Clock) -> None:
        self.inner = inner
        self.stats = Stats()
        self._clock = clock
        self._hits = self.stats["try_read_hit"]
        self._misses = self.stats["try_read_miss"]
        self._appends = self.stats["append"]

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def size(self) -> int:
        return self.inner.size

    async def read(self, offset: int, length: int) -> bytes:
        call = self.inner.read(offset, length)
        return await self.stats.timed(self._clock, "read", call, length)

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        call = self.inner.write(offset, buffers, sync=sync)
        op = "write_sync" if sync else "write"
        await self.stats.timed(self._clock, op, call, sum(map(len, buffers)))

    async def sync(self) -> None:
        await self.stats.timed(self._clock, "sync", self.inner.sync())

    def try_read(self, offset: int, into: memoryview) -> bool:
        try:
            if not self.inner.try_read(offset, into):
                self._misses.ops += 1
                return False
        except DeviceError:
            self._hits.ops += 1
            self._hits.errors += 1
            raise
        self._hits.ops += 1
        self._hits.bytes += len(into)
        return True

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._appends.ops += 1
        try:
            self.inner.append(offset, buffers)
        except DeviceError:
            self._appends.errors += 1
            raise
        self._appends.bytes += sum(map(len, buffers))

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        return self.inner.worker_spec()

    async def close(self) -> None:
        await self.inner.close()


class ObservedStore:
    """An `ObjectStore` with counters in `stats`."""

    def __init__(self, inner: ObjectStore, clock: Clock) -> None:
        self.inner = inner
        self.stats = Stats()
        self._clock = clock

    @property
    def url(self) -> str:
        return self.inner.url

    @property
    def size(self) -> int:
        return self.inner.size

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        call = self.inner.put(name, buffers)
        await self.stats.timed(self._clock, "put", call, sum(map(len, buffers)))

    async def get(self, name: str, offset: int, length: int) -> bytes:
        call = self.inner.get(name, offset, length)
        return await self.stats.timed(self._clock, "get", call, length)

    async def delete(self, name: str) -> None:
        await self.stats.timed(self._clock, "delete", self.inner.delete(name))

    async def list(self, prefix: str = "") -> list[str]:
        return await self.stats.timed(self._clock, "list", self.inner.list(prefix))

    def worker_spec(self) -> WorkerSpec:
        """As `Device.worker_spec`. Raises `DeviceError` when the store is of this process only."""
        return self.inner.worker_spec()

    async def close(self) -> None:
        await self.inner.close()
