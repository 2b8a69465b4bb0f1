"""A device behind an open file descriptor: what regular files and raw block devices share.

Invariants: everything that may wait for the medium runs in one of three threads that belong to this
device, one for reads, writes and syncs each, so that none queues behind another kind. The
threads start with the first call that needs them. Their queues hold what the callers have in
flight, and the callers bound that. The descriptor is closed after the last queued call.

Called through `backends.file` and `backends.block`.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from . import transfer
from .base import BLOCK_SIZE, Buffer, DeviceError
from .failures import check_buffers, check_range, gone, read_only, translate
from .settle import to_the_end

T = TypeVar("T")

_CLOSED = -1
_UNALIGNED = BLOCK_SIZE - 1


class DescriptorDevice:
    """Implements `backends.base.Device` over `fd`, which it owns from now on."""

    scheme = "fd"

    def __init__(self, url: str, fd: int, size: int, *, writable: bool = True) -> None:
        self._url = url
        self._fd = fd
        self._size = size
        self._writable = writable
        self._reader: ThreadPoolExecutor | None = None
        self._writer: ThreadPoolExecutor | None = None
        self._syncer: ThreadPoolExecutor | None = None

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        self._check_open()
        check_range(self._url, self._size, offset, length)
        if self._reader is None:
            self._reader = _one_thread("read")
        call = self._reader.submit(transfer.read_exactly, self._fd, offset, length)
        return await self._result("read", asyncio.wrap_future(call))

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        """See `Device.write`. A cancelled write returns only when its thread is done with it."""
        self._check_write(offset, buffers)
        write = self._write_durably if sync else transfer.write_all
        call = self._writing_thread().submit(write, self._fd, offset, buffers)
        await self._result("write", to_the_end(asyncio.wrap_future(call)))

    async def sync(self) -> None:
        self._check_open()
        if self._syncer is None:
            self._syncer = _one_thread("sync")
        call = self._syncer.submit(self._sync, self._fd)
        await self._result("sync", asyncio.wrap_future(call))

    def try_read(self, offset: int, into: memoryview) -> bool:
        length = len(into)
        if offset < 0 or offset + length > self._size or (offset | length) & _UNALIGNED:
            check_range(self._url, self._size, offset, length)
        try:
            # Short means that the rest is not cached; at a true end the blocking read will tell.
            return os.preadv(self._fd, [into], offset, os.RWF_NOWAIT) == length
        except BlockingIOError:
            return False
        except OSError as cause:
            if cause.errno == errno.EOPNOTSUPP:  # this file system cannot say: always ask a thread
                return False
            raise translate(self._url, "read", cause) from cause

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_write(offset, buffers)
        try:
            transfer.write_all(self._fd, offset, buffers)
        except OSError as cause:
            raise translate(self._url, "append", cause) from cause

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        self._check_open()
        spec: dict[str, str | int] = {"scheme": self.scheme, "url": self._url, "size": self._size}
        spec["writable"] = int(self._writable)
        return spec, [self._fd]

    async def close(self) -> None:
        fd, self._fd = self._fd, _CLOSED
        if fd != _CLOSED:
            threads = [t for t in (self._reader, self._writer, self._syncer) if t is not None]
            await to_the_end(asyncio.to_thread(_release, threads, fd))

    def _check_alive(self, fd: int) -> None:
        """Raise `DeviceGone` when the device has vanished although its descriptor still works."""

    def _sync(self, fd: int) -> None:
        os.fdatasync(fd)
        self._check_alive(fd)

    def _write_durably(self, fd: int, offset: int, buffers: Sequence[Buffer]) -> None:
        transfer.write_all(fd, offset, buffers, os.RWF_DSYNC)
        self._check_alive(fd)

    def _check_open(self) -> None:
        if self._fd == _CLOSED:
            raise gone(self._url, "it was closed here")

    def _check_write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        if not self._writable:
            raise read_only(self._url)
        check_buffers(self._url, self._size, offset, buffers)

    def _writing_thread(self) -> ThreadPoolExecutor:
        if self._writer is None:
            self._writer = _one_thread("write")
        return self._writer

    async def _result(self, action: str, call: Awaitable[T]) -> T:
        try:
            return await call
        except DeviceError:
            raise
        except OSError as cause:
            raise translate(self._url, action, cause) from cause


def _one_thread(purpose: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"device-{purpose}")


def _release(threads: list[ThreadPoolExecutor], fd: int) -> None:
    """Blocking: let queued calls end, then close the descriptor and with it the lock."""
    for thread in threads:
        thread.shutdown(wait=True)
    os.close(fd)
