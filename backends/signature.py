"""Recognises what others left on a disk, so that a pool is not created over somebody's data.

Pure. A file system or table that is found here is refused unless the operator forces it; not
finding one proves nothing, since some keep their mark at the end of the disk.
"""

from __future__ import annotations

import struct

#: Bytes from the start of the device that `foreign_signature` looks at.
HEAD_SIZE = 256 << 10

#: What it is, where its mark lies, the mark. The more telling ones come first.
_MARKS: tuple[tuple[str, int, bytes], ...] = (
    ("qcow2 image", 0, b"QFI\xfb"),
    ("LUKS volume", 0, b"LUKS\xba\xbe"),
    ("LUKS volume", 0, b"SKUL\xba\xbe"),
    ("xfs file system", 0, b"XFSB"),
    ("btrfs file system", 0x10040, b"_BHRfS_M"),
    ("Ceph BlueStore device", 0, b"bluestore block device"),
    ("Linux RAID member", 0, b"\xfc\x4e\x2b\xa9"),
    ("Linux RAID member", 0x1000, b"\xfc\x4e\x2b\xa9"),
    ("bcache device", 0x1018, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81"),
    ("f2fs file system", 0x400, b"\x10\x20\xf5\xf2"),
    ("swap space", 0xFF6, b"SWAPSPACE2"),
    ("swap space", 0xFF6, b"SWAP-SPACE"),
    ("swap space", 0xFFF6, b"SWAPSPACE2"),
    ("ext2/3/4 file system", 0x438, b"\x53\xef"),
    ("GPT partition table", 0x200, b"EFI PART"),
    ("GPT partition table", 0x1000, b"EFI PART"),
    ("ISO 9660 image", 0x8001, b"CD001"),
    ("NTFS file system", 3, b"NTFS    "),
    ("exFAT file system", 3, b"EXFAT   "),
    ("FAT file system", 0x36, b"FAT1"),
    ("FAT file system", 0x52, b"FAT32"),
)

_SECTOR = 512
_ZFS_UBERBLOCKS = range(128 << 10, 256 << 10, 1 << 10)
_ZFS_MAGIC = 0x00BAB10C


def foreign_signature(head: bytes) -> str | None:
    """Return what the first `HEAD_SIZE` bytes of a device belong to, or None if to nobody known."""
    for kind, offset, mark in _MARKS:
        if head.startswith(mark, offset):
            return kind
    if _is_lvm(head):
        return "LVM physical volume"
    if _is_zfs(head):
        return "ZFS pool member"
    if _is_mbr(head):
        return "MBR partition table"
    return None


def _is_lvm(head: bytes) -> bool:
    """The label lies in one of the first four sectors."""
    return any(
        head.startswith(b"LABELONE", start) and head.startswith(b"LVM2", start + 24)
        for start in range(0, 4 * _SECTOR, _SECTOR)
    )


def _is_zfs(head: bytes) -> bool:
    """The first label ends in a ring of uberblocks, in the byte order of the host that wrote it."""
    marks = (struct.pack("<Q", _ZFS_MAGIC), struct.pack(">Q", _ZFS_MAGIC))
    return any(head.startswith(marks, start) for start in _ZFS_UBERBLOCKS)


def _is_mbr(head: bytes) -> bool:
    """The boot mark, and four entries whose status byte is plausible, one of them in use."""
    if not head.startswith(b"\x55\xaa", 0x1FE):
        return False
    entries = [head[start : start + 16] for start in range(0x1BE, 0x1FE, 16)]
    return all(entry[0] in (0x00, 0x80) for entry in entries) and any(e[4] for e in entries)
