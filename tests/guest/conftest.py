"""Guests and pools for the tests of this folder. Every process is ended by its id on every path."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.deployment import Deployment
from tests.guest.initramfs import MissingParts, find_kernel

TOOLS = ("qemu-system-x86_64", "qemu-nbd", "busybox")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what boots a machine, and say why it is skipped where one cannot be booted."""
    reason = _cannot_boot()
    here = Path(__file__).parent
    for item in items:
        if not item.path.is_relative_to(here) or "folder" not in getattr(item, "fixturenames", ()):
            continue
        item.add_marker(pytest.mark.guest)
        if reason:
            item.add_marker(pytest.mark.skip(reason=reason))


def _cannot_boot() -> str:
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    try:
        find_kernel()
    except MissingParts as missing:
        return str(missing)
    return ""


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="swguest-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as path:
        yield path


@pytest.fixture
def site(folder: Path) -> Iterator[Deployment]:
    """A served pool 4+2 on six sparse files with a volume of 1 GiB named vm1."""
    with Deployment(folder / "site") as deployment:
        deployment.create_pool(devices=6, size="1G", data=4, parity=2)
        deployment.create_volume("vm1", "1G")
        deployment.serve()
        yield deployment
