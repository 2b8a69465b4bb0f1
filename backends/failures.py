"""Turns what the operating system says into the errors that `backends.base` promises.

Pure. Every message names the device and says what to do. Called by every adapter on local files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from .base import BLOCK_SIZE, Buffer, DeviceError, DeviceFull, DeviceGone

#: The other side of the file descriptor, or the descriptor itself, is no longer there.
_GONE = frozenset(
    {errno.ENODEV, errno.ENXIO, errno.EBADF, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN}
)
_REMEDIES = {
    errno.EACCES: "give this user access to it",
    errno.EPERM: "give this user access to it",
    errno.EROFS: "mount it for writing",
    errno.ENOLCK: "mount it with locks enabled",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files (fs.file-max)",
}
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def translate(url: str, action: str, cause: OSError) -> DeviceError:
    """Return the `DeviceError` for a system call that failed while doing `action` to `url`."""
    code = cause.errno or errno.EIO
    if code in _GONE:
        return gone(url, os.strerror(code))
    if code in _FULL:
        return DeviceFull(f"{url}: no room left for {action}: free space under it")
    remedy = _REMEDIES.get(code, "check the medium and its cables")
    return DeviceError(code, f"{url}: {action} failed: {os.strerror(code)}: {remedy}")


def gone(url: str, reason: str) -> DeviceGone:
    """Return the error of a device that will not answer again."""
    return DeviceGone(f"{url} has vanished ({reason}): bring it back, then restart the daemon")


def read_only(url: str) -> DeviceError:
    """Return the error of a write to a backend that was opened for reading."""
    return DeviceError(errno.EROFS, f"{url} was opened read-only: open it for writing first")


def misuse(url: str, size: int, offset: int, length: int) -> DeviceError:
    """Return the error of a request that the contract does not allow."""
    return DeviceError(
        errno.EINVAL,
        f"{url}: {length} bytes at {offset} are not aligned to {BLOCK_SIZE} or leave the device"
        f" of {size} bytes: correct the caller",
    )


def check_range(url: str, size: int, offset: int, length: int) -> None:
    """Raise `DeviceError` unless the request is aligned and inside the device."""
    if (offset | length) & (BLOCK_SIZE - 1) or not 0 <= offset <= size - length or length < 0:
        raise misuse(url, size, offset, length)


def check_buffers(url: str, size: int, offset: int, buffers: Sequence[Buffer]) -> None:
    """Raise `DeviceError` unless each buffer is aligned and all stay inside the device."""
    total = bits = 0
    for buffer in buffers:
        length = len(buffer)
        total += length
        bits |= length
    check_range(url, size, offset, total)
    if bits & (BLOCK_SIZE - 1):
        raise misuse(url, size, offset, bits)
