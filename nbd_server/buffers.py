"""Memory of a server: reply buffers that are used again, and a bound on what requests hold.

A buffer is out of the pool for as long as anything may still read or write it (R8). Called by
`session`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

#: Free buffers of either size that are kept.
_SHORT_KEPT = 8
_LONG_KEPT = 2


class BufferPool:
    """Buffers of two sizes: for a turn's replies, and for the longest request.

    Fresh memory costs more than filling it, and clearing a long buffer would stop the loop for
    milliseconds: so they are used again, and long ones are mapped, not cleared."""

    def __init__(self, short: int, long: int) -> None:
        self._short = short
        self._long = long
        self._short_free: list[memoryview] = []
        self._long_free: list[memoryview] = []

    def take(self, size: int) -> memoryview:
        """A writable buffer of at least `size` bytes with undefined content."""
        if size <= self._short:
            return (
                self._short_free.pop() if self._short_free else memoryview(bytearray(self._short))
            )
        return self._long_free.pop() if self._long_free else memoryview(mmap.mmap(-1, self._long))

    def give(self, buffer: memoryview) -> None:
        """Take back a buffer, as it was taken, that nothing refers to any more."""
        if len(buffer) == self._short:
            free, kept = self._short_free, _SHORT_KEPT
        else:
            free, kept = self._long_free, _LONG_KEPT
        if len(free) < kept:
            free.append(buffer)


class Budget:
    """Bytes that all requests together hold. Who finds it exhausted waits to be called.

    Taking never fails: a session asks `exhausted` before it reads more, so the limit is passed by
    one request at most.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[Callable[[], None], None] = {}
        self.used = 0

    @property
    def exhausted(self) -> bool:
        return self.used >= self._limit

    @property
    def contended(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def take(self, size: int) -> None:
        self.used += size

    def give(self, size: int) -> None:
        self.used -= size
        if self._waiting and not self.exhausted:
            waiting, self._waiting = self._waiting, {}
            for wake in waiting:
                wake()

    def wait(self, wake: Callable[[], None]) -> None:
        """Call `wake` once, when there is room again."""
        self._waiting[wake] = None

    def forget(self, wake: Callable[[], None]) -> None:
        """Do not call `wake` any more."""
        self._waiting.pop(wake, None)
