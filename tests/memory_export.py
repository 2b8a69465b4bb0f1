"""An export in memory: what the server's tests and benchmarks serve.

It follows `nbd_server.export.Export` to the letter, and can be told to wait (`slow`), to fail
(`failure`) and to stop at a gate, so that tests reach every path of a session.
"""

from __future__ import annotations

import asyncio
import mmap

from nbd_server.export import EXTENT_HOLE, EXTENT_ZERO

BLOCK = 4096
_ZEROED = EXTENT_HOLE | EXTENT_ZERO
#: Mapped at once: the first touch of a page costs more than serving it.
_MAP = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE


class MemoryExport:
    """A thin volume: blocks never written are holes."""

    def __init__(
        self, name: str, size: int, *, read_only: bool = False, description: str = ""
    ) -> None:
        self.name = name
        self.description = description
        self.size = size
        self.read_only = read_only
        self.closed = False
        #: Let the synchronous calls say that they would have to wait.
        self.slow = False
        #: Raised by every call that touches data.
        self.failure: Exception | None = None
        #: Asynchronous calls wait here.
        self.gate = asyncio.Event()
        self.gate.set()
        self.commits = 0
        self.flushes = 0
        self.waiting = 0
        self.data = mmap.mmap(-1, max(size, 1), flags=_MAP)
        self._view = memoryview(self.data)
        self._written = bytearray(-(-size // BLOCK))

    def try_read(self, offset: int, into: memoryview) -> bool:
        if self.failure is not None:
            raise self.failure
        if self.slow:
            return False
        into[:] = self._view[offset : offset + len(into)]
        return True

    def try_write(self, offset: int, data: memoryview) -> bool:
        if self.failure is not None:
            raise self.failure
        if self.slow:
            return False
        self._store(offset, data)
        return True

    def commit(self) -> None:
        self.commits += 1

    async def read(self, offset: int, into: memoryview) -> None:
        await self._wait()
        into[:] = self._view[offset : offset + len(into)]

    async def write(self, offset: int, data: memoryview) -> None:
        await self._wait()
        self._store(offset, data)

    async def trim(self, offset: int, length: int) -> None:
        await self._wait()
        first, end = -(-offset // BLOCK), (offset + length) // BLOCK
        if first < end:
            self._zero(first * BLOCK, end * BLOCK)
            self._written[first:end] = bytes(end - first)

    async def write_zeroes(self, offset: int, length: int, *, no_hole: bool) -> None:
        await self._wait()
        self._zero(offset, offset + length)
        if no_hole:
            self._mark(offset, length)
        else:
            await self.trim(offset, length)

    async def flush(self) -> None:
        await self._wait()
        self.flushes += 1

    async def extents(self, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
        await self._wait()
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < limit:
            state = self._written[at // BLOCK]
            other = self._written.find(0 if state else 1, at // BLOCK)
            stop = end if other < 0 else min(end, other * BLOCK)
            found.append((stop - at, 0 if state else _ZEROED))
            at = stop
        return found

    async def _wait(self) -> None:
        self.waiting += 1
        try:
            await self.gate.wait()
        finally:
            self.waiting -= 1
        if self.failure is not None:
            raise self.failure

    def _store(self, offset: int, data: memoryview) -> None:
        self._view[offset : offset + len(data)] = data
        self._mark(offset, len(data))

    def _mark(self, offset: int, length: int) -> None:
        first, end = offset // BLOCK, -(-(offset + length) // BLOCK)
        self._written[first:end] = b"\1" * (end - first)

    def _zero(self, start: int, end: int) -> None:
        step = 1 << 20
        for at in range(start, end, step):
            stop = min(end, at + step)
            self._view[at:stop] = bytes(stop - at)
