"""The archive builder against the real cpio, and the choice of kernels and modules."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.guest.initramfs import Archive, MissingParts, _load_order, find_kernel


def test_cpio_reads_the_archive_back(tmp_path: Path) -> None:
    archive = Archive()
    archive.file("a/b/three", b"abc", 0o755)
    archive.file("a/empty", b"")
    archive.file("a/empty", b"the first one wins")
    target = tmp_path / "archive"
    target.write_bytes(archive.finish())
    with target.open("rb") as stream:
        subprocess.run(["cpio", "-id", "--quiet"], stdin=stream, cwd=tmp_path, check=True)
    assert (tmp_path / "a/b/three").read_bytes() == b"abc"
    assert os.access(tmp_path / "a/b/three", os.X_OK)
    assert (tmp_path / "a/empty").read_bytes() == b""


def test_the_newest_kernel_with_modules_is_taken(tmp_path: Path) -> None:
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64", "6.1.0-11-cloud-amd64"):
        (tmp_path / f"vmlinuz-{version}").touch()
    for version in ("6.1.0-9-cloud-amd64", "6.1.0-10-cloud-amd64"):
        (tmp_path / "modules" / version).mkdir(parents=True)
        (tmp_path / "modules" / version / "modules.dep").touch()
    kernel = find_kernel(tmp_path, tmp_path / "modules")
    assert kernel.image.name == "vmlinuz-6.1.0-10-cloud-amd64"


def test_no_kernel_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(MissingParts, match="apt install linux-image-cloud-amd64"):
        find_kernel(tmp_path, tmp_path)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "fs/xfs.ko.xz: lib/b.ko.xz lib/a.ko.xz\nlib/b.ko.xz: lib/a.ko.xz\nlib/a.ko.xz:\n"
        "block/virtio_blk.ko: lib/a.ko.xz\nblock/other.ko:\n"
    )
    assert list(_load_order(tmp_path)) == [
        "lib/a.ko.xz",
        "block/virtio_blk.ko",
        "lib/b.ko.xz",
        "fs/xfs.ko.xz",
    ]
