"""Reads a volume out of device images with `docs/format.md` in one hand and nothing else.

Written from the document, not from the code: no import of the engine, structures spelt out anew,
the slowest and plainest way everywhere. It proves that the document is enough (P8). Section names
in the comments are the document's. All of a pool is held in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import zfec
from crc32c import crc32c

BLOCK = 4096
Image = bytes | Mapping[str, bytes]  # a device, or the objects of a store
Pointer = list[int]  # stripe, offset, length, checksum


@dataclass
class Device:
    """A member that is there: its superblock's fields and its bytes."""

    uuid: bytes
    generation: int
    root: dict[str, Any]
    image: Image


@dataclass
class Row:
    """Where a stripe is ("Table page", "Root": anchors)."""

    stripe: int
    data: int
    parity: int
    header_blocks: int
    shard_blocks: int
    places: list[tuple[int, int]]


# -- "Superblock" ------------------------------------------------------------------------------


def superblock(data: bytes) -> tuple[bytes, int, dict[str, Any]] | None:
    """(device uuid, generation, root) of a superblock slot, or None if it is not whole."""
    if data[:8] != b"STRIPEWL" or crc32c(data[:252]) != struct.unpack_from("<I", data, 252)[0]:
        return None
    revision, head_bytes = struct.unpack_from("<HH", data, 8)
    incompatible = struct.unpack_from("<Q", data, 24)[0]
    assert (revision, head_bytes, incompatible) == (1, 256, 0)
    generation, length, body_crc = struct.unpack_from("<QII", data, 80)
    body = data[256 : 256 + length]
    if crc32c(body) != body_crc:
        return None
    return data[48:64], generation, json.loads(body)


def slots(image: Image) -> Iterator[bytes]:
    """Every place where a superblock may be."""
    if isinstance(image, Mapping):
        yield from (image[name] for name in ("root-a", "root-b") if name in image)
        return
    for size in (65536, 262144):
        for at in (0, size, len(image) - 2 * size, len(image) - size):
            yield image[at : at + size]


def identify(image: Image) -> Device | None:
    """The newest whole superblock of one image."""
    found = [block for data in slots(image) if (block := superblock(data)) is not None]
    if not found:
        return None
    uuid, generation, root = max(found, key=lambda block: block[1])
    return Device(uuid, generation, root, image)


# -- the pool ----------------------------------------------------------------------------------


