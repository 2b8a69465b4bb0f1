"""A device in a real file whose power can fail: what was not synced is kept, lost or torn.

The file always holds what the engine wrote, as the page cache would show it. The decorator keeps
the old and the new bytes of every write since the last good sync; `PowerDevice.lose` puts the file
into a state that a disk may be found in after a power failure. From `cut` on nothing works any more
and nothing reaches the file.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from backends.base import Buffer, Device, DeviceGone
from tests.crash.trace import SLOWEST, draw_fate, pieces


@dataclass(slots=True, eq=False)
class Unsynced:
    """A write that may be undone. `done` once the file has all of it."""

    offset: int
    old: bytes
    new: bytes
    done: bool = False


class PowerDevice:
    """Implements `backends.base.Device` around one in the file `path`."""

    def __init__(self, inner: Device, path: str, rng: Random) -> None:
        self._inner = inner
        self._path = path
        self._rng = rng
        self._unsynced: list[Unsynced] = []
        self._cut = False

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def size(self) -> int:
        return self._inner.size

    async def read(self, offset: int, length: int) -> bytes:
        self._check()
        return await self._inner.read(offset, length)

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        self._check()
        write = self._remember(offset, buffers)
        await self._inner.write(offset, buffers, sync=sync)
        write.done = True
        self._check()
        if sync and write in self._unsynced:
            self._unsynced.remove(write)

    async def sync(self) -> None:
        self._check()
        # Slow, as disks are: more is outstanding when the power fails.
        covered = [write for write in self._unsynced if write.done]
        await asyncio.sleep(self._rng.uniform(0, SLOWEST / 1000))
        await self._inner.sync()
        self._check()
        self._unsynced = [write for write in self._unsynced if write not in covered]

    def try_read(self, offset: int, into: memoryview) -> bool:
        self._check()
        return self._inner.try_read(offset, into)

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check()
        write = self._remember(offset, buffers)
        self._inner.append(offset, buffers)
        write.done = True

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        raise NotImplementedError("jobs run in this process: another's writes would not be seen")

    async def close(self) -> None:
        await self._inner.close()

    def cut(self) -> None:
        """The power is off. What is in flight ends, but nobody hears of it."""
        self._cut = True

    def lose(self) -> Counter[str]:
        """Decide the fate of each unsynced write, in the closed file; returns the fates' counts."""
        fates: Counter[str] = Counter()
        rng = self._rng
        bias = rng.choice((0.1, 0.5, 0.9))
        fd = os.open(self._path, os.O_WRONLY)
        try:
            for write in reversed(self._unsynced):
                os.pwrite(fd, write.old, write.offset)
            for write in self._unsynced:
                fate = draw_fate(rng, bias)
                fates[fate] += 1
                for at, piece in pieces(write.new, fate, rng):
                    os.pwrite(fd, piece, write.offset + at)
        finally:
            os.close(fd)
        self._unsynced.clear()
        return fates

    def _remember(self, offset: int, buffers: Sequence[Buffer]) -> Unsynced:
        new = b"".join(buffers)
        with open(self._path, "rb") as file:
            old = os.pread(file.fileno(), len(new), offset)
        write = Unsynced(offset, old, new)
        self._unsynced.append(write)
        return write

    def _check(self) -> None:
        if self._cut:
            raise DeviceGone(f"{self.url}: the power is off")
