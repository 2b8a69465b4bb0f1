"""How a stripe fills its slots, and how a device is divided. Pure arithmetic (`docs/format.md`).

A slot is a fixed number of blocks. The first `header_blocks` hold the stripe header, the rest is
the shard. The header describes every block of the stripe, so its size depends on k and m while the
slot does not: stripes of any code fit the same slots.
"""

from __future__ import annotations

from dataclasses import dataclass

from backends.base import BLOCK_SIZE

HEADER_FIXED = 128
HEADER_PER_DATA_BLOCK = 20
HEADER_PER_BLOCK = 4

MAX_DATA = 32
MAX_PARITY = 8

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Geometry:
    """The shape of one stripe: `data` + `parity` shards of `shard_blocks` blocks behind a
    header."""

    data: int
    parity: int
    header_blocks: int
    shard_blocks: int

    @property
    def blocks(self) -> int:
        """Data blocks in the stripe."""
        return self.data * self.shard_blocks

    @property
    def shards(self) -> int:
        return self.data + self.parity

    @property
    def header_bytes(self) -> int:
        return self.header_blocks * BLOCK_SIZE

    @property
    def shard_bytes(self) -> int:
        return self.shard_blocks * BLOCK_SIZE


def geometry(data: int, parity: int, slot_blocks: int) -> Geometry:
    """The stripe of `data` + `parity` shards in slots of `slot_blocks` blocks.

    Raises ValueError if the slot is too small to hold a header and a block."""
    for header_blocks in range(1, slot_blocks):
        shard_blocks = slot_blocks - header_blocks
        need = HEADER_FIXED + shard_blocks * (
            data * HEADER_PER_DATA_BLOCK + (data + parity) * HEADER_PER_BLOCK
        )
        if need <= header_blocks * BLOCK_SIZE:
            return Geometry(data, parity, header_blocks, shard_blocks)
    raise ValueError(f"slots of {slot_blocks} blocks are too small for {data}+{parity}")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are on a byte-addressed device, in bytes (blocks for `slot_blocks`)."""

    size: int
    root_bytes: int
    journal_offset: int
    journal_bytes: int
    slots_offset: int
    slot_blocks: int
    slots: int

    @property
    def slot_bytes(self) -> int:
        return self.slot_blocks * BLOCK_SIZE

    @property
    def addressable(self) -> bool:
        """Whether it is a device's; an object store has no offsets."""
        return self.slots_offset > 0

    def root_offsets(self, slot: int) -> tuple[int, int]:
        """Both copies of root slot 0 or 1: at the front and at the end of the device."""
        front = slot * self.root_bytes
        return front, self.size - 2 * self.root_bytes + front

    def slot_offset(self, slot: int) -> int:
        return self.slots_offset + slot * self.slot_bytes


def layout(size: int, journal_bytes: int, slot_blocks: int) -> Layout:
    """Divide a device: two root slots, the journal zone, slots, two root slots.

    Raises ValueError if not even four slots fit."""
    size -= size % BLOCK_SIZE
    root_bytes = 64 * KIB if size < 1024 * MIB else 256 * KIB
    journal_offset = 2 * root_bytes
    slots_offset = journal_offset + journal_bytes
    slots = (size - 2 * root_bytes - slots_offset) // (slot_blocks * BLOCK_SIZE)
    if slots < 4:
        raise ValueError("too small")
    return Layout(size, root_bytes, journal_offset, journal_bytes, slots_offset, slot_blocks, slots)


def default_slot_bytes(smallest: int) -> int:
    """The slot size for a pool whose smallest device has `smallest` bytes."""
    if smallest < 64 * MIB:
        return 16 * KIB
    if smallest < 512 * MIB:
        return 64 * KIB
    return 256 * KIB


def default_journal_bytes(smallest: int) -> int:
    """The journal size for a pool whose smallest device has `smallest` bytes."""
    size = min(max(smallest // 16, 64 * KIB), 256 * MIB)
    return size - size % (64 * KIB)
