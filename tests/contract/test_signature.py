"""What others left on a disk is recognised: their marks, and images made by their own tools."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from backends.signature import HEAD_SIZE, foreign_signature


@pytest.mark.parametrize(
    ("offset", "mark", "kind"),
    [
        (0, b"QFI\xfb", "qcow2"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        (0, b"XFSB", "xfs"),
        (65600, b"_BHRfS_M", "btrfs"),
        (4096, b"\xfc\x4e\x2b\xa9", "RAID"),
        (0x438, b"\x53\xef", "ext2/3/4"),
        (4086, b"SWAPSPACE2", "swap"),
        (512, b"EFI PART", "GPT"),
        (32769, b"CD001", "ISO 9660"),
        (512, b"LABELONE" + bytes(16) + b"LVM2 001", "LVM"),
        (132 << 10, b"\x0c\xb1\xba\x00\x00\x00\x00\x00", "ZFS"),
        (133 << 10, b"\x00\x00\x00\x00\x00\xba\xb1\x0c", "ZFS"),
    ],
)
def test_marks(offset: int, mark: bytes, kind: str) -> None:
    head = bytearray(HEAD_SIZE)
    head[offset : offset + len(mark)] = mark
    found = foreign_signature(bytes(head))
    assert found is not None
    assert kind in found


def test_a_partition_table_needs_a_partition() -> None:
    head = bytearray(HEAD_SIZE)
    head[510:512] = b"\x55\xaa"
    assert foreign_signature(bytes(head)) is None
    head[0x1BE + 4] = 0x83
    assert foreign_signature(bytes(head)) == "MBR partition table"


@pytest.mark.parametrize("head", [b"", bytes(HEAD_SIZE), b"\xff" * HEAD_SIZE, b"x" * 511])
def test_nothing_known_is_none(head: bytes) -> None:
    assert foreign_signature(head) is None


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("mkfs.ext2 -q {}", "ext2/3/4 file system"),
        ("mkfs.ext4 -q {}", "ext2/3/4 file system"),
        ("mkfs.btrfs -q {}", "btrfs file system"),
        ("mkfs.xfs -q {}", "xfs file system"),
        ("mkfs.vfat {}", "FAT file system"),
        ("mkswap -q {}", "swap space"),
        ("qemu-img create -q -f qcow2 {} 64M", "qcow2 image"),
        ("sgdisk -n 1:0:0 {}", "GPT partition table"),
    ],
)
def test_what_real_tools_make(tmp_path: Path, command: str, kind: str) -> None:
    tool, *arguments = command.format(tmp_path / "image").split()
    path = shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/sbin:/usr/sbin")
    if path is None:
        pytest.skip(f"{tool} is not installed")
    with open(tmp_path / "image", "wb") as image:
        image.truncate(512 << 20)
    subprocess.run([path, *arguments], check=True, capture_output=True)
    with open(tmp_path / "image", "rb") as image:
        head = image.read(HEAD_SIZE)
    assert foreign_signature(head) == kind
