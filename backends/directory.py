"""A directory, on a NAS for instance, as an object store: `dir:///mnt/nas/pool?size=100G`.

An object is a file. It is written under a temporary name, synced, renamed, and the directory is
synced: readers see all of it or nothing, also after power loss. Temporary names and the lock file
begin with `~`, which no object name can contain.

Invariants: everything is done relative to one descriptor of the directory, so that an unmounted NAS
is an error and not an empty directory on the disk below. One process writes (R22); it removes the
temporaries that a dead predecessor left.

Opened by `backends.open`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import aiofiles

from .base import BLOCK_SIZE, Buffer, DeviceError, DeviceFull
from .failures import gone, read_only, translate
from .lock import lock_for_writing
from .names import check_name, is_name
from .settle import to_the_end

T = TypeVar("T")

LOCK_NAME = "~lock"
TEMPORARY_PREFIX = "~tmp-"

#: With the process id it makes temporary names unique among all that share the lock.
_serials = itertools.count()


class DirectoryStore:
    """An `ObjectStore` in the directory behind `fd`; build it with `open_directory`.

    Owns `fd` and `lock_fd`; without the latter it is read-only. `size` is a backstop: what other
    processes store (a worker) is only counted when the limit is near. Operations in flight must
    have ended before `close`.
    """

    scheme = "dir"

    def __init__(self, url: str, fd: int, size: int, *, lock_fd: int | None = None) -> None:
        self._url = url
        self._size = size
        self._descriptors = [fd] if lock_fd is None else [fd, lock_fd]
        self._writable = lock_fd is not None
        self._used = _used_bytes(fd)
        self._reserved = 0

    @property
    def url(self) -> str:
        return self._url

    @property
    def size(self) -> int:
        return self._size

    def worker_spec(self) -> tuple[dict[str, str | int], list[int]]:
        """As `Device.worker_spec`: the descriptors of the directory and of the lock."""
        spec: dict[str, str | int] = {"scheme": self.scheme, "url": self._url, "size": self._size}
        return spec, [self._fd, *self._descriptors[1:]]

    async def put(self, name: str, buffers: Sequence[Buffer]) -> None:
        """See `ObjectStore.put`. A cancelled put runs to its end first."""
        self._check_writable()
        check_name(self._url, name)
        await self._result(f"put of {name}", to_the_end(self._put(name, buffers)))

    async def get(self, name: str, offset: int, length: int) -> bytes:
        check_name(self._url, name)
        if offset < 0 or length < 0:
            raise self._outside(name, offset, length)
        data = await self._result(f"get of {name}", self._get(name, offset, length))
        if len(data) != length:
            raise self._outside(name, offset, length)
        return data

    async def delete(self, name: str) -> None:
        self._check_writable()
        check_name(self._url, name)
        deleting = to_the_end(asyncio.to_thread(_delete, self._fd, name))
        self._used -= await self._result(f"delete of {name}", deleting)

    async def list(self, prefix: str = "") -> list[str]:
        entries = await self._result("list", asyncio.to_thread(_entries, self._fd))
        return sorted(name for name in entries if is_name(name) and name.startswith(prefix))

    async def close(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    async def _put(self, name: str, buffers: Sequence[Buffer]) -> None:
        length = sum(map(len, buffers))
        growth = length - await asyncio.to_thread(_length, self._fd, name)
        await self._check_room(name, growth)
        self._reserved += growth
        try:
            await self._write(name, buffers)
            self._used += growth
        finally:
            self._reserved -= growth

    async def _write(self, name: str, buffers: Sequence[Buffer]) -> None:
        temporary = f"{TEMPORARY_PREFIX}{os.getpid()}-{next(_serials)}"
        try:
            async with aiofiles.open(temporary, "xb", opener=self._open_relative) as file:
                for buffer in buffers:
                    await file.write(buffer)
                await file.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            await asyncio.to_thread(_publish, self._fd, temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._fd)
            raise

    async def _get(self, name: str, offset: int, length: int) -> bytes:
        async with aiofiles.open(name, "rb", opener=self._open_relative) as file:
            await file.seek(offset)
            return bytes(await file.read(length))

    async def _check_room(self, name: str, growth: int) -> None:
        if self._used + self._reserved + growth > self._size:
            self._used = await asyncio.to_thread(_used_bytes, self._fd)
        if growth > 0 and self._used + self._reserved + growth > self._size:
            raise DeviceFull(
                f"{self._url}: {name} needs {growth} bytes, {self._used} of {self._size} are used:"
                " free space, or give it a larger size="
            )

    async def _result(self, action: str, call: Awaitable[T]) -> T:
        try:
            return await call
        except DeviceError:
            raise
        except OSError as cause:
            if _is_deleted(self._fd):
                raise gone(self._url, "directory was deleted") from cause
            raise translate(self._url, action, cause) from cause

    @property
    def _fd(self) -> int:
        if not self._descriptors:
            raise gone(self._url, "it was closed here")
        return self._descriptors[0]

    def _open_relative(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_CLOEXEC, 0o600, dir_fd=self._fd)

    def _check_writable(self) -> None:
        if not self._writable:
            raise read_only(self._url)

    def _outside(self, name: str, offset: int, length: int) -> DeviceError:
        text = f"{self._url}: {length} bytes at {offset} leave object {name}: correct the range"
        return DeviceError(errno.EINVAL, text)


def open_directory(
    path: str, *, url: str, size: int | None = None, create: bool = False, writable: bool = True
) -> DirectoryStore:
    """Open the directory `path`, which `create` makes when it is missing. Blocking.

    `size` limits the bytes stored; without it, all that is free now. Raises `DeviceError`,
    and `DeviceBusy` when another process writes to it.
    """
    lock_fd: int | None = None
    try:
        if create:
            os.makedirs(path, mode=0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        text = f"{url} does not exist: make the directory or mount the NAS"
        raise DeviceError(errno.ENOENT, text) from cause
    except (NotADirectoryError, FileExistsError) as cause:
        text = f"{url} is no directory: write file:{path} or block:{path} instead"
        raise DeviceError(errno.ENOTDIR, text) from cause
    except OSError as cause:
        raise translate(url, "open", cause) from cause
    try:
        if writable:
            lock_fd = _locked(fd, url)
            _remove_stale(fd)
        return DirectoryStore(url, fd, size or _room(fd), lock_fd=lock_fd)
    except OSError as cause:
        for descriptor in (fd, lock_fd):
            if descriptor is not None:
                os.close(descriptor)
        if isinstance(cause, DeviceError):
            raise
        raise translate(url, "open", cause) from cause


def _locked(fd: int, url: str) -> int:
    lock_fd = os.open(LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=fd)
    try:
        lock_for_writing(lock_fd, url)
    except OSError:
        os.close(lock_fd)
        raise
    return lock_fd


def _remove_stale(fd: int) -> None:
    for name in os.listdir(fd):
        if name.startswith(TEMPORARY_PREFIX):
            os.unlink(name, dir_fd=fd)


def _room(fd: int) -> int:
    """Return what is stored already and what is free, a multiple of `BLOCK_SIZE`."""
    status = os.fstatvfs(fd)
    room = _used_bytes(fd) + status.f_bavail * status.f_frsize
    return room - room % BLOCK_SIZE


def _used_bytes(fd: int) -> int:
    return sum(_length(fd, name) for name in os.listdir(fd) if is_name(name))


def _length(fd: int, name: str) -> int:
    """Return the bytes of an object, 0 when there is none."""
    try:
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _publish(fd: int, temporary: str, name: str) -> None:
    """Blocking: the temporary file becomes the object, durably."""
    os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
    os.fsync(fd)


def _delete(fd: int, name: str) -> int:
    """Blocking: remove an object durably; return the bytes that it had, 0 when there was none."""
    length = _length(fd, name)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
        os.fsync(fd)
    if _is_deleted(fd):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return length


def _entries(fd: int) -> list[str]:
    """Blocking: names in the directory; a deleted one is an error, not empty."""
    if _is_deleted(fd):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    return os.listdir(fd)


def _is_deleted(fd: int) -> bool:
    return os.fstat(fd).st_nlink == 0
