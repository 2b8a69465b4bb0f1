"""What the map says of stripes and of the journal, gathered in one pass over it. Pure.

Per stripe: a bit for each block that is mapped, and a sum over (place, layer, block, checksum) of
those blocks. A stripe header says the same of its blocks, so equal sums mean that header and map
agree, without a look-up per block and in a few bytes per stripe. For the journal, which is small:
owner and checksum per position.

Locations never repeat and a location has one owner for ever (R11, R17), so all of this stays true
while guests write: an entry that was seen must agree with the header whatever became of it since,
and a location that is seen twice is a fault.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
Index = npt.NDArray[np.int64]

#: Journal positions per array.
CHUNK_SHIFT = 12
CHUNK = 1 << CHUNK_SHIFT
POSITION = np.dtype([("layer", "<u4"), ("crc", "<u4"), ("block", "<u8"), ("mapped", "?")])
_FACTORS = tuple(
    np.uint64(factor)
    for factor in (
        0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93,
    )
)  # fmt: skip
_SHIFT = np.uint64(29)


def mix(places: Index, layers: U32, blocks: U64, crcs: U32) -> int:
    """The sum, modulo 2^64, of a number per block that depends on all that is said of it."""
    value = places.astype(np.uint64) * _FACTORS[0]
    columns: tuple[U32 | U64, ...] = (layers, blocks, crcs)
    for column, factor in zip(columns, _FACTORS[1:], strict=True):
        value ^= column.astype(np.uint64) + factor
        value *= _FACTORS[0]
        value ^= value >> _SHIFT
    return int(value.sum(dtype=np.uint64))


class StripeClaims:
    """Mapped blocks by stripe."""

    def __init__(self) -> None:
        self._bits: dict[int, npt.NDArray[np.uint8]] = {}
        self._sums: dict[int, int] = {}
        #: Stripes with a block that two entries map to.
        self.shared: set[int] = set()

    def add(
        self, stripe: int, size: int, places: Index, layer: int, blocks: U64, crcs: U32
    ) -> None:
        """Entries of one layer in a stripe of `size` blocks; `places` are block numbers in it."""
        bits = self._bits.get(stripe)
        if bits is None:
            bits = self._bits[stripe] = np.zeros(-(-size // 8), np.uint8)
        at, bit = places >> 3, np.uint8(1) << (places & 7).astype(np.uint8)
        if (bits[at] & bit).any() or len(np.unique(places)) < len(places):
            self.shared.add(stripe)
        np.bitwise_or.at(bits, at, bit)
        layers = np.full(len(places), layer, np.uint32)
        total = self._sums.get(stripe, 0) + mix(places, layers, blocks, crcs)
        self._sums[stripe] = total & (1 << 64) - 1

    def places(self, stripe: int) -> Index:
        """The blocks of a stripe that are mapped, ascending."""
        bits = self._bits.get(stripe)
        if bits is None:
            return np.zeros(0, np.int64)
        return np.flatnonzero(np.unpackbits(bits, bitorder="little"))

    def count(self, stripe: int) -> int:
        """How many blocks of a stripe are mapped."""
        bits = self._bits.get(stripe)
        return 0 if bits is None else int(np.unpackbits(bits).sum())

    def agree(self, stripe: int, layers: U32, blocks: U64, crcs: U32) -> bool:
        """Whether a stripe's header says of the mapped blocks what the map says."""
        places = self.places(stripe)
        if len(places) and places[-1] >= len(layers):
            return False
        said = mix(places, layers[places], blocks[places], crcs[places])
        return stripe not in self.shared and said == self._sums.get(stripe, 0)


class JournalClaims:
    """Mapped blocks by journal position. Bounded by the journal: `forget` what it released."""

    def __init__(self) -> None:
        self._chunks: dict[int, npt.NDArray[np.void]] = {}

    def add(
        self, positions: U64, layer: int, blocks: U64, crcs: U32
    ) -> Iterator[tuple[int, int, int, int]]:
        """Note entries of one layer; yields (position, layer, block, second block) for those that
        are taken already: the owner that is known, then the block of this layer."""
        numbers = positions >> np.uint64(CHUNK_SHIFT)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            chunk = self._chunks.setdefault(number, np.zeros(CHUNK, POSITION))
            at = (positions[here] & np.uint64(CHUNK - 1)).astype(np.intp)
            _, first = np.unique(at, return_index=True)
            fresh = np.zeros(len(at), np.bool_)
            fresh[first] = True
            fresh &= ~chunk["mapped"][at]
            own, sums = blocks[here], crcs[here]
            new = at[fresh]
            chunk["layer"][new], chunk["block"][new] = layer, own[fresh]
            chunk["crc"][new], chunk["mapped"][new] = sums[fresh], True
            for index in np.flatnonzero(~fresh).tolist():
                row = chunk[at[index]]
                position = number << CHUNK_SHIFT | int(at[index])
                yield position, int(row["layer"]), int(row["block"]), int(own[index])

    def peek(self, position: int) -> tuple[int, int, int] | None:
        """(layer, block, crc) of the entry at a position."""
        chunk = self._chunks.get(position >> CHUNK_SHIFT)
        if chunk is None or not chunk["mapped"][position & CHUNK - 1]:
            return None
        layer, crc, block, _ = chunk[position & CHUNK - 1].tolist()
        return layer, block, crc

    def take(self, position: int) -> tuple[int, int, int] | None:
        """As `peek`, and the entry is forgotten."""
        found = self.peek(position)
        if found is not None:
            self._chunks[position >> CHUNK_SHIFT]["mapped"][position & CHUNK - 1] = False
        return found

    def left(self, start: int, end: int) -> Iterator[int]:
        """Positions from `start` to `end` that were not taken."""
        for number in sorted(self._chunks):
            base = number << CHUNK_SHIFT
            found = np.flatnonzero(self._chunks[number]["mapped"]) + base
            yield from found[(found >= start) & (found < end)].tolist()

    def forget(self, tail: int) -> None:
        """Drop what lies below the tail."""
        for number in [n for n in self._chunks if (n + 1) << CHUNK_SHIFT <= tail]:
            del self._chunks[number]
