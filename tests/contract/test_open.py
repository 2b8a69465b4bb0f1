"""What URLs open, and the one line that an operator gets when they cannot."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.base import BLOCK_SIZE, Device, DeviceBusy, DeviceError, ObjectStore
from backends.block import BlockDevice
from backends.open import attach, open_backend
from backends.url import parse_size, parse_url


@pytest.mark.parametrize("form", ["file://{}?size=1M", "file:{}?size=1M", "{}?size=1M"])
async def test_a_file_is_created_once_and_opened_by_any_form(tmp_path: Path, form: str) -> None:
    path = f"{tmp_path}/disk.img"
    url = form.format(path)
    for create in (True, True, False):
        device = await open_backend(url, create=create)
        assert isinstance(device, Device)
        assert (device.url, device.size) == (url, 1 << 20)
        await device.close()
    device = await open_backend(path)
    assert device.size == 1 << 20
    await device.close()


async def test_opening_never_creates(tmp_path: Path) -> None:
    for url in (f"{tmp_path}/disk.img?size=1M", f"dir:{tmp_path}/objects?size=1M"):
        with pytest.raises(DeviceError, match="does not exist") as missing:
            await open_backend(url)
        assert missing.value.errno == errno.ENOENT
    assert os.listdir(tmp_path) == []


async def test_names_with_odd_characters(tmp_path: Path) -> None:
    odd = f"{tmp_path}/a b?c%20.img"
    (tmp_path / "a b?c%20.img").write_bytes(bytes(1 << 16))
    device = await open_backend(odd)
    assert device.size == 1 << 16
    await device.close()
    device = await open_backend(f"file://{tmp_path}/a%20b%3Fc%2520.img")
    await device.close()


async def test_sizes_are_rounded_down_to_blocks(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes((1 << 16) + 5000))
    device = await open_backend(f"{tmp_path}/disk.img")
    assert device.size == (1 << 16) + BLOCK_SIZE
    await device.close()


async def test_a_directory_store(tmp_path: Path) -> None:
    url = f"dir://{tmp_path}/objects?size=100M"
    store = await open_backend(url, create=True)
    assert isinstance(store, ObjectStore)
    assert (store.url, store.size) == (url, 100 << 20)
    with pytest.raises(DeviceBusy):
        await open_backend(url)
    await (await open_backend(url, writable=False)).close()
    await store.close()
    store = await open_backend(f"dir://{tmp_path}/objects")
    assert store.size > 1 << 20
    assert store.size % BLOCK_SIZE == 0
    await store.close()


async def test_a_bare_path_of_a_disk_is_a_disk(loop_device: str) -> None:
    for url in (loop_device, f"block:{loop_device}"):
        device = await open_backend(url)
        assert isinstance(device, BlockDevice)
        await device.close()
    with pytest.raises(DeviceError, match="not a regular file|no regular file"):
        await open_backend(f"file:{loop_device}")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "give a path or a URL"),
        ("foo:///x", "unknown scheme foo: use block, dir, file"),
        ("file:", "has no path"),
        ("file://{tmp}/x?size=10X", "no size: write for instance"),
        ("file://{tmp}/x?size=-1G", "no size: write for instance"),
        ("file://{tmp}/x?size=", "no size: write for instance"),
        ("file://{tmp}/x?size=0", "write one, above 0"),
        ("file://{tmp}/x?size=5000", "no multiple of 4096"),
        ("file://{tmp}/x?size=9999999999T", "too large"),
        ("file://{tmp}/x?size=4K", "too small"),
        ("file://{tmp}/x?sise=1G", "unknown option sise: use size"),
        ("file://{tmp}/x?size", "correct the URL"),
        ("file://host/x?size=1M", "write three slashes, file:///host/x"),
        ("file://{tmp}", "no regular file: write dir:"),
        ("{tmp}", "no regular file: write dir:"),
        ("/dev/null", "name a file or a disk"),
        ("{tmp}/missing", "say how large it shall become"),
        ("{tmp}/no/such/dir?size=1M", "directory does not exist"),
        ("{tmp}/small", "too few"),
        ("{tmp}/small?size=1M", "correct size="),
        ("dir:{tmp}/small", "no directory: write file:"),
        ("block:{tmp}/small", "no block device: write file:"),
        ("block:{tmp}", "no block device: write dir:"),
        ("block:/dev/no-such-disk", "attach the disk"),
        ("block:/dev/null?size=1M", "unknown option size: leave it out"),
        ("http://[x", "correct the URL"),
        ("file:///a\0b", "no path"),
    ],
)
async def test_nonsense_is_one_line_that_says_what_to_do(
    tmp_path: Path, url: str, says: str
) -> None:
    (tmp_path / "small").write_bytes(b"tiny")
    with pytest.raises(DeviceError) as refused:
        await open_backend(url.format(tmp=tmp_path), create=True)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["small"]


def test_a_worker_cannot_attach_to_what_it_does_not_know() -> None:
    with pytest.raises(DeviceError, match="cannot attach sim"):
        attach({"scheme": "sim", "url": "sim:a", "size": 4096}, [])


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("64K", 1 << 16), ("1m", 1 << 20), ("10G", 10 << 30), ("2TiB", 2 << 40)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size("x", text) == size


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused_in_one_line(text: str) -> None:
    for candidate in (text, f"file:{text}", f"file:///x?size={text}"):
        said, size = "", None
        try:
            size = parse_url(candidate).size()
        except DeviceError as refused:
            said = str(refused)
        assert "\n" not in said
        assert size is None or size % BLOCK_SIZE == 0
