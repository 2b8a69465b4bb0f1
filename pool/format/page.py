"""Checkpoint pages: map leaves, directories, stripe table pages and the top page.

A page is an envelope of 40 bytes and a body. Pages are packed one behind the other, 8-byte aligned,
into the data of meta stripes. A `Pointer` names a page by stripe and byte range and repeats its
checksum, so that a page that is whole but not the one meant is refused (R21).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

from pool.errors import FormatError

MAGIC = b"SWPG"
REVISION = 1
ENVELOPE = struct.Struct(
    "<4sIHBBIQQII"
)  # magic, crc, revision, kind, form, layer, index, generation, length, 0
ALIGN = 8
#: The largest page is a part of the top page, of 256 KiB.
PAGE_MAX = (256 << 10) + ENVELOPE.size + ALIGN

KIND_LEAF = 1
KIND_DIRECTORY = 2
KIND_TABLE = 3
KIND_TOP = 4

FORM_DENSE = 0
FORM_SPARSE = 1


class Pointer(NamedTuple):
    """Where a page is: bytes `offset` to `offset + length` of the data of `stripe`."""

    stripe: int
    offset: int
    length: int
    crc: int

    def inside(self, size: int) -> bool:
        """Whether a page can be there, in a stripe with `size` bytes of data."""
        longest = min(size - self.offset, PAGE_MAX)
        return self.offset >= 0 and ENVELOPE.size <= self.length <= longest


class Page(NamedTuple):
    kind: int
    form: int
    layer: int
    number: int
    generation: int
    body: memoryview


def encode(kind: int, form: int, layer: int, index: int, generation: int, body: bytes) -> bytes:
    """The page's bytes, padded to the alignment."""
    image = bytearray(ENVELOPE.size + len(body) + -(ENVELOPE.size + len(body)) % ALIGN)
    ENVELOPE.pack_into(
        image, 0, MAGIC, 0, REVISION, kind, form, layer, index, generation, len(body), 0
    )
    image[ENVELOPE.size : ENVELOPE.size + len(body)] = body
    struct.pack_into("<I", image, 4, crc32c(image))
    return bytes(image)


def checksum(image: bytes | memoryview) -> int:
    """What a pointer repeats: the checksum of the page as it lies in the stripe."""
    crc: int = crc32c(image)
    return crc


def decode(data: bytes | memoryview, kind: int) -> Page:
    """Read a page whose pointer's checksum has been verified. Raises FormatError."""
    if len(data) < ENVELOPE.size:
        raise FormatError("page is too short")
    magic, _, revision, found, form, layer, index, generation, length, _ = ENVELOPE.unpack_from(
        data
    )
    if magic != MAGIC or revision != REVISION or found != kind:
        raise FormatError("not the page that was asked for")
    if ENVELOPE.size + length > len(data):
        raise FormatError("page is too short for its body")
    body = memoryview(data)[ENVELOPE.size : ENVELOPE.size + length]
    return Page(found, form, layer, index, generation, body)
