"""What a directory store does beyond the contract: locks, leftovers, a directory that goes."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from backends.base import DeviceBusy, DeviceError, DeviceGone
from backends.directory import LOCK_NAME, TEMPORARY_PREFIX, DirectoryStore, open_directory

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "objects"


def opened(path: Path, *, writable: bool = True) -> DirectoryStore:
    return open_directory(
        str(path), url=f"dir:{path}", size=SIZE, create=writable, writable=writable
    )


async def test_objects_survive_reopening_and_leftovers_do_not(path: Path) -> None:
    store = opened(path)
    await store.put("a", [b"abc"])
    await store.close()
    with open(path / f"{TEMPORARY_PREFIX}1-0", "wb") as left:
        left.write(b"half an obj")
    store = opened(path)
    assert sorted(os.listdir(path)) == ["a", LOCK_NAME]
    assert await store.get("a", 0, 3) == b"abc"
    await store.close()


async def test_one_writer_any_number_of_readers(path: Path) -> None:
    store = opened(path)
    await store.put("a", [b"abc"])
    with pytest.raises(DeviceBusy, match="stop the daemon"):
        opened(path)
    reader = opened(path, writable=False)
    assert await reader.get("a", 0, 3) == b"abc"
    with pytest.raises(DeviceError) as refused:
        await reader.put("b", [b"abc"])
    assert refused.value.errno == errno.EROFS
    with pytest.raises(DeviceError):
        await reader.delete("a")
    await reader.close()
    await store.close()
    await opened(path).close()


async def test_a_deleted_directory_is_gone_not_empty(path: Path) -> None:
    store = opened(path)
    await store.put("a", [b"abc"])
    shutil.rmtree(path)
    for call in (store.list(), store.get("a", 0, 3), store.put("b", [b"x"]), store.delete("a")):
        with pytest.raises(DeviceGone, match="directory was deleted"):
            await call
    await store.close()


async def test_the_data_is_synced_before_the_name_and_then_the_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    sync, rename = os.fsync, os.rename

    def note_sync(fd: int) -> None:
        log.append("sync " + os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))[:4])
        sync(fd)

    def note_rename(old: str, new: str, **options: int) -> None:
        log.append("rename")
        rename(old, new, **options)

    store = opened(path)
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "rename", note_rename)
    await store.put("a", [b"abc"])
    assert log == [f"sync {TEMPORARY_PREFIX[:4]}", "rename", "sync obje"]
    await store.close()


async def test_a_failed_put_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "disk on fire")

    store = opened(path)
    await store.put("a", [b"old"])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DeviceError):
        await store.put("a", [b"new"])
    monkeypatch.undo()
    assert sorted(os.listdir(path)) == ["a", LOCK_NAME]
    assert await store.get("a", 0, 3) == b"old"
    await store.close()


async def test_a_cancelled_put_is_done_when_it_raises(path: Path) -> None:
    store = opened(path)
    putting = asyncio.ensure_future(store.put("a", [bytes(100_000)]))
    await asyncio.sleep(0)
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert not [name for name in os.listdir(path) if name.startswith(TEMPORARY_PREFIX)]
    assert await store.list() in ([], ["a"])
    await store.close()
