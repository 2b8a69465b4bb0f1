"""An export in memory: what the server's tests and benchmarks serve.

It follows `nbd_server.export.Export` to the letter, and can be told to wait (`slow`), to fail
(`failure`) and to stop at a gate, so that tests reach every path of a session.
"""

from __future__ import annotations

import asyncio
import errno
import mmap

from nbd_server.constants import BASE_ALLOCATION
from nbd_server.export import EXTENT_HOLE, EXTENT_ZERO, Holes

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
        self.contexts = ("test:written",)
        self.cached: list[tuple[int, int]] = []
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

    def try_read_sparse(self, offset: int, into: memoryview) -> bool | Holes:
        if not self.try_read(offset, into):
            return False
        holes: list[tuple[int, int]] = []
        at, end = offset, offset + len(into)
        while at < end:
            stop = min(end, (at // BLOCK + 1) * BLOCK)
            if not self._written[at // BLOCK]:
                # What the server is told to be zeros it must not take from here.
                into[at - offset : stop - offset] = b"?" * (stop - at)
                if holes and sum(holes[-1]) == at - offset:
                    holes[-1] = (holes[-1][0], holes[-1][1] + stop - at)
                else:
                    holes.append((at - offset, stop - at))
            at = stop
        return holes or True

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

    async def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool, fast: bool = False
    ) -> None:
        await self._wait()
        if fast and length < BLOCK:
            raise OSError(errno.ENOTSUP, "a write would be as fast")
        self._zero(offset, offset + length)
        if no_hole:
            self._mark(offset, length)
        else:
            await self.trim(offset, length)

    async def flush(self) -> None:
        await self._wait()
        self.flushes += 1

    async def cache(self, offset: int, length: int) -> None:
        await self._wait()
        self.cached.append((offset, length))

    async def extents(
        self, offset: int, length: int, limit: int, context: str = BASE_ALLOCATION
    ) -> list[tuple[int, int]]:
        await self._wait()
        found: list[tuple[int, int]] = []
        at, end = offset, offset + length
        while at < end and len(found) < limit:
            state = self._written[at // BLOCK]
            other = self._written.find(0 if state else 1, at // BLOCK)
            stop = end if other < 0 else min(end, other * BLOCK)
            if context == BASE_ALLOCATION:
                found.append((stop - at, 0 if state else _ZEROED))
            else:
                found.append((stop - at, state))
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
