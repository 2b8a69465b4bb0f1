"""Every sentence that `backends.base` says about an `ObjectStore`, for every adapter and stack."""

from __future__ import annotations

import asyncio
import errno
import os

import pytest

from backends.base import DeviceError, DeviceFull, DeviceGone, ObjectStore
from backends.memory import MemoryStore
from backends.open import attach

from .conftest import SIZE


def test_it_has_the_shape_of_a_store(store: ObjectStore) -> None:
    assert isinstance(store, ObjectStore)
    assert store.size == SIZE
    assert store.url


async def test_an_object_is_all_its_buffers(store: ObjectStore) -> None:
    await store.put("a", [b"one", bytearray(b"two"), memoryview(b"three")])
    assert await store.get("a", 0, 11) == b"onetwothree"
    data = await store.get("a", 3, 5)
    assert data == b"twoth"
    assert type(data) is bytes


async def test_an_empty_object_exists(store: ObjectStore) -> None:
    await store.put("empty", [])
    assert await store.get("empty", 0, 0) == b""
    assert await store.list() == ["empty"]


async def test_put_replaces_atomically(store: ObjectStore) -> None:
    old, new = b"o" * 100_000, b"n" * 100_000
    await store.put("a", [old])
    putting = asyncio.ensure_future(store.put("a", [new]))
    while not putting.done():
        assert await store.get("a", 0, 100_000) in (old, new)
        await asyncio.sleep(0)
    await putting
    assert await store.get("a", 0, 100_000) == new


async def test_what_is_missing_is_enoent(store: ObjectStore) -> None:
    with pytest.raises(DeviceError) as missing:
        await store.get("nothing", 0, 1)
    assert missing.value.errno == errno.ENOENT
    assert store.url in str(missing.value)


@pytest.mark.parametrize(("offset", "length"), [(0, 4), (3, 1), (4, 1), (-1, 1), (0, -1)])
async def test_a_short_get_is_an_error(store: ObjectStore, offset: int, length: int) -> None:
    await store.put("a", [b"abc"])
    with pytest.raises(DeviceError):
        await store.get("a", offset, length)
    assert await store.get("a", 3, 0) == b""


async def test_delete_removes_and_is_idempotent(store: ObjectStore) -> None:
    await store.put("a", [b"abc"])
    await store.delete("a")
    await store.delete("a")
    await store.delete("never-was")
    assert await store.list() == []
    with pytest.raises(DeviceError):
        await store.get("a", 0, 3)


async def test_list_is_sorted_and_filtered(store: ObjectStore) -> None:
    for name in ("s-2", "s-10", "root", "s-1", ".hidden"):
        await store.put(name, [b"x"])
    assert await store.list() == [".hidden", "root", "s-1", "s-10", "s-2"]
    assert await store.list("s-1") == ["s-1", "s-10"]
    assert await store.list("t") == []


async def test_list_never_shows_what_is_being_written(store: ObjectStore) -> None:
    putting = asyncio.ensure_future(store.put("a", [b"x" * 100_000]))
    while not putting.done():
        assert await store.list() in ([], ["a"])
        await asyncio.sleep(0)
    await putting


@pytest.mark.parametrize(
    "name", ["", ".", "..", "A", "a/b", "../a", "a b", "~a", "a\n", "é", "a" * 129]
)
async def test_names_outside_the_alphabet_are_refused(store: ObjectStore, name: str) -> None:
    with pytest.raises(DeviceError):
        await store.put(name, [b"x"])
    with pytest.raises(DeviceError):
        await store.get(name, 0, 1)
    with pytest.raises(DeviceError):
        await store.delete(name)
    assert await store.list() == []


@pytest.mark.parametrize("name", ["a", "...", "a" * 128, "0.9_z-"])
async def test_names_of_the_alphabet_work(store: ObjectStore, name: str) -> None:
    await store.put(name, [b"x"])
    assert await store.list() == [name]
    assert await store.get(name, 0, 1) == b"x"


async def test_no_more_than_size_is_stored(store: ObjectStore) -> None:
    half = bytes(SIZE // 2)
    await store.put("a", [half])
    await store.put("b", [half])
    with pytest.raises(DeviceFull):
        await store.put("c", [b"x"])
    await store.put("b", [half])
    assert await store.list() == ["a", "b"]
    await store.delete("a")
    await store.put("c", [half])


async def test_no_buffer_is_referenced_after_return_error_or_cancellation(
    store: ObjectStore,
) -> None:
    stored, refused, cancelled = bytearray(b"abc"), bytearray(b"abc"), bytearray(100_000)
    await store.put("a", [stored])
    with pytest.raises(DeviceError):
        await store.put("?", [refused])
    putting = asyncio.ensure_future(store.put("b", [cancelled]))
    await asyncio.sleep(0)
    putting.cancel()
    await asyncio.gather(putting, return_exceptions=True)
    for buffer in (stored, refused, cancelled):
        buffer.append(0)  # raises BufferError while anybody has a view of it
    stored[0] = 0
    assert await store.get("a", 0, 3) == b"abc"


async def test_puts_overlap(store: ObjectStore) -> None:
    names = [f"object-{i:02}" for i in range(20)]
    await asyncio.gather(*(store.put(name, [name.encode()]) for name in names))
    assert await store.list("object-") == names
    gets = [store.get(name, 0, len(name)) for name in names]
    assert await asyncio.gather(*gets) == [name.encode() for name in names]


async def test_a_worker_sees_the_same_objects_or_the_store_says_no(store: ObjectStore) -> None:
    await store.put("a", [b"abc"])
    if isinstance(store, MemoryStore):
        with pytest.raises(DeviceError, match="this process only"):
            store.worker_spec()
        return
    spec, fds = store.worker_spec()
    twin = attach(spec, [os.dup(fd) for fd in fds])
    assert isinstance(twin, ObjectStore)
    await twin.put("b", [b"def"])
    assert await store.get("b", 0, 3) == b"def"
    assert await twin.get("a", 0, 3) == b"abc"
    await twin.close()


async def test_after_close_everything_is_gone(store: ObjectStore) -> None:
    await store.put("a", [b"abc"])
    await store.close()
    await store.close()
    with pytest.raises(DeviceGone):
        await store.put("b", [b"abc"])
    with pytest.raises(DeviceGone):
        await store.get("a", 0, 3)
    with pytest.raises(DeviceGone):
        await store.delete("a")
    with pytest.raises(DeviceGone):
        await store.list()
