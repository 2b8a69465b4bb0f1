"""Where a restored volume goes: a sparse file, a disk, or a stream. Blocking.

A file is written under another name next to its own and renamed at the end, so that a file under
the wanted name is whole. Everything between the pieces that are written reads as zeros. Opened by
`command`, filled by `restore`; errors of the system are `OSError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from backends.base import DeviceError
from backends.url import parse_url
from stripewell.errors import UserError, one_line

_ZEROS = bytes(1 << 20)


class Sink(Protocol):
    """Takes pieces in ascending order."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put a piece there."""

    def finish(self, size: int) -> None:
        """All pieces are written: make `size` bytes of it, durable."""

    def abandon(self) -> None:
        """It came to nothing: leave nothing behind that looks like a result."""


class FileSink:
    """A new file of that name, once it is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        fd, name = tempfile.mkstemp(".partial", path.name + ".", path.parent)
        self._fd, self._temporary = fd, name

    def write(self, offset: int, data: memoryview) -> None:
        _write_all(self._fd, offset, data)

    def finish(self, size: int) -> None:
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)
        os.close(self._fd)
        os.replace(self._temporary, self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)


class DiskSink:
    """A block device: what is between the pieces is zeroed, what is behind the volume stays."""

    def __init__(self, path: Path, size: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_EXCL | os.O_CLOEXEC)
        self._at = 0
        room = os.lseek(self._fd, 0, os.SEEK_END)
        if room < size:
            os.close(self._fd)
            raise UserError(f"{path} has {room} bytes, the volume has {size}: use a larger disk")

    def write(self, offset: int, data: memoryview) -> None:
        self._zero(offset)
        _write_all(self._fd, offset, data)
        self._at = offset + len(data)

    def finish(self, size: int) -> None:
        self._zero(size)
        os.fsync(self._fd)
        os.close(self._fd)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)

    def _zero(self, end: int) -> None:
        for piece in _zeros(self._at, end):
            _write_all(self._fd, self._at, piece)
            self._at += len(piece)


class StreamSink:
    """A pipe, as a rule: everything is written in its order. Unbuffered, so that `written` is what
    got through, and nothing waits for the end of the process to fail."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.written = 0

    def write(self, offset: int, data: memoryview) -> None:
        self._zero(offset)
        self._put(data)

    def finish(self, size: int) -> None:
        self._zero(size)

    def abandon(self) -> None:
        """What was written cannot be taken back: the exit status tells."""

    def _zero(self, end: int) -> None:
        for piece in _zeros(self.written, end):
            self._put(piece)

    def _put(self, data: memoryview) -> None:
        while len(data):
            done = os.write(self._fd, data)
            self.written += done
            data = data[done:]


def open_sink(
    target: str, size: int, sources: Sequence[str], *, force: bool
) -> FileSink | DiskSink:
    """A sink for a path. Raises UserError if something is there and not to be overwritten, or if it
    is, or may be, a device of a pool."""
    path = Path(target)
    if _belongs_to(path, sources):
        raise UserError(f"{target} is one of the devices to restore from: name another file")
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = 0
    if mode and not force:
        raise UserError(f"{target} exists: name another file, or --force to overwrite it")
    if stat.S_ISDIR(mode) or (mode and not stat.S_ISREG(mode) and not stat.S_ISBLK(mode)):
        raise UserError(f"{target} is no file and no disk: name another")
    if mode and _holds_a_pool(path):
        raise UserError(f"{target} is a device of a stripewell pool: name another")
    try:
        return DiskSink(path, size) if stat.S_ISBLK(mode) else FileSink(path)
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}: correct the path, or unmount it") from None


def open_stdout() -> StreamSink:
    """Raises UserError if it is closed: its number may be that of another file by now."""
    if sys.stdout is None:
        raise UserError("stdout is closed: leave it open for --to -, or name a file")
    return StreamSink(sys.stdout.fileno())


def failed(sink: Sink, target: str, error: OSError) -> UserError:
    """What to say when the target takes no more."""
    if not isinstance(sink, StreamSink):
        return UserError(f"{target}: {one_line(error)}: give it room, or another file")
    remedy = "see what became of its reader, and try again"
    return UserError(f"stdout failed after {sink.written} bytes, {one_line(error)}: {remedy}")


def _belongs_to(path: Path, sources: Iterable[str]) -> bool:
    """Whether a path is one of the devices, or lies in one of the stores."""
    for url in sources:
        try:
            place = Path(parse_url(url).path)
            if place.is_dir():
                if path.resolve().is_relative_to(place.resolve()):
                    return True
            elif path.exists() and (place.samefile(path) or _same_disk(place, path)):
                return True
        except (OSError, DeviceError, ValueError):
            continue
    return False


def _same_disk(one: Path, other: Path) -> bool:
    """Two nodes of one block device."""
    modes = one.stat(), other.stat()
    if not all(stat.S_ISBLK(found.st_mode) for found in modes):
        return False
    return modes[0].st_rdev == modes[1].st_rdev


def _holds_a_pool(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8) == b"STRIPEWL"


def _zeros(start: int, end: int) -> Iterable[memoryview]:
    while start < end:
        piece = memoryview(_ZEROS)[: end - start]
        yield piece
        start += len(piece)


def _write_all(fd: int, offset: int, data: memoryview) -> None:
    while len(data):
        done = os.pwrite(fd, data, offset)
        if done == 0:
            raise OSError(errno.EIO, "the kernel took no bytes")
        offset, data = offset + done, data[done:]
