"""Whether another process writes to what a URL names, asked without being in its way.

A file and a store tell by their lock (R22), a disk by who has it exclusively: its daemon, or a
mount. Nothing is created or written, and what cannot be told counts as not in use.

Called by `stripewell.recover`, which reads what may be served.
"""

from __future__ import annotations

import errno
import os
import stat

from .directory import LOCK_NAME
from .lock import is_locked
from .url import parse_url

#: Neither waits for a writer of a pipe, nor takes a terminal.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def in_use(url: str) -> bool:
    """Whether another process, or another descriptor of this one, has it for writing. Blocking."""
    try:
        path = parse_url(url).path
        mode = os.stat(path).st_mode
        if stat.S_ISBLK(mode):
            return _is_claimed(path)
        return _is_locked(os.path.join(path, LOCK_NAME) if stat.S_ISDIR(mode) else path)
    except (OSError, ValueError):
        return False


def _is_locked(path: str) -> bool:
    fd = os.open(path, _FLAGS)
    try:
        return is_locked(fd)
    finally:
        os.close(fd)


def _is_claimed(path: str) -> bool:
    try:
        os.close(os.open(path, _FLAGS | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False
