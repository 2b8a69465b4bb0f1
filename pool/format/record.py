"""Journal records: one header block and the payload blocks behind it (`docs/format.md`, "Journal").

A record is one group commit: up to a few hundred extents of any volumes. Its header carries the
checksum of every payload block and the checksum of the header before it, so that a record vouches
for all records before it (R2). A batch too large for one header is written as several records, of
which all but the last say `MORE`: replay takes all of them or none.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from crc32c import crc32c

from backends.base import BLOCK_SIZE
from pool.errors import FormatError

MAGIC = b"SWJOURNL"
REVISION = 1
FLAG_MORE = 1
FLAG_TERM_START = 2

KIND_DATA = 1
KIND_TRIM = 2
KIND_ZERO = 3
KIND_CATALOG = 4
KINDS = (KIND_DATA, KIND_TRIM, KIND_ZERO, KIND_CATALOG)

# magic, crc, revision, flags, stream, extents, blocks, previous crc, version, position, tail,
# durable
HEAD = struct.Struct("<8sIHHIIIIQQQQ")
EXTENT = struct.Struct("<BBHIQQ")  # kind, flags, reserved, layer, block, count
CRC_AT = 8
#: Bytes of a header block that extents and checksums may fill.
ROOM = BLOCK_SIZE - HEAD.size
#: The most blocks one record can carry (one extent).
MAX_BLOCKS = (ROOM - EXTENT.size) // 4

TERM_SHIFT = 40


@dataclass(frozen=True, slots=True)
class Extent:
    """`count` blocks of a layer from `block`; a catalog extent has its byte length in `block`."""

    kind: int
    layer: int
    block: int
    count: int

    @property
    def payload(self) -> int:
        """Payload blocks that it owns in its record."""
        return self.count if self.kind in (KIND_DATA, KIND_CATALOG) else 0


@dataclass(frozen=True, slots=True)
class Record:
    """A decoded header. `crc` is its own checksum, which the next record repeats."""

    crc: int
    flags: int
    stream: int
    previous: int
    version: int
    position: int
    tail: int
    durable: int
    extents: tuple[Extent, ...]
    crcs: tuple[int, ...]

    @property
    def end(self) -> int:
        """The position behind the record, in blocks."""
        return self.position + 1 + len(self.crcs)


def encode_into(
    block: memoryview,
    *,
    flags: int,
    stream: int,
    previous: int,
    version: int,
    position: int,
    tail: int,
    durable: int,
    extents: list[tuple[int, int, int, int]],
    crcs: list[int],
) -> int:
    """Write a header into `block`; extents are (kind, layer, block, count). Returns its
    checksum."""
    at = HEAD.size
    pack = EXTENT.pack_into
    for kind, layer, first, count in extents:
        pack(block, at, kind, 0, 0, layer, first, count)
        at += EXTENT.size
    struct.pack_into(f"<{len(crcs)}I", block, at, *crcs)
    at += 4 * len(crcs)
    HEAD.pack_into(
        block, 0, MAGIC, 0, REVISION, flags, stream, len(extents), len(crcs), previous,
        version, position, tail, durable,
    )  # fmt: skip
    crc: int = crc32c(block[:at])
    struct.pack_into("<I", block, CRC_AT, crc)
    return crc


def decode(block: bytes | memoryview) -> Record:
    """Read a header block. Raises FormatError unless it is whole."""
    if len(block) < HEAD.size:
        raise FormatError("no journal record")
    (magic, crc, revision, flags, stream, extents, blocks, previous, version, position, tail,
     durable) = HEAD.unpack_from(block)  # fmt: skip
    if magic != MAGIC or revision != REVISION:
        raise FormatError("no journal record")
    used = HEAD.size + extents * EXTENT.size + 4 * blocks
    if used > min(BLOCK_SIZE, len(block)):
        raise FormatError("journal record claims more than a block")
    image = bytearray(block[:used])
    image[CRC_AT : CRC_AT + 4] = b"\0\0\0\0"
    if crc32c(image) != crc:
        raise FormatError("journal record is damaged")
    found = []
    for i in range(extents):
        kind, _, _, layer, first, count = EXTENT.unpack_from(block, HEAD.size + i * EXTENT.size)
        found.append(Extent(kind, layer, first, count))
    if sum(extent.payload for extent in found) != blocks:
        raise FormatError("journal record's extents and payload disagree")
    crcs = struct.unpack_from(f"<{blocks}I", block, HEAD.size + extents * EXTENT.size)
    return Record(
        crc, flags, stream, previous, version, position, tail, durable, tuple(found), crcs
    )
