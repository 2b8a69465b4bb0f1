"""The pool's own errors. Device errors come from `backends.base`; guests see `OSError` with an
errno."""

from __future__ import annotations

import errno


class PoolError(Exception):
    """An operation on the pool was refused or failed; `str()` is one line with the remedy."""


class BadSuperblock(PoolError):
    """A device of a pool has no superblock that can be believed. `generation` is that of a root
    with right checksums that makes no sense, or 0."""

    def __init__(self, message: str, generation: int = 0) -> None:
        super().__init__(message)
        self.generation = generation


class FormatError(Exception):
    """Bytes read from a device are not what `docs/format.md` says. Never reaches an operator as
    is."""


class _Worded(OSError):
    """`str()` is the message, without the number."""

    def __str__(self) -> str:
        return self.strerror or ""


class PoolFull(_Worded):
    """A write needs new space and there is none (P5)."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the pool is full: delete volumes, or TRIM in the guests")


class DataLost(_Worded):
    """More shards of a stripe are missing than its parity can replace (P4). `offset` is where in a
    volume, if a read of one met it."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)
        self.offset: int | None = None


class PoolStopped(_Worded):
    """The pool takes no writes any more; `str()` says why."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)
