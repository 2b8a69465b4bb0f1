"""Superblocks ("Superblock" in `docs/format.md`). Pure; called by `sources`."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Any

from crc32c import crc32c

from stripewell.recover.values import Unusable, json_object

HEAD_BYTES = 256
ROOT_SIZES = (64 << 10, 256 << 10)
_MAGIC = b"STRIPEWL"
#: magic, revision, head bytes, root_bytes, compatible, incompatible, pool, device, index, reserved,
#: slot_blocks, size, generation, body bytes, body crc
_HEAD = struct.Struct("<8sHHIQQ16s16sHHIQQII")
_REVISION = 1


class Newer(Unusable):
    """Written by a stripewell that knows more than this one: nothing of it may be guessed."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a superblock says about its device, and which body belongs to it."""

    pool: str
    device: str
    size: int
    root_bytes: int
    generation: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Superblock:
    """A whole one. `body` is the root, `digest` its name."""

    head: Head
    body: dict[str, Any]
    digest: str


def parse_head(data: bytes) -> Head | None:
    """The head at the start of `data`; None if there is no whole one. Raises Newer."""
    if len(data) < HEAD_BYTES or data[:8] != _MAGIC:
        return None
    if crc32c(data[:252]) != int.from_bytes(data[252:256], "little"):
        return None
    (_, revision, head_bytes, root_bytes, _, incompatible, pool, device, _, _, _, size, generation,
     length, crc) = _HEAD.unpack_from(data)  # fmt: skip
    if revision > _REVISION or incompatible:
        raise Newer(f"it is of revision {revision}, features {incompatible:#x}: use its stripewell")
    if head_bytes != HEAD_BYTES or root_bytes not in ROOT_SIZES:
        return None
    if length > root_bytes - HEAD_BYTES:
        return None
    return Head(pool.hex(), device.hex(), size, root_bytes, generation, length, crc)


def parse_body(head: Head, body: bytes) -> Superblock | None:
    """The superblock of a head and the bytes behind it; None if they do not belong together."""
    if len(body) != head.length or crc32c(body) != head.crc:
        return None
    try:
        root = json_object(body, "the root")
    except Unusable:
        return None
    if root.get("generation") != head.generation:
        return None
    return Superblock(head, root, hashlib.sha256(body).hexdigest()[:32])
