"""The names of objects: one alphabet that files, buckets and RADOS pools all take unescaped."""

from __future__ import annotations

import errno
import re

from .base import DeviceError

#: `.` and `..` match the alphabet but name directories wherever objects are files.
_NAME = re.compile(r"(?!\.{1,2}\Z)[a-z0-9._-]{1,128}\Z")


def is_name(name: str) -> bool:
    """Whether an object may have this name."""
    return _NAME.match(name) is not None


def check_name(url: str, name: str) -> None:
    """Raise `DeviceError` unless an object may have this name."""
    if not is_name(name):
        raise DeviceError(
            errno.EINVAL, f"{url}: {name!r} cannot name an object: use [a-z0-9._-]{{1,128}}"
        )
