"""Whether somebody writes to a device is told without a lock, and without a trace."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from backends.block import open_block
from backends.directory import LOCK_NAME, open_directory
from backends.file import open_file
from backends.in_use import in_use

from .conftest import SIZE


def test_a_file_is_in_use_while_it_is_open_for_writing(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.img")
    device = open_file(path, url=path, size=SIZE, create=True)
    reader = open_file(path, url=path, writable=False)
    assert in_use(path)
    assert in_use(f"file://{path}?size=1M")
    asyncio.run(device.close())
    assert not in_use(path)
    again = open_file(path, url=path)
    assert in_use(path)
    for one in (again, reader):
        asyncio.run(one.close())


def test_a_store_is_in_use_while_it_is_open_for_writing(tmp_path: Path) -> None:
    url = f"dir://{tmp_path}"
    assert not in_use(url)
    assert os.listdir(tmp_path) == []
    store = open_directory(str(tmp_path), url=url)
    assert in_use(url)
    asyncio.run(store.close())
    assert not in_use(url)


def test_a_disk_is_in_use_while_somebody_has_it_for_himself(loop_device: str) -> None:
    device = open_block(loop_device, url=loop_device)
    assert in_use(loop_device)
    asyncio.run(device.close())
    assert not in_use(f"block:{loop_device}")


def test_what_cannot_be_told_is_not_in_use(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOCK_NAME)
    for url in ("", "nbd://host/x", str(tmp_path / "nothing"), f"dir://{tmp_path}"):
        assert not in_use(url)
