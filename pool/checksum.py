"""Checksums of data: crc32c (Castagnoli) of whole 4 KiB blocks.

Pure. A block's checksum is computed once, when it is received, and travels with it (R13). Called by
the engine at receive and after every read (P4), by the movers and by scrub.
"""

from __future__ import annotations

from collections.abc import Sequence

from crc32c import crc32c

from backends.base import BLOCK_SIZE, Buffer


def crc(buffer: Buffer) -> int:
    """Return the crc32c of all bytes of a contiguous buffer."""
    return crc32c(buffer)


def block_crcs(view: memoryview) -> list[int]:
    """Return the crc32c of each block of a flat byte view; `ValueError` if one is not whole."""
    size = view.nbytes
    if size % BLOCK_SIZE or view.itemsize != 1:
        raise ValueError(f"checksums are of whole {BLOCK_SIZE} byte blocks, not of {size} bytes")
    return [crc32c(view[start : start + BLOCK_SIZE]) for start in range(0, size, BLOCK_SIZE)]


def verify(view: memoryview, crcs: Sequence[int]) -> int:
    """Return the index of the first block of `view` that differs from its checksum, or -1.

    Raises `ValueError` unless there is one checksum per whole block.
    """
    found = block_crcs(view)
    if len(found) != len(crcs):
        raise ValueError(f"{len(crcs)} checksums given for {len(found)} blocks")
    if found == crcs:
        return -1
    pairs = enumerate(zip(found, crcs, strict=True))
    return next((index for index, (actual, expected) in pairs if actual != expected), -1)
