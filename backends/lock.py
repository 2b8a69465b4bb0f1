"""One pool has one writer (R22): a lock that lives as long as the open file description.

An OFD lock is inherited by the worker process together with the descriptor and is released by
the kernel only when the last copy is closed, so no crash leaves a stale one and no other descriptor
of the same file drops it by accident, as a POSIX record lock would.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from .base import DeviceBusy

#: struct flock of 64-bit Linux: l_type, l_whence, (pad), l_start, l_len, l_pid, (pad).
_FLOCK = struct.Struct("hhqqi4x")


def lock_for_writing(fd: int, url: str) -> None:
    """Lock all of the file behind `fd`. Raises `DeviceBusy` when somebody else holds it."""
    whole = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, whole)
    except OSError as cause:
        if cause.errno in (errno.EAGAIN, errno.EACCES):
            raise busy(url) from cause
        raise


def is_locked(fd: int) -> bool:
    """Whether somebody else holds the lock of the file behind `fd`, which may be open for reading
    only. Takes nothing."""
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    kind, *_ = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, wanted))
    return bool(kind != fcntl.F_UNLCK)


def busy(url: str) -> DeviceBusy:
    """Return the error of a backend that another process uses."""
    return DeviceBusy(
        f"{url} is in use by another process: stop the daemon that serves it, or unmount it"
    )
