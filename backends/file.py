"""A regular file as a device: `file:///path/disk.img?size=10G` or a bare path.

Invariants: a file opened for writing is locked (R22) through the descriptor that does the I/O, and
that descriptor travels to the worker process. A deleted file is reported as gone by the next sync:
its bytes would vanish with the last descriptor, so nothing in it counts as durable.

Opened by `backends.open`.
"""

from __future__ import annotations

import errno
import os
import stat

from .base import BLOCK_SIZE, DeviceError
from .descriptor import DescriptorDevice
from .failures import gone, translate
from .lock import lock_for_writing

#: Smaller files cannot hold the superblocks at both ends and anything between them.
MIN_SIZE = 16 * BLOCK_SIZE


class FileDevice(DescriptorDevice):
    """A `Device` in a regular file; build it with `open_file`."""

    scheme = "file"

    def _check_alive(self, fd: int) -> None:
        if os.fstat(fd).st_nlink == 0:
            raise gone(self.url, "file was deleted")


def open_file(
    path: str, *, url: str, size: int | None = None, create: bool = False, writable: bool = True
) -> FileDevice:
    """Open the regular file `path`; with `create` and `size` (bytes) make a sparse one. Blocking.

    Raises `DeviceError` when it is missing, no regular file, too small or of another size than
    `size`, and `DeviceBusy` when another process writes to it.
    """
    try:
        if create and size is not None:
            _create_sparse(path, size)
        fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
    except FileNotFoundError as cause:
        raise DeviceError(errno.ENOENT, _missing(path, url, create)) from cause
    except IsADirectoryError as cause:
        raise _not_a_file(path, url) from cause
    except OSError as cause:
        raise translate(url, "open", cause) from cause
    try:
        usable = _usable_size(fd, path, url, size)
        if writable:
            lock_for_writing(fd, url)
    except DeviceError:
        os.close(fd)
        raise
    except OSError as cause:
        os.close(fd)
        raise translate(url, "open", cause) from cause
    return FileDevice(url, fd, usable, writable=writable)


def _create_sparse(path: str, size: int) -> None:
    """Make `path` durable with `size` bytes of holes; an existing file is left as it is."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return
    try:
        os.ftruncate(fd, size)
        os.fsync(fd)
        _sync_directory(os.path.dirname(path) or ".")
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(fd)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _usable_size(fd: int, path: str, url: str, wanted: int | None) -> int:
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise _not_a_file(path, url)
    if wanted is not None and wanted != status.st_size:
        raise DeviceError(
            errno.EINVAL,
            f"{url}: the file has {status.st_size} bytes, not {wanted}:"
            " correct size=, or give the file that size",
        )
    if status.st_size < MIN_SIZE:
        raise DeviceError(
            errno.EINVAL,
            f"{url}: {status.st_size} bytes are too few: a device needs at least {MIN_SIZE}",
        )
    return status.st_size - status.st_size % BLOCK_SIZE


def _missing(path: str, url: str, create: bool) -> str:
    if not os.path.isdir(os.path.dirname(path) or "."):
        return f"{url}: its directory does not exist: create it or correct the path"
    if create:
        return f"{url} does not exist: say how large it shall become, as in file://{path}?size=10G"
    return f"{url} does not exist: correct the path or attach the disk"


def _not_a_file(path: str, url: str) -> DeviceError:
    remedy = f"write dir:{path} instead" if os.path.isdir(path) else "name a file or a disk"
    return DeviceError(errno.EINVAL, f"{url} is no regular file: {remedy}")
