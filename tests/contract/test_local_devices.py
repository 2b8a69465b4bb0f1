"""What files and disks do beyond the common contract: caches, deletion, truncation, full disks."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from backends import transfer
from backends.base import BLOCK_SIZE, Buffer, DeviceBusy, DeviceError, DeviceFull, DeviceGone
from backends.block import open_block
from backends.descriptor import DescriptorDevice
from backends.file import open_file

from .conftest import SIZE

A = b"a" * BLOCK_SIZE


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk.img"


def made(path: Path) -> DescriptorDevice:
    return open_file(str(path), url=str(path), size=SIZE, create=True)


def test_a_new_file_is_sparse_and_private(path: Path) -> None:
    asyncio.run(made(path).close())
    status = path.stat()
    assert (status.st_size, status.st_blocks, status.st_mode & 0o777) == (SIZE, 0, 0o600)


async def test_try_read_never_waits_for_the_medium(path: Path) -> None:
    device = made(path)
    await device.write(0, [A], sync=True)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    into = bytearray(BLOCK_SIZE)
    if device.try_read(0, memoryview(into)):
        pytest.skip("this file system keeps its page cache: nothing is ever uncached")
    assert await device.read(0, BLOCK_SIZE) == A
    assert device.try_read(0, memoryview(into))
    assert into == A
    await device.close()


async def test_a_deleted_file_is_gone_at_the_next_sync(path: Path) -> None:
    device = made(path)
    await device.write(0, [A])
    os.unlink(path)
    with pytest.raises(DeviceGone, match="file was deleted"):
        await device.sync()
    with pytest.raises(DeviceGone, match="file was deleted"):
        await device.write(0, [A], sync=True)
    await device.close()


async def test_a_truncated_file_is_a_read_error_not_zeros(path: Path) -> None:
    device = made(path)
    os.truncate(path, SIZE // 2)
    assert not device.try_read(SIZE - BLOCK_SIZE, memoryview(bytearray(BLOCK_SIZE)))
    with pytest.raises(DeviceError) as short:
        await device.read(SIZE // 2 - BLOCK_SIZE, 2 * BLOCK_SIZE)
    assert short.value.errno == errno.EIO
    await device.close()


@pytest.fixture
def small_file_system(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half of a device."""
    target = tmp_path / "small"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "none", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"no small file system can be mounted here: {result.stderr.strip()}")
    yield target
    subprocess.run(["umount", str(target)], check=True)


async def test_a_full_file_system_is_full_not_broken(small_file_system: Path) -> None:
    device = made(small_file_system / "disk.img")
    with pytest.raises(DeviceFull):
        await device.write(0, [bytes(SIZE)])
    with pytest.raises(DeviceFull):
        device.append(0, [bytes(SIZE)])
    assert await device.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    await device.sync()
    await device.close()


async def test_partial_writes_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = made(path)
    real = os.pwritev

    def stingy(fd: int, buffers: Sequence[Buffer], offset: int, flags: int = 0) -> int:
        return real(fd, [bytes(b"".join(buffers)[:5000])], offset, flags)

    data = os.urandom(8 * BLOCK_SIZE)
    pieces = [data[i : i + BLOCK_SIZE] for i in range(0, len(data), BLOCK_SIZE)]
    monkeypatch.setattr(os, "pwritev", stingy)
    device.append(0, pieces)
    await device.write(len(data), pieces, sync=True)
    monkeypatch.undo()
    assert await device.read(0, 2 * len(data)) == data + data
    await device.close()


async def test_short_reads_are_completed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = made(path)
    data = os.urandom(4 * BLOCK_SIZE)
    device.append(0, [data])
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, offset: real(fd, min(n, 3000), offset))
    assert await device.read(0, len(data)) == data
    await device.close()


async def test_a_cancelled_write_keeps_its_buffer_until_the_thread_is_done(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, may_end = threading.Event(), threading.Event()
    real = transfer.write_all

    def slow(fd: int, offset: int, buffers: Sequence[Buffer], flags: int = 0) -> None:
        started.set()
        assert may_end.wait(10)
        real(fd, offset, buffers, flags)

    device = made(path)
    monkeypatch.setattr(transfer, "write_all", slow)
    writing = asyncio.ensure_future(device.write(0, [A]))
    await asyncio.to_thread(started.wait, 10)
    writing.cancel()
    await asyncio.sleep(0.05)
    assert not writing.done()
    writing.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await device.read(0, BLOCK_SIZE) == A
    await device.close()


async def test_a_slow_sync_does_not_delay_reads(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end = threading.Event()
    device = made(path)
    monkeypatch.setattr(os, "fdatasync", lambda fd: may_end.wait(10))
    syncing = asyncio.ensure_future(device.sync())
    assert await device.read(0, BLOCK_SIZE) == bytes(BLOCK_SIZE)
    assert not syncing.done()
    may_end.set()
    await syncing
    await device.close()


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.EIO, DeviceError),
        (errno.ENOSPC, DeviceFull),
        (errno.EDQUOT, DeviceFull),
        (errno.ENXIO, DeviceGone),
        (errno.ENODEV, DeviceGone),
        (errno.ESTALE, DeviceGone),
    ],
)
async def test_errors_have_their_class(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[DeviceError]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    device = made(path)
    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(DeviceError) as failure:
        await device.sync()
    assert type(failure.value) is kind
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)
    await device.close()


async def test_the_lock_ends_with_the_device(path: Path) -> None:
    device = made(path)
    with pytest.raises(DeviceBusy):
        made(path)
    await device.close()
    await made(path).close()


@pytest.fixture
def mounted_disk(loop_device: str, tmp_path: Path) -> Iterator[str]:
    """A block device that is mounted."""
    mkfs = shutil.which("mkfs.ext4", path="/sbin:/usr/sbin:/bin:/usr/bin")
    if mkfs is None:
        pytest.skip("mkfs.ext4 is not installed: nothing to mount")
    subprocess.run([mkfs, "-q", loop_device], check=True, capture_output=True)
    target = tmp_path / "mounted"
    target.mkdir()
    mounted = subprocess.run(["mount", loop_device, str(target)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.strip()}")
    yield loop_device
    subprocess.run(["umount", str(target)], check=True)


def test_a_mounted_disk_is_refused(mounted_disk: str) -> None:
    with pytest.raises(DeviceBusy, match="unmount"):
        open_block(mounted_disk, url=mounted_disk)
