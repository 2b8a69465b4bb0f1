"""Complete transfers over a file descriptor: all the bytes or an `OSError`. Blocking, stateless.

Called by `backends.descriptor`, in its threads or (append) in the event loop.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Sequence
from itertools import islice

from .base import Buffer

#: Linux takes at most this many buffers in one pwritev (UIO_MAXIOV).
IOV_MAX = 1024


def read_exactly(fd: int, offset: int, length: int) -> bytes:
    """Return `length` bytes from `offset`; an end of file before that is an EIO."""
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    pieces = [data]
    done = len(data)
    while data and done < length:  # the kernel moves at most 2 GiB at once
        data = os.pread(fd, length - done, offset + done)
        pieces.append(data)
        done += len(data)
    if done < length:
        raise OSError(errno.EIO, f"file ends at {offset + done}: somebody truncated it")
    return b"".join(pieces)


def write_all(fd: int, offset: int, buffers: Sequence[Buffer], flags: int = 0) -> None:
    """Write every buffer, one after the other; `flags` are those of pwritev2."""
    total = sum(map(len, buffers))
    if len(buffers) <= IOV_MAX and os.pwritev(fd, buffers, offset, flags) == total:
        return
    _write_piecewise(fd, offset, buffers, flags)


def _write_piecewise(fd: int, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
    """The slow way, from the start again: too many buffers for one call, or a partial write."""
    views = deque(memoryview(buffer) for buffer in buffers if len(buffer))
    while views:
        done = os.pwritev(fd, list(islice(views, IOV_MAX)), offset, flags)
        if done == 0:
            raise OSError(errno.EIO, "the kernel took no bytes")
        offset += done
        while views and done >= len(views[0]):
            done -= len(views.popleft())
        if done:
            views[0] = views[0][done:]
