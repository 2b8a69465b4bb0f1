"""The superblock: a binary head that says what this device is, and the root as its body.

One superblock is written per root generation into one of two slots, at both ends of the device. The
head alone tells a foreign, damaged or newer device from ours; the body is JSON, because it is
small, read by people in need, and gains fields with every feature (`docs/format.md`, "Root").
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from pool.errors import FormatError, PoolError
from pool.format.fields import parse
from pool.format.geometry import Layout
from pool.format.root import validate

MAGIC = b"STRIPEWL"
REVISION = 1
#: Feature bits that a reader must know to open the pool at all.
INCOMPATIBLE = 0
HEAD = struct.Struct("<8sHHIQQ16s16sHHIQQIIQQII")
HEAD_BYTES = 256
_CRC_AT = 252
#: What head and root both say of a device.
LAYOUT_KEYS = ("size", "root_bytes", "journal_offset", "journal_bytes", "slot_blocks", "slots")


class HostileRoot(FormatError):
    """A superblock has right checksums, and a root that there cannot be."""

    def __init__(self, message: str, generation: int) -> None:
        super().__init__(message)
        self.generation = generation


@dataclass(frozen=True, slots=True)
class Superblock:
    """One valid superblock: the device's identity and the root it carries."""

    pool: bytes
    device: bytes
    index: int
    layout: Layout
    generation: int
    root: dict[str, Any]
    digest: str


def encode(root: dict[str, Any], *, pool: bytes, device: bytes, index: int, where: Layout) -> bytes:
    """The superblock of one device for one root. Raises PoolError if the root outgrew its slot."""
    body = encode_root(root)
    if HEAD_BYTES + len(body) > where.root_bytes:
        raise PoolError(
            f"the pool's root needs {len(body)} bytes, its slot has {where.root_bytes}: "
            "too many members or stripe table pages for this device size"
        )
    head = HEAD.pack(
        MAGIC, REVISION, HEAD_BYTES, where.root_bytes, 0, INCOMPATIBLE, pool, device, index, 0,
        where.slot_blocks, where.size, root["generation"], len(body), crc32c(body),
        where.journal_offset, where.journal_bytes, where.slots, 0,
    )  # fmt: skip
    head = head.ljust(_CRC_AT, b"\0")
    return head + struct.pack("<I", crc32c(head)) + body


def encode_root(root: dict[str, Any]) -> bytes:
    """The canonical bytes of a root: what its digest and its child's `parent` are made of."""
    return json.dumps(root, sort_keys=True, separators=(",", ":")).encode()


def digest(body: bytes) -> str:
    """Identifies a root's content: two roots of one generation with different digests are a
    fork."""
    return hashlib.sha256(body).hexdigest()[:32]


def decode(data: bytes) -> Superblock:
    """Read one superblock slot. Raises FormatError (HostileRoot for a root that makes no sense);
    PoolError for a newer revision or feature."""
    if len(data) < HEAD_BYTES or data[:8] != MAGIC:
        raise FormatError("no superblock")
    if crc32c(data[:_CRC_AT]) != int.from_bytes(data[_CRC_AT:HEAD_BYTES], "little"):
        raise FormatError("superblock head is damaged")
    (_, revision, _, root_bytes, _, incompatible, pool, device, index, _, slot_blocks, size,
     generation, length, crc, journal_offset, journal_bytes, slots, _,
    ) = HEAD.unpack_from(data)  # fmt: skip
    if revision > REVISION or incompatible & ~INCOMPATIBLE:
        raise PoolError(
            f"format revision {revision} (features {incompatible:#x}) is newer than this "
            f"stripewell understands ({REVISION}): use a newer stripewell"
        )
    body = data[HEAD_BYTES : HEAD_BYTES + length]
    if len(body) != length or crc32c(body) != crc:
        raise FormatError("superblock body is damaged")
    where = Layout(
        size, root_bytes, journal_offset, journal_bytes, journal_offset + journal_bytes,
        slot_blocks, slots,
    )  # fmt: skip
    try:
        root = parse(body, "root")
        validate(root)
        assert isinstance(root, dict)
        _agree(root, generation, device, index, where)
    except FormatError as error:
        raise HostileRoot(str(error), generation) from None
    return Superblock(pool, device, index, where, generation, root, digest(body))


def _agree(root: dict[str, Any], generation: int, device: bytes, index: int, where: Layout) -> None:
    """Head and root must say the same of the device. Raises FormatError."""
    if root["generation"] != generation:
        raise FormatError("root and head disagree about the generation")
    for row in root["members"]:
        if row["uuid"] == device.hex():
            said = (row["index"], *(row[name] for name in LAYOUT_KEYS))
            if said != (index, *(getattr(where, name) for name in LAYOUT_KEYS)):
                raise FormatError("root and head disagree about the device")


def body_length(head: bytes) -> int:
    """How many bytes follow a head; 0 for anything that is not one."""
    if len(head) < HEAD_BYTES or head[:8] != MAGIC:
        return 0
    length: int = HEAD.unpack_from(head)[13]
    return min(length, 1 << 20)
