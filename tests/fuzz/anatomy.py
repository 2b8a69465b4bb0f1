"""Where the structures of a pool's images are, and how to change one so that it still validates.

`Anatomy` reads sound images. Its `write_*` methods put an edited structure back and then mend
every checksum, pointer, parity and digest above it, on all devices: what reads the images meets the
edit and not a checksum that gives it away. Everything is located when it is made; make a new one
after an edit. Offsets are bytes of a device.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c

from backends.base import BLOCK_SIZE
from pool.checkpoint import DIRECTORY_DTYPE
from pool.erasure import codec
from pool.errors import FormatError
from pool.format import page, record, superblock
from pool.format import stripe as stripe_format
from pool.format.page import Page, Pointer
from pool.format.record import Record
from pool.format.superblock import Superblock
from pool.member import ROOT_SIZES
from pool.table import NOWHERE, Stripe, row_dtype
from tests.fuzz.images import Images

HEAD_BYTES = superblock.HEAD_BYTES


@dataclass(frozen=True, slots=True)
class Region:
    """A place on a device that holds one structure, or a part of one."""

    structure: str
    device: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """A whole superblock: root slots exist twice on a device."""

    device: str
    offset: int
    block: Superblock


@dataclass(frozen=True, slots=True)
class PageAt:
    """A page and what points to it: the place in the page above, or in the root."""

    page: Page
    pointer: Pointer
    above: PageAt | None
    place: int


@dataclass(frozen=True, slots=True)
class RecordAt:
    """A record of the chain, with its header block as it is on the replicas."""

    record: Record
    block: bytes


class Anatomy:
    """See the module. Raises FormatError for images that are not sound."""

    def __init__(self, images: Images) -> None:
        self.images = images
        self.copies = [copy for name in images for copy in _copies(name, images[name])]
        newest = max(copy.block.generation for copy in self.copies)
        #: Superblocks that carry the newest root.
        self.newest = [copy for copy in self.copies if copy.block.generation == newest]
        self.pool = self.newest[0].block.pool
        self.root: dict[str, Any] = self.newest[0].block.root
        by_uuid = {copy.block.device.hex(): copy.device for copy in self.newest}
        self.devices = {row["index"]: by_uuid.get(row["uuid"]) for row in self.root["members"]}
        self._slots = {row["index"]: row for row in self.root["members"]}
        anchors = [Stripe.from_json(row) for row in self.root["checkpoint"]["anchors"]]
        self.stripes = {stripe.id: stripe for stripe in anchors}
        self.pages = list(self._read_pages())
        self.records = list(self._read_records())

    # -- where things are --------------------------------------------------------------------

    def regions(self) -> list[Region]:
        """Every structure, as the places where it is stored."""
        return [
            *self._superblock_regions(),
            *self._stripe_regions(),
            *(region for at in self.pages for region in self._page_regions(at)),
            *self._journal_regions(),
        ]

    def _superblock_regions(self) -> Iterator[Region]:
        for copy in self.copies:
            body = len(superblock.encode_root(copy.block.root))
            yield Region("superblock head", copy.device, copy.offset, HEAD_BYTES)
            yield Region("root", copy.device, copy.offset + HEAD_BYTES, body)

    def _stripe_regions(self) -> Iterator[Region]:
        for stripe in self.stripes.values():
            for shard in range(stripe.shape.shards):
                if (where := self._shard(stripe, shard)) is not None:
                    device, offset = where
                    header = stripe.shape.header_bytes
                    yield Region("stripe header", device, offset, header)
                    yield Region("shard", device, offset + header, stripe.shape.shard_bytes)

    def _page_regions(self, at: PageAt) -> Iterator[Region]:
        names = {1: "leaf page", 2: "directory page", 3: "table page", 4: "top page"}
        stripe = self.stripes[at.pointer.stripe]
        size = stripe.shape.shard_bytes
        offset, end = at.pointer.offset, at.pointer.offset + at.pointer.length
        while offset < end:
            now = min(end, (offset // size + 1) * size) - offset
            if (where := self._shard(stripe, offset // size)) is not None:
                start = where[1] + stripe.shape.header_bytes + offset % size
                yield Region(names[at.page.kind], where[0], start, now)
            offset += now

    def _journal_regions(self) -> Iterator[Region]:
        for at in self.records:
            for device, offset in self.ring(at.record.position):
                yield Region("journal header", device, offset, BLOCK_SIZE)
            for position in range(at.record.position + 1, at.record.end):
                for device, offset in self.ring(position):
                    yield Region("journal payload", device, offset, BLOCK_SIZE)

    def ring(self, position: int) -> Iterator[tuple[str, int]]:
        """Where a journal position is, on every replica that is there."""
        stream = self.root["streams"][0]
        for replica in stream["replicas"]:
            device = self.devices[replica["member"]]
            if device is not None:
                yield device, replica["offset"] + position % stream["blocks"] * BLOCK_SIZE

    def _shard(self, stripe: Stripe, shard: int) -> tuple[str, int] | None:
        """Device and offset of a shard's header."""
        index, slot = stripe.places[shard]
        device = None if index == NOWHERE else self.devices[index]
        if device is None:
            return None
        row = self._slots[index]
        return device, row["slots_offset"] + slot * row["slot_blocks"] * BLOCK_SIZE

    # -- reading -----------------------------------------------------------------------------

    def data(self, stripe: Stripe) -> bytearray:
        """All data of a stripe. Its data shards must be there."""
        whole = bytearray()
        for shard in range(stripe.shape.data):
            where = self._shard(stripe, shard)
            if where is None:
                raise FormatError("a data shard is not there")
            start = where[1] + stripe.shape.header_bytes
            whole += self.images[where[0]][start : start + stripe.shape.shard_bytes]
        return whole

    def _read_pages(self) -> Iterator[PageAt]:
        for i, pointer in enumerate(self.root["checkpoint"]["top"]):
            yield from self._read_top(self._page(page.KIND_TOP, Pointer(*pointer), None, i))

    def _read_top(self, top: PageAt) -> Iterator[PageAt]:
        """The top page (of one part: these pools are small) and all below it."""
        yield top
        found = json.loads(bytes(top.page.body))
        for i, (_, *pointer) in enumerate(found["table"]):
            table = self._page(page.KIND_TABLE, Pointer(*pointer), top, i)
            yield table
            self._add_rows(table.page.body, found["width"])
        for i, (_, _, *pointer) in enumerate(found["directories"]):
            directory = self._page(page.KIND_DIRECTORY, Pointer(*pointer), top, i)
            yield directory
            rows = np.frombuffer(directory.page.body, DIRECTORY_DTYPE).tolist()
            for j, (_, length, stripe, offset, crc) in enumerate(rows):
                yield self._page(page.KIND_LEAF, Pointer(stripe, offset, length, crc), directory, j)

    def _page(self, kind: int, pointer: Pointer, above: PageAt | None, place: int) -> PageAt:
        whole = self.data(self.stripes[pointer.stripe])
        image = bytes(whole[pointer.offset : pointer.offset + pointer.length])
        if crc32c(image) != pointer.crc:
            raise FormatError("a page is damaged")
        return PageAt(page.decode(image, kind), pointer, above, place)

    def _add_rows(self, body: memoryview, width: int) -> None:
        for row in np.frombuffer(body, row_dtype(width)).tolist():
            number, _, placement, kind, k, m, _, header, shard, devices, slots = row
            if number:
                places = [[d, s] for d, s in zip(devices, slots, strict=True)][: k + m]
                flat = [value for place in places for value in place]
                found = Stripe.from_json([number, kind, k, m, header, shard, placement, flat])
                self.stripes[number] = found

    def _read_records(self) -> Iterator[RecordAt]:
        stream = self.root["streams"][0]
        position, previous, version = stream["replay"], stream["previous"], stream["version"]
        while True:
            device, offset = next(self.ring(position))
            block = bytes(self.images[device][offset : offset + BLOCK_SIZE])
            try:
                found = record.decode(block)
            except FormatError:
                return
            if (found.position, found.previous) != (position, previous) or found.version <= version:
                return
            yield RecordAt(found, block)
            position, previous, version = found.end, found.crc, found.version

    # -- writing -----------------------------------------------------------------------------

    def write_head(self, copy: Copy, head: bytes) -> None:
        """256 bytes of head, with its checksum made right."""
        whole = bytearray(head[:252])
        whole += struct.pack("<I", crc32c(whole))
        self.images[copy.device][copy.offset : copy.offset + HEAD_BYTES] = whole

    def write_root(self, root: object, *, only: str | None = None) -> None:
        """A root in place of the newest one, on one device or on all. Raises ValueError if it does
        not fit."""
        body = json.dumps(root, sort_keys=True, separators=(",", ":")).encode()
        for copy in self.newest:
            if only not in (None, copy.device):
                continue
            if HEAD_BYTES + len(body) > copy.block.layout.root_bytes:
                raise ValueError("the root outgrew its slot")
            image = self.images[copy.device]
            head = bytearray(image[copy.offset : copy.offset + 252])
            generation = root.get("generation") if isinstance(root, dict) else None
            if isinstance(generation, int) and 0 <= generation < 1 << 64:
                struct.pack_into("<Q", head, 80, generation)
            struct.pack_into("<II", head, 88, len(body), crc32c(body))
            image[copy.offset + HEAD_BYTES : copy.offset + HEAD_BYTES + len(body)] = body
            self.write_head(copy, bytes(head))

    def write_page(self, at: PageAt, body: bytes, **envelope: int) -> None:
        """A page with another body or other fields in its envelope, and all that points to it.
        Raises ValueError if it does not fit where the old one is."""
        old = at.page
        fields = {
            "kind": old.kind,
            "form": old.form,
            "layer": old.layer,
            "index": old.number,
            "generation": old.generation,
        } | {key: value for key, value in envelope.items() if key != "length"}
        image = bytearray(page.encode(body=body, **fields))
        if "length" in envelope:
            struct.pack_into("<I", image, 32, envelope["length"])
            struct.pack_into("<II", image, 0, int.from_bytes(b"SWPG", "little"), 0)
            struct.pack_into("<I", image, 4, crc32c(image))
        self._write_data(at.pointer, bytes(image))
        pointer = at.pointer._replace(length=len(image), crc=crc32c(image))
        self.write_pointer(at, pointer)

    def write_pointer(self, at: PageAt, pointer: Pointer) -> None:
        """Another pointer to a page, in the page or root above it."""
        if at.above is None:
            self.root["checkpoint"]["top"][at.place] = list(pointer)
            self.write_root(self.root)
        elif at.page.kind == page.KIND_LEAF:
            rows = np.frombuffer(bytearray(at.above.page.body), DIRECTORY_DTYPE)
            for key in ("stripe", "offset", "length", "crc"):
                rows[at.place][key] = getattr(pointer, key)
            self.write_page(at.above, rows.tobytes())
        else:
            top = json.loads(bytes(at.above.page.body))
            key, start = ("table", 1) if at.page.kind == page.KIND_TABLE else ("directories", 2)
            top[key][at.place][start:] = pointer
            self.write_page(at.above, json.dumps(top, separators=(",", ":")).encode())

    def _write_data(self, pointer: Pointer, image: bytes) -> None:
        stripe = self.stripes[pointer.stripe]
        whole = self.data(stripe)
        end = pointer.offset + len(image)
        if end > len(whole) or any(whole[pointer.offset + pointer.length : end]):
            raise ValueError("the page outgrew its place")
        whole[pointer.offset : pointer.offset + max(pointer.length, len(image))] = image.ljust(
            pointer.length, b"\0"
        )
        self.write_stripe(stripe, bytes(whole))

    def write_stripe(self, stripe: Stripe, data: bytes) -> None:
        """All shards of a stripe, with new parity and headers."""
        shape, size = stripe.shape, stripe.shape.shard_bytes
        shards = [data[i * size : (i + 1) * size] for i in range(shape.data)]
        parity = [bytearray(size) for _ in range(shape.parity)]
        codec(shape.data, shape.parity).encode(shards, parity)
        places = [self._shard(stripe, number) for number in range(shape.shards)]
        device, offset = next(place for place in places if place is not None)
        old = stripe_format.decode(self.images[device][offset : offset + shape.header_bytes])
        every = [*shards, *parity]
        blocks = [
            shard[at : at + BLOCK_SIZE] for shard in every for at in range(0, size, BLOCK_SIZE)
        ]
        contents = stripe_format.Contents(
            old.contents.layers,
            old.contents.blocks,
            old.contents.versions,
            np.array([crc32c(block) for block in blocks], np.uint32),
        )
        headers = stripe_format.encode(
            pool=self.pool,
            stripe=stripe.id,
            kind=old.kind,
            shape=shape,
            used=old.used,
            contents=contents,
        )
        for place, header, shard in zip(places, headers, every, strict=True):
            if place is not None:
                self.images[place[0]][place[1] : place[1] + len(header) + size] = header + shard

    def write_records(self, blocks: list[bytes]) -> None:
        """Headers of the whole chain, each with its checksum and that of the one before."""
        previous: int | None = None
        for at, block in zip(self.records, blocks, strict=True):
            image = bytearray(block)
            if previous is not None:
                struct.pack_into("<I", image, 28, previous)
            previous = _seal(image)
            for device, offset in self.ring(at.record.position):
                self.images[device][offset : offset + BLOCK_SIZE] = image

    def write_payload(self, at: RecordAt, data: bytes) -> None:
        """Other payload for a record, and the checksums of it in its header."""
        image = bytearray(at.block)
        crcs = record.HEAD.size + len(at.record.extents) * record.EXTENT.size
        for i in range(len(at.record.crcs)):
            block = data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE].ljust(BLOCK_SIZE, b"\0")
            struct.pack_into("<I", image, crcs + 4 * i, crc32c(block))
            for device, offset in self.ring(at.record.position + 1 + i):
                self.images[device][offset : offset + BLOCK_SIZE] = block
        self.write_records([bytes(image) if other is at else other.block for other in self.records])

    def write_stripe_header(self, stripe: Stripe, shard: int, header: bytes) -> None:
        """One shard's header, with its checksum made right."""
        where = self._shard(stripe, shard)
        if where is not None:
            image = bytearray(header)
            image[8:12] = bytes(4)
            struct.pack_into("<I", image, 8, crc32c(image))
            self.images[where[0]][where[1] : where[1] + len(image)] = image

    def stripe_header(self, stripe: Stripe, shard: int) -> bytes | None:
        """One shard's header, None if it is not there."""
        where = self._shard(stripe, shard)
        if where is None:
            return None
        return bytes(self.images[where[0]][where[1] : where[1] + stripe.shape.header_bytes])


def _copies(name: str, image: bytearray) -> Iterator[Copy]:
    seen = set()
    for size in ROOT_SIZES:
        for offset in (0, size, len(image) - 2 * size, len(image) - size):
            if offset in seen or offset < 0:
                continue
            seen.add(offset)
            try:
                yield Copy(name, offset, superblock.decode(bytes(image[offset : offset + size])))
            except FormatError:
                continue


def _seal(image: bytearray) -> int:
    """Make a record header's checksum right, whatever the header says; returns it."""
    extents, blocks = struct.unpack_from("<II", image, 20)
    used = min(record.HEAD.size + extents * record.EXTENT.size + 4 * blocks, BLOCK_SIZE)
    image[8:12] = bytes(4)
    crc: int = crc32c(image[:used])
    struct.pack_into("<I", image, 8, crc)
    return crc
