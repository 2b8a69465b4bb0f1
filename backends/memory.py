"""Backends in memory, for unit tests and benchmarks: they forget everything when they are closed.

`MemoryDevice` lives in an anonymous memory file, so that a worker process can attach to it like
to a disk. Nothing ever waits: every write is as durable as it will get.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence

from .base import BLOCK_SIZE, Buffer, DeviceError, DeviceFull, WorkerSpec
from .failures import check_buffers, check_range, gone
from .names import check_name


class MemoryDevice:
    """A `Device` of `size` bytes of zeros, or the one in the memory file `fd`, which it owns."""

    def __init__(self, size: int, *, url: str = "memory:", fd: int | None = None) -> None:
        if size <= 0 or size % BLOCK_SIZE:
            raise DeviceError(errno.EINVAL, f"{url}: size {size} is no multiple of {BLOCK_SIZE}")
        if fd is None:
            fd = os.memfd_create("stripewell", os.MFD_CLOEXEC)
            os.ftruncate(fd, size)
        self._fd = fd
        self._url = url
        self._size = size
        self._map = mmap.mmap(fd, size)

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    async def read(self, offset: int, length: int) -> bytes:
        self._check_open()
        check_range(self._url, self._size, offset, length)
        return self._map[offset : offset + length]

    async def write(self, offset: int, buffers: Sequence[Buffer], *, sync: bool = False) -> None:
        self.append(offset, buffers)

    async def sync(self) -> None:
        self._check_open()

    def try_read(self, offset: int, into: memoryview) -> bool:
        self._check_open()
        length = len(into)
        check_range(self._url, self._size, offset, length)
        into[:] = self._map[offset : offset + length]
        return True

    def append(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        check_buffers(self._url, self._size, offset, buffers)
        for buffer in buffers:
            self._map[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        self._check_open()
        return {"scheme": "memory", "url": self._url, "size": self._size}, [self._fd]

    async def close(self) -> None:
        if not self._map.closed:
            self._map.close()
            os.close(self._fd)

    def _check_open(self) -> None:
        if self._map.closed:
            raise gone(self._url, "it was closed here")


class MemoryStore:
    """An `ObjectStore` of at most `size` bytes in a dictionary."""

    def __init__(self, size: int, *, url: str = "memory:") -> None:
        self._url = url
        self._size = size
        self._objects: dict[str, bytes] = {}
        self._open = True

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        self._check_open()
        check_name(self._url, name)
        others = sum(len(data) for key, data in self._objects.items() if key != name)
        if others + sum(map(len, buffers)) > self._size:
            raise DeviceFull(f"{self._url}: {name} does not fit: delete objects")
        self._objects[name] = b"".join(buffers)

    async def get(self, name: str, offset: int, length: int) -> bytes:
        self._check_open()
        check_name(self._url, name)
        if name not in self._objects:
            raise DeviceError(errno.ENOENT, f"{self._url} has no object {name}: look at its list")
        data = self._objects[name]
        if not 0 <= offset <= len(data) - length or length < 0:
            raise DeviceError(
                errno.EINVAL,
                f"{self._url}: {name} has {len(data)} bytes: {length} at {offset} leave the object",
            )
        return data[offset : offset + length]

    async def delete(self, name: str) -> None:
        self._check_open()
        check_name(self._url, name)
        self._objects.pop(name, None)

    async def list(self, prefix: str = "") -> list[str]:
        self._check_open()
        return sorted(name for name in self._objects if name.startswith(prefix))

    def worker_spec(self) -> WorkerSpec:
        text = f"{self._url} lives in this process only: use a directory, or no worker process"
        raise DeviceError(errno.EOPNOTSUPP, text)

    async def close(self) -> None:
        self._open = False
        self._objects.clear()

    def _check_open(self) -> None:
        if not self._open:
            raise gone(self._url, "it was closed here")
