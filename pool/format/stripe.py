"""The stripe header that stands in front of every shard (`docs/format.md`, "Stripe").

It is the same in all shards but for the shard's number, and describes every block of the stripe:
owner, address, version and checksum, and the checksums of the parity. So any one readable shard
says what the stripe holds. `digest` covers pool, stripe id and all tables: shards with different
digests come from different attempts at a stripe and must never be decoded together (R15).
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from pool.errors import FormatError
from pool.format.geometry import Geometry

MAGIC = b"SWSTRIPE"
REVISION = 1
KIND_DATA = 1
KIND_META = 2

CODEC_RS_ZFEC = 1
CRYPTO_NONE = 0

# magic, crc, revision, kind, codec, pool (16), stripe, shard, data, parity, crypto,
# header blocks, shard blocks, blocks used, digest (16), allocation class
HEAD = struct.Struct("<8sIHBB16sQBBBBHHI16sH")
_CRC_AT = 8
_SHARD_AT = 40
NO_LAYER = 0

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Contents:
    """What the data blocks of a stripe are, in block order; unused ones have layer 0."""

    layers: U32
    blocks: U64
    versions: U64
    crcs: U32  # data blocks, then parity blocks


@dataclass(frozen=True, slots=True)
class Header:
    """A decoded stripe header."""

    pool: bytes
    stripe: int
    kind: int
    shard: int
    shape: Geometry
    used: int
    contents: Contents
    digest: bytes

    def belongs(self, pool: bytes, stripe: int, shard: int, shape: Geometry) -> bool:
        """Whether it is the header of that shard, and not of what was in its place before."""
        return (self.pool, self.stripe, self.shard, self.shape) == (pool, stripe, shard, shape)


def encode(
    *, pool: bytes, stripe: int, kind: int, shape: Geometry, used: int, contents: Contents
) -> list[bytes]:
    """The headers of all shards, each padded to the shape's header blocks."""
    tables = _tables(contents)
    identity = _identity(pool, stripe, tables)
    headers = []
    for shard in range(shape.shards):
        image = bytearray(shape.header_bytes)
        HEAD.pack_into(
            image, 0, MAGIC, 0, REVISION, kind, CODEC_RS_ZFEC, pool, stripe, shard, shape.data,
            shape.parity, CRYPTO_NONE, shape.header_blocks, shape.shard_blocks, used,
            identity, 0,
        )  # fmt: skip
        image[128 : 128 + len(tables)] = tables
        struct.pack_into("<I", image, _CRC_AT, crc32c(image))
        headers.append(bytes(image))
    return headers


def _tables(contents: Contents) -> bytes:
    return b"".join(
        (
            contents.layers.astype("<u4").tobytes(),
            contents.blocks.astype("<u8").tobytes(),
            contents.versions.astype("<u8").tobytes(),
            contents.crcs.astype("<u4").tobytes(),
        )
    )


def _identity(pool: bytes, stripe: int, tables: bytes) -> bytes:
    return hashlib.blake2b(pool + stripe.to_bytes(8, "little") + tables, digest_size=16).digest()


def digest(header: Header) -> bytes:
    """The digest that a stripe with this header must have (R15)."""
    return _identity(header.pool, header.stripe, _tables(header.contents))


def decode(data: bytes | memoryview) -> Header:
    """Read a header; `data` may be longer. Raises FormatError unless it is whole."""
    if len(data) < 128:
        raise FormatError("no stripe header")
    (magic, crc, revision, kind, codec, pool, stripe, shard, k, m, crypto, header_blocks,
     shard_blocks, used, digest, _) = HEAD.unpack_from(data)  # fmt: skip
    if magic != MAGIC or revision != REVISION:
        raise FormatError("no stripe header")
    shape = Geometry(k, m, header_blocks, shard_blocks)
    count = shape.blocks
    if len(data) < shape.header_bytes or 128 + count * 20 + 4 * shape.shards * shard_blocks > (
        shape.header_bytes
    ):
        raise FormatError("stripe header is too short for its stripe")
    if used > count:
        raise FormatError("stripe header uses more blocks than there are")
    image = bytearray(data[: shape.header_bytes])
    image[_CRC_AT : _CRC_AT + 4] = b"\0\0\0\0"
    if crc32c(image) != crc:
        raise FormatError("stripe header is damaged")
    if codec != CODEC_RS_ZFEC or crypto != CRYPTO_NONE:
        raise FormatError(f"stripe codec {codec} or crypto {crypto} is unknown")
    at = 128
    layers = np.frombuffer(image, "<u4", count, at).astype(np.uint32)
    at += 4 * count
    blocks = np.frombuffer(image, "<u8", count, at).astype(np.uint64)
    at += 8 * count
    versions = np.frombuffer(image, "<u8", count, at).astype(np.uint64)
    at += 8 * count
    crcs = np.frombuffer(image, "<u4", shape.shards * shard_blocks, at).astype(np.uint32)
    contents = Contents(layers, blocks, versions, crcs)
    return Header(pool, stripe, kind, shard, shape, used, contents, digest)
