"""Opens what a URL names, and rebuilds in a worker process what its parent has open.

The only module that knows all adapters. Called by `stripewell`, and by the worker process.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .base import Device, ObjectStore
from .block import BlockDevice, open_block
from .directory import DirectoryStore, open_directory
from .file import MIN_SIZE, FileDevice, open_file
from .memory import MemoryDevice
from .url import BackendUrl, invalid, parse_url

Backend = Device | ObjectStore


@dataclass(frozen=True, slots=True)
class OpenMode:
    """How to open: make what is missing, and hold the lock for writing."""

    create: bool
    writable: bool


async def open_backend(url: str, *, create: bool = False, writable: bool = True) -> Backend:
    """Open the backend that `url` names.

    With `create`, a missing file is made sparse with the size in the URL and a missing directory is
    made. With `writable` False nothing is locked or changed: for looking at what another process
    serves. Raises `DeviceError`, `DeviceBusy` when another process writes to it.
    """
    target = parse_url(url)
    opener = _OPENERS.get(target.scheme or _scheme_of_path(target.path))
    if opener is None:
        known = ", ".join(sorted(_OPENERS))
        raise invalid(url, f"unknown scheme {target.scheme}", f"use {known} or a path")
    mode = OpenMode(create=create, writable=writable)
    opening = asyncio.ensure_future(asyncio.to_thread(opener, target, mode))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_abandon)
        raise


def attach(spec: Mapping[str, str | int], fds: Sequence[int]) -> Backend:
    """Rebuild what `worker_spec` described, over the inherited descriptors, which it then owns.

    The lock stays held as long as either process has them open.
    """
    url, size = str(spec["url"]), int(spec["size"])
    match spec["scheme"], list(fds):
        case "file", [fd]:
            return FileDevice(url, fd, size, writable=bool(spec["writable"]))
        case "block", [fd]:
            return BlockDevice(url, fd, size, writable=bool(spec["writable"]))
        case "memory", [fd]:
            return MemoryDevice(size, url=url, fd=fd)
        case "dir", [fd]:
            return DirectoryStore(url, fd, size)
        case "dir", [fd, lock_fd]:
            return DirectoryStore(url, fd, size, lock_fd=lock_fd)
        case scheme, _:
            raise invalid(url, f"cannot attach {scheme} with {len(fds)} descriptors", "open it")


def _open_file(target: BackendUrl, mode: OpenMode) -> Backend:
    target.check_options(frozenset({"size"}))
    size = target.size()
    if size is not None and size < MIN_SIZE:
        raise invalid(target.text, "too small for a device", f"give at least {MIN_SIZE} bytes")
    path = _local_path(target)
    return open_file(path, url=target.text, size=size, create=mode.create, writable=mode.writable)


def _open_block(target: BackendUrl, mode: OpenMode) -> Backend:
    target.check_options(frozenset())
    return open_block(_local_path(target), url=target.text, writable=mode.writable)


def _open_directory(target: BackendUrl, mode: OpenMode) -> Backend:
    target.check_options(frozenset({"size"}))
    return open_directory(
        _local_path(target),
        url=target.text,
        size=target.size(),
        create=mode.create,
        writable=mode.writable,
    )


#: Each opens a URL of its scheme, blocking, in a thread.
_OPENERS: dict[str, Callable[[BackendUrl, OpenMode], Backend]] = {
    "block": _open_block,
    "dir": _open_directory,
    "file": _open_file,
}


def _scheme_of_path(path: str) -> str:
    """A bare path is a disk if it names one now, a file otherwise."""
    try:
        return "block" if stat.S_ISBLK(os.stat(path).st_mode) else "file"
    except OSError:
        return "file"


def _local_path(target: BackendUrl) -> str:
    if target.host not in ("", "localhost"):
        remedy = f"write three slashes, {target.scheme}:///{target.host}{target.path}"
        raise invalid(target.text, f"names a host, {target.host}", remedy)
    if not target.path:
        raise invalid(target.text, "has no path", f"write {target.scheme}:///path")
    return target.path


def _abandon(opening: asyncio.Future[Backend]) -> None:
    """Nobody waits any more: close what was opened, so that no lock stays behind."""
    if not opening.cancelled() and opening.exception() is None:
        closing = asyncio.ensure_future(opening.result().close())
        _closing.add(closing)
        closing.add_done_callback(_closing.discard)


#: Keeps the tasks of `_abandon` alive until they are done.
_closing: set[asyncio.Future[None]] = set()