class Reader:
    """A pool's images, read as "Reading a volume without a daemon" says."""

    def __init__(self, images: list[Image]) -> None:
        there = [device for image in images if (device := identify(image)) is not None]
        self.root = max(there, key=lambda device: device.generation).root
        self.by_index = {
            member["index"]: (member, device.image)
            for member in self.root["members"]
            for device in there
            if member["uuid"] == device.uuid.hex()
        }
        self.rows: dict[int, Row] = {}
        self._stripes: dict[int, list[bytes]] = {}
        for stripe, _, k, m, header, shard, _, flat in self.root["checkpoint"]["anchors"]:
            places = list(zip(flat[::2], flat[1::2], strict=True))
            self.rows[stripe] = Row(stripe, k, m, header, shard, places)
        self.stream = self.root["streams"][0]
        self.volumes: dict[str, dict[str, Any]] = {}
        self.layers: dict[int, dict[int, tuple[int, int]]] = {}
        self.records: list[tuple[int, ...]] = []
        if self.root["checkpoint"]["top"]:
            self._load_checkpoint()
        self._replay()

    def volume(self, name: str) -> bytes:
        """All bytes of a volume."""
        volume = self.volumes[name]
        out = bytearray(volume["size"])
        for block, (location, crc) in self.layers[volume["layer"]].items():
            tag = location >> 62
            if tag == 3:
                continue
            data = self.journal(location & (1 << 62) - 1, crc) if tag == 1 else self.block(location)
            assert crc32c(data) == crc
            out[block * BLOCK : (block + 1) * BLOCK] = data
        return bytes(out)

    # -- "Stripe" --------------------------------------------------------------------------------

    def block(self, location: int) -> bytes:
        """A data block of a stripe ("Map entry")."""
        stripe, shard, block = location >> 22 & (1 << 40) - 1, location >> 16 & 63, location & 65535
        return self.shards(stripe)[shard][block * BLOCK : (block + 1) * BLOCK]

    def shards(self, stripe: int) -> list[bytes]:
        """All data shards of a stripe, through parity if need be."""
        if stripe not in self._stripes:
            row = self.rows[stripe]
            good = {}
            for number, (index, slot) in enumerate(row.places):
                data = self._shard(row, number, index, slot)
                if data is not None:
                    good[number] = data
            numbers = sorted(good)[: row.data]
            decoder = zfec.Decoder(row.data, row.data + row.parity)
            self._stripes[stripe] = decoder.decode([good[n] for n in numbers], numbers)
        return self._stripes[stripe]

    def _shard(self, row: Row, number: int, index: int, slot: int) -> bytes | None:
        """A shard without its header, or None if it is not there or not right."""
        member, image = self.by_index.get(index, (None, b""))
        if member is None:
            return None
        size = (row.header_blocks + row.shard_blocks) * BLOCK
        if isinstance(image, Mapping):
            whole = image[f"shard-{row.stripe:010x}-{number:02x}"]
        else:
            at = member["slots_offset"] + slot * member["slot_blocks"] * BLOCK
            whole = image[at : at + size]
        behind = row.header_blocks * BLOCK
        head, data = bytearray(whole[:behind]), whole[behind:]
        crc = struct.unpack_from("<I", head, 8)[0]
        head[8:12] = bytes(4)
        if head[:8] != b"SWSTRIPE" or crc32c(head) != crc:
            return None
        stripe, shard, k, m, crypto = struct.unpack_from("<QBBBB", head, 32)
        assert (stripe, shard, k, m, crypto) == (row.stripe, number, row.data, row.parity, 0)
        crcs = 128 + row.data * row.shard_blocks * 20 + number * row.shard_blocks * 4
        for i in range(row.shard_blocks):
            expected = struct.unpack_from("<I", head, crcs + 4 * i)[0]
            if crc32c(data[i * BLOCK : (i + 1) * BLOCK]) != expected:
                return None
        return data

    # -- "Checkpoint" ----------------------------------------------------------------------------

    def page(self, pointer: Pointer, kind: int) -> tuple[int, int, int, bytes]:
        """(form, layer, number, body) of a page."""
        stripe, offset, length, crc = pointer
        data = b"".join(self.shards(stripe))[offset : offset + length]
        assert crc32c(data) == crc
        assert data[:4] == b"SWPG"
        revision, found, form, layer, number = struct.unpack_from("<HBBIQ", data, 8)
        assert (revision, found) == (1, kind)
        size = struct.unpack_from("<I", data, 32)[0]
        return form, layer, number, data[40 : 40 + size]

    def _load_checkpoint(self) -> None:
        top = json.loads(b"".join(self._top_parts()))
        for _, *pointer in top["table"]:
            self._load_table(top["width"], self.page(pointer, 3)[3])
        self.volumes = {volume["name"]: volume for volume in top["catalog"]["volumes"]}
        self.layers = {layer["id"]: {} for layer in top["catalog"]["layers"]}
        for layer, directory, *pointer in top["directories"]:
            body = self.page(pointer, 2)[3]
            for at in range(0, len(body), 24):
                leaf, length, stripe, offset, crc = struct.unpack_from("<IIQII", body, at)
                self._load_leaf(layer, directory * 256 + leaf, [stripe, offset, length, crc])

    def _top_parts(self) -> Iterator[bytes]:
        """The bodies of the parts of the top page."""
        for number, pointer in enumerate(self.root["checkpoint"]["top"]):
            _, _, found, body = self.page(pointer, 4)
            assert found == number
            yield body

    def _load_table(self, width: int, body: bytes) -> None:
        for at in range(0, len(body), 24 + 6 * width):
            stripe = struct.unpack_from("<Q", body, at)[0]
            if stripe:
                k, m = struct.unpack_from("<BB", body, at + 17)
                header, shard = struct.unpack_from("<HH", body, at + 20)
                devices = struct.unpack_from(f"<{width}H", body, at + 24)
                numbers = struct.unpack_from(f"<{width}I", body, at + 24 + 2 * width)
                places = list(zip(devices, numbers, strict=True))[: k + m]
                self.rows[stripe] = Row(stripe, k, m, header, shard, places)

    def _load_leaf(self, layer: int, number: int, pointer: Pointer) -> None:
        form, found_layer, found_number, body = self.page(pointer, 1)
        assert (found_layer, found_number) == (layer, number)
        count = 512 if form == 0 else len(body) // 14
        locations = struct.unpack_from(f"<{count}Q", body, 0)
        crcs = struct.unpack_from(f"<{count}I", body, 8 * count)
        index = range(512) if form == 0 else struct.unpack_from(f"<{count}H", body, 12 * count)
        for block, location, crc in zip(index, locations, crcs, strict=True):
            if location:
                self.layers[layer][number * 512 + block] = location, crc

    # -- "Journal" -------------------------------------------------------------------------------

    def _copies(self, position: int) -> Iterator[bytes]:
        """A journal block as each replica has it."""
        for replica in self.stream["replicas"]:
            _, image = self.by_index.get(replica["member"], (None, b""))
            at = replica["offset"] + position % self.stream["blocks"] * BLOCK
            if image and not isinstance(image, Mapping):
                yield image[at : at + BLOCK]

    def journal(self, position: int, crc: int) -> bytes:
        """A payload block, from a replica that has it right. Raises StopIteration."""
        return next(data for data in self._copies(position) if crc32c(data) == crc)

    def _replay(self) -> None:
        position, version, previous = (
            self.stream[key] for key in ("replay", "version", "previous")
        )
        group: list[bytes] = []
        while True:
            found = self._record(position, version, previous)
            if found is None:
                return
            crc, flags, blocks, version, data = found
            group.append(data)
            previous, position = crc, position + 1 + blocks
            if not flags & 1:
                for header in group:
                    self._apply(header)
                group = []

    def _record(
        self, position: int, version: int, previous: int
    ) -> tuple[int, int, int, int, bytes] | None:
        """(checksum, flags, payload blocks, version, header) of the record that comes next: the
        newest that any replica has there."""
        best: tuple[int, int, int, int, bytes] | None = None
        payload: tuple[int, ...] = ()
        for data in self._copies(position):
            if data[:8] != b"SWJOURNL":
                continue
            crc, _, flags = struct.unpack_from("<IHH", data, 8)
            extents, blocks, before = struct.unpack_from("<III", data, 20)
            newer, here, _, _ = struct.unpack_from("<QQQQ", data, 32)
            end = 64 + 24 * extents + 4 * blocks
            if end > BLOCK or crc32c(data[:8] + bytes(4) + data[12:end]) != crc:
                continue
            if here == position and before == previous and newer > (best[3] if best else version):
                best = crc, flags, blocks, newer, data
                payload = struct.unpack_from(f"<{blocks}I", data, 64 + 24 * extents)
        try:
            for i, payload_crc in enumerate(payload):
                self.journal(position + 1 + i, payload_crc)
        except StopIteration:
            return None
        return best

    def _apply(self, header: bytes) -> None:
        extents, blocks = struct.unpack_from("<II", header, 20)
        position = struct.unpack_from("<Q", header, 40)[0] + 1
        crcs = list(struct.unpack_from(f"<{blocks}I", header, 64 + 24 * extents))
        for i in range(extents):
            kind, _, _, layer, block, count = struct.unpack_from("<BBHIQQ", header, 64 + 24 * i)
            self.records.append((kind, layer, block, count))
            payload = count if kind in (1, 4) else 0
            if kind == 4:
                parts = [self.journal(position + j, crcs[j]) for j in range(count)]
                self._change(json.loads(b"".join(parts)[:block]))
            elif layer in self.layers:
                for j in range(count):
                    if kind == 1:
                        self.layers[layer][block + j] = 1 << 62 | (position + j), crcs[j]
                    elif kind == 2:
                        self.layers[layer].pop(block + j, None)
                    else:
                        self.layers[layer][block + j] = 3 << 62, 0
            position += payload
            del crcs[:payload]

    def _change(self, change: dict[str, Any]) -> None:
        if change["do"] == "create":
            self.volumes[change["name"]] = {"layer": change["layer"], "size": change["size"]}
            self.layers[change["layer"]] = {}
        elif change["do"] == "delete":
            del self.volumes[change["name"]]
        elif change["do"] == "resize":
            self.volumes[change["name"]]["size"] = change["size"]
