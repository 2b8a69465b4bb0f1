"""A raw disk or partition as a device: `/dev/sdb` or `block:/dev/sdb`.

Invariant: one opened for writing is opened with O_EXCL, which the kernel grants to one holder only
and to none while the disk is mounted or part of an array (R22). I/O is that of
`backends.descriptor`. Opened by `backends.open`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from .base import BLOCK_SIZE, DeviceError
from .descriptor import DescriptorDevice
from .failures import gone, translate
from .file import MIN_SIZE
from .lock import busy

_BLKGETSIZE64 = 0x80081272


class BlockDevice(DescriptorDevice):
    """A `Device` on a block special file; build it with `open_block`."""

    scheme = "block"

    def _check_alive(self, fd: int) -> None:
        # The node of an unplugged disk is removed, its descriptor stays and its size drops to 0.
        if os.fstat(fd).st_nlink == 0:
            raise gone(self.url, "device node was removed")
        if block_size(fd) < self.size:
            raise gone(self.url, "disk was unplugged or shrank")


def open_block(path: str, *, url: str, writable: bool = True) -> BlockDevice:
    """Open the block device `path`. Blocking.

    Raises `DeviceError` when it is missing or no block device, `DeviceBusy` when it is mounted or
    used by another process.
    """
    flags = os.O_RDWR | os.O_EXCL if writable else os.O_RDONLY
    try:
        if not stat.S_ISBLK(os.stat(path).st_mode):
            raise _not_a_disk(path, url)
        fd = os.open(path, flags | os.O_CLOEXEC)
    except DeviceError:
        raise
    except FileNotFoundError as cause:
        raise DeviceError(
            errno.ENOENT, f"{url} does not exist: correct the path or attach the disk"
        ) from cause
    except OSError as cause:
        raise busy(url) if cause.errno == errno.EBUSY else translate(url, "open", cause) from cause
    try:
        size = block_size(fd)
    except OSError as cause:
        os.close(fd)
        raise translate(url, "size query", cause) from cause
    if size < MIN_SIZE:
        os.close(fd)
        raise DeviceError(errno.EINVAL, f"{url} has {size} bytes only: insert a medium or a disk")
    return BlockDevice(url, fd, size - size % BLOCK_SIZE, writable=writable)


def block_size(fd: int) -> int:
    """Return the size in bytes of the block device behind `fd`. Raises `OSError`."""
    answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    return int(struct.unpack("=Q", answer)[0])


def _not_a_disk(path: str, url: str) -> DeviceError:
    kind = "dir" if os.path.isdir(path) else "file"
    return DeviceError(errno.EINVAL, f"{url} is no block device: write {kind}:{path} instead")
